"""What a run found: metrics, references, diagnostics, environment, as a table, results.json and report.html."""

import dataclasses
import json
import math
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console
from rich.progress import track

from sgw_jax.data_pipelines.errors import InputError, files_named
from sgw_jax.evaluation import probe
from sgw_jax.evaluation.diagnostics import collect_examples, diagnose
from sgw_jax.evaluation.edge_scores import SCORES, edge_scores
from sgw_jax.evaluation.evaluate import Evaluation
from sgw_jax.evaluation.metrics import delta_m
from sgw_jax.experiment.experiment import Experiment, flatten
from sgw_jax.pictures.gallery import gallery
from sgw_jax.report.page import write_report
from sgw_jax.report.tables import print_table
from sgw_jax.run.logs import read_metrics, write_atomically
from sgw_jax.run.saved_run import open_run
from sgw_jax.run.state import restored_state
from sgw_jax.run.steps import evaluate_split
from sgw_jax.sharding import replicated
from sgw_jax.tasks import Edges
from sgw_jax.tasks.base import Task
from sgw_jax.train_step import TrainState, make_eval_step

PACKAGES = ("sgw_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
EXAMPLES = 4  # test images drawn in the report


def finish(
    experiment: Experiment, workdir: Path, split: str, which: str, speed: dict[str, float], console: Console
) -> dict[str, Any]:
    """Evaluates a checkpoint on a split, prints the table and writes results.json, report.html and examples.png.

    The files of another split than "test" carry its name.
    """
    with open_run(workdir, which) as run:
        state = restored_state(experiment, run.checkpoints, run.step)
    with jax.set_mesh(experiment.mesh):
        eval_step = jax.jit(
            make_eval_step(experiment.model, experiment.tasks), out_shardings=replicated(experiment.mesh)
        )
        found = evaluate_split(experiment, eval_step, state.variables, split)
        add_edge_scores(experiment, state, found, split, console)
        results = gather(experiment, state, found, split, console)
        results |= {"checkpoint": which, "speed": speed or earlier_speed(workdir)}
        pictures = examples(experiment, state, split)
    print_table(console, results)
    if jax.process_index() == 0:
        suffix = "" if split == "test" else f"_{split}"
        numbers = json.dumps(without_nan(results), indent=1, allow_nan=False)
        with files_named(f"--workdir={workdir}"):
            write_atomically(workdir / f"results{suffix}.json", numbers)
            write_report(workdir / f"report{suffix}.html", results, pictures, read_metrics(workdir / "metrics.jsonl"))
            gallery(pictures).save(workdir / f"examples{suffix}.png")
        console.print(f"Report: {workdir / f'report{suffix}.html'}   numbers: {workdir / f'results{suffix}.json'}")
    return results


def add_edge_scores(experiment: Experiment, state: TrainState, found: Evaluation, split: str, console: Console) -> None:
    """Writes ODS, OIS and AP into the metrics of every edge task, where the configuration asks for them."""
    settings = experiment.boundary
    for task in experiment.tasks:
        if isinstance(task, Edges) and settings.max_dist is not None:
            with experiment.data.evaluation(split) as batches:
                found.metrics[task.name] |= edge_scores(
                    experiment.model,
                    state.variables,
                    batches,
                    experiment.mesh,
                    task=task.name,
                    length=len(experiment.data.sources[split]),
                    published=task.protocol == "published",
                    console=console,
                    **dataclasses.asdict(settings),
                )


def earlier_speed(workdir: Path) -> dict[str, float]:
    """The training speed that the run's results.json tells of: evaluating again measures none."""
    path = workdir / "results.json"
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))["speed"]
    except (ValueError, KeyError) as error:
        raise InputError(f"{path} is damaged ({error}); remove it to evaluate again.") from error


def without_nan(value: Any) -> Any:
    """The same data with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def gather(
    experiment: Experiment, state: TrainState, found: Evaluation, split: str, console: Console
) -> dict[str, Any]:
    """Everything about the state on one split; metrics of the reference predictors stand beside the network's."""
    references = reference_predictors(experiment, split, console)
    with experiment.data.evaluation(split) as batches:
        diagnostics = diagnose(
            experiment.model,
            state.variables,
            batches,
            experiment.mesh,
            experiment.tasks,
            length=len(experiment.data.sources[split]),
        )
    return {
        "name": f"{experiment.config.interaction} on {experiment.config.data.source}",
        "step": int(state.step),
        "protocol": experiment.config.protocol,
        "split": split,
        "tasks": [
            {
                "name": task.name,
                "metric": task.metric,
                "unit": task.units.get(task.metric, ""),
                "higher_is_better": task.higher_is_better,
                "units": task.units | {name: "%" for name in SCORES if name in found.metrics[task.name]},
            }
            for task in experiment.tasks
        ],
        "metrics": found.metrics,
        "losses": found.losses,
        "per_class": found.per_class,
        "references": references,
        "delta_m": {
            name: relative_gain(found.metrics, values, experiment.tasks) for name, values in references.items()
        },
        "diagnostics": diagnostics,
        "parameters": count_parameters(state.params),
        "environment": environment(experiment),
        "config": flatten(experiment.config.to_dict()),
        "identity": experiment.identity(),
    }


def examples(experiment: Experiment, state: TrainState, split: str) -> dict[str, Any]:
    """Pictures for the report: the split's first images, predictions, truth and what the slots read."""
    with experiment.data.evaluation(split) as batches:
        batch = next(iter(batches))
    count = min(EXAMPLES, len(experiment.data.sources[split]))
    return collect_examples(experiment.model, state.variables, batch, experiment.mesh, experiment.tasks, count)


def reference_predictors(
    experiment: Experiment, split: str, console: Console
) -> dict[str, dict[str, dict[str, float]]]:
    """The constant predictor and the linear probe on colour and position, fitted on the training split."""
    found = {}
    for features in track(("constant", "linear"), "reference predictors", console=console, transient=True):
        with experiment.data.evaluation("train") as batches:
            fitted = probe.fit(batches, experiment.tasks, features)
        with experiment.data.evaluation(split) as batches:
            found[features] = probe.evaluate(fitted, batches, experiment.tasks)
    return found


def relative_gain(metrics: dict, baselines: dict, tasks: Sequence[Task]) -> float | None:
    """delta_m over the tasks whose baseline is finite and not zero; None if there is none."""
    usable = [
        task
        for task in tasks
        if math.isfinite(baselines[task.name][task.metric])
        and baselines[task.name][task.metric] != 0
        and math.isfinite(metrics[task.name][task.metric])
    ]
    return delta_m(metrics, baselines, usable) if usable else None


def count_parameters(params: Any) -> dict[str, int]:
    """Parameters of the whole and of its parts."""

    def part(name: str) -> str:
        return name.split("_", 1)[0] if "_" in name else name

    counts: dict[str, int] = {"total": 0}
    for name, subtree in params.items():
        size = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(subtree))
        counts[part(name)] = counts.get(part(name), 0) + size
        counts["total"] += size
    return counts


def environment(experiment: Experiment) -> dict[str, str]:
    """Versions, devices and mesh."""
    devices = jax.devices()
    return {
        "python": platform.python_version(),
        **{name: metadata.version(name) for name in PACKAGES},
        "devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})",
        "processes": str(jax.process_count()),
        "mesh": ", ".join(f"{axis} {size}" for axis, size in experiment.mesh.shape.items()),
    }
