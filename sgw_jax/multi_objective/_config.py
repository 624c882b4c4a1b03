"""ConFIG: the direction with equal cosines to all gradients, as long as they pull along it."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sgw_jax.multi_objective._solvers import null_space, solve_off
from sgw_jax.multi_objective.gramian import standardise


def config_weights(
    gramian: Float[Array, "tasks tasks"],
    *,
    preference: Float[Array, " tasks"] | None = None,
    eps: float = 1e-5,
    mask: Bool[Array, " tasks"] | None = None,
) -> Float[Array, " tasks"]:
    """``u = U' C^+ p``, U the unit gradients; update ``(sum_i <g_i, u>) u / |u|^2`` (Liu et al. 2024, 2408.11104).

    Preference: sums to T; the cosine to g_i is proportional to p_i. Cost: one eigenproblem and one system of T
    equations. Scale: the direction does not depend on the rows' sizes, the length is linear in them. Promise: no
    conflict (positive, equal cosines) when the gradients are independent. Of exactly dependent ones C^+ drops what
    float32 does not tell from no direction, and the cosines are as equal as can be; nearly dependent ones (a relative
    noise of 3e-3 and more) leave an update that vanishes like their common direction, bounded by the cosines' ``eps``.
    At stationarity likewise. Use it where every task must gain alike in angle, as IMTL-G, from which it differs in
    length; not with gradients nearly opposite to each other, whose common direction is mostly noise.

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
    >>> [round(float(weight), 2) for weight in jax.jit(weights.config_)(gramian)]
    [1.5, 0.75]
    """
    found = standardise(gramian, preference, mask, eps, "count")
    wanted = jnp.where(found.active, found.preference, 0)
    scaled = solve_off(found.cosines, null_space(found.cosines, eps), wanted)
    along = jnp.sum(jnp.where(found.active, found.norms * jnp.matvec(found.cosines, scaled), 0))
    square = scaled @ wanted
    weights = scaled * along / jnp.maximum(square, jnp.finfo(square.dtype).tiny) / found.norms
    return jnp.where(found.active, weights, 0)
