"""CAGrad: the mean gradient, bent within a ball towards the worst task."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.multi_objective._solvers import ENUMERATED, solve_on_supports, supports, violation
from sgw_jax.multi_objective.gramian import standardise


def cagrad_weights(
    gramian: Float[Array, "tasks tasks"],
    *,
    c: float = 0.5,
    rescale: bool = False,
    preference: Float[Array, " tasks"] | None = None,
    eps: float = 1e-5,
    mask: Bool[Array, " tasks"] | None = None,
) -> Float[Array, " tasks"]:
    """``max_d min_i <g_i, d>`` subject to ``|d - g_0| <= c |g_0|``, g_0 = sum p_i g_i (Liu et al. 2021, 2110.14048).

    d = g_0 + J' x with x >= 0. For the support S of x, <g_i, d> = nu for i in S, so x_S = G_SS^-1 (nu 1 - G p), where
    |J' x| = c |g_0| makes nu the root of a quadratic; all supports are solved and the one that satisfies the optimality
    conditions best is taken [closed form: ours]. ``rescale`` divides by 1 + c^2, as in LibMTL's default.

    Preference: sums to 1; that of g_0. Cost: 2^T systems of T equations, at most 10 tasks. Scale: moderate: g_0 is
    linear in the rows. Promise: for c < 1 it converges to a minimum of the mean loss; conflict may remain. A gradient
    of zero is left out of the minimum. At stationarity of g_0: the weights are p. One task alone: 1 + c times its
    gradient. Use it to stay near the mean gradient (c = 0 is the mean); not with more than 10 tasks, nor where the mean
    itself is dominated by one task's scale.

    Args:
      gramian: G (T, T) of the tasks' gradients.
      c: radius of the ball, in lengths of g_0; not negative.
      rescale: divide by 1 + c^2.
      preference: (T,), not negative; None: equal ones.
      eps: added to the diagonal of the cosines; it bounds the weights of collinear gradients.
      mask: (T,), False for tasks without labels in the batch; their weight is 0.

    Returns:
      The weights (T,), in the tasks' order.

    Raises:
      ValueError: c < 0, more than 10 tasks; a Gramian that is not square; a preference or mask of another length.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import weights
    >>> gramian = jnp.array([[1.0, -1.0], [-1.0, 4.0]])  # two tasks in conflict
    >>> [round(float(weight), 2) for weight in jax.jit(weights.cagrad)(gramian)]
    [0.93, 0.5]
    """
    tasks = gramian.shape[-1]
    if not c >= 0:
        raise InputError(f"cagrad: c is {c}; it must not be negative.")
    if tasks > ENUMERATED:
        raise InputError(f"cagrad: {tasks} tasks; its closed form tries all supports, for at most {ENUMERATED} tasks.")
    found = standardise(gramian, preference, mask, eps, "one")
    mean = found.preference * found.norms * found.active
    scale = jnp.maximum(jnp.max(mean), jnp.finfo(mean.dtype).tiny)
    mean = mean / scale
    slope = jnp.matvec(found.cosines, mean) - eps * mean  # <g_i, g_0> / |g_i|
    radius = c * jnp.sqrt(jnp.maximum(mean @ slope, 0))
    least = jnp.min(jnp.where(found.active, found.norms, jnp.inf))
    inverse_norms = jnp.where(found.active, jnp.where(jnp.isfinite(least), least, 1) / found.norms, 0)

    chosen = jnp.asarray(supports(tasks)) & found.active
    level, offset = solve_on_supports(found.cosines, jnp.stack([inverse_norms, slope]))
    a = level @ inverse_norms
    b = offset @ inverse_norms
    rest = offset @ slope - radius**2
    root = b**2 - a * rest
    nu = (b + jnp.sqrt(jnp.maximum(root, 0))) / jnp.where(a > 0, a, 1)
    extra = nu[:, None] * level - offset
    gradient = slope + jnp.matvec(found.cosines, extra) - nu[:, None] * inverse_norms
    worst = violation(extra, jnp.where(found.active, gradient, 0), chosen)
    valid = jnp.any(chosen, -1) & (root >= 0) & (a > 0)
    # Inactive tasks double each support; the first of equals is taken.
    best = jnp.argmin(jnp.where(valid, worst, jnp.inf))
    moved = jnp.maximum(extra[best], 0) * jnp.any(valid)
    length = jnp.sqrt(jnp.maximum(moved @ jnp.matvec(found.cosines, moved), 0))
    moved = moved * jnp.where(length > 0, radius / jnp.where(length > 0, length, 1), 0)
    weights = found.preference + moved * scale / found.norms * found.active
    return weights / (1 + c**2) if rescale else weights
