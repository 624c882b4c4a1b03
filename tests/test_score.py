"""Scores of predictions from files: perfect ones, equality with the tasks' own sums, round trips, what is refused."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from sgw_jax.__main__ import main
from sgw_jax.commands import sources
from sgw_jax.configs import base
from sgw_jax.data_pipelines.cityscapes import Cityscapes
from sgw_jax.data_pipelines.predictions import Predictions, item_names
from sgw_jax.data_pipelines.scenes import Scenes
from sgw_jax.data_pipelines.transforms import Target
from sgw_jax.evaluation import boundary
from sgw_jax.evaluation.edge_scores import edge_scores
from sgw_jax.evaluation.saliency_scores import saliency_scores
from sgw_jax.evaluation.score import score
from sgw_jax.experiment.build import build
from sgw_jax.experiment.config_files import read_config
from sgw_jax.experiment.experiment import Boundary
from sgw_jax.prediction.predict_files import predict_files
from sgw_jax.prediction.source import Source
from sgw_jax.run.saved_run import open_run
from sgw_jax.run.state import restored_state
from sgw_jax.run.steps import compiled_eval_step, evaluate_split
from sgw_jax.sharding import make_mesh, mesh_sizes
from sgw_jax.tasks import TASKS
from sgw_jax.train import train

SIZE, LENGTH = (32, 64), 3
SCENES = ["--config.data.size=32,64", f"--config.data.lengths.test={LENGTH}"]
TASK_NAMES = ("semseg", "depth", "normals", "edges", "saliency", "human_parts")
OPTIONS = ["--config.boundary.max_dist=0.02", "--config.metric_options.saliency.image_scores=True"]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return Scenes("test", LENGTH, size=SIZE, cache_dir=tmp_path_factory.mktemp("scenes")).prepare()


@pytest.fixture(autouse=True)
def _same_compilation_cache():
    before = jax.config.jax_compilation_cache_dir
    yield
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.fixture
def run(scenes, tmp_path, capsys):
    """Scores a folder by the command and gives the JSON and what was printed."""

    def scored(folder, *arguments):
        out, cache = tmp_path / "scores.json", f"--cache_dir={scenes.cache_dir}"
        arguments = [f"--predictions={folder}", "--config=scenes", f"--json={out}", cache, *SCENES, *arguments]
        assert main(["score", *arguments]) == 0, capsys.readouterr().err
        return json.loads(out.read_text()), capsys.readouterr().out

    return scored


@pytest.fixture
def refused(scenes, capsys):
    def message(folder, *arguments):
        cache = f"--cache_dir={scenes.cache_dir}"
        assert main(["score", f"--predictions={folder}", "--config=scenes", cache, *SCENES, *arguments]) == 1
        said = capsys.readouterr().err
        assert said.startswith("error: ")
        assert "Traceback" not in said
        return said

    return message


def save(folder, task, name, values):
    """A PNG of what is 8 or 16 bits, else .npy."""
    path = folder / task / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    if values.dtype in (np.uint8, np.uint16):
        Image.fromarray(values).save(path)
    else:
        np.save(path.with_suffix(".npy"), values)


def pictures(example):
    """The truth of a scene as the pictures of a perfect prediction."""
    found = {name: np.where(example[name] == 255, 0, example[name]) for name in ("semseg", "human_parts")}
    found |= {name: (255 * example[name]).astype(np.uint8) for name in ("edges", "saliency")}
    found["depth"] = np.rint(1000 * example["depth"]).astype(np.uint16)
    found["normals"] = np.rint((example["normals"] + 1) * 127.5).astype(np.uint8)
    return found


def truth(scenes, folder, normals_as_floats=False, tasks=TASK_NAMES):
    for index in range(LENGTH):
        maps = pictures(scenes[index])
        if normals_as_floats:
            maps["normals"] = scenes[index]["normals"]
        for task in tasks:
            save(folder, task, str(index), maps[task])
    return folder


def test_perfect_predictions_are_perfect(scenes, run, tmp_path):
    folder = truth(scenes, tmp_path / "perfect", normals_as_floats=True)
    found, text = run(folder, *OPTIONS)
    metrics = found["metrics"]
    assert (found["images"], found["split"], found["protocol"]) == (LENGTH, "test", "exact")
    for task in ("semseg", "human_parts"):
        assert set(metrics[task].values()) == {100.0}
    right = {"delta_1": 100.0, "delta_2": 100.0, "delta_3": 100.0}
    assert {name: metrics["depth"][name] for name in right} == right
    # Scenes are in whole millimetres too: v / 1000 in float32 here and there.
    assert [metrics["depth"][name] for name in ("rmse", "abs_err", "abs_rel", "log_rmse")] == [0.0] * 4
    # Vectors that are equal lie at the angle 0; those that are zero are invalid.
    assert metrics["normals"]["mean"] == metrics["normals"]["rmse"] == 0
    assert metrics["normals"]["within_5"] == 100
    assert metrics["edges"]["max_f"] == metrics["saliency"]["max_f"] == metrics["saliency"]["iou"] == 100
    assert metrics["saliency"]["mae"] == metrics["saliency"]["image_mae"] == 0
    assert metrics["edges"]["loss"] == pytest.approx(0, abs=1e-40)  # softplus(-100)
    assert metrics["edges"]["ods"] == metrics["edges"]["ois"] == pytest.approx(100)
    assert metrics["saliency"]["s_measure"] == pytest.approx(100)
    assert all(part in text for part in ("miou % ↑", "rmse m ↓", "mean deg ↓", "ods % ↑", "s_measure % ↑"))


def perturbed(example, rng):
    """Maps that are wrong in some places, in the dtypes that a decoder may give."""
    drawn = {name: rng.random(SIZE) for name in TASK_NAMES}
    maps = pictures(example)
    maps["semseg"] = np.where(drawn["semseg"] < 0.3, 5, maps["semseg"]).astype(np.uint8)
    maps["human_parts"] = rng.normal(size=(*SIZE, 7)).astype(np.float32)
    maps["depth"] = (example["depth"] * (0.8 + 0.5 * drawn["depth"])).astype(np.float32)
    maps["normals"] = np.rint((rng.normal(size=(*SIZE, 3)).clip(-1, 1) + 1) * 127.5).astype(np.uint8)
    maps["edges"] = rng.integers(0, 256, SIZE).astype(np.uint8)
    maps["saliency"] = np.where(drawn["saliency"] < 0.2, np.rint(drawn["saliency"]), drawn["saliency"]).astype("f4")
    return maps


@pytest.mark.parametrize("protocol", ["exact", "published"])
def test_wrong_predictions_score_what_the_tasks_sums_say(scenes, run, tmp_path, protocol):
    rng, tasks = np.random.default_rng(0), {name: TASKS[name](protocol=protocol) for name in TASK_NAMES}
    tasks["semseg"] = TASKS["semseg"](num_classes=12, protocol=protocol)
    examples, maps = [scenes[index] for index in range(LENGTH)], []
    for index, example in enumerate(examples):
        maps.append(perturbed(example, rng))
        for task in TASK_NAMES:
            save(tmp_path / "maps", task, str(index), maps[-1][task])
    found, _ = run(tmp_path / "maps", f"--config.protocol={protocol}", "--config.boundary.max_dist=0.02")

    stacked = {name: np.stack([one[name] for one in maps]) for name in TASK_NAMES}
    probability = {name: stacked[name] / (255 if name == "edges" else 1) for name in ("edges", "saliency")}
    with np.errstate(divide="ignore"):
        logit = {name: np.clip(np.log(p) - np.log1p(-p), -100, 100) for name, p in probability.items()}
    raw = {
        "semseg": np.eye(12)[stacked["semseg"]],
        "human_parts": stacked["human_parts"],
        "depth": stacked["depth"][..., None],
        "normals": stacked["normals"].astype(np.float32) * np.float32(2 / 255) - 1,
        "edges": np.nextafter(logit["edges"].astype(np.float32), np.float32(np.inf))[..., None],
        "saliency": logit["saliency"][..., None],
    }
    for name, task in tasks.items():
        labels = np.stack([example[name] for example in examples])
        labels = labels.astype(np.int32) if labels.dtype == np.uint8 else labels
        sums = jax.jit(task.metric_sums)(raw[name].astype(np.float32), labels)
        values = task.metric_values(sums)
        if task.target["kind"] == "labels":  # they do not say how sure they are
            assert values.pop("ece") > 0
        assert values.keys() <= found["metrics"][name].keys()
        for metric, value in values.items():
            # Sums of float32 errors in another order, and a last bit of logits.
            assert found["metrics"][name][metric] == pytest.approx(value, rel=2e-5, abs=1e-6, nan_ok=True), metric
    published = protocol == "published"
    matched = boundary.evaluate(
        stacked["edges"],
        np.stack([example["edges"] > 0.5 for example in examples]),
        max_dist=0.02,
        suppress=published,
        program="seism" if published else "ours",
    )
    assert found["metrics"]["edges"]["ods"] == 100 * matched["ods"]
    assert found["metrics"]["edges"]["ap"] == 100 * matched["ap"]


@pytest.mark.parametrize("name", TASK_NAMES)
def test_a_map_stands_for_a_prediction_that_decodes_to_it(name):
    task = TASKS[name]()
    raw = np.random.default_rng(1).normal(size=(2, 5, 6, task.channels), scale=3).astype(np.float32)
    decoded = np.asarray(task.decode(raw))
    again = task.from_decoded(decoded)
    assert (again.shape, again.dtype) == (raw.shape, np.float32)
    np.testing.assert_allclose(task.decode(again), decoded, rtol=1e-6, atol=1e-7)


def test_levels_that_are_thresholds_reach_them():
    levels = np.array([51, 102, 153, 204, 0, 255], np.uint8).reshape(1, 2, 3)
    for task in (TASKS["edges"](), TASKS["saliency"]()):
        raw = task.from_decoded(levels)
        sums = task.metric_sums(raw, np.ones((1, 2, 3), np.float32))
        thresholds = [step / (100 if task.kind == "edges" else 20) for step in range(1, 100)][:19]
        want = [int(np.sum(levels / 255 >= t)) for t in thresholds]
        assert np.asarray(sums["predicted"])[: len(thresholds)].tolist() == want
        assert np.isfinite(raw).all()


class Network:
    """Its image is what it predicts."""

    def apply(self, variables, image):
        return {"edges": image[..., :1], "saliency": image[..., 1:2]}


def test_measures_on_the_host_are_those_of_an_evaluation():
    """Of the same probabilities, by the functions that `finish` calls."""
    rng, options = np.random.default_rng(2), {"max_dist": 0.05, "outline_targets": False, "workers": 0}
    raw = {name: rng.normal(size=(8, 12, 16, 1)).astype(np.float32) for name in ("edges", "saliency")}
    labels = {name: (rng.random((8, 12, 16, 1)) < 0.3).astype(np.float32) for name in raw}
    labels["edges"][0] = -1
    labels["saliency"][1, :3] = -1
    batch = {"image": np.concatenate([*raw.values(), raw["edges"]], axis=-1), **labels}
    mesh = build(read_config("scenes"), None).mesh
    for published in (False, True):
        protocol = "published" if published else "exact"
        tasks = [TASKS["edges"](protocol=protocol), TASKS["saliency"](protocol=protocol, image_scores=True)]

        def pairs(names, tasks=tasks):
            for row in range(8):
                maps = {task.name: np.asarray(task.decode(raw[task.name][row])) for task in tasks}
                yield {n: maps[n] for n in names}, {n: labels[n][row] for n in names}

        found = score(tasks, pairs, Boundary(**options)).metrics
        edges = edge_scores(Network(), {}, [batch], mesh, task=tasks[0], **options)
        assert {name: found["edges"][name] for name in edges} == pytest.approx(edges)
        saliency = saliency_scores(Network(), {}, [batch], mesh, task=tasks[1])
        # Sums of eight images in another order.
        assert {name: found["saliency"][name] for name in saliency} == pytest.approx(saliency, rel=1e-6)


@pytest.mark.slow
def test_predict_then_score_is_evaluate(tmp_path, capsys):
    """At the network's own size nothing is resampled."""
    config = base.get_config()
    config.data.update({"size": SIZE, "lengths": {"train": 8, "validation": 0, "test": LENGTH}, "threads": 1})
    config.backbones.vit.update({"width": 16, "depth": 4, "num_heads": 2, "patch_size": 16})
    config.interaction, config.channels, config.stride = "none", 8, 8
    config.update({"steps": 2, "batch_size": 8, "checkpoint_every": 2, "eval_every": 2})
    experiment = build(config, tmp_path / "cache", mesh=make_mesh(mesh_sizes("data"), jax.devices()[:1]))
    train(experiment, tmp_path / "run", Console(quiet=True))
    (tmp_path / "images").mkdir()
    for index in range(LENGTH):
        Image.fromarray(experiment.data.sources["test"][index]["image"]).save(tmp_path / "images" / f"{index}.png")
    predict_files(Source(tmp_path / "run"), [tmp_path / "images"], tmp_path / "maps", Console(quiet=True))
    out = tmp_path / "scores.json"
    arguments = [f"--predictions={tmp_path / 'maps'}", "--config=scenes", f"--json={out}", *SCENES]
    assert main(["score", *arguments, f"--cache_dir={tmp_path / 'cache'}"]) == 0, capsys.readouterr().err
    with open_run(tmp_path / "run", "best") as saved:
        state = restored_state(experiment, saved.checkpoints, saved.step)
    with jax.set_mesh(experiment.mesh):
        want = evaluate_split(experiment, compiled_eval_step(experiment), state, "test").metrics
    found = json.loads(out.read_text())["metrics"]
    for task in want:
        if task in ("semseg", "human_parts"):
            want[task].pop("ece")  # of probabilities, which labels have none of
        for metric, value in want[task].items():
            # Programs for batches of 1 and 8 round differently; one of 6144 pixels that changes its class is 0.016 %.
            assert found[task][metric] == pytest.approx(value, rel=1e-3, abs=2e-2, nan_ok=True), (task, metric)


def resave(task, values, suffix=".npy", **arrays):
    """An edit that puts these values in place of item 0."""

    def edit(folder):
        for path in (folder / task).glob("0.*"):
            path.unlink()
        path = folder / task / f"0{suffix}"
        if suffix == ".png":
            Image.fromarray(values).save(path)
        elif suffix == ".npz":
            np.savez(path, **arrays)
        else:
            np.save(path, values)

    return edit


FLOATS = np.full(SIZE, 0.5, np.float32)
WRONG = {
    "missing": (lambda f: (f / "edges" / "0.png").unlink(), ["edges lacks 1 of the split's 3 images: 0;", ".npz"]),
    "extra": (lambda f: shutil.copy(f / "edges" / "0.png", f / "edges" / "9.png"), ["1 files of no image", "9.png"]),
    "twice": (lambda f: np.save(f / "edges" / "0.npy", FLOATS), ["0.npy and 0.png", "keep one"]),
    "no folder": (lambda f: (f / "edges").rename(f / "edge"), ["no folder 'edges'", "depth, edge, ", "config.tasks"]),
    "no class": (resave("semseg", np.full(SIZE, 12, np.uint8), ".png"), ["0.png", "the values 12", "0..11"]),
    "ignored": (resave("semseg", np.full(SIZE, 255, np.uint8), ".png"), ["0.png", "the values 255", "0..11"]),
    "negative class": (resave("semseg", np.full(SIZE, -1)), ["0.npy", "the values -1", "0..11"]),
    "colours": (resave("semseg", np.zeros((*SIZE, 3), np.uint8), ".png"), ["0.png", "'RGB'", "a PNG of 8 bits"]),
    "logits": (resave("semseg", np.zeros((*SIZE, 7), np.float32)), ["float32 (32, 64, 7)", "(H, W, 12)"]),
    "float labels": (resave("semseg", FLOATS), ["float32 (32, 64)", "integers (H, W)"]),
    "size": (resave("edges", np.zeros((16, 64), np.uint8), ".png"), ["0.png", "16 x 64", "labels' 32 x 64"]),
    "8-bit depth": (resave("depth", np.zeros(SIZE, np.uint8), ".png"), ["0.png", "'L'", "16-bit grey PNG of mill"]),
    "depth of integers": (resave("depth", np.ones(SIZE, np.int32)), ["0.npy", "int32 (32, 64)", "floats (H, W)"]),
    "depth unknown": (resave("depth", np.full(SIZE, np.nan, np.float32)), ["0.npy", "not finite"]),
    "grey normals": (resave("normals", np.zeros(SIZE, np.uint8), ".png"), ["0.png", "'L'", "8-bit RGB"]),
    "flat normals": (resave("normals", FLOATS), ["float32 (32, 64)", "floats (H, W, 3)"]),
    "edge logits": (resave("edges", FLOATS * 4), ["from 2 to 2", "probabilities in [0, 1]"]),
    "16-bit edges": (resave("edges", np.zeros(SIZE, np.uint16), ".png"), ["0.png", "8-bit grey PNG"]),
    "archive": (resave("edges", None, ".npz", a=FLOATS, b=FLOATS), ["arrays a, b", "an array 'edges', or one"]),
    "damaged": (lambda f: (f / "edges" / "0.png").write_bytes(b"x"), ["0.png", "cannot be decoded"]),
    "pickle": (resave("edges", np.array([{}])), ["0.npy", "cannot be decoded"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_message(scenes, refused, tmp_path, case):
    edit, parts = WRONG[case]
    edit(truth(scenes, tmp_path / "maps"))
    tasks = "--config.tasks=('semseg','depth','normals','edges')"
    message = refused(tmp_path / "maps", tasks)
    for part in (str(tmp_path / "maps"), *parts):
        assert part in message


def test_files_are_counted_before_anything_is_rendered(scenes, refused, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "prepare", lambda *_: pytest.fail("what should be refused was begun"))
    assert "no such directory" in refused(tmp_path / "nowhere")
    (tmp_path / "maps").mkdir()
    assert "no folder 'semseg'" in refused(tmp_path / "maps")
    assert "--split=val: the data has the splits" in refused(tmp_path / "maps", "--split=val")
    np.savez(tmp_path / "maps" / "0.npz", semseg=FLOATS)
    assert "lacks 2 of the split's 3 images: 1, 2" in refused(tmp_path / "maps")


def test_archives_of_all_tasks_or_of_one(scenes, run, refused, tmp_path):
    folder = tmp_path / "maps"
    folder.mkdir()
    for index in range(LENGTH):
        maps = pictures(scenes[index])
        np.savez(folder / f"{index}.npz", semseg=maps["semseg"], depth=scenes[index]["depth"], semseg_classes=["a"])
        (folder / f"{index}.png").write_bytes(b"a panel")
        (folder / "saliency").mkdir(exist_ok=True)
        np.savez(folder / "saliency" / f"{index}.npz", scenes[index]["saliency"][..., None])
    found, _ = run(folder, "--config.tasks=('semseg','depth','saliency')")
    assert found["metrics"]["semseg"]["miou"] == found["metrics"]["saliency"]["iou"] == 100
    assert found["metrics"]["depth"]["rmse"] == 0
    assert "an array 'normals'" in refused(folder, "--config.tasks=('semseg','normals')")


def test_images_without_labels_of_a_task_count_nothing(tmp_path):
    class Source:
        ids = ("a", "b")

        def __len__(self):
            return 2

        def __getitem__(self, index):
            size = (4, 6 + index)
            example = {"image": np.zeros((*size, 3), np.uint8)}
            return example | ({"depth": np.full(size, 2, np.float32)} if index else {})

    for name, width in (("a", 6), ("b", 7)):
        save(tmp_path, "depth", name, np.full((4, width), 3, np.float32))
    task = TASKS["depth"]()
    found = Predictions(tmp_path, Source(), {"depth": Target(**task.target)}, {"depth": 1})
    assert score([task], found.pairs, Boundary(None, False, 0)).metrics["depth"]["rmse"] == 1


def test_names_of_items():
    class City(Cityscapes):
        def __init__(self):
            self.root, self._folder, self.ids = Path("root"), "val", ("bonn/bonn_0",)

    assert item_names(City(), 0) == ("bonn/bonn_0", "bonn_0_leftImg8bit")
    assert item_names(Scenes("test", 3), 2) == ("2",)
