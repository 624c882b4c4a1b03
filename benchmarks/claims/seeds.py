"""The same configuration with several seeds: trains what is missing and prints one Markdown table with the spread.

    python benchmarks/claims/seeds.py --config=scenes --seeds=3 --out=runs/seeds [--results=FILE]
        [--config.key=value ...]

Seed s differs in initialisation, data order and drop path; the scenes are the same. Run again, it goes on where it was.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, where this runs as a script

from benchmarks.claims.comparison import interval, number_of_tasks, shown, spread
from benchmarks.measure import DASH, Results, needed
from sgw_jax.evaluation.metrics import delta_m
from sgw_jax.experiment.build import build_tasks
from sgw_jax.experiment.config_files import read_config
from sgw_jax.tasks.base import Task

KEPT = ("step", "split", "tasks", "metrics", "references", "diagnostics", "parameters", "environment", "speed")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains, collects every results.json, prints the table and writes seeds.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="scenes")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/seeds"))
    parser.add_argument("--results", type=Path, help="where the numbers go too, for the page of results")
    arguments, overrides = parser.parse_known_args(argv)
    results = []
    for seed in range(arguments.seeds):
        workdir = arguments.out / f"seed{seed}"
        if not (workdir / "results.json").exists():
            command = [sys.executable, "-m", "sgw_jax", "train", f"--config={arguments.config}", f"--workdir={workdir}"]
            subprocess.run([*command, f"--config.seed={seed}", *overrides], check=True)
        found = Results("default", workdir / "results.json").load()
        lines = (json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
        (*_, last) = (line for line in lines if line.get("split") == "validation")
        results.append({key: found[key] for key in KEPT} | {"validation_loss": last["loss"]})
    print(table(results))
    for path in (arguments.out / "seeds.json", arguments.results):
        if path is not None:
            Results("default", path).write(results)  # each has its own environment
    return 0


def table(results: Sequence[dict[str, Any]]) -> str:
    """Headline metrics: mean over the runs and, in brackets, lowest and highest; the references beside them."""
    lines = ["| task | metric | network, mean [lowest, highest] | linear probe | constant |", "|---|---|---|---|---|"]
    for task in results[0]["tasks"]:
        name, metric = task["name"], task["metric"]
        values = [result["metrics"][name][metric] for result in results]
        references = [results[0]["references"][kind][name][metric] for kind in ("linear", "constant")]
        unit = " ".join(filter(None, [metric, task["unit"], "↑" if task["higher_is_better"] else "↓"]))
        values = f"**{np.mean(values):.3g}** [{min(values):.3g}, {max(values):.3g}]"
        lines.append(f"| {name} | {unit} | {values} | {references[0]:.3g} | {references[1]:.3g} |")
    for key in ("slot_diversity", "retrieve_entropy", "write_entropy", "readout_cosine", "update_ratio"):
        if all(result["diagnostics"] is None for result in results):  # no KEM
            break
        found = [needed(result, "diagnostics")[key] for result in results]
        if all(value is not None for value in found):
            cells = f"{np.mean(found):.3f} [{min(found):.3f}, {max(found):.3f}]"
            lines.append(f"| {DASH} | {key} | {cells} | {DASH} | {DASH} |")
    return "\n".join(lines)


def side_by_side(runs: Mapping[str, Sequence[dict[str, Any]]], config: str = "scenes") -> str:
    """Headline metrics of several configurations; delta_m and the last validation loss over the first, by seed."""
    tasks = build_tasks(read_config(config, ()))
    first = next(iter(runs.values()))
    heads = [(task["name"], task["metric"], "↑" if task["higher_is_better"] else "↓") for task in first[0]["tasks"]]
    titles = [*(" ".join(head) for head in heads), "Δm %", "by seed", "validation loss", "over none", "by seed"]
    lines = ["| | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    for name, results in runs.items():
        cells = [shown(spread([found["metrics"][task][metric] for found in results])) for task, metric, _ in heads]
        losses = [found["validation_loss"] for found in results]
        gains = [delta_m(one["metrics"], other["metrics"], tasks) for one, other in zip(results, first, strict=True)]
        above = [loss - other["validation_loss"] for loss, other in zip(losses, first, strict=True)]
        if results is first:
            cells += [DASH, DASH, shown(spread(losses), 4), DASH, DASH]
        else:
            cells += [interval(spread(gains)), ", ".join(f"{gain:+.2f}" for gain in gains)]
            cells += [shown(spread(losses), 4), interval(spread(above)), ", ".join(f"{x:+.2f}" for x in above)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def by_task(runs: Mapping[str, Sequence[dict[str, Any]]], config: str = "scenes", over: str = "") -> str:
    """Each task's relative gain over one configuration (by default the first) in %, above 0 is better, by pairs of the
    same seed."""
    tasks = build_tasks(read_config(config, ()))
    over = over or next(iter(runs))
    lines = ["| | " + " | ".join(task.name for task in tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    for name in runs:
        if name != over:
            cells = [_gain(runs[name], runs[over], task) for task in tasks]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def over_fewer_tasks(summaries: Sequence[Mapping[str, Any]], config: str = "scenes") -> str:
    """`over_fewer` by method (rows) and comparison (columns) after the first, which has the fewest tasks."""
    fewest, *others = summaries
    lines = ["| | " + " | ".join(f"{number_of_tasks(found)} tasks" for found in others) + " |"]
    lines.append("|---" * (len(others) + 1) + "|")
    for name in fewest["runs"]:
        lines.append(f"| {name} | " + " | ".join(over_fewer(found, fewest, name, config) for found in others) + " |")
    return "\n".join(lines)


def over_fewer(found: Mapping[str, Any], fewest: Mapping[str, Any], name: str, config: str = "scenes") -> str:
    """A method's delta_m in % over itself in a comparison with fewer tasks, by pairs of the same seed: what the tasks
    beside cost it."""
    tasks = build_tasks(read_config(config, ()))
    pairs = zip(found["runs"][name], fewest["runs"][name], strict=True)
    return interval(spread([delta_m(one["metrics"], other["metrics"], tasks) for one, other in pairs]))


def task_gain(runs: Mapping[str, Sequence[dict[str, Any]]], name: str, task: str, over: str) -> str:
    """One cell of `by_task`, of scenes."""
    (found,) = (each for each in build_tasks(read_config("scenes", ())) if each.name == task)
    return _gain(runs[name], runs[over], found)


def _gain(results: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], task: Task) -> str:
    pairs = zip(results, others, strict=True)
    return interval(spread([delta_m(one["metrics"], other["metrics"], [task]) for one, other in pairs]))


def gates(results: Sequence[dict[str, Any]]) -> str:
    """The size of each task's gate: mean over the seeds and, in brackets, lowest and highest."""
    found = [needed(result, "diagnostics", "task_gates") for result in results]
    lines = ["| " + " | ".join(found[0]) + " |", "|---" * len(found[0]) + "|"]
    sizes = [[abs(gate[task]) for gate in found] for task in found[0]]
    lines.append("| " + " | ".join(f"{np.mean(s):.2f} [{min(s):.2f}, {max(s):.2f}]" for s in sizes) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
