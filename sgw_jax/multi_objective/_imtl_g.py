"""IMTL-G: the update whose projections onto all gradients are equal."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sgw_jax.multi_objective._solvers import null_space, orthogonalise, project_out, solve_off
from sgw_jax.multi_objective.gramian import standardise

LEAST_SUM = 0.05  # of the weights, as a share of the sum of their sizes


def imtl_g_weights(
    gramian: Float[Array, "tasks tasks"],
    *,
    preference: Float[Array, " tasks"] | None = None,
    eps: float = 1e-5,
    mask: Bool[Array, " tasks"] | None = None,
) -> Float[Array, " tasks"]:
    """``w ~ G^+ (p |g|)``, sum w = 1 (Liu et al. 2021, openreview IMPnRXEWpvr).

    Preference: sums to T; the projection onto g_i / |g_i| is proportional to p_i. Cost: one eigenproblem and one system
    of T equations. Scale: the direction does not depend on the rows' sizes if they are independent, the length does.
    Promise: equal projections of independent gradients; weights may be negative, so no descent for a task in conflict
    with what is common. Directions that float32 does not tell from none are dropped as in `config_weights`. At
    stationarity the sum of the solution may vanish: it is then taken to be 5 % of the sum of sizes, which bounds the
    weights [our decision]. Use it to balance tasks of different scales; not where they conflict much.

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
    >>> [round(float(weight), 2) for weight in jax.jit(weights.imtl_g)(gramian)]
    [0.67, 0.33]
    """
    found = standardise(gramian, preference, mask, eps, "count")
    largest = jnp.max(jnp.where(found.active, found.norms, 0), initial=1e-30)
    sizes = jnp.where(found.active, found.norms / largest, 1)
    null = null_space(found.cosines, eps)
    # G = D C D: what D^-1 takes to the null space of C. Projected out on both sides, as in G^+.
    basis, _ = orthogonalise(null / sizes[:, None], jnp.zeros((0, len(null))))
    lengths = jnp.sqrt(jnp.sum(basis**2, 0))
    basis = basis / jnp.where(lengths > 0, lengths, 1)
    wanted = jnp.where(found.active, found.preference, 0) * sizes
    weights = solve_off(found.cosines, null, project_out(basis, wanted) / sizes) / sizes
    weights = jnp.where(found.active, project_out(basis, weights), 0)
    # Relative to the largest first: norms of 1e-6 would make sums of 1e6 and more.
    weights = weights / jnp.maximum(jnp.max(jnp.abs(weights)), jnp.finfo(weights.dtype).tiny)
    total, size = jnp.sum(weights), jnp.sum(jnp.abs(weights))
    divisor = jnp.where(total < 0, -1, 1) * jnp.maximum(jnp.abs(total), LEAST_SUM * size)
    return jnp.where(size > 0, weights / jnp.where(size > 0, divisor, 1), found.preference / len(weights))
