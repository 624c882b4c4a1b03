"""Sums over pixels at many thresholds, bins or classes."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


def sums_one_by_one(of_images: Callable[[Any], Any], each: Any) -> Any:
    """The sums over all pixels at each threshold, bin or class of ``each``, one after the other.

    Nothing of size pixels x thresholds exists, and no scatter, which a TPU does slowly. The loop ends before the batch
    is summed up: of a batch that lies on several devices it needs nothing from another device, and they speak once
    afterwards instead of at every threshold.

    Args:
      of_images: one of ``each`` -> a tree of each image's sums (batch,).
      each: a tree of arrays (number, ...).

    Returns:
      The tree of sums (number,), of the same types.
    """
    sums = jax.lax.map(of_images, each)
    return jax.tree.map(lambda values: jnp.sum(values, axis=1, dtype=values.dtype), sums)


def count_of_images(mask: Bool[Array, "batch height width"]) -> Int[Array, " batch"]:
    """How many are true in each image, in int32 (`count` is that of all)."""
    return jnp.sum(mask, axis=(1, 2), dtype=jnp.int32)
