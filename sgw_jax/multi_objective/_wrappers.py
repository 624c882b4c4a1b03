"""Wrappers of any aggregator here: weights averaged over steps, or computed every k-th step alone."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.multi_objective._weighting import WeightedAggregator, Weighting, from_weighting


def ema_weights(inner: WeightedAggregator, decay: float, num_tasks: int) -> WeightedAggregator:
    """The inner method's weights averaged over steps: ``w <- decay w + (1 - decay) w_new`` (CR-MOGM, Zhou et al. 2022).

    The first update takes the new weights as they are. A task that is absent has weight 0 and its average waits. Use it
    where weights jump from batch to batch; not with a promise of no conflict that must hold in every step, which
    averages do not keep. Cost: T numbers.

    Args:
      inner: the aggregator whose weights they are.
      decay: share of the old average, in [0, 1).
      num_tasks: T.

    Returns:
      The aggregator; its state holds the average.

    Raises:
      ValueError: a decay outside [0, 1); (update) a Jacobian of another number of tasks.

    >>> from sgw_jax.multi_objective import ema_weights, nash_mtl
    >>> ema_weights(nash_mtl(2), decay=0.9, num_tasks=2).init({}).weights.shape
    (2,)
    """
    if not 0 <= decay < 1:
        raise InputError(f"ema_weights: decay is {decay}; it must be in [0, 1).")

    def init(number: int) -> Any:
        return jnp.zeros(num_tasks), jnp.zeros(num_tasks, bool), inner.weighting.init(num_tasks)

    def apply(matrix: Array, state: Any, *, losses: Any = None, mask: Any = None, key: Any = None) -> Any:
        average, seen, rest = state
        new, rest = inner.weighting.apply(matrix, rest, losses=losses, mask=mask, key=key)
        present = jnp.ones(num_tasks, bool) if mask is None else jnp.asarray(mask, bool)
        mixed = jnp.where(seen, decay * average + (1 - decay) * new, new)
        average = jnp.where(present, mixed, average)
        return jnp.where(present, average, 0), (average, seen | present, rest)

    return from_weighting(Weighting(init, apply), num_tasks)


def every_k(inner: WeightedAggregator, k: int, num_tasks: int) -> WeightedAggregator:
    """The inner method's weights of steps 0, k, 2 k, ...; in between the last ones.

    A task that was absent when the weights were computed gets, until the next time, their mean; if all that are present
    were, weights are computed there and then. Saves the T x T work alone: the Jacobian, which costs far more, is still
    needed for the update (with ``gradients="representation"`` it is cheap anyway). Use it for weights that stand still
    between looks, as Nash-MTL's authors do; not for a promise that must hold in every step.

    Args:
      inner: the aggregator whose weights they are.
      k: updates from one look to the next, at least 1.
      num_tasks: T.

    Returns:
      The aggregator; its state holds the weights.

    Raises:
      ValueError: k < 1; (update) a Jacobian of another number of tasks.

    >>> from sgw_jax.multi_objective import every_k, nash_mtl
    >>> every_k(nash_mtl(2), k=10, num_tasks=2).init({}).weights.shape
    (2,)
    """
    if k < 1:
        raise InputError(f"every_k: k is {k}; it must be at least 1.")

    def init(number: int) -> Any:
        return (
            jnp.zeros((), jnp.int32),
            jnp.zeros(num_tasks),
            jnp.zeros(num_tasks, bool),
            inner.weighting.init(num_tasks),
        )

    def apply(matrix: Array, state: Any, *, losses: Any = None, mask: Any = None, key: Any = None) -> Any:
        count, last, known, rest = state
        present = jnp.ones(num_tasks, bool) if mask is None else jnp.asarray(mask, bool)

        def fresh() -> Any:
            weights, new = inner.weighting.apply(matrix, rest, losses=losses, mask=mask, key=key)
            return weights.astype(last.dtype), present, new

        due = (count % k == 0) | ~jnp.any(known & present)
        last, known, rest = jax.lax.cond(due, fresh, lambda: (last, known, rest))
        mean = jnp.sum(jnp.where(known, last, 0)) / jnp.maximum(jnp.sum(known), 1)
        weights = jnp.where(present, jnp.where(known, last, mean), 0)
        return weights, (count + 1, last, known, rest)

    return from_weighting(Weighting(init, apply), num_tasks)
