"""Images of any size in one set: scored at their own size, whatever the network's, by any fit, on any devices."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from test_placement import COLLECTIVE
from test_tasks import reference_metrics

from sgw_jax.__main__ import main
from sgw_jax.configs import base
from sgw_jax.data_pipelines import transforms
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.evaluation import canvases, eval_batches, lots, needs_geometry
from sgw_jax.data_pipelines.transforms import Augmentation, Target
from sgw_jax.evaluation import boundary, probe
from sgw_jax.evaluation.edge_scores import edge_scores
from sgw_jax.evaluation.evaluate import evaluate
from sgw_jax.evaluation.saliency import image_scores
from sgw_jax.evaluation.saliency_scores import saliency_scores
from sgw_jax.experiment.build import build
from sgw_jax.prediction.predictor import Predictor
from sgw_jax.sharding import global_batch, make_mesh, replicated
from sgw_jax.tasks import TASKS, Depth, SemSeg
from sgw_jax.tasks.depth import CROPS
from sgw_jax.tasks.own_size import at_labels
from sgw_jax.train_step import make_eval_step

SIZE = (16, 24)
SIZES = [(16, 24), (15, 20), (24, 16), (32, 48), (37, 29)]  # as the network's, smaller, portrait, larger, both
TASK_LIST = (
    SemSeg(num_classes=3),
    Depth(),
    TASKS["normals"](),
    TASKS["edges"](),
    TASKS["saliency"](image_scores=True),
    Depth(name="disparity", quantity="disparity", zero_is_valid=True),
)
TARGETS = {task.name: Target(**task.target) for task in TASK_LIST}
EPS = float(np.finfo(np.float32).eps)


@dataclasses.dataclass(frozen=True)
class Mixed:
    """Random images of these sizes, smooth enough to be resampled, with random labels of every task."""

    sizes: tuple[tuple[int, int], ...] = tuple(SIZES)

    def __len__(self):
        return len(self.sizes)

    def __getitem__(self, index):
        rng, size = np.random.default_rng(index), self.sizes[index]
        normals = rng.normal(size=(*size, 3))
        example = {
            "image": rng.integers(0, 256, (*size, 3), dtype=np.uint8),
            "semseg": rng.integers(0, 3, size, dtype=np.uint8),
            "depth": rng.uniform(1, 4, size).astype(np.float32),
            "normals": (normals / np.linalg.norm(normals, axis=-1, keepdims=True)).astype(np.float32),
            "edges": (rng.random(size) < 0.2).astype(np.float32),
            "saliency": (rng.random(size) < 0.4).astype(np.float32),
            "disparity": rng.uniform(0, 9, size).astype(np.float32),
        }
        for name, target in TARGETS.items():
            example[name][rng.random(size) < 0.1] = target.fill
        for name in ("edges", "saliency"):
            example[name][[0, -1], [0, -1]] = 1  # labelled corners: the frame of the labels is the image
        return example

    def size_of(self, index):
        return self.sizes[index]

    def fingerprint(self):
        return {"name": "mixed", "length": len(self)}


@functools.cache
def heads():
    rng = np.random.default_rng(5)
    return {task.name: rng.normal(size=(3, task.channels)).astype(np.float32) for task in TASK_LIST}


class Network:
    """Pixel by pixel a linear map, so that its raw predictions are known in float64 too."""

    def apply(self, variables, image):
        return {name: image @ matrix for name, matrix in heads().items()} | {"depth": 2 + image @ heads()["depth"]}


def call(variables, image, *, train, rngs):
    return Network().apply(variables, image)


def batches(fit, **options):
    return eval_batches(Mixed(), TARGETS, **{"batch_size": 8, "size": SIZE, "fit": fit, "num_threads": 0, **options})


@functools.cache
def scored(fit, devices=1, parts=1):
    mesh = make_mesh({"data": -1}, jax.devices()[:devices])
    step = jax.jit(make_eval_step(None, TASK_LIST, apply=call), out_shardings=replicated(mesh))
    with jax.set_mesh(mesh), batches(fit, parts=parts) as found:
        return evaluate(step, {}, found, mesh, TASK_LIST)


# --- an independent reference


def line(values, length, axis):
    """Linear interpolation along an axis between the centres of pixels, in float64; the border repeats."""
    known, wanted = (np.arange(number) + 0.5 for number in (values.shape[axis], length))
    at = functools.partial(np.interp, wanted * values.shape[axis] / length, known)
    return np.apply_along_axis(at, axis, values.astype(np.float64))


def own_predictions(index, fit):
    """Raw predictions of an item at its own size, by task, in float64."""
    image = Mixed()[index]["image"]
    own, factor = image.shape[:2], 1.0
    if fit == "resize" or own[0] > SIZE[0] or own[1] > SIZE[1]:
        image = transforms.resize_to_fit(image, SIZE)
        factor = min(SIZE[0] / own[0], SIZE[1] / own[1])
    seen = (image / 255 - transforms.IMAGE_MEAN) / transforms.IMAGE_STD
    raw = {name: seen @ matrix.astype(np.float64) for name, matrix in heads().items()}
    raw["depth"] = raw["depth"] + 2
    raw = {name: line(line(values, own[1], 1), own[0], 0) for name, values in raw.items()}
    if fit == "pad":
        raw["depth"], raw["disparity"] = raw["depth"] * min(factor, 1), raw["disparity"] / min(factor, 1)
    return raw


def labels(index):
    """An item's labels as the tasks take them."""
    example = Mixed()[index]
    return transforms.eval_example(example, TARGETS, example["image"].shape[:2])


@pytest.mark.parametrize("fit", ["resize", "pad"])
def test_scores_are_those_of_every_image_at_its_own_size(fit):
    found = scored(fit)
    raw, target = [own_predictions(index, fit) for index in range(len(SIZES))], list(map(labels, range(len(SIZES))))
    for task in TASK_LIST:
        predicted = np.concatenate([one[task.name].reshape(-1, task.channels) for one in raw])
        values = 3 if task.target["kind"] == "vectors" else 1
        truth = np.concatenate([one[task.name].reshape(-1, values) for one in target])
        expected = reference_metrics(task, predicted, truth if values == 3 else truth[:, 0])
        for name, value in expected.items():
            # Sums of float32 over at most 4,000 pixels; of percents one pixel in a thousand, at a tie or a threshold.
            few = 0.1 if task.units.get(name) == "%" else 0
            assert found.metrics[task.name][name] == pytest.approx(value, rel=4000 * EPS, abs=few), (task.name, name)


def test_more_devices_give_the_same():
    one, many = scored("pad"), scored("pad", devices=8, parts=8)
    for task in TASK_LIST:
        for name, value in one.metrics[task.name].items():
            assert many.metrics[task.name][name] == pytest.approx(value, rel=4000 * EPS), (task.name, name)
    assert many.losses == pytest.approx(one.losses, rel=4000 * EPS)


def test_devices_speak_once_all_is_summed():
    """No loop over thresholds, bins or classes waits for another device: each is ended before the batch is summed."""
    mesh = make_mesh({"data": -1})
    step = jax.jit(make_eval_step(None, TASK_LIST, apply=call), out_shardings=replicated(mesh))
    with jax.set_mesh(mesh), batches("pad", parts=8) as found:
        program = step.lower({}, global_batch(next(iter(found)), mesh)).compile().as_text()
    spoken = [line for line in program.splitlines() if COLLECTIVE.search(line)]
    assert spoken
    assert not [line for line in spoken if "while/body" in line or "all-reduce" not in line]


def test_measures_on_the_host_are_those_of_every_image_at_its_own_size():
    mesh, edges, saliency = make_mesh({"data": -1}, jax.devices()[:2]), TASK_LIST[3], TASK_LIST[4]
    maps = []
    for index in range(len(SIZES)):
        raw, target = own_predictions(index, "resize"), labels(index)
        logits = {task.name: np.float32(raw[task.name][..., 0]) for task in (edges, saliency)}
        maps.append({name: (np.asarray(jax.nn.sigmoid(x)), target[name][..., 0]) for name, x in logits.items()})
    with batches("resize", parts=2) as found:
        got = edge_scores(Network(), {}, found, mesh, task=edges, max_dist=0.05)
    images = [(p, t >= 0.5, t < 0) for p, t in (found["edges"] for found in maps)]
    want = boundary.summarise(boundary.counts_of(images, max_dist=0.05), program="ours")
    assert got == pytest.approx({name: 100 * want[name] for name in got}, abs=0.1)  # a pixel at a threshold
    with batches("resize", parts=2) as found:
        by_image = saliency_scores(Network(), {}, found, mesh, task=saliency)
    each = [image_scores(p.astype(np.float64), t >= 0.5, t < 0) for p, t in (found["saliency"] for found in maps)]
    assert by_image["image_mae"] == pytest.approx(np.mean([one.mae for one in each]), rel=100 * EPS)
    assert by_image["s_measure"] == pytest.approx(100 * np.mean([one.s_measure for one in each]), rel=100 * EPS)


def test_prediction_and_evaluation_bring_predictions_back_by_one_rule():
    """Depths of up to 6, after the rounding of a dozen operations."""
    task, index = TASK_LIST[1], 4
    predicted = Predictor(Network(), {}, [task], SIZE, batch_size=1)(Mixed()[index]["image"])["depth"]
    with batches("resize") as found:
        (batch,) = (batch for batch in found if index in batch["item"])
    row = batch["item"].tolist().index(index)
    one = {name: values[row : row + 1] for name, values in batch.items()}
    brought = at_labels([task], Network().apply({}, one["image"]), jax.tree.map(jnp.asarray, one))
    height, width = SIZES[index]
    np.testing.assert_allclose(task.decode(brought["depth"])[0, :height, :width], predicted, rtol=0, atol=6 * 12 * EPS)


# --- where nothing is resampled


@pytest.mark.parametrize(("fit", "sizes"), [("resize", [SIZE] * 3), ("pad", [SIZE, (10, 12), (16, 20)])])
def test_without_resampling_nothing_is_brought_anywhere(fit, sizes):
    with eval_batches(Mixed(tuple(sizes)), TARGETS, batch_size=4, size=SIZE, fit=fit, num_threads=0) as found:
        (batch,) = found
    assert set(batch) == {"image", "item", *TARGETS}
    for row, own in enumerate(sizes):
        expected = transforms.eval_example(Mixed(tuple(sizes))[row], TARGETS, SIZE)
        assert own == Mixed(tuple(sizes))[row]["image"].shape[:2]
        for name, values in expected.items():
            np.testing.assert_array_equal(batch[name][row], values)
    step = make_eval_step(None, TASK_LIST, apply=call)
    bare = {name: values for name, values in batch.items() if name != "item"}
    assert jax.jit(step).lower({}, batch).as_text() == jax.jit(step).lower({}, bare).as_text()  # the same program


def test_a_prediction_of_the_images_size_keeps_every_bit():
    """Among others, images that need no resampling are scored as if they were alone."""
    rng = np.random.default_rng(0)
    values = rng.normal(size=(2, *SIZE, 1)).astype(np.float32)
    geometry = np.array([[0, 0, *SIZE, *SIZE], [3, 5, 10, 12, 10, 12]], np.int32)
    target = np.ones((2, 20, 24, 1), np.float32)
    batch = {"depth": target, "geometry": geometry, "zoom": np.ones(2, np.float32)}
    found = np.asarray(jax.jit(lambda v, b: at_labels([Depth()], v, b))({"depth": values}, batch)["depth"])
    np.testing.assert_array_equal(found[0, :16, :24], values[0])
    np.testing.assert_array_equal(found[1, :10, :12], values[1, 3:13, 5:17])


def test_metrics_that_look_at_the_frame_get_no_padding():
    assert needs_geometry([(10, 12)], SIZE, "pad", exact_frames=True)
    assert not needs_geometry([(10, 12)], SIZE, "pad")
    assert set(canvases(SIZES, exact=True)) == set(SIZES)
    task = Depth(crop="eigen")
    with eval_batches(
        Mixed(), {"depth": TARGETS["depth"]}, batch_size=4, size=SIZE, fit="pad", exact_frames=task.sees_frame
    ) as found:
        step = jax.jit(make_eval_step(None, [task], apply=call))
        pixels = sum(
            int(step({}, {k: jnp.asarray(v) for k, v in b.items()})["depth"]["metrics"]["pixels"]) for b in found
        )
    counted = 0
    for index, (height, width) in enumerate(SIZES):
        top, bottom, left, right = (
            int(s * n + 1e-6) for s, n in zip(CROPS["eigen"], (height, height, width, width), strict=True)
        )
        counted += np.sum(labels(index)["depth"][top:bottom, left:right] > 0)
    assert pixels == counted


# --- batches


def test_canvases_are_few_and_waste_little():
    rng = np.random.default_rng(1)
    sizes = [tuple(map(int, size)) for size in rng.integers(200, 700, (500, 2))] + [(4000, 6000), (30, 40)]
    found = canvases(sizes)
    assert sorted(item for items in found.values() for item in items) == list(range(len(sizes)))
    assert len(found) <= 4
    for canvas, items in found.items():
        assert canvas == tuple(np.max([sizes[item] for item in items], axis=0))
    own = sum(height * width for height, width in sizes)
    assert own <= sum(height * width * len(items) for (height, width), items in found.items()) <= 2 * own
    planned = lots(sizes, 8, (448, 576), parts=2)
    assert sorted(item for lot in planned for item in lot.items) == list(range(len(sizes)))
    assert all(lot.rows % 2 == 0 and len(lot.items) <= lot.rows <= 8 for lot in planned)
    (large,) = (lot for lot in planned if 500 in lot.items)
    assert large.rows == 2  # not eight images of 24 million pixels
    assert sum(lot.rows == 8 for lot in planned) >= 500 // 8


@pytest.mark.parametrize("view", ["scored", "network", "own"])
def test_processes_read_the_blocks_of_one_plan(view):
    with batches("resize", view=view, parts=2) as found:
        whole = list(found)
    parts = []
    for index in range(2):
        with batches("resize", view=view, parts=2, process_index=index, process_count=2) as found:
            parts.append(list(found))
    for one, *blocks in zip(whole, *parts, strict=True):
        for name, values in one.items():
            np.testing.assert_array_equal(values, np.concatenate([block[name] for block in blocks]))
    read = np.concatenate([batch["item"] for batch in whole])
    assert sorted(read[read >= 0]) == list(range(len(SIZES)))


# --- training


def test_training_fits_whole_images_before_it_augments_them():
    """The pixels' grid changes, no distance does; labels stay where the image is."""
    own = (40, 20)
    depth = np.repeat(np.repeat(np.arange(1, 9, dtype=np.float32).reshape(4, 2), 10, 0), 10, 1)
    example = {"image": np.repeat((30 * depth).astype(np.uint8)[..., None], 3, -1), "depth": depth}
    targets = {"depth": Target("depth", 0.0)}
    found = transforms.train_example(
        example, np.random.default_rng(0), targets, Augmentation(SIZE, flip=False, fit="resize")
    )
    assert transforms.fitted_size(own, SIZE) == (16, 8)
    inner = found["depth"][:, 8:16, 0]
    np.testing.assert_array_equal(inner, np.repeat(np.repeat(np.arange(1, 9).reshape(4, 2), 4, 0), 4, 1))
    assert np.all(np.delete(found["depth"], np.s_[8:16], axis=1) == 0)
    shown = np.rint(255 * (found["image"] * transforms.IMAGE_STD + transforms.IMAGE_MEAN))[:, 8:16, 0]
    np.testing.assert_array_equal(shown, 30 * inner)  # area averages of equal pixels
    with pytest.raises(InputError, match=r"data.fit is 'crop'; allowed: resize, pad"):
        Augmentation(SIZE, fit="crop")


def test_nearest_targets_keep_their_centres():
    """A mark in the middle stays in the middle, whichever way the image is resized."""
    mask = np.zeros((45, 45), np.float32)
    mask[18:27, 18:27] = 1
    example = {"image": np.zeros((45, 45, 3), np.uint8), "mask": mask}
    fitted = transforms.fit_inside(example, {"mask": Target("mask", -1.0)}, (15, 40))["mask"]
    rows, columns = np.nonzero(fitted)
    assert (rows.mean(), columns.mean(), fitted.sum()) == (7, 7, 9)


def test_an_image_of_the_networks_size_is_trained_on_as_ever():
    targets = {name: TARGETS[name] for name in ("semseg", "depth")}
    example = {name: Mixed()[0][name] for name in ("image", *targets)}
    one, other = (
        transforms.train_example(example, np.random.default_rng(3), targets, Augmentation(SIZE, (0.5, 2.0), fit=fit))
        for fit in ("resize", "pad")
    )
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name])


# --- the reference predictors


def test_reference_predictors_are_fitted_and_scored_at_own_sizes():
    tasks = (TASK_LIST[1],)
    with batches("pad", view="own") as found:
        fitted = probe.fit(found, tasks, "linear", stride=1)
    with batches("pad", view="own") as found:
        measured = probe.evaluate(fitted, found, tasks)
    phi, y = [], []
    for index, (height, width) in enumerate(SIZES):
        example = Mixed()[index]
        colour = (example["image"] / 255 - transforms.IMAGE_MEAN) / transforms.IMAGE_STD
        down, across = np.meshgrid(np.linspace(-1, 1, height), np.linspace(-1, 1, width), indexing="ij")
        seen = example["depth"] > 0
        features = np.concatenate([np.ones((height, width, 1)), colour, across[..., None], down[..., None]], axis=-1)
        phi.append(features[seen])
        y.append(example["depth"][seen])
    phi, y = np.concatenate(phi), np.concatenate(y)
    weights = np.linalg.lstsq(phi, y, rcond=None)[0]
    np.testing.assert_allclose(fitted.weights["depth"][:, 0], weights, atol=1e-6)  # images are normalised in float32
    rmse = np.sqrt(np.mean((phi @ weights - y) ** 2))
    assert measured["depth"]["rmse"] == pytest.approx(rmse, rel=1e-5)


# --- whole runs

RUN = (
    *("--config=scenes:interaction=none,tasks=semseg+depth", "--config.data.source=folder", "--config.steps=2"),
    *("--config.batch_size=8", "--config.channels=8", "--config.upsample=bilinear", "--config.data.size=32,64"),
    *("--config.backbones.vit.width=8", "--config.backbones.vit.num_heads=1", "--config.schedule.warmup_steps=0"),
    *("--config.checkpoint_every=1", "--config.eval_every=1", "--config.log_every=1", "--config.data.num_classes=3"),
)


def write_folder(root, splits):
    for name in ("images", "semseg", "depth", "splits"):
        (root / name).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, sizes in splits.items():
        ids = [f"{split}{number}" for number in range(len(sizes))]
        (root / "splits" / f"{split}.txt").write_text("\n".join(ids))
        for id_, size in zip(ids, sizes, strict=True):
            Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)).save(root / "images" / f"{id_}.png")
            Image.fromarray(rng.integers(0, 3, size, dtype=np.uint8)).save(root / "semseg" / f"{id_}.png")
            np.save(root / "depth" / f"{id_}.npy", rng.uniform(1, 4, size).astype(np.float32))


@pytest.mark.slow
def test_a_set_of_mixed_sizes_trains_evaluates_and_writes_a_report(tmp_path, capsys):
    """Larger training images, a portrait for validation, all of it for testing; then at another size of the network."""
    write_folder(tmp_path / "data", {"train": [(48, 96), (32, 64)], "validation": [(64, 32)], "test": SIZES})
    common = (f"--workdir={tmp_path / 'run'}", f"--cache_dir={tmp_path / 'cache'}")
    assert main(["train", *RUN, f"--config.data.root={tmp_path / 'data'}", "--config.data.fit=pad", *common]) == 0
    shown = capsys.readouterr().err
    assert "1 of 5 images of test are larger than config.data.size, 32 x 64" in shown
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["metrics"]["semseg"]["miou"] > 0
    assert set(results["references"]) == {"constant", "linear"}
    assert (tmp_path / "run" / "report.html").stat().st_size > 1000


def test_a_network_is_evaluated_at_another_size_with_its_own_parameters():
    """The table of positions has the size of training; the network interpolates it."""
    config = base.get_config()
    config.tasks, config.interaction, config.channels = ("depth",), "none", 4
    config.backbones.vit.update({"width": 8, "depth": 4, "num_heads": 1})
    config.data.size = (32, 64)
    trained = build(config, None)
    config.data.size = (64, 64)
    other = build(config, None, trained_size=(32, 64))
    shapes = [
        jax.eval_shape(one.model.init, jax.random.key(0), jnp.zeros((1, *one.size, 3))) for one in (trained, other)
    ]
    assert jax.tree.map(jnp.shape, shapes[0]) == jax.tree.map(jnp.shape, shapes[1])
    predicted = jax.eval_shape(other.model.apply, shapes[0], jnp.zeros((1, 64, 64, 3)))
    assert predicted["depth"].shape == (1, 64, 64, 1)
    odd = jax.eval_shape(other.model.apply, shapes[0], jnp.zeros((1, 41, 62, 3)))
    assert odd["depth"].shape == (1, 41, 62, 1)
