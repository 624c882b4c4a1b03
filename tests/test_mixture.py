"""Mixtures of data sets: rows by a pure function of (seed, n), heads and class maps, evaluation by source, refusals."""

import contextlib
import dataclasses
import json
import pickle
import re
from fractions import Fraction
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from sgw_jax.__main__ import main
from sgw_jax.configs import base
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.loader import train_batches
from sgw_jax.data_pipelines.mixture import Mixture, Part, Shares, mapped, part_seed
from sgw_jax.data_pipelines.transforms import Augmentation, Target
from sgw_jax.evaluation.evaluate import evaluation_of, evaluation_of_mixture
from sgw_jax.evaluation.metrics import add_sums
from sgw_jax.experiment.build import build, build_tasks
from sgw_jax.experiment.config_files import data_roots, read_config, with_overrides
from sgw_jax.experiment.experiment import EVALUATION_KEYS, FREE_KEYS, Data, among
from sgw_jax.report.record import Results
from sgw_jax.tasks import TASKS
from sgw_jax.train_step import init_state, make_train_step

SIZE = (32, 32)
LABELS, MASK = Target("labels", 255), Target("mask", -1.0)
TARGETS = {"semseg": LABELS, "semseg@street": LABELS, "edges": MASK}


@dataclasses.dataclass(frozen=True)
class Numbered:
    """Item i is an image of the level `first` + i with the label i % 4; without edges if they are not asked for."""

    length: int
    first: int
    edges: bool = True

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        found = {"image": np.full((*SIZE, 3), self.first + index, np.uint8)}
        found["semseg"] = np.full(SIZE, index % 4, np.uint8)
        return found | ({"edges": np.ones(SIZE, np.float32)} if self.edges else {})

    def fingerprint(self):
        return {"name": "numbered", "length": self.length, "first": self.first}


def mixture():
    people = Part(Numbered(7, 0), {"semseg": "semseg", "edges": "edges"})
    street = Part(Numbered(5, 100, edges=False), {"semseg@street": "semseg", "edges": "edges"})
    return Mixture({"people": people, "street": street}, {"people": 3.0, "street": 1.0})


def batches(**options):
    given = {"batch_size": 4, "seed": 3, "num_steps": 9, **options}
    with train_batches(mixture(), TARGETS, Augmentation(SIZE, colour=None), **given) as found:
        return list(found)


def same(one, other):
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


# --- rows


@pytest.mark.parametrize("weights", [(1.0,), (3.0, 1.0), (1.0, 1.0, 1.0), (0.7, 0.1, 1e-3, 5.0)])
def test_shares_are_exact_and_count_each_source_from_nought(weights):
    shares, counts = Shares(weights), [0] * len(weights)
    for n in range(3000):
        place, own = shares.position(n)
        assert own == counts[place]
        counts[place] += 1
        for weight, count in zip(weights, counts, strict=True):
            share = Fraction(weight) / sum(map(Fraction, weights))
            assert abs(count - share * (n + 1)) < len(weights)  # each split off rounds by less than one row
    far = 10**12
    assert shares.position(far) == shares.position(far)
    assert sum(shares.position(far + n)[0] == 0 for n in range(100)) == pytest.approx(
        100 * weights[0] / sum(weights), abs=1
    )


def test_each_source_has_epochs_of_its_own_and_no_random_number_of_another():
    stream = mixture().stream(TARGETS, Augmentation(SIZE, colour=None), 3)
    for name, part in enumerate(stream.streams):
        for epoch in range(2):
            items = [part.position(n)[1] for n in range(epoch * len(part.source), (epoch + 1) * len(part.source))]
            assert sorted(items) == list(range(len(part.source))), name
    seeds = {part_seed(seed, place) for seed in range(20) for place in range(20)}
    assert len(seeds) == 400
    assert all(seed >= 2**32 for seed in seeds)  # none is a seed of a configuration


def test_rows_are_a_pure_function_of_seed_and_number():
    whole = batches()
    same(batches(start_step=4), whole[4:])
    same(batches(num_threads=0), whole)
    halves = [batches(process_index=index, process_count=2) for index in range(2)]
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*halves, strict=True)]
    same(joined, whole)
    other = batches(seed=4)
    assert any((a["image"] != b["image"]).any() for a, b in zip(other, whole, strict=True))
    pickle.loads(pickle.dumps(mixture()))[0]


def test_a_row_has_its_sources_labels_alone_in_the_runs_heads():
    sources = np.concatenate([batch["source"] for batch in batches()])
    assert np.bincount(sources).tolist() == [27, 9]
    for batch in batches():
        for row, source in enumerate(batch["source"]):
            assert (batch["semseg"][row] == 255).all() == (source == 1)
            assert (batch["semseg@street"][row] == 255).all() == (source == 0)
            assert (batch["edges"][row] == -1).all() == (source == 1)


def test_crops_are_balanced_by_labels_that_the_source_has():
    parts = {
        "people": Part(Numbered(2, 0), {"semseg": "semseg"}, balanced="semseg"),
        "street": Part(Numbered(2, 0), {"edges": "edges"}),
    }
    augmentation = Augmentation(SIZE, cat_max_ratio=0.5, cat_max_target="semseg")
    found = Mixture(parts, {"people": 1, "street": 1}).stream(TARGETS, augmentation, 0).streams
    assert [stream.augmentation.cat_max_target for stream in found] == ["semseg", None]


# --- class maps, ids


def test_class_maps():
    labels = np.random.default_rng(0).choice([0, 1, 2, 3, 255], (8, 9)).astype(np.uint8)
    classes = (2, 255, 0, 2)
    expected = [[255 if label == 255 else classes[label] for label in row] for row in labels.tolist()]
    found = mapped(labels, classes)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)
    with pytest.raises(InputError, match=r"target 'semseg' holds the labels 3, but its map is of the classes 0\.\.2"):
        mapped(labels, (0, 1, 2), "semseg")
    part = Part(Numbered(4, 0), {"semseg": "semseg", "semseg@two": "semseg"}, {"semseg@two": (0, 1, 1, 255)})
    assert [int(part[i]["semseg@two"][0, 0]) for i in range(4)] == [0, 1, 1, 255]
    assert [int(part[i]["semseg"][0, 0]) for i in range(4)] == [0, 1, 2, 3]


def test_the_whole_is_its_parts_one_after_another():
    whole = mixture()
    assert len(whole) == 12
    assert [whole.place(index) for index in (0, 6, 7, 11)] == [
        ("people", 0),
        ("people", 6),
        ("street", 0),
        ("street", 4),
    ]
    assert whole.ids[6:8] == ("people/6", "street/0")
    assert whole.size_of(8) == SIZE
    assert whole.listing() == {}
    assert whole.spread(4) == [(0, "people"), (7, "street"), (3, "people"), (9, "street")]
    with pytest.raises(IndexError):
        whole[12]


# --- configuration


def config_of(sources=None, **changes):
    """Two sources of rendered scenes that share edges, the second with a head of its own for its classes."""
    config = base.get_config()
    with config.unlocked():
        config.tasks = ("semseg", "semseg@street", "edges")
        config.data.source = "mixture"
        given = {
            "people": {"source": "scenes", "tasks": ("semseg", "edges")},
            "street": {"source": "scenes", "tasks": ("semseg@street", "edges"), "weight": 0.5},
        }
        for name, options in (given if sources is None else sources).items():
            config.data.mixture[name] = base.mixture_source(**options)
        config.data.update(size=SIZE, threads=1)
        config.data.lengths.update({"train": 8, "validation": 4, "test": 4})
        config.backbones.vit.update({"width": 8, "depth": 4, "num_heads": 2, "patch_size": 8})
        config.update({"channels": 8, "steps": 4, "batch_size": 8, "log_every": 1})
        config.update({"checkpoint_every": 2, "eval_every": 2})
        config.update_from_flattened_dict(changes)
    return config


def folder(classes=4, tasks=("semseg",), **more):
    return {"root": "somewhere", "num_classes": classes, "tasks": tasks, **more}


def test_the_snippet_of_your_data_md(tmp_path):
    page = Path(__file__).parent.parent / "docs" / "your-data.md"
    (snippet,) = re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    (tmp_path / "both.py").write_text(snippet, encoding="utf-8")
    config = read_config(str(tmp_path / "both.py"), ["--config.data.mixture.people.root=here"])
    assert config.data.mixture.people.root == "here"
    classes = {task.name: getattr(task, "num_classes", None) for task in build_tasks(config)}
    assert classes == {"semseg": 14, "semseg@street": 11, "edges": None, "depth": None}
    with pytest.raises(InputError, match=r"has no key 'data.mixture.people.wieght'. Did you mean .*weight"):
        read_config(str(tmp_path / "both.py"), ["--config.data.mixture.people.wieght=2"])


def test_heads_of_their_own_are_tasks_of_the_kind():
    config = config_of(
        {"a": folder(4), "b": folder(6, ("semseg@street",))},
        tasks=("semseg", "semseg@street"),
        **{"task_weights.semseg": 3.0},
    )
    one, other = build_tasks(config)
    assert (one.name, one.num_classes, one.weight) == ("semseg", 4, 3.0)
    assert (other.name, other.num_classes, other.weight) == ("semseg@street", 6, 3.0)
    with config.unlocked():
        config.task_weights["semseg@street"] = 0.5
    assert build_tasks(config)[1].weight == 0.5


def test_one_head_by_class_maps():
    maps = {"semseg": (0, 1, 255, 3, 3)}
    config = config_of({"a": folder(4), "b": folder(5, maps=maps)}, tasks=("semseg",))
    assert build_tasks(config)[0].num_classes == 4  # of the source that has no map
    config = config_of({"b": folder(5, maps=maps)}, tasks=("semseg",), **{"data.num_classes": 9})
    assert build_tasks(config)[0].num_classes == 9


CONTRADICTIONS = {
    "no source": ({}, {}, "config.data.mixture names no source"),
    "other classes": (
        {"a": folder(4), "b": folder(6)},
        {},
        "sources of task 'semseg' contradict each other: num_classes is 4 in a, 6 in b; .*semseg@b.*mixture.b.maps",
    ),
    "other names": (
        {"a": {"source": "scenes"}, "b": {"source": "cityscapes", "maps": {}}},
        {},
        "num_classes is 12 in a, 19 in b",
    ),
    "other quantity": (
        {"a": folder(tasks=("depth",)), "b": {"source": "cityscapes", "tasks": ("depth",)}},
        {"tasks": ("depth",)},
        "task 'depth' contradict each other: quantity is 'depth' in a, 'disparity' in b; .*depth@b",
    ),
    "other axes": (
        {"a": folder(tasks=("normals",)), "b": folder(tasks=("normals",), normals_axes="opengl")},
        {"tasks": ("normals",)},
        "task 'normals' contradict each other: axes is 'opencv' in a, 'opengl' in b; .*normals@b",
    ),
    "axes of scenes": (
        {"a": {"source": "scenes", "tasks": ("normals",), "normals_axes": "opengl"}},
        {"tasks": ("normals",)},
        "mixture.a.normals_axes is 'opengl', but the normals of scenes are x right",
    ),
    "short map": ({"a": folder(4, maps={"semseg": (0, 1)})}, {}, "a.maps.semseg has 2 entries, but .* has 4 classes"),
    "map beyond": (
        {"a": folder(4), "b": folder(2, maps={"semseg": (0, 4)})},
        {},
        r"b.maps.semseg leads to the classes \[4\], but the run's task has 0..3; .*those of a",
    ),
    "map of no task": ({"a": folder(maps={"depth": (0,)})}, {}, "a.maps has 'depth', which is none of"),
    "map of no classes": (
        {"a": folder(tasks=("edges",), maps={"edges": (0, 1)})},
        {"tasks": ("edges",)},
        "a.maps has 'edges', whose labels are no classes",
    ),
    "no source of a task": ({"a": folder()}, {"tasks": ("semseg", "depth")}, "has 'depth', which no source of"),
    "no task of a source": (
        {"a": folder(), "b": folder(tasks=("depth",))},
        {},
        "b.tasks are .*'depth'.*none of the run's tasks",
    ),
    "weight": ({"a": folder(weight=0.0)}, {}, "mixture.a.weight is 0.0; it must be positive"),
    "unknown source": ({"a": folder(source="nyu")}, {}, "mixture.a.source is 'nyu'; .* Did you mean 'nyud'"),
    "a mixture within": ({"a": folder(source="mixture")}, {}, "a.source is 'mixture'; a mixture within a mixture"),
    "mistyped key": ({"a": folder(wieght=2.0)}, {}, "mixture.a has no key 'wieght'; .* Did you mean 'weight'"),
    "unknown kind": ({"a": folder(tasks=("semseg", "semsge@x"))}, {}, "'semsge'; it must be .* Did you mean 'semseg'"),
    "name of a head": ({"a": folder(tasks=("semseg", "semseg@a/b"))}, {}, "after @ stands a name of letters"),
    "name of a source": ({"a b": folder()}, {}, "a source's name is made of letters"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_are_refused_before_anything_is_read(case, tmp_path):
    sources, changes, message = CONTRADICTIONS[case]
    with pytest.raises(InputError, match=message):
        build(config_of(sources, **{"tasks": ("semseg",), **changes}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_head_of_its_own_needs_a_mixture():
    config = base.get_config()
    config.tasks = ("semseg@street",)
    with pytest.raises(InputError, match=r"config.tasks is 'semseg@street'; it must be one of"):
        build_tasks(config)


def test_a_source_without_its_directory_is_named(tmp_path):
    with pytest.raises(InputError, match=r"config.data.mixture.a.root is empty: .*--config.data.mixture.a.root=DIR"):
        build(config_of({"a": {**folder(), "root": ""}}, tasks=("semseg",)), tmp_path)


def test_roots_may_differ_between_a_run_and_its_evaluation():
    assert among("data.mixture.people.root", FREE_KEYS)
    assert not among("data.mixture.people.weight", FREE_KEYS)
    saved = read_config("scenes").copy_and_resolve_references()
    with saved.unlocked():
        saved.data.mixture = json.loads(json.dumps({"a": base.mixture_source(root="there")}))
    moved = with_overrides(saved, ["--config.data.mixture.a.root=here"], EVALUATION_KEYS)
    assert data_roots(moved) == {"data.mixture.a.root": "here"}
    with pytest.raises(InputError, match=r"the checkpoint says it; here may be set .*data.mixture.a.root"):
        with_overrides(saved, ["--config.data.mixture.a.weight=2.0"], EVALUATION_KEYS)


# --- evaluation


def test_all_is_the_sum_of_the_sources_and_a_source_is_itself():
    tasks = [TASKS["semseg"](num_classes=3), TASKS["depth"]()]
    rng = np.random.default_rng(0)

    def sums(rows, with_depth):
        prediction = {"semseg": rng.normal(size=(rows, 4, 5, 3)), "depth": rng.uniform(1, 3, (rows, 4, 5, 1))}
        target = {"semseg": rng.choice([0, 1, 2, 255], (rows, 4, 5)), "depth": rng.uniform(1, 2, (rows, 4, 5))}
        target["depth"] *= with_depth
        found = {}
        for task in tasks:
            loss, count = task.loss_terms(prediction[task.name], target[task.name])
            metrics = task.metric_sums(prediction[task.name], target[task.name])
            found[task.name] = {"metrics": metrics, "loss": loss, "count": count}
        return add_sums(None, found), prediction, target

    parts = {"a": sums(3, True), "b": sums(2, False)}
    found = evaluation_of_mixture({name: part[0] for name, part in parts.items()}, tasks)
    predicted, target = (np.concatenate([part[i]["semseg"] for part in parts.values()]) for i in (1, 2))
    labels, valid = predicted.argmax(-1), target != 255
    iou = [
        100 * (valid & (labels == c) & (target == c)).sum() / (valid & ((labels == c) | (target == c))).sum()
        for c in range(3)
    ]
    assert found.metrics["semseg"]["miou"] == pytest.approx(np.mean(iou), rel=1e-12)
    off = parts["a"][1]["depth"][..., 0] - parts["a"][2]["depth"]
    assert found.metrics["depth"]["rmse"] == pytest.approx(np.sqrt(np.mean(off**2)), rel=1e-6)
    for name, (total, _, _) in parts.items():
        alone = evaluation_of(total, tasks[: 2 if name == "a" else 1])
        assert found.sources[name].metrics == alone.metrics
        assert found.sources[name].losses == alone.losses
    assert "depth" not in found.sources["b"].metrics  # no label, so no number
    flat = found.flat()
    assert flat["semseg/miou/b"] == found.sources["b"].metrics["semseg"]["miou"]
    assert flat["loss/depth/a"] == found.sources["a"].losses["depth"]
    assert not [name for name in flat if name.startswith(("depth", "loss/depth")) and name.endswith("/b")]


class Flat(nn.Module):
    """A prediction of each pixel from its colours."""

    @nn.compact
    def __call__(self, image, train=False):
        return {"saliency": nn.Dense(1)(image)}


def test_losses_of_a_step_by_source_add_up_to_that_of_all():
    """A loss that balances itself by the batch too: each source's is of the batch's balance, over its own pixels."""
    rng, task = np.random.default_rng(0), TASKS["saliency"]()
    target = (rng.random((4, 8, 8, 1)) < np.array([0.1, 0.5, 0.9, 0.2])[:, None, None, None]).astype(np.float32)
    target[0, :3] = -1  # ignored
    batch = {"image": rng.normal(size=(4, 8, 8, 3)).astype(np.float32), "saliency": target}
    batch["source"] = np.array([1, 0, 1, 0], np.int32)
    sources, optimizer = {"a": ("saliency",), "b": ("saliency", "depth")}, optax.sgd(0.1)
    state = jax.jit(lambda image: init_state(Flat(), optimizer, image))(batch["image"])
    for accumulate in (1, 2):
        step = jax.jit(make_train_step(Flat(), [task], optimizer, sources=sources, accumulate=accumulate))
        found = step(state, batch)[1]
        rows = {"a": [1, 3], "b": [0, 2]}
        pixels = {name: (target[own] >= 0).sum() for name, own in rows.items()}
        mean = sum(pixels[name] * float(found[f"loss/saliency/{name}"]) for name in rows) / sum(pixels.values())
        assert mean == pytest.approx(float(found["loss/saliency"]), rel=1e-5)
        assert float(found["loss/saliency/a"]) != pytest.approx(float(found["loss/saliency/b"]), rel=1e-2)
    alone = jax.jit(make_train_step(Flat(), [task], optimizer))(state, batch)[1]
    assert sorted(alone) == ["grad_norm", "loss", "loss/saliency"]  # no mixture, nothing more


# --- a run


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on_bit_by_bit_and_reports_by_source(tmp_path, monkeypatch, capsys):
    (tmp_path / "mixed.py").write_text(
        "from test_mixture import config_of\n\n\ndef get_config():\n    return config_of()\n", encoding="utf-8"
    )

    def command(name, *more):
        return main([name, f"--workdir={tmp_path / more[0]}", f"--cache_dir={tmp_path}", *more[1:]])

    asked = f"--config={tmp_path / 'mixed.py'}"
    assert command("train", "whole", asked) == 0
    original = Data.train

    def killed(self, start, steps):
        @contextlib.contextmanager
        def until():
            with original(self, start, steps) as found:
                yield numbered(found)

        def numbered(found):
            for step, batch in enumerate(found):
                if step == 3:
                    raise Killed
                yield batch

        return until()

    with monkeypatch.context() as patch:
        patch.setattr(Data, "train", killed)
        with pytest.raises(Killed):
            command("train", "again", asked)
    assert command("train", "again", asked) == 0
    lines = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "again")]
    assert lines[0] == lines[1]
    trained = [json.loads(line) for line in lines[0].splitlines() if '"train"' in line]
    for line in trained:
        assert {"loss/edges/people", "loss/edges/street"} < line.keys()
        assert "loss/semseg/people" not in line  # the loss of semseg is that of its one source
    results = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("whole", "again")]
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["sources"] == results[1]["sources"]
    record = Results.from_dict(results[0])
    assert {name: sorted(found.metrics) for name, found in record.sources.items()} == {
        "people": ["edges", "semseg"],
        "street": ["edges", "semseg@street"],
    }
    assert record.sources["people"].metrics["semseg"] == record.metrics["semseg"]
    page = (tmp_path / "whole" / "report.html").read_text(encoding="utf-8")
    assert "By source" in page
    assert "All metrics on street" in page
    assert "by source" in capsys.readouterr().out
    assert command("evaluate", "whole", "--split=validation") == 0
