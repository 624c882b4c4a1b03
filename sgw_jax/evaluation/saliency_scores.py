"""Saliency measures of a network over a whole split: predictions to the host, means over all processes' images."""

from collections.abc import Iterable, Mapping
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.sharding import Mesh

from sgw_jax.evaluation.edge_scores import framed, probabilities
from sgw_jax.evaluation.saliency import LEVELS, ImageScores, image_scores
from sgw_jax.sharding import over_processes
from sgw_jax.tasks.base import Task
from sgw_jax.tasks.mask import labelled

Batch = Mapping[str, Any]
# Name -> (unit, whether more is better).
SCORES = {
    "image_mae": ("", False),
    "s_measure": ("%", True),
    "weighted_f": ("%", True),
    "adaptive_f": ("%", True),
    "image_max_f": ("%", True),
    "image_mean_f": ("%", True),
    "adaptive_e": ("%", True),
    "max_e": ("%", True),
    "mean_e": ("%", True),
}
FIELDS = ImageScores._fields


def saliency_scores(
    model: nn.Module, variables: Any, batches: Iterable[Batch], mesh: Mesh, *, task: Task
) -> dict[str, float]:
    """`SCORES`, in percent but for the error, as means over the images of what `image_scores` finds of each.

    An image is cut to the frame of its labelled pixels, which undoes padding; images without any label are left out.
    Each process scores the images that its devices predicted, at the labels' size.

    Args:
      batches: as `eval_batches` yields them; rows without an item do not count.
      task: with its protocol "published" probabilities are cut down to 8 bits first, as the field saves them.
    """
    return means_of(*saliency_sums(model, variables, batches, mesh, task=task))


def saliency_sums(model: nn.Module, variables: Any, batches: Iterable[Batch], mesh: Mesh, *, task: Task) -> np.ndarray:
    """What `saliency_scores` makes means of: the `sums_of` all processes' images, added."""
    total = no_sums()
    with jax.set_mesh(mesh):
        for probability, labels in probabilities(model, variables, batches, mesh, task):
            total += sums_of(probability, labels, task.protocol == "published")
    return over_processes(total)


WIDTHS = tuple(LEVELS + 1 if name.endswith("curve") else 1 for name in FIELDS)


def no_sums() -> np.ndarray:
    """(2, n) zeros: what `sums_of` images is added to."""
    return np.zeros((2, sum(WIDTHS)))


def sums_of(probability: np.ndarray, labels: np.ndarray, published: bool) -> np.ndarray:
    """(2, n): the scores of one image in a row, 0 where undefined, and where they are defined; zeros without labels."""
    if not np.any(labelled(labels)):
        return no_sums()
    scores = image_scores(*_as_saved(published, *framed(probability, labels)))
    row = np.concatenate([np.atleast_1d(value) for value in scores])
    return np.stack([np.nan_to_num(row, nan=0.0), ~np.isnan(row)])


def _as_saved(
    published: bool, probability: np.ndarray, target: np.ndarray, ignored: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The probability in float64, in 8 bits under `published`; the others as they are."""
    levels = np.floor(np.float32(LEVELS) * probability)
    wide = probability.astype(np.float64)
    return levels.astype(np.float64) / LEVELS if published else wide, target, ignored


def means_of(sums: np.ndarray, numbers: np.ndarray) -> dict[str, float]:
    """`SCORES` of the added `sums_of`."""
    means = np.divide(sums, numbers, out=np.full(len(sums), np.nan), where=numbers > 0)
    found = dict(zip(FIELDS, np.split(means, np.cumsum(WIDTHS)[:-1]), strict=True))
    values = {
        "image_mae": found["mae"],
        "image_max_f": found["f_curve"].max(),
        "image_mean_f": found["f_curve"].mean(),
        "max_e": found["e_curve"].max(),
        "mean_e": found["e_curve"].mean(),
        **{name: found[name] for name in ("s_measure", "weighted_f", "adaptive_f", "adaptive_e")},
    }
    return {name: float(np.squeeze(values[name])) * (100 if unit else 1) for name, (unit, _) in SCORES.items()}
