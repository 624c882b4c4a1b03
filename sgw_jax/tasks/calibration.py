"""Calibration: whether of the pixels that a task is 80 % sure of 80 % are right."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sgw_jax.tasks.base import ratio
from sgw_jax.tasks.one_by_one import sums_one_by_one
from sgw_jax.tasks.thresholds import float32_at_least

ECE = "ece"  # the metric; comparisons over all metrics leave it out, for it says nothing of how good a map is
BINS = 15


def calibration_sums(
    confidence: Float[Array, "batch height width"],
    right: Bool[Array, "batch height width"],
    valid: Bool[Array, "batch height width"],
) -> Float[Array, " bins"]:
    """What adds up to the expected calibration error: by bin, the sum of (right - confidence) over the valid pixels.

    Bin b of the 15 holds the confidences in [b / 15, (b + 1) / 15), the last one 1 too. The sums are float32 of
    differences, which in a calibrated bin cancel: nothing grows with the pixels as it would in their two parts.
    """
    edges = float32_at_least(np.arange(BINS) / BINS)
    gap = jnp.where(valid, right - confidence, 0)

    def sum_of(bounds: tuple[Array, Array]) -> Array:
        return jnp.sum(jnp.where((confidence >= bounds[0]) & (confidence < bounds[1]), gap, 0), axis=(1, 2))

    return sums_one_by_one(sum_of, (jnp.asarray(edges), jnp.asarray(np.append(edges[1:], np.float32(np.inf)))))


def calibration_error(gaps: Any, pixels: int) -> float:
    """sum_b n_b / n |accuracy_b - confidence_b| in percent (ECE, Guo et al. 2017), of the sums of all batches.

    With n_b (accuracy_b - confidence_b) the sum of a bin. NaN without pixels.
    """
    return 100 * ratio(np.sum(np.abs(np.asarray(gaps, np.float64))), pixels)
