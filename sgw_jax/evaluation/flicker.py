"""Flicker: how much predictions change between two frames that show the same."""

import math

import numpy as np

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.tasks.base import Task


def flicker(task: Task, before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """The mean change of a task's decoded maps over the pixels; 0 is a prediction that stands still.

    Both maps are of the same things at the same pixels: a scene that does not move, or frames brought over each other.
    It says nothing of whether a prediction is right.

    Args:
      task: of the maps.
      before: a decoded map, or several frames of it along leading axes.
      after: the map, or maps, that follow.

    Returns:
      By the kind of the task:
        labels: "changed", percent of the pixels with another label.
        depth, disparity: "absolute", mean |a - b| in the map's unit; "relative", percent that the sum of |a - b| is of
        the sum of (a + b) / 2.
        vectors: "angle", the mean angle in degrees.
        mask: "absolute", mean |a - b|, of probabilities.

    Raises:
      ValueError: maps of different shapes; a task of another kind.

    >>> import numpy as np
    >>> from sgw_jax import TASKS
    >>> from sgw_jax.evaluation.flicker import flicker
    >>> flicker(TASKS["depth"](), np.array([[1.0, 3.0]]), np.array([[1.5, 3.0]]))
    {'absolute': 0.25, 'relative': 11.76470588235294}
    """
    if before.shape != after.shape:
        raise InputError(f"flicker: maps of {task.name} have shapes {before.shape} and {after.shape}; give equal ones.")
    kind = task.target["kind"]
    if kind == "labels":
        return {"changed": 100 * float(np.mean(before != after))}
    a, b = before.astype(np.float64), after.astype(np.float64)
    absolute = float(np.mean(np.abs(a - b)))
    if kind in ("depth", "disparity"):
        level = float(np.mean(a + b)) / 2
        return {"absolute": absolute, "relative": 100 * absolute / level if level else math.nan}
    if kind == "vectors":
        # Not the arc cosine of the product, which near 0 degrees has no digits left.
        angle = 2 * np.arctan2(np.linalg.norm(a - b, axis=-1), np.linalg.norm(a + b, axis=-1))
        return {"angle": math.degrees(float(np.mean(angle)))}
    if kind == "mask":
        return {"absolute": absolute}
    raise InputError(
        f"flicker: task {task.name} is of kind {kind!r}; known are labels, depth, disparity, vectors, mask."
    )
