"""The comparison on photographs: the best interaction, the configuration, views of a data folder, the table."""

from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.claims import elsewhere, real
from benchmarks.claims.comparison import single_task_models
from benchmarks.claims.photographs import view
from benchmarks.claims.runs import Runs
from sgw_jax.experiment.build import build
from sgw_jax.experiment.config_files import read_config
from sgw_jax.tasks import Edges, Saliency

TASKS = (Edges(), Saliency())


def validated(edges: float, saliency: float) -> dict:
    return {"validation": {"edges": {"max_f": edges}, "saliency": {"max_f": saliency}}}


def test_the_best_interaction_gains_most_over_single_tasks() -> None:
    """In relative terms: +20 and -5 % is more than +1 and +10 %; having none is not an interaction."""
    rates = {"single_edges": validated(10, 80), "single_saliency": validated(99, 80)}
    rates |= {"none": validated(90, 90), "kem": validated(12, 76), "cross_attention": validated(10.1, 88)}
    assert real.best_exchange(rates, TASKS) == "kem"


def test_what_is_not_tuned_has_the_rate_that_all_frozen_networks_chose() -> None:
    rates = real.Results("real").load()["people, frozen"]["rates"]
    assert {rate["chosen"] for rate in rates.values()} == {real.UNTUNED}


def test_the_configuration_says_what_learns() -> None:
    def experiment(tuned: str):
        return build(read_config(f"{real.CONFIG}:root=DIR,tuned={tuned}", ["--config.mesh.data=-1"]), cache_dir=None)

    frozen, lora = experiment("frozen"), experiment("lora")
    mixed = experiment("frozen,views=VIEWS,tasks=depth+edges").config
    assert frozen.size == lora.size == (224, 112)
    assert [task.name for task in frozen.tasks] == ["semseg", "human_parts", "saliency", "edges"]
    assert frozen.config.optimizer.backbone_scale == 0
    assert frozen.model.lora is None
    assert lora.model.lora.rank == 8
    assert frozen.config.data.root.endswith("DIR/people")
    assert {name: tuple(source.tasks) for name, source in mixed.data.mixture.items()} == {
        "people": ("semseg", "human_parts", "saliency", "edges"),
        "camvid": ("semseg@street", "edges"),
        "bsds500": ("edges",),
        "rgbd": ("depth", "normals"),
    }


def test_a_rate_of_factors_that_are_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        real.main(["--weights=DIR", "--lora_scale=0.1"])
    assert "--lora_scale is a rate of LoRA's factors: give --tuned=lora" in capsys.readouterr().err


def test_a_network_of_one_task_reads_what_has_labels_of_it() -> None:
    runs = Runs("FILE:root=DIR", (), 1, Path("out"), Path("cache"))
    names = single_task_models(TASKS)
    assert [real.of_case(runs, name).config for name in names] == [
        "FILE:root=DIR,tasks=edges",
        "FILE:root=DIR,tasks=saliency",
    ]
    assert real.of_case(runs, "kem") == runs
    taps = [real.of_case(runs, name, Path("taps")).overrides for name in ("kem", "single_edges")]
    assert taps == [("--config.backbone_cache=taps/all",), ("--config.backbone_cache=taps/edges",)]


def test_a_view_has_the_images_of_one_name(tmp_path: Path) -> None:
    """Made twice it is the same."""
    mixed = tmp_path / "mixed"
    for name in ("images", "semseg", "edges", "splits"):
        (mixed / name).mkdir(parents=True)
    for split in ("train", "validation", "test"):
        (mixed / "splits" / f"{split}.txt").write_text(f"camvid_{split}\nbsds500_{split}\n", encoding="utf-8")
    for _ in range(2):
        folder = view(mixed, ("semseg@street", "edges"), "camvid", tmp_path)
    assert (folder / "splits" / "test.txt").read_text(encoding="utf-8") == "camvid_test\n"
    assert {path.name: path.resolve() for path in folder.iterdir() if path.is_symlink()} == {
        name: mixed / name for name in ("images", "semseg", "edges")
    }


def test_what_was_found_elsewhere_is_a_table() -> None:
    """A network without either task has no row, one without the other no number."""
    found = {"kem": {"bsds500": {"ods": 40.04, "ois": 42, "ap": 30}, "ecssd": {"max_f": 80}}}
    found |= {"single_semseg": {}, "single_saliency": {"ecssd": {"max_f": 71.26}}}
    assert elsewhere.table({"elsewhere": found}).splitlines() == [
        "| | edges ods % ↑ | edges ois % ↑ | saliency max_f % ↑ |",
        "|---|---|---|---|",
        "| kem | 40.0 | 42.0 | 80.0 |",
        "| single_saliency | – | – | 71.3 |",
    ]


def test_networks_whose_checkpoints_are_not_here_are_named() -> None:
    """Those of tasks that are scored nowhere else are not missing."""
    found = {"none": {}, "kem": {"ecssd": {"max_f": 80}}, "single_semseg": {}, "single_edges": {}}
    assert elsewhere.not_scored({"elsewhere": found}) == ["none", "single_edges"]


def test_only_complete_runs_lose_their_checkpoints(tmp_path: Path) -> None:
    for name in ("complete", "begun"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    (tmp_path / "complete" / "result.json").write_text("{}", encoding="utf-8")
    real.forget_checkpoints(tmp_path)
    assert [path.name for path in tmp_path.rglob("checkpoints")] == ["checkpoints"]
    assert (tmp_path / "begun" / "checkpoints").exists()


def test_no_picture_of_a_photograph_enters_the_repository() -> None:
    with pytest.raises(SystemExit, match="lies in the repository, which may hold no photograph"):
        real.draw({}, real.ROOT / "docs", Console())


def test_gains_over_single_task_networks_are_paired_by_seed() -> None:
    def run(edges: float, saliency: float) -> dict:
        return {"metrics": {"edges": {"max_f": edges}, "saliency": {"max_f": saliency}}}

    runs = {"none": [run(11, 80), run(22, 80)], "single_edges": [run(10, 1), run(20, 1)]}
    runs["single_saliency"] = [run(1, 80), run(1, 80)]
    summary = {"tasks": [{"name": "edges"}, {"name": "saliency"}], "seeds": 2, "runs": runs}
    head, _, row = real.by_task(summary).splitlines()
    assert head == "| | edges | saliency |"
    assert row == "| none | +10.00 [+10.00, +10.00] | +0.00 [+0.00, +0.00] |"


def test_tasks_of_the_mixture_and_a_single_seed_are_gains_too() -> None:
    """Without an interval, which one value has none of."""

    def run(street: float, depth: float) -> dict:
        return {"metrics": {"semseg@street": {"miou": street}, "depth": {"rmse": depth}}}

    runs = {"kem": [run(44, 0.5)], "single_semseg@street": [run(40, 9)], "single_depth": [run(1, 0.4)]}
    summary = {"tasks": [{"name": "semseg@street"}, {"name": "depth"}], "seeds": 1, "runs": runs}
    head, _, row = real.by_task(summary).splitlines()
    assert head == "| | semseg@street | depth |"
    assert row == "| kem | +10.00 | -25.00 |"


def test_a_run_that_came_without_its_checkpoints_has_found_nothing_elsewhere(tmp_path: Path) -> None:
    runs = Runs("FILE", (), 1, tmp_path, tmp_path / "cache")
    assert elsewhere.scores(runs, "kem", {}) == {}
    assert not (runs.folder("kem", 0) / "elsewhere.json").exists()
