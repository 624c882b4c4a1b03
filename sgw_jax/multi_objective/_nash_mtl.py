"""Nash-MTL: the update that tasks would agree on in bargaining; and FairGrad, its alpha-fair family."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sgw_jax.multi_objective._arguments import check_positive
from sgw_jax.multi_objective._solvers import fair_point
from sgw_jax.multi_objective.gramian import standardise


def nash_mtl_weights(
    gramian: Float[Array, "tasks tasks"],
    *,
    preference: Float[Array, " tasks"] | None = None,
    max_norm: float | None = 1.0,
    eps: float = 1e-6,
    mask: Bool[Array, " tasks"] | None = None,
) -> Float[Array, " tasks"]:
    """w > 0 with ``G w = p / w`` (Navon et al. 2022, arXiv 2202.01017): maximises ``prod_i <g_i, d>^p_i`` on a ball.

    Solved as a convex problem in a = w |g|: ``min a' C a / 2 - sum p_i log a_i``, C the cosines [ours; the authors'
    convex-concave procedure stops early on collinear or badly scaled rows].

    ``max_norm`` shortens the update, whose length is sqrt(T) whatever the gradients are, to at most that (1, as the
    authors do); None leaves it. Preference: sums to T. Cost: 30 Newton steps in T variables. Scale: the update does not
    depend on the rows' sizes at all, so neither shrinks towards an optimum: decay the learning rate. Promise: no
    conflict. At stationarity there is no solution; ``eps`` bounds the weights by about sqrt(T / eps) / |g_i|, and the
    aggregator's flag is set. Use it when the losses' scales are arbitrary; not with a constant learning rate, under
    which it never comes to rest.

    Args:
      gramian: G (T, T) of the tasks' gradients.
      preference: (T,), not negative; None: equal ones.
      max_norm: greatest length of the update; None: sqrt(T), as it comes.
      eps: added to the diagonal of the cosines; it bounds the weights of collinear gradients.
      mask: (T,), False for tasks without labels in the batch; their weight is 0.

    Returns:
      The weights (T,), in the tasks' order.

    Raises:
      ValueError: max_norm that is not positive; a Gramian that is not square; a preference or mask of another length.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import weights
    >>> gramian = jnp.array([[1.0, -1.0], [-1.0, 4.0]])  # two tasks in conflict
    >>> [round(float(weight), 2) for weight in jax.jit(weights.nash_mtl)(gramian)]
    [1.0, 0.5]
    """
    if max_norm is not None:
        check_positive("nash_mtl", max_norm=max_norm)
    found = standardise(gramian, preference, mask, eps, "count")
    gain = jnp.where(found.active & (found.preference > 0), found.preference, 1)
    taking = found.active & (found.preference > 0)
    both = taking[:, None] & taking[None, :]
    matrix = jnp.where(both, found.cosines, jnp.eye(len(gain)))
    scaled = jnp.where(taking, fair_point(matrix, gain, 1.0), 0)
    if max_norm is not None:
        length = jnp.sqrt(jnp.maximum(scaled @ jnp.matvec(found.cosines, scaled), 0))
        scaled = scaled * jnp.minimum(1, max_norm / jnp.where(length > 0, length, 1))
    return scaled / found.norms


def fairgrad_weights(
    gramian: Float[Array, "tasks tasks"],
    *,
    alpha: float = 1.0,
    preference: Float[Array, " tasks"] | None = None,
    eps: float = 1e-6,
    mask: Bool[Array, " tasks"] | None = None,
) -> Float[Array, " tasks"]:
    """w > 0 with ``G w = p w^(-1 / alpha)`` (Ban and Ji 2024, arXiv 2402.15638): alpha-fair progress of the tasks.

    alpha 1 is Nash-MTL (without its max_norm), 0 would be the largest total progress, infinity the best worst progress;
    2 is common. Solved as `nash_mtl_weights`.

    Preference: sums to T. Cost: as Nash-MTL. Scale: all rows c times as large, the update is c^((1 - alpha) / (1 +
    alpha)) times as long; rows of different sizes change its direction too unless alpha is 1. Promise: no conflict. At
    stationarity: bounded by ``eps``, as Nash-MTL. Use it to choose between the sum of the gains and the least of them,
    for alpha between 1/2 and 4 on gradients of similar sizes; not on rows 1e6 apart with other alphas than 1: these ask
    for angles to the update that float32 does not resolve.

    Args:
      gramian: G (T, T) of the tasks' gradients.
      alpha: of the fairness, positive.
      preference: (T,), not negative; None: equal ones.
      eps: added to the diagonal of the cosines; it bounds the weights of collinear gradients.
      mask: (T,), False for tasks without labels in the batch; their weight is 0.

    Returns:
      The weights (T,), in the tasks' order.

    Raises:
      ValueError: alpha that is not positive; a Gramian that is not square; a preference or mask of another length.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import weights
    >>> gramian = jnp.array([[1.0, -1.0], [-1.0, 4.0]])  # two tasks in conflict
    >>> [round(float(weight), 2) for weight in weights.fairgrad(gramian, alpha=2.0)]
    [1.5, 0.68]
    """
    check_positive("fairgrad", alpha=alpha)
    power = 1 / alpha
    found = standardise(gramian, preference, mask, eps, "count")
    taking = found.active & (found.preference > 0)
    largest = jnp.max(jnp.where(taking, found.norms, 0), initial=1e-30)
    relative = jnp.where(taking, found.norms / largest, 1)
    # With a = w |g|: C a = p |g|^(1/alpha - 1) a^(-1/alpha); the largest norm is taken out of it.
    gain = jnp.where(taking, found.preference, 1) * relative ** (power - 1)
    both = taking[:, None] & taking[None, :]
    matrix = jnp.where(both, found.cosines, jnp.eye(len(gain)))
    scaled = jnp.where(taking, fair_point(matrix, gain, power), 0) * largest ** ((power - 1) / (power + 1))
    return scaled / found.norms
