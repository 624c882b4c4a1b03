"""Scores of decoded maps, anybody's, with the tasks' own metrics: what evaluation computes, without a network."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from rich.console import Console

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.progress import counted
from sgw_jax.evaluation import boundary
from sgw_jax.evaluation.edge_scores import LEVELS, framed, scores_of
from sgw_jax.evaluation.metrics import add_all
from sgw_jax.evaluation.saliency_scores import means_of, no_sums, sums_of
from sgw_jax.experiment.experiment import Boundary
from sgw_jax.tasks.base import Sums, Task
from sgw_jax.tasks.calibration import ECE
from sgw_jax.tasks.mask import labelled

Maps = Mapping[str, np.ndarray]
Pairs = Callable[[Sequence[str]], Iterable[tuple[Maps, Maps]]]


@dataclasses.dataclass(frozen=True)
class Scores:
    """metrics: {task: {metric: value}}; per_class: {task: {class: IoU in %}} for tasks with classes."""

    metrics: dict[str, dict[str, float]]
    per_class: dict[str, dict[str, float]]


def score(
    tasks: Sequence[Task], pairs: Pairs, matching: Boundary, *, total: int | None = None, console: Console | None = None
) -> Scores:
    """Metrics of a split, each image at its labels' size: sums of single images added, one jitted step per size.

    A task says by `from_decoded` what raw prediction a map stands for. ODS, OIS and AP (`boundary_scores`, if
    `matching.max_dist` is given) and the saliency measures (`scores_images`) take the probabilities as they are: 8 bits
    stay 8 bits. Labels have no calibration error: they do not say how sure they are, nor do scores of unknown scale.

    Args:
      pairs: task names -> (decoded maps by task, labels by task as the loader has them) of each image. A task of
        boundaries has them read once more, when all have been read and found right.
      matching: of boundaries.
      total, console: for the progress bar.

    Raises ValueError without images.
    """
    by_image = {task.name: no_sums() for task in tasks if task.scores_images}

    @jax.jit
    def step(predictions: Mapping[str, jax.Array], targets: Mapping[str, jax.Array]) -> dict[str, Sums]:
        return {task.name: task.metric_sums(predictions[task.name], targets[task.name]) for task in tasks}

    def sums() -> Iterator[dict[str, Any]]:
        for maps, labels in counted(pairs([task.name for task in tasks]), "score", total, console):
            raw = {task.name: task.from_decoded(maps[task.name][None]) for task in tasks}
            yield step(raw, {task.name: labels[task.name][None] for task in tasks})
            for task in tasks:
                if task.name in by_image:
                    wide = _wide(maps[task.name])
                    by_image[task.name] += sums_of(wide, labels[task.name].reshape(wide.shape), _published(task))

    added = add_all(sums())
    if added is None:
        raise InputError("score: there are no images; the split is empty.")
    metrics = {task.name: task.metric_values(added[task.name]) for task in tasks}
    for task in tasks:
        if task.target["kind"] == "labels":
            metrics[task.name].pop(ECE, None)
        if task.boundary_scores and matching.max_dist is not None:
            metrics[task.name] |= _boundaries(task, pairs, matching, total, console)
        if task.name in by_image:
            metrics[task.name] |= means_of(*by_image[task.name])
    return Scores(metrics, {task.name: found for task in tasks if (found := task.per_class(added[task.name]))})


def _boundaries(
    task: Task, pairs: Pairs, matching: Boundary, total: int | None, console: Console | None
) -> dict[str, float]:
    published = _published(task)

    def images() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for maps, labels in pairs([task.name]):
            probability, target = maps[task.name], labels[task.name].reshape(maps[task.name].shape)
            if published and probability.dtype != np.uint8:
                probability = np.floor(LEVELS * probability).astype(np.uint8)
            if np.any(labelled(target)):
                yield framed(probability, target)

    options = dataclasses.asdict(matching)
    options["suppressed"] = options.pop("suppress") or published
    return scores_of(boundary.counts_of(images(), console=console, total=total, **options), published)


def _published(task: Task) -> bool:
    return task.protocol == "published"


def _wide(probability: np.ndarray) -> np.ndarray:
    return probability / LEVELS if probability.dtype == np.uint8 else probability.astype(np.float64)
