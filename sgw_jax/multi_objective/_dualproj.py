"""DualProj: the weighted mean gradient projected onto the cone that no task objects to."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sgw_jax.multi_objective._solvers import non_negative_qp
from sgw_jax.multi_objective.gramian import standardise


def dualproj_weights(
    gramian: Float[Array, "tasks tasks"],
    *,
    preference: Float[Array, " tasks"] | None = None,
    eps: float = 1e-5,
    mask: Bool[Array, " tasks"] | None = None,
) -> Float[Array, " tasks"]:
    """``w = argmin_{v >= p} v' G v`` (GEM: Lopez-Paz and Ranzato 2017, arXiv 1706.08840).

    The update is the projection of sum p_i g_i onto {d: <g_j, d> >= 0 for all j}.

    Preference: sums to 1. Cost: one quadratic program of T variables. Scale: not linear in the rows: a large gradient
    decides where the projection lands. Promise: no conflict, up to ``eps`` (see `upgrad_weights`). At stationarity:
    finite, the update vanishes. Use it to stay as near to the mean gradient as no conflict allows; not for small
    gradients beside large ones, which UPGrad lets count more.

    Args:
      gramian: G (T, T) of the tasks' gradients.
      preference: (T,), not negative; None: equal ones.
      eps: added to the diagonal of the cosines; it bounds the weights of collinear gradients.
      mask: (T,), False for tasks without labels in the batch; their weight is 0.

    Returns:
      The weights (T,), in the tasks' order.

    Raises:
      ValueError: a Gramian that is not square; a preference or mask of another length.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import weights
    >>> gramian = jnp.array([[1.0, -1.0], [-1.0, 4.0]])  # two tasks in conflict
    >>> [round(float(weight), 2) for weight in jax.jit(weights.dualproj)(gramian)]
    [0.5, 0.5]
    """
    found = standardise(gramian, preference, mask, eps, "one")
    wanted = found.preference * found.norms * found.active
    scale = jnp.maximum(jnp.max(wanted), jnp.finfo(wanted.dtype).tiny)
    extra = non_negative_qp(found.cosines, jnp.matvec(found.cosines, wanted / scale)[None])[0]
    weights = (extra * scale + wanted) / found.norms
    return jnp.where(found.active, weights, found.preference)
