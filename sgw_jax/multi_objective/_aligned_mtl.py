"""Aligned-MTL: the gradients replaced by the nearest orthogonal system, of one common length."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.multi_objective._solvers import eigen, orthogonalise
from sgw_jax.multi_objective.gramian import standardise

SCALES = ("min", "median", "rmse")
RANK = 1e-5  # eigenvalues of the cosines up to this count as zero: float32 resolves those above to some percent


def aligned_mtl_weights(
    gramian: Float[Array, "tasks tasks"],
    *,
    preference: Float[Array, " tasks"] | None = None,
    scale: Literal["min", "median", "rmse"] = "min",
    mask: Bool[Array, " tasks"] | None = None,
) -> Float[Array, " tasks"]:
    """``w = sigma G^(-1/2) p`` on the span of the gradients (Senushkin et al. 2023, arXiv 2305.19000).

    sigma^2 is the smallest ("min"), the lower median ("median") or the mean ("rmse") of the non-zero eigenvalues of G.

    G = D C D by lengths and cosines; with C = V L V', the singular vectors of L^(1/2) V' D are found by one-sided
    Jacobi [ours], so that rows may be 1e6 times shorter than others: an eigenproblem of G loses them in rounding.

    Preference: sums to 1. Cost: two eigenproblems of T x T, of 10 sweeps each. Scale: equalises the principal
    directions of the gradients; the update is as short as the weakest of them ("min"), so a short or a near-collinear
    gradient shrinks it. Promise: a condition number of 1; weights may be negative. At stationarity, and for dependent
    rows, a direction is cut as zero when its eigenvalue of C is below 1e-5 (rows that depend on each other up to a
    relative noise of 3e-3): finite, but the choice jumps there. Use it for conflicting tasks of similar scale; not with
    rows much shorter than others, to which "min" shrinks the whole update.

    Args:
      gramian: G (T, T) of the tasks' gradients.
      preference: (T,), not negative; None: equal ones.
      scale: which eigenvalue becomes the common one, as above.
      mask: (T,), False for tasks without labels in the batch; their weight is 0.

    Returns:
      The weights (T,), in the tasks' order.

    Raises:
      ValueError: an unknown scale; a Gramian that is not square; a preference or mask of another length.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import weights
    >>> gramian = jnp.array([[1.0, -1.0], [-1.0, 4.0]])  # two tasks in conflict
    >>> [round(float(weight), 2) for weight in jax.jit(weights.aligned_mtl)(gramian)]
    [0.56, 0.31]
    """
    if scale not in SCALES:
        raise InputError(f"aligned_mtl: scale is {scale!r}; it must be one of {SCALES}.")
    found = standardise(gramian, preference, mask, 0.0, "one")
    largest = jnp.max(jnp.where(found.active, found.norms, 0), initial=1e-30)
    lengths = jnp.where(found.active, found.norms / largest, 0)
    values, vectors = eigen(found.cosines)  # of tasks that do not take part: unit vectors, of length 0
    roots = jnp.sqrt(jnp.where(values > RANK, values, 1))
    basis = jnp.where(values > RANK, vectors, 0)
    wanted = jnp.where(found.active, found.preference, 0)
    columns, along = orthogonalise((basis * roots).T * lengths, wanted[None])
    sizes = jnp.sqrt(jnp.sum(columns**2, 0))
    rank = jnp.maximum(jnp.sum(values > RANK) - jnp.sum(~found.active), 0)
    order = jnp.sort(sizes, descending=True)
    last = order[jnp.maximum(rank - 1, 0)]
    kept = (sizes >= last) & (rank > 0) & (sizes > 0)
    common = {
        "min": lambda: last,
        "median": lambda: order[rank // 2],
        "rmse": lambda: jnp.sqrt(jnp.sum(jnp.where(kept, sizes**2, 0)) / jnp.maximum(rank, 1)),
    }[scale]()
    turned = jnp.where(kept, along[0] / jnp.where(kept, sizes, 1), 0)
    update = common * jnp.einsum("ij,j->i", columns, turned, precision="highest")  # in an orthonormal basis
    weights = jnp.einsum("ij,j->i", basis / roots, update, precision="highest")
    weights = weights / jnp.where(found.active, lengths, 1)
    return jnp.where(found.active, weights, found.preference)
