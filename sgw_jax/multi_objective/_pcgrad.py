"""PCGrad and GradVac: gradients that conflict (or agree too little) are turned away from each other, pair by pair."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.multi_objective._weighting import WeightedAggregator, Weighting, from_weighting
from sgw_jax.multi_objective.gramian import standardise


def pcgrad_weights(
    gramian: Float[Array, "tasks tasks"],
    *,
    key: Array,
    preference: Float[Array, " tasks"] | None = None,
    mask: Bool[Array, " tasks"] | None = None,
) -> Float[Array, " tasks"]:
    """Each g_i, in random order over j: ``if <g_i, g_j> < 0: g_i -= <g_i, g_j> g_j / |g_j|^2``; their sum (Yu et al.
    2020, arXiv 2001.06782).

    Done on the coefficients of the gradients, so that it needs G alone. ``key``: of the orders.

    Preference: sums to T; weighs the projected gradients. Cost: T^2 steps in T variables. Scale: the projections do not
    depend on the rows' sizes, the sum does. Promise: for two tasks no conflict; for more, the last projection may undo
    an earlier one. At stationarity: finite. Use it as the simplest method with surgery; not where a promise, or the
    same result for any order of the tasks, matters.

    Args:
      gramian: G (T, T) of the tasks' gradients.
      key: of the random orders.
      preference: (T,), not negative; None: equal ones.
      mask: (T,), False for tasks without labels in the batch; their weight is 0.

    Returns:
      The weights (T,), in the tasks' order.

    Raises:
      ValueError: a Gramian that is not square; a preference or mask of another length.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import weights
    >>> gramian = jnp.array([[1.0, -1.0], [-1.0, 4.0]])  # two tasks in conflict
    >>> [round(float(weight), 2) for weight in weights.pcgrad(gramian, key=jax.random.key(0))]
    [2.0, 1.25]
    """
    found = standardise(gramian, preference, mask, 0.0, "count")

    def project(first: Array, order: Array) -> Array:
        def visit(position: int, mine: Array) -> Array:
            other = order[position]
            agreement = found.cosines[other] @ mine  # <current, g_j> / |g_j|
            meeting = (other != first) & found.active[other] & found.active[first] & (agreement < 0)
            return mine.at[other].add(jnp.where(meeting, -agreement, 0))

        start = jnp.where(jnp.arange(len(order)) == first, found.norms, 0)
        return jax.lax.fori_loop(0, len(order), visit, start)

    projected = jax.vmap(project)(jnp.arange(len(found.norms)), orders(key, len(found.norms)))
    weights = found.preference @ (projected * found.active[:, None]) / found.norms
    return jnp.where(found.active, weights, found.preference)


def gradvac_weights(
    gramian: Float[Array, "tasks tasks"],
    targets: Float[Array, "tasks tasks"],
    *,
    key: Array,
    beta: float = 0.01,
    preference: Float[Array, " tasks"] | None = None,
    mask: Bool[Array, " tasks"] | None = None,
) -> tuple[Float[Array, " tasks"], Float[Array, "tasks tasks"]]:
    """As PCGrad, but a cosine below a running target phi_ij is raised to it (Wang et al. 2021, arXiv 2010.05874).

    ``g_i += |g_i| (phi sqrt(1 - s^2) - s sqrt(1 - phi^2)) / (|g_j| sqrt(1 - phi^2)) g_j`` where s = cos(g_i, g_j) <
    phi; then ``phi <- (1 - beta) phi + beta s``. One group of all parameters. Cost, preference, scale and stationarity
    as PCGrad; promise: not even PCGrad's, as raising a cosine may lower another. Use it when tasks agree too little
    without conflict; not for the first steps, whose targets are 0.

    Args:
      gramian: G (T, T) of the tasks' gradients.
      targets: phi (T, T), zeros at first.
      key: of the random orders.
      beta: share of the new cosine in the new target, in [0, 1].
      preference: (T,), not negative; None: equal ones.
      mask: (T,), False for tasks without labels in the batch; their weight is 0.

    Returns:
      (the weights (T,), the new targets (T, T)).

    Raises:
      ValueError: beta outside [0, 1]; a Gramian that is not square; a preference or mask of another length.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import weights
    >>> gramian = jnp.array([[1.0, -1.0], [-1.0, 4.0]])  # two tasks in conflict
    >>> [round(float(weight), 2) for weight in weights.gradvac(gramian, jnp.zeros((2, 2)), key=jax.random.key(0))[0]]
    [2.0, 1.25]
    """
    if isinstance(beta, int | float) and not 0 <= beta <= 1:
        raise InputError(f"gradvac: beta is {beta}; it must be in [0, 1].")
    found = standardise(gramian, preference, mask, 0.0, "count")
    phi = jnp.clip(targets, -0.999, 0.999)

    def turn(first: Array, order: Array, row: Array) -> tuple[Array, Array]:
        def visit(position: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            mine, wanted = carry
            other = order[position]
            length = jnp.sqrt(jnp.maximum(mine @ jnp.matvec(found.cosines, mine), jnp.finfo(mine.dtype).tiny))
            cosine = jnp.clip(found.cosines[other] @ mine / length, -1, 1)
            target = wanted[other]
            meeting = (other != first) & found.active[other] & found.active[first]
            side = jnp.sqrt(1 - target**2)
            step = length * (target * jnp.sqrt(jnp.maximum(1 - cosine**2, 0)) - cosine * side) / side
            mine = mine.at[other].add(jnp.where(meeting & (cosine < target), step, 0))
            wanted = wanted.at[other].set(jnp.where(meeting, (1 - beta) * target + beta * cosine, target))
            return mine, wanted

        start = jnp.where(jnp.arange(len(order)) == first, found.norms, 0)
        return jax.lax.fori_loop(0, len(order), visit, (start, row))

    indices = jnp.arange(len(found.norms))
    turned, phi = jax.vmap(turn)(indices, orders(key, len(found.norms)), phi)
    weights = found.preference @ (turned * found.active[:, None]) / found.norms
    return jnp.where(found.active, weights, found.preference), phi


def orders(key: Array, tasks: int) -> Int[Array, "tasks tasks"]:
    """A random order of the tasks for each task."""
    return jax.vmap(lambda k: jax.random.permutation(k, tasks))(jax.random.split(key, tasks))


def pcgrad(num_tasks: int | None = None, *, seed: int = 0, **options: Any) -> WeightedAggregator:
    """The aggregator of `pcgrad_weights`; without ``key`` in its update the orders follow from ``seed`` and a count.

    Args:
      num_tasks: T; with it the state holds the weights of the last update.
      seed: of the orders.
      options: of `pcgrad_weights`.

    Returns:
      The aggregator; its state counts updates.

    Raises:
      ValueError: (update) a Jacobian of another number of tasks; what `pcgrad_weights` refuses.

    >>> from sgw_jax.multi_objective import pcgrad
    >>> pcgrad(num_tasks=2).init({}).weights.shape
    (2,)
    """

    def apply(matrix: Array, count: Array, *, losses: Any = None, mask: Any = None, key: Any = None) -> Any:
        del losses
        key = jax.random.fold_in(jax.random.key(seed), count) if key is None else key
        return pcgrad_weights(matrix, key=key, mask=mask, **options), count + 1

    return from_weighting(Weighting(lambda number: jnp.zeros((), jnp.int32), apply), num_tasks)


def gradvac(num_tasks: int, *, seed: int = 0, **options: Any) -> WeightedAggregator:
    """The aggregator of `gradvac_weights`; its state, the targets, needs ``num_tasks``.

    Args:
      num_tasks: T.
      seed: of the orders.
      options: of `gradvac_weights`.

    Returns:
      The aggregator; its state holds the targets and counts updates.

    Raises:
      ValueError: (update) a Jacobian of another number of tasks; what `gradvac_weights` refuses.

    >>> from sgw_jax.multi_objective import gradvac
    >>> gradvac(num_tasks=2).init({}).weights.shape
    (2,)
    """

    def init(number: int) -> tuple[Array, Array]:
        return jnp.zeros((num_tasks, num_tasks)), jnp.zeros((), jnp.int32)

    def apply(matrix: Array, state: Any, *, losses: Any = None, mask: Any = None, key: Any = None) -> Any:
        del losses
        targets, count = state
        key = jax.random.fold_in(jax.random.key(seed), count) if key is None else key
        weights, targets = gradvac_weights(matrix, targets, key=key, mask=mask, **options)
        return weights, (targets, count + 1)

    return from_weighting(Weighting(init, apply), num_tasks)
