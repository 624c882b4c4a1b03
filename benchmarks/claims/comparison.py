"""Tables of a comparison: per method the scores, what it gains over another method by seed, and its diagnostics."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from scipy import stats

from benchmarks.claims.runs import Method
from benchmarks.measure import DASH, select
from sgw_jax.evaluation.metrics import delta_m
from sgw_jax.tasks.base import Task

SINGLE = "single_"  # prefix of the runs of one task
NUMBERS = (
    "slot_diversity",
    "retrieve_entropy",
    "write_entropy",
    "readout_cosine",
    "selection_stability",
    "selection_between_images",
    "update_ratio",
)


def single_task_models(tasks: Sequence[Task]) -> dict[str, Method]:
    """The networks of one task, under the names by which `summarise` finds them."""
    return {SINGLE + task.name: ("none", {"tasks": task.name}) for task in tasks}


def summarise(found: Mapping[str, Sequence[Mapping[str, Any]]], tasks: Sequence[Task]) -> dict[str, Any]:
    """Per method: each task's headline metric, by seed; delta_m against the single-task models (if there are any) and
    against "none" of the same seed."""
    singles = [
        {task.name: found[SINGLE + task.name][seed]["metrics"][task.name] for task in tasks}
        for seed in range(len(found.get(SINGLE + tasks[0].name, ())))
    ]
    rows = []
    for name, runs in found.items():
        if name.startswith(SINGLE):
            continue
        none = [] if name == "none" else [run["metrics"] for run in found.get("none", ())]
        others = {"delta_m": singles, "over_none": none}
        gains = {
            key: spread([delta_m(run["metrics"], other, tasks) for run, other in zip(runs, metrics, strict=True)])
            if metrics
            else None
            for key, metrics in others.items()
        }
        rows.append(
            {
                "name": name,
                "parameters": runs[0]["parameters"],
                "images_per_second": speed_of(runs),
                **gains,
                "tasks": {
                    task.name: spread([run["metrics"][task.name][task.metric] for run in runs]) for task in tasks
                },
                "diagnostics": diagnostics_of(runs, tasks),
            }
        )
    single = {task.name: spread([values[task.name][task.metric] for values in singles]) for task in tasks if singles}
    heads = [
        {
            "name": task.name,
            "metric": task.metric,
            "unit": task.units.get(task.metric, ""),
            "better": "↑" if task.higher_is_better else "↓",
        }
        for task in tasks
    ]
    return {"tasks": heads, "methods": rows, "single": single}


def speed_of(runs: Sequence[Mapping[str, Any]]) -> float | None:
    """Images per second, the median over the seeds; None where they ran on devices of several kinds."""
    devices = {run["environment"]["device"] for run in runs}
    return statistics.median(run["images_per_second"] for run in runs) if len(devices) == 1 else None


def diagnostics_of(runs: Sequence[Mapping[str, Any]], tasks: Sequence[Task]) -> dict[str, Any] | None:
    """The module's numbers, and what delta_m loses when its read-out is zeroed or another image's."""
    if any(run["diagnostics"] is None for run in runs):
        return None
    numbers = {
        key: spread([run["diagnostics"][key] for run in runs])
        for key in NUMBERS
        if all(run["diagnostics"][key] is not None for run in runs)
    }
    for name in ("zeroed", "swapped"):
        changed = [delta_m(run["diagnostics"]["ablations"][name]["metrics"], run["metrics"], tasks) for run in runs]
        numbers[f"delta_m with the read-out {name}"] = spread(changed)
    return numbers


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for one value) and the values."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "std": deviation, "values": list(values)}


def interval(value: Mapping[str, Any] | None) -> str:
    """mean and, in brackets, its 95 % confidence interval by Student's t: normal values, one per seed.

    Among several rows whose true gain is 0, one in twenty lies outside its interval by chance.
    """
    if value is None:
        return DASH
    count = len(value["values"])
    if count < 2:
        return f"{value['mean']:+.2f}"
    half = stats.t.ppf(0.975, count - 1) * value["std"] / count**0.5
    return f"{value['mean']:+.2f} [{value['mean'] - half:+.2f}, {value['mean'] + half:+.2f}]"


def shown(value: Mapping[str, Any] | None, digits: int = 3) -> str:
    """mean ± standard deviation."""
    if value is None:
        return DASH
    deviation = "" if value["std"] is None else f" ± {value['std']:.2g}"
    return f"{value['mean']:.{digits}g}{deviation}"


def speed(value: float | None) -> str:
    """Images per second, in digits that tell slow ones apart too."""
    return DASH if value is None else f"{value:.0f}" if value >= 10 else f"{value:.2g}"


def markdown(summary: Mapping[str, Any]) -> str:
    """The summary as Markdown tables."""
    heads = [f"{t['name']} {t['metric']} {t['unit']} {t['better']}" for t in summary["tasks"]]
    lines = ["| method | parameters | images/s | " + " | ".join(heads) + " | Δm vs single % | Δm vs none % |"]
    lines.append("|---" * (len(heads) + 5) + "|")
    for row in summary["methods"]:
        cells = [shown(row["tasks"][task["name"]]) for task in summary["tasks"]]
        start = [row["name"], f"{row['parameters']:,}", speed(row["images_per_second"])]
        lines.append("| " + " | ".join([*start, *cells, interval(row["delta_m"]), interval(row["over_none"])]) + " |")
    if summary["single"]:
        single = [shown(summary["single"][task["name"]]) for task in summary["tasks"]]
        lines.append("| " + " | ".join(["single-task models", DASH, DASH, *single, "0", DASH]) + " |")
    measured = [row for row in summary["methods"] if row["diagnostics"]]
    if measured:
        lines += ["", "| | " + " | ".join(row["name"] for row in measured) + " |", "|---" * (len(measured) + 1) + "|"]
        for key in dict.fromkeys(key for row in measured for key in row["diagnostics"]):
            lines.append(f"| {key} | " + " | ".join(shown(row["diagnostics"].get(key)) for row in measured) + " |")
    return "\n".join(lines)


def gain(summary: Mapping[str, Any], name: str, over: str = "over_none") -> str:
    """A method's gain over "none", or by ``over="delta_m"`` over the single-task models."""
    (row,) = select(summary["methods"], name=name)
    return interval(row[over])


def by_number_of_tasks(summaries: Sequence[Mapping[str, Any]]) -> str:
    """The gain over "none" alone: a row per method, a column per summary, headed by its number of tasks, distractors
    too."""
    names = dict.fromkeys(row["name"] for summary in summaries for row in summary["methods"] if row["name"] != "none")
    lines = ["| | " + " | ".join(f"{number_of_tasks(summary)} tasks" for summary in summaries) + " |"]
    lines.append("|---" * (len(summaries) + 1) + "|")
    for name in names:
        rows = [{row["name"]: row for row in summary["methods"]}.get(name) for summary in summaries]
        cells = [DASH if row is None else interval(row["over_none"]) for row in rows]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def number_of_tasks(summary: Mapping[str, Any]) -> int:
    """Of a comparison's networks, with those that are not scored."""
    return len(summary["tasks"]) + summary.get("distractors", 0)


def who_reads_whom(summary: Mapping[str, Any], name: str) -> str:
    """Markdown: the size of a method's gates of pairs, mean over the seeds: what each task (row) reads of another's
    slots (column), 1 being all of it."""
    runs = [run["diagnostics"] for run in summary["runs"][name]]
    sizes = np.mean([np.abs(found["pair_gates"]) for found in runs], axis=0)
    tasks = runs[0]["tasks"]
    lines = ["| reads | " + " | ".join(tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    lines += [
        f"| {task} | " + " | ".join(f"{size:.2f}" for size in row) + " |"
        for task, row in zip(tasks, sizes, strict=True)
    ]
    return "\n".join(lines)


def page(summary: Mapping[str, Any]) -> str:
    """The summary as one self-contained page."""
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=folder, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    template.filters.update({"shown": shown, "interval": interval, "speed": speed})
    extent = max(
        (abs(value) for row in summary["methods"] for value in (row["over_none"] or {"values": []})["values"]),
        default=1,
    )
    return template.get_template("compare.html.jinja").render(**summary, extent=max(extent, 0.1))
