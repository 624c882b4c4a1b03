"""Metric sums added on the host, and what compares results over tasks: delta_m and the mean rank."""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.tasks.base import Task
from sgw_jax.tasks.calibration import ECE


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


def added(sums: Iterable[Any]) -> Any:
    """The total of sums that lie on the host, at least one of them; see `add_sums`."""
    return functools.reduce(add_sums, sums, None)


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
    gains = [_task_gain(results, baselines, task, task.metric, task.higher_is_better, "delta_m") for task in tasks]
    if not gains:
        raise InputError("delta_m: there are no tasks; give at least one.")
    return 100 * math.fsum(gains) / len(gains)


def delta_m_of_all(
    results: Mapping[str, Mapping[str, float]],
    baselines: Mapping[str, Mapping[str, float]],
    tasks: Iterable[Task],
    metrics: Mapping[str, Sequence[str]] | None = None,
) -> float:
    """delta_m with the mean gain over a task's metrics in place of its headline's (LibMTL's), in percent.

    Args:
      results, baselines, tasks: as in `delta_m`.
      metrics: {task name: names of its metrics}; None = all in `task.directions`, which say also which way is better,
        but for the calibration error, which is of the network's doubts and not of its maps.
        LibMTL takes miou and pixel_accuracy, abs_err and abs_rel, and mean, median, within_11.25, within_22.5 and
        within_30.

    Returns:
      Percent.

    Raises:
      ValueError: as `delta_m` does, of each metric; a metric without a direction; a task without metrics.
    """
    gains = []
    for task, names in _chosen(tasks, metrics, "delta_m_of_all"):
        found = [_task_gain(results, baselines, task, name, task.directions[name], "delta_m_of_all") for name in names]
        gains.append(math.fsum(found) / len(found))
    return 100 * math.fsum(gains) / len(gains)


def mean_ranks(
    methods: Mapping[str, Mapping[str, Mapping[str, float]]],
    tasks: Iterable[Task],
    metrics: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, float]:
    """Each method's mean rank over the metrics of all tasks, 1 being the best (MR of Navon et al. 2022).

    Methods that tie share the mean of their ranks. A value that is NaN makes its method's mean NaN and stands behind
    all others.

    Args:
      methods: {method: {task name: {metric: value}}}.
      tasks: which to compare, at least one.
      metrics: {task name: names of its metrics}; None = the headlines.

    Returns:
      {method: mean rank}.

    Raises:
      ValueError: no methods or tasks; a task or a metric that is missing or has no direction.
    """
    if not methods:
        raise InputError("mean_ranks: there are no methods; give at least one.")
    tasks = tuple(tasks)
    headlines = {task.name: (task.metric,) for task in tasks}
    ranks: dict[str, list[float]] = {method: [] for method in methods}
    for task, names in _chosen(tasks, headlines if metrics is None else metrics, "mean_ranks"):
        for name in names:
            sign = -1 if task.directions[name] else 1
            values = {m: sign * _value(found, task, name, m, "mean_ranks") for m, found in methods.items()}
            for method, value in values.items():
                better = sum(other < value for other in values.values())
                equal = sum(other == value for other in values.values())
                ranks[method].append(better + (equal + 1) / 2 if equal else math.nan)
    return {method: math.fsum(found) / len(found) for method, found in ranks.items()}


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


def _chosen(
    tasks: Iterable[Task], metrics: Mapping[str, Sequence[str]] | None, caller: str
) -> list[tuple[Task, Sequence[str]]]:
    """(task, its metrics to compare), each with a direction; all of its maps' where `metrics` is None."""
    chosen: list[tuple[Task, Sequence[str]]] = []
    for task in tasks:
        compared = tuple(name for name in task.directions if name != ECE)
        names = compared if metrics is None else tuple(metrics.get(task.name, ()))
        if not names:
            raise InputError(f"{caller}: metrics name none of task {task.name!r}; give at least one.")
        for name in names:
            if name not in task.directions:
                raise InputError(
                    f"{caller}: task {task.name!r} does not say whether a larger {name!r} is better; it does of "
                    f"{sorted(task.directions)}."
                )
        chosen.append((task, names))
    if not chosen:
        raise InputError(f"{caller}: there are no tasks; give at least one.")
    return chosen


def _task_gain(
    results: Mapping[str, Mapping[str, float]],
    baselines: Mapping[str, Mapping[str, float]],
    task: Task,
    metric: str,
    higher_is_better: bool,
    caller: str,
) -> float:
    value = _value(results, task, metric, "results", caller)
    baseline = _value(baselines, task, metric, "baselines", caller)
    if not math.isfinite(baseline) or baseline == 0:
        raise InputError(
            f"{caller}: the baseline of task {task.name!r} has {metric} = {baseline}; a relative gain needs a "
            "finite baseline other than zero."
        )
    return _gain(value, baseline, higher_is_better)


def _headline(results: Mapping[str, Mapping[str, float]], task: Task, side: str) -> float:
    return _value(results, task, task.metric, side, "delta_m")


def _value(results: Mapping[str, Mapping[str, float]], task: Task, metric: str, side: str, caller: str) -> float:
    if task.name not in results:
        raise InputError(f"{caller}: {side} have no task {task.name!r}; they have {sorted(results)}.")
    if metric not in results[task.name]:
        raise InputError(
            f"{caller}: {side} of task {task.name!r} have no {metric!r}; they have {sorted(results[task.name])}."
        )
    return float(results[task.name][metric])


def _wide(leaf: Any) -> np.ndarray:
    array = np.asarray(leaf)
    return array.astype(np.int64 if np.issubdtype(array.dtype, np.integer) else np.float64)


def _add(total: np.ndarray, new: np.ndarray) -> np.ndarray:
    if total.shape != new.shape:
        raise InputError(f"Sums of shape {new.shape} cannot be added to sums of shape {total.shape}.")
    return total + new
