"""Aligned-MTL: the gradients replaced by the nearest orthogonal system, of one common length."""

from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sgw_jax.multi_objective._weighting import WeightedAggregator, from_weighting, stateless
from sgw_jax.multi_objective.gramian import standardise

SCALES = ("min", "median", "rmse")
RANK = 1e-5  # eigenvalues below this share of the largest count as zero: what float32 Gramians resolve


def aligned_mtl_weights(
    gramian: Float[Array, "tasks tasks"],
    *,
    preference: Float[Array, " tasks"] | None = None,
    scale: Literal["min", "median", "rmse"] = "min",
    mask: Bool[Array, " tasks"] | None = None,
) -> Float[Array, " tasks"]:
    """``w = sigma G^(-1/2) p`` on the span of the gradients (Senushkin et al. 2023, arXiv 2305.19000).

    sigma^2 is the smallest ("min"), the lower median ("median") or the mean ("rmse") of the non-zero eigenvalues of G.

    Preference: sums to 1. Cost: one symmetric eigenproblem of T x T. Scale: equalises the principal directions of the
    gradients; the update is as short as the weakest of them ("min"), so near-collinear gradients shrink it. Promise: a
    condition number of 1; weights may be negative. At stationarity the smallest eigenvalue is cut as zero when it is
    below 1e-5 of the largest: finite, but the choice jumps there. Use it for conflicting tasks of similar scale; not
    with rows 300 times shorter than the longest, which that cut drops.

    Raises:
      ValueError: an unknown scale.
    """
    if scale not in SCALES:
        raise ValueError(f"aligned_mtl: scale is {scale!r}; it must be one of {SCALES}.")
    found = standardise(gramian, preference, mask, 0.0, "one")
    both = found.active[:, None] & found.active[None, :]
    matrix = jnp.where(both, gramian.astype(found.cosines.dtype), 0)
    unit = jnp.maximum(jnp.max(jnp.diagonal(matrix)), jnp.finfo(matrix.dtype).tiny)
    values, vectors = jnp.linalg.eigh(matrix / unit)
    kept = values > RANK * jnp.max(values)
    rank = jnp.sum(kept)
    tasks = len(values)
    common = {
        "min": lambda: jnp.min(jnp.where(kept, values, jnp.inf)),
        "median": lambda: values[tasks - rank + jnp.maximum(rank - 1, 0) // 2],  # ascending: the kept ones are last
        "rmse": lambda: jnp.sum(jnp.where(kept, values, 0)) / jnp.maximum(rank, 1),
    }[scale]()
    factors = jnp.where(kept, jnp.sqrt(common / jnp.where(kept, values, 1)), 0)
    weights = jnp.einsum("ik,k,jk,j->i", vectors, factors, vectors, found.preference, precision="highest")
    return jnp.where(found.active, weights, found.preference)


def aligned_mtl(num_tasks: int | None = None, **options: Any) -> WeightedAggregator:
    """The aggregator of `aligned_mtl_weights`."""
    return from_weighting(stateless(aligned_mtl_weights, **options), num_tasks)
