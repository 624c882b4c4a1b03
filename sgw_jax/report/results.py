"""What a run found: a checkpoint evaluated, described and drawn, as results.json, report.html and examples.png."""

import dataclasses
import json
import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from rich.console import Console

from sgw_jax.data_pipelines import consoles
from sgw_jax.data_pipelines.atomic import replacing, write_atomically
from sgw_jax.data_pipelines.errors import files_named
from sgw_jax.data_pipelines.progress import counted
from sgw_jax.evaluation import probe
from sgw_jax.evaluation.diagnostics import diagnose
from sgw_jax.evaluation.edge_scores import SCORES, edge_counts, scores_of
from sgw_jax.evaluation.evaluate import Evaluation
from sgw_jax.evaluation.examples import collect_examples
from sgw_jax.evaluation.metrics import added, mean_gain
from sgw_jax.evaluation.saliency_scores import SCORES as SALIENCY_SCORES
from sgw_jax.evaluation.saliency_scores import means_of, saliency_sums
from sgw_jax.experiment.experiment import Data, Experiment, flatten
from sgw_jax.pictures.gallery import gallery
from sgw_jax.report.page import write_report
from sgw_jax.report.record import (
    Diagnostics,
    Metrics,
    Results,
    SourceResults,
    Speed,
    TaskDescription,
    read_results,
    read_value,
)
from sgw_jax.report.tables import print_table
from sgw_jax.run.logs import read_metrics
from sgw_jax.run.saved_run import open_run
from sgw_jax.run.state import restored_state
from sgw_jax.run.steps import compiled_eval_step, evaluate_split
from sgw_jax.tasks.base import Task
from sgw_jax.train_step import TrainState

PACKAGES = ("sgw_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
REFERENCES = ("constant", "linear")
EXAMPLES = 4  # test images drawn in the report

Sums = TypeVar("Sums")


def finish(
    experiment: Experiment, workdir: Path, split: str, which: str | int, speed: Mapping[str, float], console: Console
) -> Results:
    """Evaluates a checkpoint on a split, prints the table and writes results.json, report.html and examples.png.

    The files of another split than "test" carry its name.

    Args:
      which: "best", "last" or a step.   speed: the fields of `Speed`, or empty: as an earlier results.json tells.
    """
    with open_run(workdir, which) as run:
        state = restored_state(experiment, run.checkpoints, run.step)
    measured = Speed(**speed) if speed else earlier_speed(workdir)
    with jax.set_mesh(experiment.mesh):
        found = evaluate(experiment, state, split, console)
        predicted = reference_predictors(experiment, split, console)
        diagnostics = diagnosis(experiment, state, split)
        pictures = examples(experiment, state, split)
    references, delta_m = compared(experiment, found, predicted[""])
    results = Results(
        name=f"{experiment.config.interaction} on {experiment.config.data.source}",
        step=int(state.step),
        protocol=experiment.config.protocol,
        split=split,
        tasks=[describe(task, found.metrics[task.name]) for task in experiment.tasks],
        metrics=found.metrics,
        losses=found.losses,
        per_class=found.per_class,
        references=references,
        delta_m=delta_m,
        diagnostics=diagnostics,
        parameters=count_parameters(state.params),
        environment=environment(experiment),
        config=flatten(experiment.config.to_dict()),
        identity=experiment.identity(),
        checkpoint=which if isinstance(which, str) else "chosen",
        speed=measured,
        sources={
            name: source_results(
                experiment, alone, len(experiment.data.by_source(split)[name].sources[split]), predicted[name]
            )
            for name, alone in found.sources.items()
        },
    )
    print_table(consoles.results(console), results)
    if jax.process_index() == 0:
        write(results, pictures, workdir, console)
    return results


def compared(
    experiment: Experiment, found: Evaluation, references: Mapping[str, Metrics]
) -> tuple[dict[str, Metrics], dict[str, float]]:
    """The references' metrics of the tasks that were evaluated, and the mean gain over each."""
    tasks = [task for task in experiment.tasks if task.name in found.metrics]
    own = {name: {task.name: values[task.name] for task in tasks} for name, values in references.items()}
    return own, {name: mean_gain(found.metrics, values, tasks) for name, values in own.items()}


def source_results(
    experiment: Experiment, found: Evaluation, images: int, references: Mapping[str, Metrics]
) -> SourceResults:
    """The record of one source of a mixture."""
    own, delta_m = compared(experiment, found, references)
    return SourceResults(images, found.metrics, found.losses, found.per_class, own, delta_m)


def earlier_speed(workdir: Path) -> Speed | None:
    """The training speed that the run's results.json tells of: evaluating again measures none."""
    path = workdir / "results.json"
    return read_results(path).speed if path.exists() else None


def evaluate(experiment: Experiment, state: TrainState, split: str, console: Console) -> Evaluation:
    """Metrics of the split, with what is computed on the host of boundaries and of saliency where that is asked for."""
    found = evaluate_split(experiment, compiled_eval_step(experiment), state, split)
    for task in experiment.tasks:
        if task.boundary_scores and experiment.boundary.max_dist is not None:
            found = with_scores(found, task, boundary_scores(experiment, state, task, split, console))
        if task.scores_images:
            found = with_scores(found, task, scores_by_image(experiment, state, task, split))
    return found


def with_scores(found: Evaluation, task: Task, scores: Mapping[str, dict[str, float]]) -> Evaluation:
    """The evaluation with a task's further scores by source, under "" those of all."""

    def more(known: Evaluation, source: str) -> Evaluation:
        if task.name not in known.metrics:
            return known
        return dataclasses.replace(
            known, metrics={**known.metrics, task.name: known.metrics[task.name] | scores[source]}
        )

    return dataclasses.replace(more(found, ""), sources={name: more(own, name) for name, own in found.sources.items()})


def by_source(
    data: Data, split: str, measure: Callable[[Data], Sums], join: Callable[[list[Sums]], Sums]
) -> dict[str, Sums]:
    """What is measured on a split, under "": of a mixture on each source by its name, and those joined."""
    parts = data.by_source(split)
    found = {name: measure(part) for name, part in (parts or {"": data}).items()}
    return {**found, "": join(list(found.values()))}


def boundary_scores(
    experiment: Experiment, state: TrainState, task: Task, split: str, console: Console
) -> dict[str, dict[str, float]]:
    """ODS, OIS and AP of a task of boundaries, by source."""

    def counts(data: Data) -> np.ndarray:
        with data.evaluation(split) as batches:
            return edge_counts(
                experiment.model,
                state.variables,
                batches,
                experiment.mesh,
                task=task,
                total=len(data.sources[split]),
                console=console,
                **dataclasses.asdict(experiment.boundary),
            )

    found = by_source(experiment.data, split, counts, np.concatenate)
    return {name: scores_of(own, task.protocol == "published") for name, own in found.items()}


def scores_by_image(experiment: Experiment, state: TrainState, task: Task, split: str) -> dict[str, dict[str, float]]:
    """The saliency measures that are means over images, by source."""

    def sums(data: Data) -> np.ndarray:
        with data.evaluation(split) as batches:
            return saliency_sums(experiment.model, state.variables, batches, experiment.mesh, task=task)

    found = by_source(experiment.data, split, sums, lambda parts: np.sum(parts, axis=0))
    return {name: means_of(*own) for name, own in found.items()}


def reference_predictors(experiment: Experiment, split: str, console: Console) -> dict[str, dict[str, Metrics]]:
    """The constant predictor and the linear probe on colour and position, fitted on the training split, by source."""
    data, tasks = experiment.data, experiment.tasks
    metrics: dict[str, dict[str, Metrics]] = {}
    for features in counted(REFERENCES, "reference predictors", len(REFERENCES), console):
        with data.evaluation("train", "own") as batches:
            fitted = probe.fit(batches, tasks, features, block=data.block[0])

        def sums(part: Data, fitted: probe.Probe = fitted) -> dict[str, Any]:
            with part.evaluation(split, "own") as batches:
                return probe.sums_of(fitted, batches, tasks, block=data.block[0])

        for name, total in by_source(data, split, sums, added).items():
            found = {task.name: task.metric_values(total[task.name]) for task in tasks}
            metrics.setdefault(name, {})[features] = found
    return metrics


def diagnosis(experiment: Experiment, state: TrainState, split: str) -> Diagnostics | None:
    """What the interaction does on the split; None where it is not a KEM."""
    with experiment.data.evaluation(split) as batches:
        found = diagnose(experiment.model, state.variables, batches, experiment.mesh, experiment.tasks)
    return read_value(Diagnostics | None, found, "diagnose")


def examples(experiment: Experiment, state: TrainState, split: str) -> dict[str, Any]:
    """Pictures for the report: the split's first images, of a mixture some of every source, as the network sees them,
    predictions, truth and what the slots read; and the images' sources."""
    data, sources = experiment.data.examples(split, EXAMPLES)
    with data.evaluation(split, "network") as batches:
        batch = next(iter(batches))
    found = collect_examples(experiment.model, state.variables, batch, experiment.mesh, experiment.tasks, len(sources))
    return {**found, "sources": sources}


def describe(task: Task, metrics: Mapping[str, float]) -> TaskDescription:
    """The task, for who reads its metrics."""
    measured = {**dict.fromkeys(SCORES, ("%", True)), **SALIENCY_SCORES}  # on the host
    measured = {name: about for name, about in measured.items() if name in metrics}
    return TaskDescription(
        name=task.name,
        metric=task.metric,
        unit=task.units.get(task.metric, ""),
        higher_is_better=task.higher_is_better,
        units=task.units | {name: unit for name, (unit, _) in measured.items()},
        directions=task.directions | {name: up for name, (_, up) in measured.items()},
    )


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


def write(results: Results, pictures: Mapping[str, Any], workdir: Path, console: Console) -> None:
    """Writes the numbers, the page and the examples, each whole."""
    suffix = "" if results.split == "test" else f"_{results.split}"
    numbers, page = workdir / f"results{suffix}.json", workdir / f"report{suffix}.html"
    with files_named(f"--workdir={workdir}"):
        write_atomically(numbers, json.dumps(results.to_dict(), indent=1, allow_nan=False))
        write_report(page, results, pictures, read_metrics(workdir / "metrics.jsonl"))
        with replacing(workdir / f"examples{suffix}.png") as temporary:
            gallery(pictures, max(2, len(results.sources))).save(temporary, "PNG")
    consoles.results(console).print(f"Report: {page}   numbers: {numbers}", soft_wrap=True)
