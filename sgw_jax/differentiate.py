"""How a train step differentiates several losses: through one number, through a Jacobian, or through the pyramid."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sgw_jax.model import TRUNK
from sgw_jax.multi_objective import (
    Scalarizer,
    WeightedAggregator,
    conflict_rate,
    cosines,
    gramian,
    representation_gradients,
)
from sgw_jax.multi_objective.gradients import added, rows_of, stacked
from sgw_jax.sharding import constrain_rows

GRADIENTS = ("parameters", "representation")

Objective = Scalarizer | WeightedAggregator


class Program(NamedTuple):
    """The losses of a model as functions of flat parameters {path: array} and one micro-batch.

    losses(params, part, key) -> one scalar a task. encode(params, part, key) -> z, the pyramid, from the trunk's
    parameters; decode(z, params, part, key) -> one scalar a task: the two together are losses. losses of micro-batches
    add up.
    """

    losses: Callable[[Any, Any, Array], list[Float[Array, ""]]]
    encode: Callable[[Any, Any, Array], Any]
    decode: Callable[[Any, Any, Any, Array], list[Float[Array, ""]]]


class Found(NamedTuple):
    """losses (tasks,); gradients like the parameters, flat; the objective's new state; numbers to log."""

    losses: Float[Array, " tasks"]
    gradients: dict[str, Array]
    state: Any
    metrics: dict[str, Array]


def initial_state(objective: Objective | None, params: Any) -> Any:
    """What an objective remembers, at step 0."""
    if objective is None:
        return ()
    return objective.init() if isinstance(objective, Scalarizer) else objective.init(params)


def by_scalar(
    program: Program,
    scalarizer: Scalarizer,
    params: dict[str, Array],
    state: Any,
    parts: Any,
    keys: Array,
    mask: Bool[Array, " tasks"],
) -> Found:
    """The gradient of ``scalarizer(losses)``: one backward pass.

    A scalariser that is not linear needs the whole batch's losses before its weights are known: with micro-batches they
    come from a forward pass of their own, and the gradient is that of ``sum_t w_t L_t``, ``w`` its slope there.
    """
    count = len(keys)

    def one(params: Any, part: Any, key: Array) -> tuple[Array, Array]:
        losses = jnp.stack(program.losses(params, part, key))
        return scalarizer.apply(losses, state, mask=mask)[0], losses

    if count == 1 or scalarizer.linear:
        gradient = jax.value_and_grad(one, has_aux=True)
        (_, losses), gradients = _summed(lambda part, key: gradient(params, part, key), parts, keys)
        return Found(losses, gradients, scalarizer.apply(losses, state, mask=mask)[1], {})
    losses = _summed(lambda part, key: jnp.stack(program.losses(params, part, key)), parts, keys)
    (_, new), slope = jax.value_and_grad(lambda x: scalarizer.apply(x, state, mask=mask), has_aux=True)(losses)

    def weighted(params: Any, part: Any, key: Array) -> Array:
        return jnp.sum(slope * jnp.stack(program.losses(params, part, key)))

    gradients = _summed(lambda part, key: jax.grad(weighted)(params, part, key), parts, keys)
    return Found(losses, gradients, new, {})


def by_parameters(
    program: Program,
    aggregator: WeightedAggregator,
    own: frozenset[str],
    params: dict[str, Array],
    state: Any,
    parts: Any,
    keys: Array,
    mask: Bool[Array, " tasks"],
    names: Sequence[str],
) -> Found:
    """Weights from the Jacobian of the shared parameters: one forward pass, a backward pass for each task."""
    shared, private = _split(params, own)

    def rows(part: Any, key: Array) -> tuple[Array, Any, Any]:
        losses, pull = jax.vjp(lambda s, p: program.losses({**s, **p}, part, key), shared, private)
        jacobian, alone = zip(*rows_of(pull, losses), strict=True)
        # A head's gradient is its task's alone, so the sum over tasks is that gradient, unweighted.
        return jnp.stack(losses), constrain_rows(stacked(jacobian)), added(alone)

    losses, jacobian, alone = _summed(rows, parts, keys)
    matrix = gramian(jacobian)
    update, state = aggregator.update(jacobian, state, losses=losses, task_mask=mask)
    return Found(losses, {**update, **alone}, state, gradient_metrics(matrix, state.weights, names))


def by_representation(
    program: Program,
    aggregator: WeightedAggregator,
    own: frozenset[str],
    params: dict[str, Array],
    state: Any,
    parts: Any,
    keys: Array,
    mask: Bool[Array, " tasks"],
    names: Sequence[str],
) -> Found:
    """Weights from the gradients in the pyramid; one backward pass of the backbone whatever the number of tasks is.

    With micro-batches the Gramian is first added up over all of them (its sum over samples does not care), then a
    second pass takes the gradient of the weighted losses.
    """
    trunk, rest = _split(params, frozenset(name for name in params if not name.startswith(TRUNK)))
    shared, private = _split(rest, own)

    def weigh(matrix: Array, losses: Array) -> tuple[Array, Any]:
        return aggregator.weigh(matrix, state, losses=losses, mask=mask)

    if len(keys) == 1:
        part, key = _first(parts), keys[0]
        found = representation_gradients(
            lambda t: program.encode(t, part, key),
            lambda z, s, p: program.decode(z, {**s, **p}, part, key),
            trunk,
            shared,
            private,
            weigh,
        )
        gradients = {**found.trunk, **found.shared, **found.own}
        return Found(found.losses, gradients, found.state, gradient_metrics(found.gramian, found.weights, names))

    def measure(part: Any, key: Array) -> tuple[Array, Array, Any]:
        z = program.encode(trunk, part, key)
        losses, pull = jax.vjp(lambda z, p: program.decode(z, {**shared, **p}, part, key), z, private)
        by_z, alone = zip(*rows_of(pull, losses), strict=True)
        return jnp.stack(losses), gramian(stacked(by_z)), added(alone)

    losses, matrix, alone = _summed(measure, parts, keys)
    weights, state = weigh(matrix, losses)

    def weighted(kept: Any, part: Any, key: Array) -> Array:
        losses = jnp.stack(program.losses({**kept, **private}, part, key))
        return jnp.sum(jnp.where(weights == 0, 0, weights * losses))

    gradients = _summed(lambda part, key: jax.grad(weighted)({**trunk, **shared}, part, key), parts, keys)
    return Found(losses, {**gradients, **alone}, state, gradient_metrics(matrix, weights, names))


def gradient_metrics(
    matrix: Float[Array, "tasks tasks"], weights: Float[Array, " tasks"] | None, names: Sequence[str]
) -> dict[str, Array]:
    """Numbers to log: ``weight/TASK``, ``cosine/TASK-TASK`` of every pair, and the share of pairs in conflict."""
    angles = cosines(matrix)
    found = {"conflict_rate": conflict_rate(matrix).astype(jnp.float32)}
    if weights is not None:
        found |= {f"weight/{name}": weights[i] for i, name in enumerate(names)}
    for i, name in enumerate(names):
        found |= {f"cosine/{name}-{other}": angles[i, j] for j, other in enumerate(names) if j > i}
    return found


def flat(params: Any) -> dict[str, Array]:
    """{"a": {"b": x}} as {"a/b": x}."""
    return flax.traverse_util.flatten_dict(params, sep="/")


def unflat(params: Mapping[str, Array]) -> Any:
    """The inverse of `flat`."""
    return flax.traverse_util.unflatten_dict(dict(params), sep="/")


def _split(params: Mapping[str, Array], second: frozenset[str]) -> tuple[dict[str, Array], dict[str, Array]]:
    return (
        {name: leaf for name, leaf in params.items() if name not in second},
        {name: leaf for name, leaf in params.items() if name in second},
    )


def _first(parts: Any) -> Any:
    return jax.tree.map(lambda x: x[0], parts)


def _summed(function: Callable[[Any, Array], Any], parts: Any, keys: Int[Array, " parts"]) -> Any:
    """The sum of ``function(part, key)`` over the micro-batches, one after another; what it returns must add up."""
    if len(keys) == 1:
        return function(_first(parts), keys[0])

    def add(total: Any, micro: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(*micro)), None

    shapes = jax.eval_shape(function, _first(parts), keys[0])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    return jax.lax.scan(add, zeros, (parts, keys))[0]
