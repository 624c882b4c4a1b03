"""Reference predictors that see no context: a constant, and a linear probe on a pixel's colour and position.

Both are one least-squares fit. With phi the features of a pixel and y its `task.regression_target`, the weights are
W = (sum phi phi^T)^+ (sum phi y^T) over the valid pixels, and the raw prediction is `task.from_regression(phi W)`,
which then goes through the task's own metrics. "constant" has phi = [1] and so predicts class frequencies (hence the
majority class), the mean depth, the mean normal, the base rate. "linear" has phi = [1, r, g, b, x, y]: the normalised
image and the position in it, in [-1, 1]. What a network gains over these comes from context.

Images are taken at their own size, one at a time: beside the batch in hand, memory is that of one image, however many
there are. Several processes add their sums, so that all of them find what one would.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.evaluation.metrics import add_all
from sgw_jax.sharding import over_processes
from sgw_jax.tasks.base import Task

Batch = Mapping[str, Any]
Size = tuple[int, int]


def constant_features(image: np.ndarray, size: Size) -> np.ndarray:
    """(height, width, 3) -> (height, width, 1): ones."""
    del size
    return np.ones((*image.shape[:2], 1))


def linear_features(image: np.ndarray, size: Size) -> np.ndarray:
    """(height, width, 3) -> (height, width, 6): 1, r, g, b, x, y, with x to the right and y down.

    The image has this size and lies in the upper left corner; positions beyond it are 1.
    """
    y, x = np.ones(image.shape[0]), np.ones(image.shape[1])
    y[: size[0]], x[: size[1]] = np.linspace(-1, 1, size[0]), np.linspace(-1, 1, size[1])
    x, y = np.broadcast_arrays(x, y[:, None])
    ones = constant_features(image, size)
    return np.concatenate([ones, image, x[..., None], y[..., None]], axis=-1, dtype=np.float64)


FEATURES: dict[str, Callable[[np.ndarray, Size], np.ndarray]] = {
    "constant": constant_features,
    "linear": linear_features,
}


@dataclasses.dataclass(frozen=True)
class Probe:
    """A fitted reference predictor: the name of its features and, per task, float64 weights (features, channels)."""

    features: str
    weights: dict[str, np.ndarray]


def fit(
    batches: Iterable[Batch],
    tasks: Sequence[Task],
    features: str = "linear",
    stride: int = 4,
    block: int | None = None,
) -> Probe:
    """Fits all tasks in one pass over `batches` ({"image": ..., task name: target}, as `eval_batches` yields them).

    Only every `stride`-th row and column is read, from the first on: with at most six features, the pixels of a few
    hundred images determine the weights, and their neighbours say the same. The normal equations are summed in
    float64 on the host and solved by the pseudo-inverse, so that features which do not vary, and tasks without a
    label, get the solution of least norm (zero). There is no ridge.

    Args:
      block: which block of the batches' rows this process has, see `sharding.over_processes`.

    Raises ValueError for unknown features and for a stride below 1.
    """
    if features not in FEATURES:
        raise InputError(f"probe: features are {features!r}; choose one of {sorted(FEATURES)}.")
    if stride < 1:
        raise InputError(f"probe: stride is {stride}; give an integer >= 1.")
    widths = {task.name: task.channels for task in tasks}
    known = len(FEATURES[features](np.zeros((1, 1, 3)), (1, 1))[0, 0])
    gram = {name: np.zeros((known, known)) for name in widths}
    moment = {name: np.zeros((known, width)) for name, width in widths.items()}
    target_of = {task.name: jax.jit(task.regression_target) for task in tasks}
    empty = True
    for image, targets, size in _images(batches, tasks):
        empty = False
        phi = FEATURES[features](image, size)[::stride, ::stride]
        for task in tasks:
            sparse = np.ascontiguousarray(targets[task.name][None, ::stride, ::stride])
            values, mask = (np.asarray(array)[0] for array in target_of[task.name](sparse))
            seen = phi[mask]
            gram[task.name] += seen.T @ seen
            moment[task.name] += seen.T @ values[mask].astype(np.float64)
    if empty:
        raise InputError("probe: there are no batches to fit; give at least one.")
    gram, moment = over_processes((gram, moment), block)
    return Probe(features, {n: np.linalg.pinv(g, rcond=1e-12, hermitian=True) @ moment[n] for n, g in gram.items()})


def evaluate(
    probe: Probe, batches: Iterable[Batch], tasks: Sequence[Task], block: int | None = None
) -> dict[str, dict[str, float]]:
    """{task name: metrics} of the fitted predictor over all pixels of `batches`, by the tasks' own metrics.

    Args:
      block: as of `fit`.
    """
    total = sums_of(probe, batches, tasks, block)
    return {task.name: task.metric_values(total[task.name]) for task in tasks}


def sums_of(probe: Probe, batches: Iterable[Batch], tasks: Sequence[Task], block: int | None = None) -> dict[str, Any]:
    """{task name: metric sums}, from which `evaluate` has the metrics."""
    metric_sums = jax.jit(
        lambda values, target, task: task.metric_sums(task.from_regression(values), target), static_argnums=2
    )

    def sums() -> Iterator[dict[str, Any]]:
        for image, targets, size in _images(batches, tasks):
            phi = FEATURES[probe.features](image, size)
            yield {
                task.name: metric_sums(_product(phi, probe.weights[task.name])[None], targets[task.name][None], task)
                for task in tasks
            }

    total = add_all(sums())
    if total is None:
        raise InputError("probe: there are no batches to evaluate; give at least one.")
    return over_processes(total, block)


def _product(phi: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """phi W, in float64 row by row of the image, kept in float32: of many classes it is the largest array here."""
    values = np.empty((*phi.shape[:2], weights.shape[1]), np.float32)
    for row, features in zip(values, phi, strict=True):
        row[:] = features @ weights
    return values


def _images(batches: Iterable[Batch], tasks: Sequence[Task]) -> Iterator[tuple[np.ndarray, Batch, Size]]:
    """(image, targets, the image's size) of every row; rows without an item, of nothing but ignored labels, too."""
    for batch in batches:
        for row, image in enumerate(np.asarray(batch["image"])):
            height, width = batch["geometry"][row, 4:] if "geometry" in batch else image.shape[:2]
            yield image, {task.name: np.asarray(batch[task.name])[row] for task in tasks}, (int(height), int(width))
