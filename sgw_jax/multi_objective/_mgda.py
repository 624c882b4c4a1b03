"""MGDA: the shortest vector in the convex hull of the gradients."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.multi_objective._solvers import non_negative_qp
from sgw_jax.multi_objective.gramian import standardise

NORMALISATIONS = ("none", "l2", "loss", "loss+")


def mgda_weights(
    gramian: Float[Array, "tasks tasks"],
    *,
    preference: Float[Array, " tasks"] | None = None,
    eps: float = 1e-6,
    mask: Bool[Array, " tasks"] | None = None,
    normalisation: Literal["none", "l2", "loss", "loss+"] = "none",
    losses: Float[Array, " tasks"] | None = None,
) -> Float[Array, " tasks"]:
    """``argmin_{w in simplex} w' G w`` (Desideri 2012; Sener and Koltun 2018, arXiv 1810.04650).

    Found as x / sum x of the quadratic program ``min_{x >= 0} x' G x / 2 - p' x``, whose solution is a multiple of it.

    ``normalisation`` divides the rows first: by their norm ("l2"), by the loss, or by both ("loss+"); the weights
    returned are for the rows as they are.

    Preference: sums to T; p_i divides row i, so that a task with twice the preference is descended twice as fast, and
    one of preference 0 has weight 0.
    Cost: one quadratic program. Scale: with "none" the smallest gradient decides; use "l2" to be rid of that. Promise:
    no conflict; the update is zero exactly at Pareto-stationary points, so also where one task alone is done (a zero
    gradient of a present task gets all the weight; under "l2" it is left out). Use it for its theory; not where
    training must go on when one task is done, as it slows down to its slowest task.

    Args:
      gramian: G (T, T) of the tasks' gradients.
      preference: (T,), not negative; None: equal ones.
      eps: added to the diagonal of the cosines; it bounds the weights of collinear gradients.
      mask: (T,), False for tasks without labels in the batch; their weight is 0.
      normalisation: what the rows are divided by first, as above.
      losses: L (T,); for "loss" and "loss+" alone.

    Returns:
      The weights (T,), in the tasks' order.

    Raises:
      ValueError: an unknown normalisation; "loss" or "loss+" without losses; a Gramian that is not square; a
        preference or mask of another length.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import weights
    >>> gramian = jnp.array([[1.0, -1.0], [-1.0, 4.0]])  # two tasks in conflict
    >>> [round(float(weight), 2) for weight in jax.jit(weights.mgda)(gramian)]
    [0.71, 0.29]
    """
    if normalisation not in NORMALISATIONS:
        raise InputError(f"mgda: normalisation is {normalisation!r}; it must be one of {NORMALISATIONS}.")
    if "loss" in normalisation and losses is None:
        raise InputError(f"mgda: normalisation {normalisation!r} needs losses.")
    found = standardise(gramian, preference, mask, eps, "count")
    divisor = found.norms if normalisation in ("l2", "loss+") else jnp.ones_like(found.norms)
    if losses is not None and "loss" in normalisation:
        divisor = divisor * jnp.where(found.active, losses, 1)
    wanted = found.preference > 0
    taking = found.active & wanted
    divisor = divisor * jnp.where(wanted, found.preference, 1)
    reach = divisor / found.norms  # one over the norms of the divided rows
    reach = jnp.where(taking, reach / jnp.max(jnp.where(taking, reach, 0), initial=1e-30), -1.0)
    both = taking[:, None] & taking[None, :]
    matrix = jnp.where(both, found.cosines, jnp.eye(len(reach)))
    shares = non_negative_qp(matrix, -reach[None])[0] * jnp.where(taking, reach, 0)
    shares = shares / jnp.maximum(jnp.sum(shares), jnp.finfo(shares.dtype).tiny)
    weights = shares / divisor
    done = found.present & wanted & ~found.active
    if normalisation in ("none", "loss"):
        weights = jnp.where(jnp.any(done), done / jnp.maximum(jnp.sum(done), 1), weights)
    return weights
