"""What a method is: weights from a Gramian, with a state; and the Optax aggregator that applies them."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from optax.experimental import aggregating

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.multi_objective.gramian import gramian, standardise


class Weighting(NamedTuple):
    """A method as a pair of pure functions.

    Attributes:
      init: num_tasks -> state.
      apply: (gramian (T, T), state, *, losses (T,), mask (T,), key) -> (weights (T,), state); ``losses``, ``mask`` and
        ``key`` may be None where the method does not need them.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import Weighting, from_weighting
    >>> first = Weighting(lambda num_tasks: (), lambda gramian, state, **_: (jnp.eye(len(gramian))[0], state))
    >>> aggregator = from_weighting(first)
    >>> aggregator.weigh(jnp.eye(2), aggregator.init({}))[0].tolist()
    [1.0, 0.0]
    """

    init: Callable[[int], Any]
    apply: Callable[..., tuple[Array, Any]]


class AggregatorState(NamedTuple):
    """weights: of the last update, and stationary: whether the weighted gradients all but cancelled (both None without
    ``num_tasks``). inner: the method's own state."""

    weights: Any
    stationary: Any
    inner: Any


class WeightedAggregator(aggregating.Aggregator):
    """An Optax aggregator that can also be used by those who have a Gramian but no Jacobian.

    Attributes:
      init: params -> state.
      update: (jacobian, state, params, *, losses, task_mask, key) -> (the update, like the parameters; state).
      weighting: the method itself, for wrappers.
      weigh: (gramian, state, *, losses, mask, key) -> (weights, state): what the update does between the Gramian and
        the weighted sum; the state is that of the update.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import equal
    >>> aggregator = equal(num_tasks=2)
    >>> weights, state = aggregator.weigh(jnp.eye(2), aggregator.init({}))
    >>> weights.tolist()
    [1.0, 1.0]
    """

    weighting: Weighting
    weigh: Callable[..., tuple[Array, AggregatorState]]


def stateless(function: Callable[..., Array], **options: Any) -> Weighting:
    """A weighting from ``function(gramian, mask=mask, **options)``, which also gets ``losses`` if it names them."""
    wants = inspect.signature(function).parameters.get("losses")

    def apply(matrix: Array, state: Any, *, losses: Any = None, mask: Any = None, key: Any = None) -> tuple[Array, Any]:
        del key
        if wants is None:
            return function(matrix, mask=mask, **options), state
        if losses is None and wants.default is inspect.Parameter.empty:
            raise InputError(f"{function.__name__.removesuffix('_weights')}: the update needs losses=.")
        return function(matrix, mask=mask, losses=losses, **options), state

    return Weighting(lambda num_tasks: (), apply)


def from_weighting(weighting: Weighting | Callable[..., Array], num_tasks: int | None = None) -> WeightedAggregator:
    """The aggregator ``sum_i w_i g_i`` of a weighting, or of a function (gramian, mask=, losses= if named) -> weights.

    ``init(params)`` and ``update(jacobian, state, params, *, losses, task_mask, key)``: the Jacobian's leaves have a
    leading axis of tasks, the update is like the parameters. It goes first in ``optax.chain``: what comes after sees
    one gradient.

    Args:
      weighting: the method, or a function that is one without a state.
      num_tasks: T; with it the state holds the weights of the last update, for logging.

    Returns:
      The aggregator.

    Raises:
      ValueError: (update) a Jacobian of another number of tasks than ``num_tasks``; no losses where the function needs
        them.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import from_weighting
    >>> halves = from_weighting(lambda gramian, mask=None: jnp.full(len(gramian), 0.5))
    >>> jacobian = {"kernel": jnp.array([[1.0, 0.0], [0.0, 1.0]])}
    >>> update, state = halves.update(jacobian, halves.init({"kernel": jnp.zeros(2)}))
    >>> update["kernel"].tolist()
    [0.5, 0.5]
    """
    chosen = weighting if isinstance(weighting, Weighting) else stateless(weighting)

    def init(params: Any) -> AggregatorState:
        del params
        if num_tasks is None:
            return AggregatorState(None, None, chosen.init(0))
        return AggregatorState(jnp.zeros(num_tasks), jnp.zeros((), bool), chosen.init(num_tasks))

    def weigh(
        matrix: Array, state: AggregatorState, *, losses: Any = None, mask: Any = None, key: Any = None
    ) -> tuple[Array, AggregatorState]:
        if num_tasks not in (None, matrix.shape[0]):
            raise InputError(f"aggregator: made for {num_tasks} tasks, but the Jacobian has {matrix.shape[0]} rows.")
        weights, inner = chosen.apply(matrix, state.inner, losses=losses, mask=mask, key=key)
        if num_tasks is None:
            return weights, AggregatorState(None, None, inner)
        flag = standardise(matrix, None, mask, 0.0, "one").stationary(weights)
        return weights, AggregatorState(weights, flag, inner)

    def update(
        jacobian: Any,
        state: AggregatorState,
        params: Any = None,
        *,
        losses: Any = None,
        task_mask: Any = None,
        key: Any = None,
        **extra: Any,
    ) -> tuple[Any, AggregatorState]:
        del params, extra
        weights, state = weigh(gramian(jacobian), state, losses=losses, mask=task_mask, key=key)
        return weighted_sum_of(jacobian, weights), state

    aggregator = WeightedAggregator(init, update)
    aggregator.weighting, aggregator.weigh = chosen, weigh
    return aggregator


class Method(NamedTuple):
    """A member of the family.

    Attributes:
      weights: its pure function of the Gramian; None if it has none.
      aggregator: (num_tasks, **options) -> aggregator.

    >>> from sgw_jax.multi_objective import METHODS, weights
    >>> METHODS["upgrad"].weights is weights.upgrad
    True
    """

    weights: Callable[..., Any] | None
    aggregator: Callable[..., WeightedAggregator]


# The docstring of an aggregator that is made of a function.
AGGREGATOR = """The aggregator of `{function}`, with its options.

{about}

Args:
  num_tasks: T; with it the state holds the weights of the last update.
  options: of `{function}`.

Returns:
  The aggregator.

Raises:
  ValueError: (update) a Jacobian of another number of tasks than ``num_tasks``; what `{function}` refuses.

>>> from sgw_jax.multi_objective import AGGREGATORS
>>> AGGREGATORS["{name}"](num_tasks=2).init({{}}).weights.shape
(2,)
"""


def method(weights: Callable[..., Array]) -> Method:
    """The member of a function as `stateless` takes, named ``NAME_weights``; its aggregator has the rest as options.

    Args:
      weights: (gramian, mask=, preference=, ...) -> weights (T,).

    Returns:
      The function and its aggregator.

    Raises:
      ValueError: (update) a Jacobian of another number of tasks; no losses where the function needs them.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import method
    >>> def halves_weights(gramian, *, mask=None):
    ...     return jnp.full(len(gramian), 0.5)
    >>> method(halves_weights).aggregator.__name__
    'halves'
    """

    def aggregator(num_tasks: int | None = None, **options: Any) -> WeightedAggregator:
        return from_weighting(stateless(weights, **options), num_tasks)

    name = weights.__name__.removesuffix("_weights")
    about = inspect.cleandoc(weights.__doc__ or "").partition("\n\nArgs:")[0]
    aggregator.__name__ = aggregator.__qualname__ = name
    aggregator.__module__ = weights.__module__
    aggregator.__doc__ = AGGREGATOR.format(name=name, function=weights.__name__, about=about)
    return Method(weights, aggregator)


def weighted_sum_of(jacobian: Any, weights: Float[Array, " tasks"]) -> Any:
    """``sum_i w_i g_i`` in float32, leaf by leaf, in the leaf's dtype.

    Added task by task: elementwise, so that shards stay where they are, and no matrix product that a TPU would take in
    bfloat16. A task of weight 0 adds nothing, even if its gradient is not finite.

    Args:
      jacobian: a pytree like the parameters, every leaf with a leading axis of T tasks.
      weights: (T,).

    Returns:
      A pytree like the parameters.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import weighted_sum_of
    >>> weighted_sum_of({"bias": jnp.array([[1.0], [2.0]])}, jnp.array([0.5, 0.25]))["bias"].tolist()
    [1.0]
    """

    def combine(leaf: Array) -> Array:
        wide = jnp.promote_types(leaf.dtype, jnp.float32)
        rows = (jnp.where(weights[i] == 0, 0, weights[i].astype(wide) * leaf[i].astype(wide)) for i in range(len(leaf)))
        total = next(rows)
        for row in rows:
            total = total + row
        return total.astype(leaf.dtype)

    return jax.tree.map(combine, jacobian)
