"""Exact evaluation: sums added over all batches of a split, then values."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.evaluation.metrics import add_all, added
from sgw_jax.sharding import global_batch
from sgw_jax.tasks.base import Task


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    metrics: {task: {metric: value}}; per_class: {task: {class: IoU in %}} for tasks with classes; losses: {task: mean
    loss over all labelled pixels} (a loss that balances itself by batch depends on the batch size); loss: their sum by
    the tasks' weights, by which the best checkpoint is chosen: it is defined for every task and needs no baseline.
    sources: of a mixture what is found on each source alone, of the tasks that have labels there.
    """

    metrics: dict[str, dict[str, float]]
    per_class: dict[str, dict[str, float]]
    losses: dict[str, float]
    loss: float
    sources: "dict[str, Evaluation]" = dataclasses.field(default_factory=dict)

    def flat(self) -> dict[str, float]:
        """One level of names, for metrics.jsonl: "loss", "loss/TASK", "TASK/METRIC"; of a source with "/SOURCE" behind,
        but for the weighted sum, which is of other tasks in each."""
        found = {"loss": self.loss, **self._named()}
        for source, alone in self.sources.items():
            found |= {f"{name}/{source}": value for name, value in alone._named().items()}
        return found

    def _named(self) -> dict[str, float]:
        named = {f"{task}/{name}": value for task, values in self.metrics.items() for name, value in values.items()}
        return {f"loss/{task}": value for task, value in self.losses.items()} | named


def evaluate(
    eval_step: Callable[[Any, Mapping[str, Any]], dict[str, Any]],
    variables: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: Mesh,
    tasks: Sequence[Task],
) -> Evaluation:
    """Metrics of a whole split, exact on any number of devices and processes: sums are added, never means.

    ``eval_step`` (jitted) returns the sums of a global batch, the same on every process; the host adds them in int64
    and float64 and fetches them one batch late, so the device never waits for it.
    """
    return evaluation_of(evaluation_sums(eval_step, variables, batches, mesh), tasks)


def evaluation_sums(
    eval_step: Callable[[Any, Mapping[str, Any]], dict[str, Any]],
    variables: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: Mesh,
) -> dict[str, Any]:
    """The sums that `evaluate` makes an evaluation of; those of several sources add up by `add_sums`."""
    total = add_all(eval_step(variables, global_batch(batch, mesh)) for batch in batches)
    if total is None:
        raise InputError("evaluate: there were no batches; the split is empty.")
    return total


def evaluation_of_mixture(sums: Mapping[str, Mapping[str, Any]], tasks: Sequence[Task]) -> Evaluation:
    """What the `evaluation_sums` of each source say of all, and of each on the tasks that it has labels of."""
    whole = evaluation_of(added(sums.values()), tasks)
    labelled = {name: [task for task in tasks if total[task.name]["count"] > 0] for name, total in sums.items()}
    return dataclasses.replace(whole, sources={name: evaluation_of(sums[name], own) for name, own in labelled.items()})


def evaluation_of(total: Mapping[str, Any], tasks: Sequence[Task]) -> Evaluation:
    """The metrics and losses that the sums amount to."""
    metrics = {task.name: task.metric_values(total[task.name]["metrics"]) for task in tasks}
    losses = {task.name: float(total[task.name]["loss"] / max(total[task.name]["count"], 1)) for task in tasks}
    return Evaluation(
        metrics=metrics,
        per_class={t.name: c for t in tasks if (c := t.per_class(total[t.name]["metrics"]))},
        losses=losses,
        loss=float(sum(task.weight * losses[task.name] for task in tasks)),
    )
