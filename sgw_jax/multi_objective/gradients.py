"""Gradients of several losses: by parameters (a Jacobian), or by a representation and then one backward pass."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.multi_objective._weighting import weighted_sum_of
from sgw_jax.multi_objective.gramian import gramian

MODES = ("map", "vmap", "unroll")

Losses = Float[Array, " tasks"] | list[Float[Array, ""]] | tuple[Float[Array, ""], ...]


def task_gradients(
    losses_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    mode: Literal["map", "vmap", "unroll"] = "unroll",
    constrain: Callable[[Any], Any] | None = None,
    has_aux: bool = False,
) -> tuple[Float[Array, " tasks"], Any, Any]:
    """``losses_fn(params, *args) -> losses`` and its Jacobian, a pytree like params with a leading axis of tasks.

    One forward pass; T backward passes, written out one after another ("unroll", the default), as a loop ("map": the
    shortest program) or at once ("vmap": the memory of T). All give the same numbers up to rounding. Cost: F + T B,
    with B about 2 F. A loop keeps XLA's CPU backend from its fast convolutions: there it was 5 times slower than
    "unroll" (benchmarks/speed/objective_cost.py).

    Args:
      losses_fn: returns T numbers, a sequence of scalars or a vector (T,). Prefer the sequence: with "unroll" the pass
        of loss i then leaves out what it does not depend on, such as the other tasks' heads. Through a vector they are
        all passed through with zeros, which no compiler removes (0 times infinity is not 0).
      params: a pytree, what the losses are differentiated by.
      args: the other arguments of ``losses_fn``.
      mode: how the backward passes are made, as above.
      constrain: applied to the Jacobian, for instance to keep its leaves sharded like the parameters.
      has_aux: losses_fn returns (losses, aux).

    Returns:
      (losses, jacobian, aux), aux None without ``has_aux``.

    Raises:
      ValueError: losses that are neither one vector nor scalars, an unknown mode.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import task_gradients
    >>> losses, jacobian, _ = task_gradients(lambda w, x: [w @ x, w @ w], jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]))
    >>> losses.tolist(), jacobian.tolist()
    ([11.0, 5.0], [[3.0, 4.0], [2.0, 4.0]])
    """
    if mode not in MODES:
        raise InputError(f"task_gradients: mode is {mode!r}; it must be one of {MODES}.")
    aux = None
    if has_aux:
        losses, pull, aux = jax.vjp(lambda p: losses_fn(p, *args), params, has_aux=True)
    else:
        losses, pull = jax.vjp(lambda p: losses_fn(p, *args), params)
    (jacobian,) = stacked(rows_of(pull, losses, mode))
    return jnp.stack(losses), jacobian if constrain is None else constrain(jacobian), aux


def rows_of(pull: Callable[[Any], Any], losses: Losses, mode: str = "unroll") -> list[Any]:
    """What a function pulls back for each of its losses, one tree a loss; see `task_gradients` for ``mode``."""
    scalars = isinstance(losses, list | tuple)
    shapes = [jnp.shape(loss) for loss in losses] if isinstance(losses, list | tuple) else jnp.shape(losses)
    if any(shapes) if scalars else len(shapes) != 1:
        raise InputError(f"task_gradients: the losses have shape {shapes}; they must be one vector, or scalars.")
    ones, tree = [jnp.ones_like(loss) for loss in losses], jax.tree.structure(losses)
    units = jnp.eye(len(ones), dtype=jnp.result_type(*ones))

    def at(unit: Array) -> Any:
        entries = [unit[i].astype(one.dtype) for i, one in enumerate(ones)]
        return pull(jax.tree.unflatten(tree, entries) if scalars else unit)

    if mode != "unroll":
        rows = jax.vmap(at)(units) if mode == "vmap" else jax.lax.map(at, units)
        return [jax.tree.map(lambda leaf, i=i: leaf[i], rows) for i in range(len(ones))]
    if not scalars:
        return [pull(unit) for unit in units]
    zeros = [_no_slope(one) for one in ones]
    return [pull(jax.tree.unflatten(tree, [*zeros[:i], one, *zeros[i + 1 :]])) for i, one in enumerate(ones)]


def _no_slope(one: Array) -> Any:
    """A symbolic zero, which ends the pass through what the other losses alone depend on; by JAX's legacy API, so that
    where it is gone an array of zeros stands in: the same gradients for more work."""
    try:
        from jax.interpreters import ad

        return ad.Zero(jax.typeof(one).to_ct_aval())
    except (ImportError, AttributeError):
        return jnp.zeros_like(one)


def stacked(rows: Sequence[Any]) -> Any:
    """Trees as one tree with a new first axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


def added(rows: Sequence[Any]) -> Any:
    """The sum of trees."""
    return jax.tree.map(lambda *leaves: sum(leaves[1:], start=leaves[0]), *rows)


class RepresentationGradients(NamedTuple):
    """What `representation_gradients` returns.

    Attributes:
      losses: (T,).
      trunk: the gradient of the weighted losses in the trunk's parameters.
      shared: in the parameters after the representation, weighted likewise.
      own: the unweighted sum of the losses' gradients in ``own`` parameters.
      weights: (T,), of the weighting.
      state: of the weighting.
      gramian: (T, T), of the gradients in the representation.
      aux: what the heads returned beside the losses; None without ``has_aux``.

    >>> from sgw_jax.multi_objective import RepresentationGradients
    >>> RepresentationGradients._fields
    ('losses', 'trunk', 'shared', 'own', 'weights', 'state', 'gramian', 'aux')
    """

    losses: Float[Array, " tasks"]
    trunk: Any
    shared: Any
    own: Any
    weights: Float[Array, " tasks"]
    state: Any
    gramian: Float[Array, "tasks tasks"]
    aux: Any = None


def representation_gradients(
    trunk: Callable[[Any], Any],
    heads: Callable[[Any, Any, Any], Any],
    trunk_params: Any,
    shared_params: Any,
    own_params: Any,
    weighting: Callable[[Array, Array], tuple[Array, Any]],
    *,
    mode: Literal["map", "vmap", "unroll"] = "unroll",
    has_aux: bool = False,
) -> RepresentationGradients:
    """Weights from gradients in a representation z = trunk(trunk_params); one backward pass of the trunk whatever T is.

    G[i, j] = sum over the batch's samples of <dL_i / dz_b, dL_j / dz_b> (MGDA-UB, Sener and Koltun 2018, for any
    method). It equals the parameters' problem up to the trunk's Jacobian: an upper bound, and with it a Pareto-
    stationary point in z is one in the parameters. Cost: F + B and T - 1 more backward passes of what follows z; with s
    the share of the FLOPs after z, 1 + (T - 1) (2/3) s of a step with one loss. Memory: T times z.

    Args:
      trunk: trunk_params -> z, any pytree; the inputs are in its closure.
      heads: (z, shared_params, own_params) -> T losses, best as a sequence of scalars (see `task_gradients`).
      trunk_params: a pytree.
      shared_params: parameters after z that more than one task uses; they take the weighted gradients, from the same
        backward passes.
      own_params: parameters that one task alone uses; they take their task's gradient unweighted.
      weighting: (gramian (T, T), losses (T,)) -> (weights (T,), its state).
      mode: as of `task_gradients`.
      has_aux: whether ``heads`` returns (losses, anything else), which is passed on.

    Returns:
      The gradients, and what they were weighted by.

    Raises:
      ValueError: losses that are neither one vector nor scalars; a z without a leading axis of samples.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import representation_gradients
    >>> x = jnp.array([[1.0], [2.0]])
    >>> found = representation_gradients(
    ...     trunk=lambda w: x * w,
    ...     heads=lambda z, shared, own: [jnp.sum(z * shared), jnp.sum(z * own)],
    ...     trunk_params=jnp.array(1.0),
    ...     shared_params=jnp.array(2.0),
    ...     own_params=jnp.array(3.0),
    ...     weighting=lambda gramian, losses: (jnp.array([0.5, 0.5]), None),
    ... )
    >>> float(found.trunk), float(found.shared), float(found.own)
    (7.5, 1.5, 3.0)
    """
    z, pull_trunk = jax.vjp(trunk, trunk_params)
    beside = heads if has_aux else lambda *at: (heads(*at), None)
    losses, pull, aux = jax.vjp(beside, z, shared_params, own_params, has_aux=True)
    by_z, by_shared, by_own = zip(*rows_of(pull, losses, mode), strict=True)
    by_z, losses = stacked(by_z), jnp.stack(losses)
    matrix = gramian(by_z)
    weights, state = weighting(matrix, losses)
    (by_trunk,) = pull_trunk(weighted_sum_of(by_z, weights))
    return RepresentationGradients(
        losses=losses,
        trunk=by_trunk,
        shared=weighted_sum_of(stacked(by_shared), weights),
        own=added(by_own),
        weights=weights,
        state=state,
        gramian=matrix,
        aux=aux,
    )
