"""Metric sums added on the host, and delta_m, the one number that compares multi-task with single-task results."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.tasks.base import Task


def add_sums(total: Any | None, new: Any) -> Any:
    """total + new, leaf by leaf, in int64 and float64; None as the total of nothing.

    `new` is any pytree of sums, such as one task's `metric_sums` or {task name: metric_sums}. A batch's int32 counts
    and float32 sums are small enough to be right; those of a data set are not, so the adding happens here, on the host.

    Raises ValueError when the two have different keys or shapes.
    """
    new = jax.tree.map(_wide, new)
    if total is None:
        return new
    old_keys, new_keys = str(jax.tree.structure(total)), str(jax.tree.structure(new))
    if old_keys != new_keys:
        raise InputError(f"Sums of structure {new_keys} cannot be added to sums of structure {old_keys}.")
    return jax.tree.map(_add, total, new)


def add_all(sums: Iterable[Any]) -> Any | None:
    """The total of an iterable of sums that lie on the device; None if there were none.

    Each is fetched once the next has been dispatched, so the device never waits for the host.
    """
    total: Any | None = None
    waiting: Any | None = None
    for new in sums:
        if waiting is not None:
            total = add_sums(total, jax.device_get(waiting))
        waiting = new
    return total if waiting is None else add_sums(total, jax.device_get(waiting))


def delta_m(
    results: Mapping[str, Mapping[str, float]], baselines: Mapping[str, Mapping[str, float]], tasks: Iterable[Task]
) -> float:
    """100 / T * sum over the T tasks of (-1)^l (M - B) / B, in percent; positive means better than the baselines.

    M and B are a task's headline metric (`task.metric`); l = 1 where lower is better (Vandenhende et al., "Multi-Task
    Learning for Dense Prediction Tasks: A Survey", eq. 10). A result that is NaN, because there was nothing to measure,
    makes delta_m NaN.

    Args:
      results: M, {task name: {metric: value}}.
      baselines: B, likewise; in the same units.
      tasks: which to compare, at least one.

    Returns:
      Percent.

    Raises:
      ValueError: no tasks; a task or its metric that is missing on either side; a baseline that is zero or not finite.

    >>> from sgw_jax import TASKS, delta_m
    >>> tasks = [TASKS["depth"](), TASKS["semseg"]()]
    >>> single = {"depth": {"rmse": 1.0}, "semseg": {"miou": 40.0}}
    >>> round(delta_m({"depth": {"rmse": 0.9}, "semseg": {"miou": 42.0}}, single, tasks), 6)
    7.5
    """
    gains = []
    for task in tasks:
        value = _headline(results, task, "results")
        baseline = _headline(baselines, task, "baselines")
        if not math.isfinite(baseline) or baseline == 0:
            raise InputError(
                f"delta_m: the baseline of task {task.name!r} has {task.metric} = {baseline}; a relative gain needs a "
                "finite baseline other than zero."
            )
        gains.append(_gain(value, baseline, task.higher_is_better))
    if not gains:
        raise InputError("delta_m: there are no tasks; give at least one.")
    return 100 * math.fsum(gains) / len(gains)


def relative_gain(value: float, baseline: float, higher_is_better: bool) -> float:
    """One term of delta_m, in percent; NaN where it is not defined."""
    if not math.isfinite(value) or not math.isfinite(baseline) or baseline == 0:
        return math.nan
    return 100 * _gain(value, baseline, higher_is_better)


def mean_gain(
    results: Mapping[str, Mapping[str, float]], baselines: Mapping[str, Mapping[str, float]], tasks: Iterable[Task]
) -> float:
    """delta_m over the tasks for which it is defined; NaN where there is none."""
    usable = [
        task
        for task in tasks
        if not math.isnan(
            relative_gain(
                _headline(results, task, "results"), _headline(baselines, task, "baselines"), task.higher_is_better
            )
        )
    ]
    return delta_m(results, baselines, usable) if usable else math.nan


def _gain(value: float, baseline: float, higher_is_better: bool) -> float:
    return (1 if higher_is_better else -1) * (value - baseline) / baseline


def _headline(results: Mapping[str, Mapping[str, float]], task: Task, side: str) -> float:
    if task.name not in results:
        raise InputError(f"delta_m: {side} have no task {task.name!r}; they have {sorted(results)}.")
    if task.metric not in results[task.name]:
        raise InputError(
            f"delta_m: {side} of task {task.name!r} have no {task.metric!r}; they have {sorted(results[task.name])}."
        )
    return float(results[task.name][task.metric])


def _wide(leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    return array.astype(np.int64 if np.issubdtype(array.dtype, np.integer) else np.float64)


def _add(total: np.ndarray, new: np.ndarray) -> np.ndarray:
    if total.shape != new.shape:
        raise InputError(f"Sums of shape {new.shape} cannot be added to sums of shape {total.shape}.")
    return total + new
