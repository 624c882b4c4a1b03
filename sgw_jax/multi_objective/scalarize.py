"""Scalarisation: from a vector of task losses to one number, possibly with a state that learns."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class Scalarizer(NamedTuple):
    """A pair of pure functions, like an Optax transformation.

    init() -> state; apply(losses (T,) float32, state) -> (scalar, state). `make_train_step` calls `apply` inside the
    gradient, so a gradient flows through the losses; the state is carried in the train state and checkpointed.
    """

    init: Callable[[], Any]
    apply: Callable[[Float[Array, " tasks"], Any], tuple[Float[Array, ""], Any]]


def weighted_sum(weights: Sequence[float]) -> Scalarizer:
    """``sum_t w_t L_t`` with fixed weights, in the order of the tasks: the field's default."""
    fixed = tuple(float(weight) for weight in weights)

    def apply(losses: Float[Array, " tasks"], state: Any) -> tuple[Float[Array, ""], Any]:
        return jnp.sum(jnp.asarray(fixed, losses.dtype) * losses), state  # not a dot: on a TPU that would be bfloat16

    return Scalarizer(init=lambda: (), apply=apply)
