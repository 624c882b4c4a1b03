"""How a train step differentiates several losses: through one number, through a Jacobian, or through the pyramid."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.layers.parameter_names import in_backbone
from sgw_jax.multi_objective import (
    Scalarizer,
    WeightedAggregator,
    conflict_rate,
    cosines,
    gramian,
    representation_gradients,
)
from sgw_jax.multi_objective.gradients import added, rows_of, stacked
from sgw_jax.sharding import constrain_rows, path_name

GRADIENTS = ("parameters", "representation")

Objective = Scalarizer | WeightedAggregator


class Program(NamedTuple):
    """The losses of a model as functions of flat parameters {path: array} and one micro-batch.

    losses(params, part, key) -> (one scalar a task, {name: another number to log}). encode(params, part, key) -> z, the
    pyramid, from the trunk's parameters; decode(z, params, part, key) -> as losses: the two together are losses. All
    numbers of micro-batches add up.
    """

    losses: Callable[[Any, Any, Array], tuple[list[Float[Array, ""]], dict[str, Array]]]
    encode: Callable[[Any, Any, Array], Any]
    decode: Callable[[Any, Any, Any, Array], tuple[list[Float[Array, ""]], dict[str, Array]]]


class Question(NamedTuple):
    """What a step asks: the update of these parameters by this batch.

    params: flat. state: the objective's. parts: the micro-batches, along the first axis of every array. keys: of each
    one's randomness. mask: False for tasks without labels in the batch. names: of the tasks. own: paths of the
    parameters that one task alone uses, see `parameter_names.owner`.
    """

    program: Program
    params: dict[str, Array]
    state: Any
    parts: Any
    keys: Array
    mask: Bool[Array, " tasks"]
    names: Sequence[str]
    own: frozenset[str]

    def summed(self, function: Callable[[Any, Array], Any]) -> Any:
        """The sum of ``function(part, key)`` over the micro-batches, one after another; what it returns must add up."""
        if len(self.keys) == 1:
            return function(*self.first())

        def add(total: Any, micro: Any) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, function(*micro)), None

        shapes = jax.eval_shape(function, *self.first())
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return jax.lax.scan(add, zeros, (self.parts, self.keys))[0]

    def first(self) -> tuple[Any, Array]:
        """The first micro-batch and its key."""
        return jax.tree.map(lambda x: x[0], self.parts), self.keys[0]


class Found(NamedTuple):
    """losses (tasks,); gradients like the parameters, flat; the objective's new state; numbers to log."""

    losses: Float[Array, " tasks"]
    gradients: dict[str, Array]
    state: Any
    metrics: dict[str, Array]


def initial_objective_state(objective: Objective | None, params: Any) -> Any:
    """What an objective remembers, at step 0."""
    if objective is None:
        return ()
    return objective.init() if isinstance(objective, Scalarizer) else objective.init(params)


def by_scalar(asked: Question, scalarizer: Scalarizer) -> Found:
    """The gradient of ``scalarizer(losses)``: one backward pass.

    A scalariser that is not linear needs the whole batch's losses before its weights are known: with micro-batches they
    come from a forward pass of their own, and the gradient is that of ``sum_t w_t L_t``, ``w`` its slope there.
    """
    program, params, state, mask = asked.program, asked.params, asked.state, asked.mask

    def stack(params: Any, part: Any, key: Array) -> tuple[Array, dict[str, Array]]:
        losses, said = program.losses(params, part, key)
        return jnp.stack(losses), said

    def one(params: Any, part: Any, key: Array) -> tuple[Array, Any]:
        losses, said = stack(params, part, key)
        return scalarizer.apply(losses, state, mask=mask)[0], (losses, said)

    if len(asked.keys) == 1 or scalarizer.linear:
        gradient = jax.value_and_grad(one, has_aux=True)
        (_, (losses, said)), gradients = asked.summed(lambda part, key: gradient(params, part, key))
        return Found(losses, gradients, scalarizer.apply(losses, state, mask=mask)[1], said)
    losses, said = asked.summed(lambda part, key: stack(params, part, key))
    (_, new), slope = jax.value_and_grad(lambda x: scalarizer.apply(x, state, mask=mask), has_aux=True)(losses)

    def weighted(params: Any, part: Any, key: Array) -> Array:
        return jnp.sum(slope * stack(params, part, key)[0])

    gradients = asked.summed(lambda part, key: jax.grad(weighted)(params, part, key))
    return Found(losses, gradients, new, said)


def by_parameters(asked: Question, aggregator: WeightedAggregator) -> Found:
    """Weights from the Jacobian of the shared parameters: one forward pass, a backward pass for each task.

    Raises:
      ValueError: no parameter that learns is shared.
    """
    shared, private = _split(asked.params, asked.own)
    if not shared:
        raise InputError(
            "objective: it weighs the tasks by their gradients of shared parameters, but all that learns belongs to "
            "one task or another; take gradients='representation', or a scalariser."
        )

    def rows(part: Any, key: Array) -> tuple[Array, Any, Any, dict[str, Array]]:
        losses, pull, said = jax.vjp(
            lambda s, p: asked.program.losses({**s, **p}, part, key), shared, private, has_aux=True
        )
        jacobian, alone = zip(*rows_of(pull, losses), strict=True)
        # A head's gradient is its task's alone, so the sum over tasks is that gradient, unweighted.
        return jnp.stack(losses), constrain_rows(stacked(jacobian)), added(alone), said

    losses, jacobian, alone, said = asked.summed(rows)
    matrix = gramian(jacobian)
    update, state = aggregator.update(jacobian, asked.state, losses=losses, task_mask=asked.mask)
    measured = gradient_metrics(matrix, state.weights, asked.names)
    return Found(losses, {**update, **alone}, state, {**measured, **said})


def by_representation(asked: Question, aggregator: WeightedAggregator) -> Found:
    """Weights from the gradients in the pyramid; one backward pass of the backbone whatever the number of tasks is.

    With micro-batches the Gramian is first added up over all of them (its sum over samples does not care), then a
    second pass takes the gradient of the weighted losses.
    """
    program, names = asked.program, asked.names
    trunk, rest = _split(asked.params, frozenset(path for path in asked.params if in_backbone(path) is None))
    shared, private = _split(rest, asked.own)

    def weigh(matrix: Array, losses: Array) -> tuple[Array, Any]:
        return aggregator.weigh(matrix, asked.state, losses=losses, mask=asked.mask)

    if len(asked.keys) == 1:
        part, key = asked.first()
        found = representation_gradients(
            lambda t: program.encode(t, part, key),
            lambda z, s, p: program.decode(z, {**s, **p}, part, key),
            trunk,
            shared,
            private,
            weigh,
            has_aux=True,
        )
        gradients = {**found.trunk, **found.shared, **found.own}
        measured = gradient_metrics(found.gramian, found.weights, names)
        return Found(found.losses, gradients, found.state, {**measured, **found.aux})

    def measure(part: Any, key: Array) -> tuple[Array, Array, Any, dict[str, Array]]:
        z = program.encode(trunk, part, key)
        losses, pull, said = jax.vjp(
            lambda z, p: program.decode(z, {**shared, **p}, part, key), z, private, has_aux=True
        )
        by_z, alone = zip(*rows_of(pull, losses), strict=True)
        return jnp.stack(losses), gramian(stacked(by_z)), added(alone), said

    losses, matrix, alone, said = asked.summed(measure)
    weights, state = weigh(matrix, losses)

    def weighted(kept: Any, part: Any, key: Array) -> Array:
        losses = jnp.stack(program.losses({**kept, **private}, part, key)[0])
        return jnp.sum(jnp.where(weights == 0, 0, weights * losses))

    gradients = asked.summed(lambda part, key: jax.grad(weighted)({**trunk, **shared}, part, key))
    return Found(losses, {**gradients, **alone}, state, {**gradient_metrics(matrix, weights, names), **said})


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
    """{"a": {"b": x}} as {"a/b": x}; any pytree's leaves by their paths."""
    return {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def unflat(leaves: Mapping[str, Array], params: Any) -> Any:
    """A tree like ``params``, with these of its leaves by their paths and the others as they are: `flat` undone.

    A leaf with fewer rows (entries of its first axis) takes the place of the last ones: of a stack of which the lowest
    blocks are frozen.
    """
    whole = flat(params)
    for name, leaf in leaves.items():
        kept = whole[name].shape[0] - leaf.shape[0] if leaf.ndim else 0
        # What takes a part of it again meets the part itself: the compiler sees through a concatenation.
        whole[name] = jnp.concatenate([whole[name][:kept], leaf]) if kept else leaf
    return jax.tree.unflatten(jax.tree.structure(params), list(whole.values()))


def _split(params: Mapping[str, Array], second: frozenset[str]) -> tuple[dict[str, Array], dict[str, Array]]:
    return (
        {name: leaf for name, leaf in params.items() if name not in second},
        {name: leaf for name, leaf in params.items() if name in second},
    )
