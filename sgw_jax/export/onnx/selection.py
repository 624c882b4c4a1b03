"""Primitives that reduce axes or choose entries, as operators of ONNX."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from sgw_jax.export.onnx.graph import Batch, Graph, Length, Value, static
from sgw_jax.export.onnx.lowering import Result, primitive, unknown
from sgw_jax.export.onnx.shapes import reshape, sliced


def _reduction(name: str, onnx_name: str, repeats: bool) -> None:
    @primitive(name)
    def lowered(graph: Graph, results: Sequence[Result], value: Value, *, axes: Sequence[int], **_: Any) -> Value:
        axes = [int(axis) for axis in axes]
        if not axes:
            return value
        value = graph.whole(value, axes) if repeats else value  # the largest of equal ones is each
        kept = tuple(length for axis, length in enumerate(value.held) if axis not in axes)
        logical = results[0].dtype == np.bool_
        tensor = graph.name(graph.cast(value, np.int32) if logical else value)
        reduced = graph.made(results[0], graph.node(onnx_name, tensor, graph.integers(*axes), keepdims=0), kept)
        if not logical:
            return reduced
        return graph.cast(Value(reduced.shape, np.dtype(np.int32), kept, reduced.name), np.bool_)


for _name, _onnx_name, _repeats in (
    ("reduce_sum", "ReduceSum", True),
    ("reduce_prod", "ReduceProd", True),
    ("reduce_max", "ReduceMax", False),
    ("reduce_min", "ReduceMin", False),
    ("reduce_and", "ReduceMin", False),
    ("reduce_or", "ReduceMax", False),
):
    _reduction(_name, _onnx_name, _repeats)


def _place(name: str, onnx_name: str) -> None:
    @primitive(name)
    def lowered(graph: Graph, results: Sequence[Result], value: Value, *, axes: Sequence[int], **_: Any) -> Value:
        (axis,) = axes
        value = graph.whole(value, [axis])
        kept = (*value.held[:axis], *value.held[axis + 1 :])
        name = graph.node(onnx_name, graph.name(value), axis=int(axis), keepdims=0)  # of equal ones the first, as JAX
        return graph.cast(Value(results[0].shape, np.dtype(np.int64), kept, name), results[0].dtype)


_place("argmax", "ArgMax")
_place("argmin", "ArgMin")


@primitive("cumsum")
def _cumsum(
    graph: Graph, results: Sequence[Result], value: Value, *, axis: int, reverse: bool = False, **_: Any
) -> Value:
    value = graph.whole(value, [axis])
    where = graph.array(np.asarray(axis, np.int64))
    return graph.made(results[0], graph.node("CumSum", graph.name(value), where, reverse=int(reverse)), value.held)


@primitive("top_k")
def _top_k(graph: Graph, results: Sequence[Result], value: Value, *, k: int, axis: int = -1, **_: Any) -> list[Value]:
    """Of equal ones the first comes first in both ONNX and JAX: the same tokens in the same order."""
    axis = axis % len(value.shape)
    value = graph.whole(value, [axis])
    held = (*value.held[:axis], results[0].shape[axis], *value.held[axis + 1 :])
    values, index = graph.nodes("TopK", [graph.name(value), graph.integers(int(k))], 2, axis=axis, largest=1, sorted=1)
    found = Value(results[1].shape, np.dtype(np.int64), held, index)
    return [graph.made(results[0], values, held), graph.cast(found, results[1].dtype)]


@primitive("approx_top_k")
def _approx_top_k(
    graph: Graph,
    results: Sequence[Result],
    value: Value,
    *,
    k: int,
    reduction_dimension: int,
    is_max_k: bool,
    **_: Any,
) -> list[Value]:
    """Exactly: what may miss some may miss none."""
    if not is_max_k:
        raise unknown("approx_top_k", "of the smallest")
    return _top_k(graph, results, value, k=k, axis=reduction_dimension)


@primitive("gather")
def _gather(
    graph: Graph,
    results: Sequence[Result],
    value: Value,
    index: Value,
    *,
    dimension_numbers: Any,
    slice_sizes: Sequence[Any],
    mode: Any,
    fill_value: Any,
    **_: Any,
) -> Value:
    numbers, shape = dimension_numbers, results[0].shape
    if len(index.shape) == 1 and index.array is not None:
        return _one_slice(graph, results[0], value, index.array, numbers.start_index_map)
    indexed, batched = tuple(numbers.start_index_map), tuple(numbers.operand_batching_dims)
    if set(numbers.collapsed_slice_dims) != set(indexed):
        raise unknown("gather", "of more than single rows")
    rest = [axis for axis in range(len(value.shape)) if axis not in (*indexed, *batched)]
    if any(_as_is(slice_sizes[axis]) != _as_is_length(value.shape[axis]) for axis in rest):
        raise unknown("gather", "of a part of rows")
    table = graph.transposed(graph.whole(value), [*batched, *indexed, *rest])
    own = [axis for axis in range(len(index.shape) - 1) if axis not in numbers.start_indices_batching_dims]
    order = [*numbers.start_indices_batching_dims, *own, len(index.shape) - 1]
    places = graph.cast(graph.transposed(graph.whole(index), order), np.int64)
    names = [graph.name(places)]
    inside = ""
    if mode != lax.GatherScatterMode.PROMISE_IN_BOUNDS and index.array is None:
        limits = np.asarray(static(tuple(value.shape[axis] for axis in indexed), "gather"), np.int64) - 1
        zero, last = graph.array(np.zeros_like(limits)), graph.array(limits)
        clamped = graph.node("Min", graph.node("Max", names[0], zero), last)
        if mode == lax.GatherScatterMode.FILL_OR_DROP:
            same = graph.node("Cast", graph.node("Equal", names[0], clamped), to=6)  # int32
            inside = graph.node("ReduceMin", same, graph.integers(-1), keepdims=0)
        names = [clamped]
    found = graph.node("GatherND", graph.name(table), names[0], batch_dims=len(batched))
    if inside:
        inside = graph.node("Cast", inside, to=9)  # bool
        where = graph.node("Unsqueeze", inside, graph.integers(*range(-len(rest), 0))) if rest else inside
        filling = np.nan if fill_value is None and value.dtype.kind == "f" else fill_value or 0
        found = graph.node("Where", where, found, graph.array(np.asarray(filling, value.dtype)))
    # Axes of the result so far: those of the index in this order, then the rows'. Where JAX has them:
    free = [axis for axis in range(len(shape)) if axis not in numbers.offset_dims]
    places_of = [free[axis] for axis in order[:-1]] + list(numbers.offset_dims)
    so_far = Value(
        tuple(shape[axis] for axis in places_of), value.dtype, tuple(shape[axis] for axis in places_of), found
    )
    return graph.transposed(so_far, [int(axis) for axis in np.argsort(places_of)])


def _one_slice(graph: Graph, result: Result, value: Value, starts: np.ndarray, indexed: Sequence[int]) -> Value:
    """What begins at one known place; axes of length 1 may be dropped."""
    if value.parts and tuple(indexed) == (0,) and len(result.shape) == len(value.shape) - 1:
        return value.parts[int(starts[0])]
    sizes = list(value.shape)
    dropped = len(value.shape) - len(result.shape)
    kept = list(result.shape)
    if dropped:  # the indexed axes are those that single entries are taken of
        for axis in indexed:
            sizes[axis] = 1
    else:
        sizes = kept
    value = graph.whole(value, list(indexed))
    cut = {
        int(axis): (int(start), int(start) + int(sizes[axis]), 1)  # type: ignore[arg-type]
        for axis, start in zip(indexed, starts, strict=True)
    }
    part = sliced(graph, tuple(sizes), value, cut)
    return reshape(graph, [result], part)


def _as_is(size: Any) -> Any:
    """A size of JAX's: a number, or for the batch its text."""
    return int(size) if isinstance(size, int | np.integer) else "batch"


def _as_is_length(length: Length) -> Any:
    return "batch" if isinstance(length, Batch) else length
