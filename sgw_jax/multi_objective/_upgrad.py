"""UPGrad: the mean of the gradients, each projected onto the cone that no task objects to."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sgw_jax.multi_objective._solvers import non_negative_qp
from sgw_jax.multi_objective.gramian import standardise


def upgrad_weights(
    gramian: Float[Array, "tasks tasks"],
    *,
    preference: Float[Array, " tasks"] | None = None,
    eps: float = 1e-5,
    mask: Bool[Array, " tasks"] | None = None,
) -> Float[Array, " tasks"]:
    """``w = sum_i argmin_{v >= p_i e_i} v' G v`` (Quinton and Rey 2024, arXiv 2406.16232).

    The update is the weighted mean of the projections of every p_i g_i onto the dual cone {d: <g_j, d> >= 0 for all j}.

    Preference: sums to 1 (1/T each). Cost: T quadratic programs of T variables, solved exactly up to 10 tasks. Scale:
    linear in each row (a gradient twice as large counts twice as much). Promise: no conflict with any task, up to
    ``eps``, which is added to the cosines' diagonal (not to the trace-normalised Gramian, with which rows 100 times
    smaller than the largest lose the promise). At stationarity: finite; the update goes to zero with the conflict-free
    cone. Use it as the first choice among Gramian methods: it keeps the losses' scale and never hurts a task to first
    order. Not when the losses' scales are arbitrary: it does not balance them.

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
    >>> [round(float(weight), 2) for weight in jax.jit(weights.upgrad)(gramian)]
    [1.0, 0.62]
    """
    found = standardise(gramian, preference, mask, eps, "one")
    # In units of p_i |g_i| each program is: x >= 0 added to the i-th unit vector.
    extra = non_negative_qp(found.cosines, found.cosines)
    units = extra + jnp.eye(len(found.norms))
    weights = jnp.sum((found.preference * found.norms * found.active)[:, None] * units, 0) / found.norms
    return jnp.where(found.active, weights, found.preference)
