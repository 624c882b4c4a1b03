"""Reference predictors that see no context: a constant, and a linear probe on a pixel's colour and position.

Both are one least-squares fit. With phi the features of a pixel and y its `task.regression_target`, the weights are
W = (sum phi phi^T)^+ (sum phi y^T) over the valid pixels, and the raw prediction is `task.from_regression(phi W)`,
which then goes through the task's own metrics. "constant" has phi = [1] and so predicts class frequencies (hence the
majority class), the mean depth, the mean normal, the base rate. "linear" has phi = [1, r, g, b, x, y]: the image as
the model sees it and the position in [-1, 1]. What a network gains over these comes from context.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.evaluation.metrics import add_sums
from sgw_jax.tasks.base import Task

Batch = Mapping[str, Any]


def constant_features(image: np.ndarray) -> np.ndarray:
    """(batch, height, width, 3) -> (batch, height, width, 1): ones."""
    return np.ones((*image.shape[:-1], 1))


def linear_features(image: np.ndarray) -> np.ndarray:
    """(batch, height, width, 3) -> (batch, height, width, 6): 1, r, g, b, x, y, with x to the right and y down."""
    y, x = (np.linspace(-1, 1, size) for size in image.shape[1:3])
    x, y = (np.broadcast_to(axis, image.shape[:-1]) for axis in (x, y[:, None]))
    return np.concatenate([constant_features(image), image, x[..., None], y[..., None]], axis=-1, dtype=np.float64)


FEATURES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"constant": constant_features, "linear": linear_features}


@dataclasses.dataclass(frozen=True)
class Probe:
    """A fitted reference predictor: the name of its features and, per task, float64 weights (features, channels)."""

    features: str
    weights: dict[str, np.ndarray]


def fit(batches: Iterable[Batch], tasks: Sequence[Task], features: str = "linear", stride: int = 4) -> Probe:
    """Fits all tasks in one pass over `batches` ({"image": ..., task name: target}, as the loader yields them).

    Only every `stride`-th row and column is read, from the first on: with at most six features, the pixels of a few
    hundred images determine the weights, and their neighbours say the same. The normal equations are summed in
    float64 on the host and solved by the pseudo-inverse, so that features which do not vary, and tasks without a
    label, get the solution of least norm (zero). There is no ridge.

    Raises ValueError for unknown features and for a stride below 1.
    """
    if features not in FEATURES:
        raise InputError(f"probe: features are {features!r}; choose one of {sorted(FEATURES)}.")
    if stride < 1:
        raise InputError(f"probe: stride is {stride}; give an integer >= 1.")
    gram: dict[str, Any] = {task.name: 0.0 for task in tasks}
    moment: dict[str, Any] = {task.name: 0.0 for task in tasks}
    for batch in batches:
        phi = FEATURES[features](np.asarray(batch["image"]))[:, ::stride, ::stride]
        for task in tasks:
            target = jnp.asarray(batch[task.name][:, ::stride, ::stride])
            values, mask = (np.asarray(array) for array in task.regression_target(target))
            seen = phi[mask]
            gram[task.name] += seen.T @ seen
            moment[task.name] += seen.T @ values[mask].astype(np.float64)
    if not all(isinstance(g, np.ndarray) for g in gram.values()):
        raise InputError("probe: there are no batches to fit; give at least one.")
    return Probe(features, {n: np.linalg.pinv(g, rcond=1e-12, hermitian=True) @ moment[n] for n, g in gram.items()})


def evaluate(probe: Probe, batches: Iterable[Batch], tasks: Sequence[Task]) -> dict[str, dict[str, float]]:
    """{task name: metrics} of the fitted predictor over all pixels of `batches`, by the tasks' own metrics."""
    metric_sums = jax.jit(
        lambda values, target, task: task.metric_sums(task.from_regression(values), target), static_argnums=2
    )
    total = None
    for batch in batches:
        phi = FEATURES[probe.features](np.asarray(batch["image"]))
        sums = {
            task.name: metric_sums((phi @ probe.weights[task.name]).astype(np.float32), batch[task.name], task)
            for task in tasks
        }
        total = add_sums(total, sums)
    if total is None:
        raise InputError("probe: there are no batches to evaluate; give at least one.")
    return {task.name: task.metric_values(total[task.name]) for task in tasks}
