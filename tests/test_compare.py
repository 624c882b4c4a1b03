"""The comparison's arithmetic: pairing by seed, signs, spread, and a page that holds the numbers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.claims import compare, comparison, exchange, few_labels, runs, seeds
from benchmarks.claims.blind import positions
from sgw_jax.experiment.build import build
from sgw_jax.experiment.config_files import read_config
from sgw_jax.tasks import Depth, SemSeg

TASKS = (SemSeg(), Depth())


def run(miou, rmse, diagnostics=None):
    metrics = {"semseg": {"miou": miou}, "depth": {"rmse": rmse}}
    measured = {"images_per_second": 50.0, "environment": {"device": "cpu"}}
    return {"metrics": metrics, "parameters": 1234, "diagnostics": diagnostics, **measured}


def diagnostics():
    changed = {"metrics": {"semseg": {"miou": 20.0}, "depth": {"rmse": 1.2}}}
    numbers = dict.fromkeys(comparison.NUMBERS, 0.5)
    return {**numbers, "update_ratio": None, "ablations": {"zeroed": changed, "swapped": changed}}


FOUND = {
    "none": [run(20.0, 1.0), run(10.0, 2.0)],
    "kem": [run(22.0, 0.9, diagnostics()), run(10.0, 2.0, diagnostics())],
    "single_semseg": [run(20.0, 9.0), run(20.0, 9.0)],
    "single_depth": [run(1.0, 1.0), run(1.0, 1.0)],
}


def test_gains_are_paired_by_seed():
    summary = comparison.summarise(FOUND, TASKS)
    none, kem = summary["methods"]
    assert none["over_none"] is None
    np.testing.assert_allclose(kem["over_none"]["values"], [10, 0])  # +10 % mIoU and -10 % error; then nothing
    np.testing.assert_allclose(kem["over_none"]["std"], np.std([10, 0], ddof=1))
    np.testing.assert_allclose(none["delta_m"]["values"], [0, -75])  # half the mIoU, twice the error
    assert summary["single"]["depth"]["mean"] == 1.0
    assert none["diagnostics"] is None
    expected = 100 * ((20 / 22 - 1) - (1.2 / 0.9 - 1)) / 2
    np.testing.assert_allclose(kem["diagnostics"]["delta_m with the read-out zeroed"]["values"][0], expected)
    assert "update_ratio" not in kem["diagnostics"]


def test_widened_has_as_many_parameters_as_kem():
    """To half a hidden unit, of 2 c + 1 parameters."""

    def count(interaction, width=None):
        config = read_config(f"scenes:interaction={interaction}")
        config.interactions.none.mlp_width = width
        config.mesh.data, config.batch_size = -1, 8
        experiment = build(config, "unused")
        image = jnp.zeros((1, *experiment.size, 3))
        params = jax.eval_shape(experiment.model.init, jax.random.key(0), image)["params"]
        return experiment, sum(leaf.size for leaf in jax.tree.leaves(params))

    kem, wanted = count("kem")
    _, found = count("none", runs.equal_mlp_width(kem))
    assert abs(found - wanted) <= (2 * kem.config.channels + 1) / 2


def test_one_seed_has_no_spread():
    summary = comparison.summarise({name: runs[:1] for name, runs in FOUND.items()}, TASKS)
    assert summary["methods"][1]["over_none"]["std"] is None


def test_devices_of_several_kinds_have_no_speed_in_common():
    slow, fast = run(1, 1), run(1, 1) | {"images_per_second": 100.0, "environment": {"device": "NVIDIA H100"}}
    assert comparison.speed_of([slow, slow | {"images_per_second": 60.0}]) == 55
    assert comparison.speed_of([slow, fast]) is None
    assert [comparison.speed(value) for value in (123.6, 50.0, 0.5785, None)] == ["124", "50", "0.58", "–"]


def test_a_result_of_another_configuration_is_refused(tmp_path):
    """Found by its seed, and by that of the trunk; the same ones are complete."""

    def experiment(seed):
        config = read_config("scenes", [f"--config.seed={seed}"])
        config.mesh.data = -1
        return build(config, "unused")

    def write(workdir, seed, trunk=None):
        workdir.mkdir()
        made = runs.made_by(experiment(seed), trunk)
        (workdir / "result.json").write_text(json.dumps({"made_by": made}), encoding="utf-8")
        return workdir

    trunk, other = write(tmp_path / "trunk", 5), write(tmp_path / "other", 6)
    workdir = write(tmp_path / "run", 7, trunk)
    assert not runs.done(experiment(7), tmp_path / "none", trunk)
    assert runs.done(experiment(7), workdir, trunk)
    with pytest.raises(SystemExit, match=r"made with another seed: give another --out"):
        runs.done(experiment(8), workdir, trunk)
    with pytest.raises(SystemExit, match="made with another trunk"):
        runs.done(experiment(7), workdir, other)


def test_a_key_that_an_earlier_version_did_not_know_had_its_default(tmp_path):
    """So that a comparison goes on after the configuration has grown; another value of it is another run."""

    def experiment(*options):
        config = read_config("scenes", options)
        config.mesh.data = -1
        return build(config, "unused")

    made = runs.made_by(experiment(), None)
    del made["optimizer"]["layer_decay"], made["profile_steps"]
    (tmp_path / "result.json").write_text(json.dumps({"made_by": made}), encoding="utf-8")
    assert runs.done(experiment(), tmp_path, None)
    with pytest.raises(SystemExit, match="made with another optimizer: give another --out"):
        runs.done(experiment("--config.optimizer.layer_decay=0.5"), tmp_path, None)


def test_labels_of_a_share_of_the_images():
    """About the share (six standard errors of 512 draws), the same ones again, and fewer of them for a smaller share;
    images, other tasks and the other splits keep all; a result says it."""

    def experiment(**shares):
        config = read_config("scenes:tasks=semseg+depth", ["--config.data.lengths.train=512"])
        config.mesh.data = -1
        return few_labels.with_few_labels(build(config, "unused"), shares)

    few, fewer = experiment(depth=0.5), experiment(depth=0.05)
    source = few.data.sources["train"]
    kept, less = ({i for i in range(512) if e.data.sources["train"].labelled("depth", i)} for e in (few, fewer))
    assert abs(len(kept) / 512 - 0.5) < 6 * np.sqrt(0.25 / 512)
    assert less < kept
    assert all(source.labelled(name, i) for name in ("image", "semseg") for i in range(512))
    assert few.data.sources["test"] is not source
    assert runs.made_by(few, None)["few_labels"] == {"depth": 0.5}
    assert runs.made_by(few, None) != runs.made_by(fewer, None)
    held = few_labels.FewLabels([{"image": 0, "depth": 1}] * 512, {"depth": 0.5})
    assert {i for i in range(512) if "depth" in held[i]} == kept


def test_distractors_are_noise_of_their_own(tmp_path):
    """The same for an item again, another for another task, item and split; the other tasks stay as they are."""
    small = ["--config.data.lengths.train=8", "--config.data.lengths.test=2", "--config.mesh.data=-1"]
    made = runs.Runs("scenes:tasks=semseg+depth", small, 100, tmp_path, tmp_path, distractors=2)
    plain = dataclasses.replace(made, distractors=0)
    experiment, other = (one.build(("none", {}), seed=0) for one in (made, plain))
    assert [task.name for task in experiment.tasks] == ["semseg", "depth", "distractor00", "distractor01"]
    train, test = (experiment.data.sources[split] for split in ("train", "test"))
    first, second = train[0], train[1]
    maps = [first["distractor00"], first["distractor01"], second["distractor00"], test[0]["distractor00"]]
    assert all(np.array_equal(a, b) == (i == j) for i, a in enumerate(maps) for j, b in enumerate(maps))
    assert np.array_equal(maps[0], train[0]["distractor00"])
    assert all(map.shape == first["image"].shape[:2] and map.min() >= 1 and map.max() <= 5 for map in maps)
    assert np.array_equal(first["depth"], other.data.sources["train"][0]["depth"])
    assert runs.made_by(experiment, None) != runs.made_by(other, None)


@pytest.mark.parametrize(
    "interaction", ["kem", *(pytest.param(name, marks=pytest.mark.slow) for name in ("none", "cross_attention"))]
)
def test_a_blind_task_knows_what_it_is_told(tmp_path, interaction):
    """Without exchange its prediction is that of any image; with it, that of this one. A result says it."""
    method = (interaction, {"interactions.kem.task_gate": "false"} if interaction == "kem" else {})
    small = ["--config.data.lengths.train=8", "--config.data.lengths.test=8", "--config.mesh.data=-1"]
    sighted = runs.Runs("scenes:tasks=depth+edges", small, 100, tmp_path, tmp_path)
    blind = dataclasses.replace(sighted, blind="depth")
    experiment, other = (one.build(method, seed=0) for one in (blind, sighted))
    images = jax.random.normal(jax.random.key(0), (2, *experiment.size, 3))
    variables = jax.jit(other.model.init)(jax.random.key(1), images)

    def differ(model):
        predictions = jax.jit(model.apply)(variables, images)
        return {name: not np.array_equal(maps[0], maps[1]) for name, maps in predictions.items()}

    assert differ(other.model) == {"depth": True, "edges": True}
    assert differ(experiment.model) == {"depth": interaction != "none", "edges": True}
    assert runs.made_by(experiment, None) == runs.made_by(other, None) | {"blind": "depth"}


def test_with_a_cache_of_taps_it_is_the_same_run(tmp_path):
    """A machine may do without: what it made is gone on with from the cache, and no other setting passes for it."""
    small = ("--config.data.lengths.train=8", "--config.data.lengths.test=8", "--config.mesh.data=-1")
    plain = ("--config.augment.colour=false", "--config.augment.scale=1,1", "--config.augment.scale_crop=")
    without, cached, other = (
        runs.Runs(
            "scenes:tasks=depth", (*small, *plain, "--config.optimizer.backbone_scale=0", *keys), 100, *2 * [tmp_path]
        )
        for keys in ((), (f"--config.backbone_cache={tmp_path}",), ("--config.channels=8",))
    )
    made = [runs.made_by(one.build(("none", {}), seed=0), None) for one in (without, cached, other)]
    assert made[0] == made[1] != made[2]


def test_a_blind_task_must_be_one_of_the_tasks(tmp_path):
    small = ["--config.data.lengths.train=8", "--config.data.lengths.test=8", "--config.mesh.data=-1"]
    with pytest.raises(SystemExit, match="--blind normals: the tasks are depth, edges"):
        runs.Runs("scenes:tasks=depth+edges", small, 100, tmp_path, tmp_path, blind="normals").build(("none", {}), 0)
    scales = ("kem", {"scales": "16,8"})
    with pytest.raises(SystemExit, match="--blind depth: with interaction at several scales"):
        runs.Runs("scenes:tasks=depth+edges", small, 100, tmp_path, tmp_path, blind="depth").build(scales, 0)


def test_positions_tell_cells_apart():
    """Each cell has its own, of one length: a sine and a cosine of each angle."""
    where = positions(16, 24, 32).reshape(-1, 32)
    assert len(np.unique(where.round(4), axis=0)) == 16 * 24
    np.testing.assert_allclose(np.linalg.norm(where, axis=-1), 4, rtol=1e-6)  # 16 pairs
    assert not positions(2, 2, 6)[..., 4:].any()


@pytest.mark.parametrize("part", exchange.PARTS)
def test_the_plan_of_exchange_can_be_run(part):
    """Its configurations exist, and backbones that stand beside the default's million parameters have about as many."""
    overrides = [given for given in exchange.PARTS[part] if given.startswith("--config.")]
    config = read_config("scenes", [*overrides, "--config.mesh.data=-1"])
    experiment = build(config, None)
    image = jax.ShapeDtypeStruct((1, *experiment.size, 3), jnp.float32)
    backbone = jax.eval_shape(experiment.model.init, jax.random.key(0), image)["params"]["backbone"]
    assert 0.5e6 < sum(leaf.size for leaf in jax.tree.leaves(backbone)) < 2e6
    assert {given for given in exchange.PARTS[part] if given in compare.METHODS} >= {"none", "kem"}


def test_processes_share_the_runs_of_a_comparison(tmp_path, monkeypatch):
    """A run is left to one process; who needs it waits, and finds it complete without making it anew."""
    made, begun = [], []
    shared = runs.Runs("scenes", (), 1, tmp_path, tmp_path)
    monkeypatch.setattr(runs, "PATIENCE", 0)
    monkeypatch.setattr(runs, "_complete", set())
    monkeypatch.setattr(runs.Runs, "build", lambda *_, **__: None)
    monkeypatch.setattr(runs, "done", lambda _, folder, __: folder in made)
    monkeypatch.setattr(runs, "run", lambda _, folder, *__: made.append(folder))
    with runs.claim(shared.folder("kem", 0)):
        with pytest.raises(runs.Busy), runs.claim(shared.folder("kem", 0)):
            pass
        assert not shared.make("kem", ("kem", {}), 0, begun.append)
        assert shared.make("kem", ("kem", {}), 1, begun.append)
    assert shared.make("kem", ("kem", {}), 0, begun.append)
    assert shared.make("kem", ("kem", {}), 0, begun.append)
    assert begun == ["kem, seed 1", "kem, seed 0"]
    assert made == [shared.folder("kem", 1), shared.folder("kem", 0)]

    turns = iter([False, False, True])

    def attempt() -> str:
        if not next(turns):
            raise runs.Busy
        return "all"

    assert runs.shared(attempt) == "all"


def test_results_say_where_their_runs_were_made():
    """Not where they were summed up; what differs between the runs is listed."""
    one, other = {"device": "a", "jax": "1"}, {"device": "b", "jax": "1"}
    found = {"none": [{"environment": one}, {"environment": one}], "kem": [{"environment": other}]}
    assert runs.measured_on(found) == {"device": ["a", "b"], "jax": "1"}


@pytest.mark.parametrize("given", ["depth", "depth=0", "depth=2", "depth=half"])
def test_shares_of_labels_that_are_none(given):
    with pytest.raises(SystemExit, match=f"--labelled {given}: give TASK=SHARE"):
        few_labels.read_shares([given])


def test_confidence_intervals_are_students():
    """Quantiles from a printed table of the t distribution: 12.706 with one degree of freedom, 2.776 with four."""
    values = [1.0, 2.0, 4.0, 4.0, 9.0]
    half = 2.776 * np.std(values, ddof=1) / np.sqrt(5)
    mean, low, high = (float(x.strip("[],")) for x in comparison.interval(comparison.spread(values)).split())
    np.testing.assert_allclose((mean, low, high), (4, 4 - half, 4 + half), atol=0.006)  # two decimals are shown
    assert comparison.interval(comparison.spread([0.0, 2.0])) == "+1.00 [-11.71, +13.71]"
    assert comparison.interval(comparison.spread([1.5])) == "+1.50"
    assert comparison.interval(None) == "–"


def test_without_single_task_models():
    """Gains over none alone, and a table by the number of tasks."""
    multi = {name: runs for name, runs in FOUND.items() if not name.startswith("single")}
    summary = comparison.summarise(multi, TASKS)
    assert [row["delta_m"] for row in summary["methods"]] == [None, None]
    assert "single-task" not in comparison.markdown(summary)
    head, _, row = comparison.by_number_of_tasks([summary, {**summary, "distractors": 2}]).splitlines()
    assert head == "| | 2 tasks | 4 tasks |"
    assert row == "| kem | +5.00 [-58.53, +68.53] | +5.00 [-58.53, +68.53] |"


def test_who_reads_whom():
    """Sizes, whatever their signs, in the mean over the seeds."""
    gates = [[[0.5, -0.1], [0.0, 0.25]], [[0.7, 0.3], [0.0, -0.25]]]
    runs = [{"diagnostics": {"tasks": ["semseg", "depth"], "pair_gates": found}} for found in gates]
    table = comparison.who_reads_whom({"runs": {"kem_pairs": runs}}, "kem_pairs")
    assert table.splitlines() == [
        "| reads | semseg | depth |",
        "|---|---|---|",
        "| semseg | 0.60 | 0.20 |",
        "| depth | 0.00 | 0.25 |",
    ]


def test_gains_of_each_task_are_paired_by_seed():
    """As `seeds.by_task` shows them: 10 % and 0 % more mIoU, 10 % and 0 % less error."""
    table = seeds.by_task({"none": FOUND["none"], "kem": FOUND["kem"]}, "scenes:tasks=semseg+depth")
    assert table.splitlines()[-1] == "| kem | +5.00 [-58.53, +68.53] | +5.00 [-58.53, +68.53] |"


def test_what_more_tasks_cost_is_paired_by_seed():
    """The same two networks: none of kem's, kem of none's."""
    tasks = [{"name": "semseg"}, {"name": "depth"}]
    few = {"tasks": tasks, "runs": {"method": FOUND["none"]}}
    many = {"tasks": tasks, "distractors": 6, "runs": {"method": FOUND["kem"]}}
    head, _, row = seeds.over_fewer_tasks([few, many], "scenes:tasks=semseg+depth").splitlines()
    assert head == "| | 8 tasks |"
    assert row == "| method | +5.00 [-58.53, +68.53] |"


def test_the_page_and_the_table_hold_the_numbers():
    facts = {
        "config": "scenes",
        "overrides": [],
        "steps": 5,
        "trunk_steps": 6,
        "seeds": 2,
        "environment": {"device": "cpu"},
    }
    summary = comparison.summarise(FOUND, TASKS) | facts
    page, table = comparison.page(summary), comparison.markdown(summary)
    for text in (page, table):
        assert "kem" in text
        assert "1,234" in text
        assert "+5.00 [-58.53, +68.53]" in text  # delta_m over none: 10 and 0
    assert "<script" not in page
