"""Exact evaluation: sums added over all batches of a split, then values."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.evaluation.metrics import add_all
from sgw_jax.sharding import global_batch
from sgw_jax.tasks.base import Task


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    metrics: {task: {metric: value}}; per_class: {task: {class: IoU in %}} for tasks with classes; losses: {task: mean
    loss over all labelled pixels} (a loss that balances itself by batch depends on the batch size); loss: their sum by
    the tasks' weights, by which the best checkpoint is chosen: it is defined for every task and needs no baseline.
    """

    metrics: dict[str, dict[str, float]]
    per_class: dict[str, dict[str, float]]
    losses: dict[str, float]
    loss: float

    def flat(self) -> dict[str, float]:
        """One level of names, for metrics.jsonl."""
        named = {f"{task}/{name}": value for task, values in self.metrics.items() for name, value in values.items()}
        return {"loss": self.loss, **{f"loss/{task}": value for task, value in self.losses.items()}, **named}


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
    total = add_all(eval_step(variables, global_batch(batch, mesh)) for batch in batches)
    if total is None:
        raise InputError("evaluate: there were no batches; the split is empty.")
    metrics = {task.name: task.metric_values(total[task.name]["metrics"]) for task in tasks}
    losses = {task.name: float(total[task.name]["loss"] / max(total[task.name]["count"], 1)) for task in tasks}
    return Evaluation(
        metrics=metrics,
        per_class={t.name: c for t in tasks if (c := t.per_class(total[t.name]["metrics"]))},
        losses=losses,
        loss=float(sum(task.weight * losses[task.name] for task in tasks)),
    )
