"""Primitives that move, repeat or cut entries, as operators of ONNX."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sgw_jax.export.onnx.graph import Graph, Length, Shape, Value, static
from sgw_jax.export.onnx.lowering import Result, primitive, unknown


@primitive("broadcast_in_dim")
def _broadcast(
    graph: Graph, results: Sequence[Result], value: Value, *, broadcast_dimensions: Sequence[int], **_: Any
) -> Value:
    held: list[Length] = [1] * len(results[0].shape)
    for axis, length in zip(broadcast_dimensions, value.held, strict=True):
        held[axis] = length
    return graph.reshaped(value, results[0].shape, tuple(held))


@primitive("reshape", "squeeze", "expand_dims")
def reshape(graph: Graph, results: Sequence[Result], value: Value, **_: Any) -> Value:
    shape = results[0].shape
    old = [axis for axis, length in enumerate(value.shape) if length != 1]
    new = [axis for axis, length in enumerate(shape) if length != 1]
    if [value.shape[axis] for axis in old] != [shape[axis] for axis in new]:
        return graph.reshaped(graph.whole(value), shape)
    held: list[Length] = [1] * len(shape)  # only axes of length 1 come and go
    for before, after in zip(old, new, strict=True):
        held[after] = value.held[before]
    return graph.reshaped(value, shape, tuple(held))


@primitive("transpose")
def _transpose(graph: Graph, results: Sequence[Result], value: Value, *, permutation: Sequence[int], **_: Any) -> Value:
    return graph.transposed(value, permutation)


@primitive("concatenate")
def _concatenate(graph: Graph, results: Sequence[Result], *values: Value, dimension: int, **_: Any) -> Value:
    return concatenated(graph, results[0], values, dimension)


@primitive("stack")
def _stack(graph: Graph, results: Sequence[Result], *values: Value, axis: int, **_: Any) -> Value:
    def raised(lengths: Shape) -> Shape:
        return (*lengths[:axis], 1, *lengths[axis:])

    rows = [graph.reshaped(value, raised(value.shape), raised(value.held)) for value in values]
    return concatenated(graph, results[0], rows, axis)


def concatenated(graph: Graph, result: Result, values: Sequence[Value], axis: int) -> Value:
    """The values one behind the other; other axes are written out in all if they are in one."""
    values = [value for value in values if value.shape[axis] != 0]
    out = [i for i in range(len(result.shape)) if i == axis or any(value.held[i] != 1 for value in values)]
    values = [graph.whole(value, out) for value in values]
    held = tuple(length if i in out else 1 for i, length in enumerate(result.shape))
    if len(values) == 1:
        return values[0]
    return graph.made(result, graph.node("Concat", *map(graph.name, values), axis=int(axis)), held)


@primitive("split")
def _split(
    graph: Graph, results: Sequence[Result], value: Value, *, sizes: Sequence[int], axis: int, **_: Any
) -> list[Value]:
    value = graph.whole(value, [axis])
    lengths = graph.integers(*(int(size) for size in sizes))
    names = graph.nodes("Split", [graph.name(value), lengths], len(sizes), axis=int(axis))
    return [
        graph.made(result, name, (*value.held[:axis], result.shape[axis], *value.held[axis + 1 :]))
        for result, name in zip(results, names, strict=True)
    ]


@primitive("tile")
def _tile(graph: Graph, results: Sequence[Result], value: Value, *, reps: Sequence[int], **_: Any) -> Value:
    if all(count == 1 for count in reps):
        return value
    name = graph.node("Tile", graph.name(graph.whole(value)), graph.integers(*(int(count) for count in reps)))
    return graph.made(results[0], name)


@primitive("pad")
def _pad(
    graph: Graph, results: Sequence[Result], value: Value, filling: Value, *, padding_config: Any, **_: Any
) -> Value:
    if any(interior for *_, interior in padding_config):
        raise unknown("pad", "between entries")
    ends = [int(low) for low, _, _ in padding_config] + [int(high) for _, high, _ in padding_config]
    name = graph.node("Pad", graph.name(graph.whole(value)), graph.integers(*ends), graph.name(filling))
    return graph.made(results[0], name)


@primitive("slice")
def _slice(
    graph: Graph,
    results: Sequence[Result],
    value: Value,
    *,
    start_indices: Sequence[int],
    limit_indices: Sequence[int],
    strides: Sequence[int] | None,
    **_: Any,
) -> Value:
    steps, shape = strides or [1] * len(start_indices), results[0].shape
    axes = [a for a, length in enumerate(shape) if length != value.shape[a] and value.held[a] == value.shape[a]]
    cut = {axis: (int(start_indices[axis]), int(limit_indices[axis]), int(steps[axis])) for axis in axes}
    return sliced(graph, shape, value, cut)


def sliced(graph: Graph, shape: Shape, value: Value, cut: dict[int, tuple[int, int, int]]) -> Value:
    """The part of a value between (start, end, step) along axes that are written out."""
    held = tuple(shape[axis] if axis in cut else length for axis, length in enumerate(value.held))
    if not cut:
        return Value(shape, value.dtype, held, value.name, value.array, parts=value.parts)
    if value.array is not None:
        where = tuple(slice(*cut[axis]) if axis in cut else slice(None) for axis in range(len(shape)))
        return Value(shape, value.dtype, held, array=value.array[where])
    starts, ends, steps = (graph.integers(*numbers) for numbers in zip(*cut.values(), strict=True))
    name = graph.node("Slice", graph.name(value), starts, ends, graph.integers(*cut), steps)
    return Value(shape, value.dtype, held, name)


@primitive("rev")
def _rev(graph: Graph, results: Sequence[Result], value: Value, *, dimensions: Sequence[int], **_: Any) -> Value:
    cut = {int(axis): (-1, -(2**31), -1) for axis in dimensions if value.held[axis] != 1}
    if not cut:
        return value
    starts, ends, steps = (graph.integers(*numbers) for numbers in zip(*cut.values(), strict=True))
    name = graph.node("Slice", graph.name(value), starts, ends, graph.integers(*cut), steps)
    return graph.made(results[0], name, value.held)


@primitive("dynamic_slice")
def _dynamic_slice(
    graph: Graph, results: Sequence[Result], value: Value, *starts: Value, slice_sizes: Sequence[Any], **_: Any
) -> Value:
    if any(start.array is None for start in starts):
        raise unknown("dynamic_slice", "at a place that the images decide")
    value, shape, cut = graph.whole(value), results[0].shape, {}
    for axis, start in enumerate(starts):
        length = shape[axis]
        if length != value.shape[axis]:
            (size,), (whole,) = static((length,), "dynamic_slice"), static((value.shape[axis],), "dynamic_slice")
            first = min(max(int(start.array), 0), whole - size)  # type: ignore[arg-type]
            cut[axis] = (first, first + size, 1)
    return sliced(graph, shape, value, cut)


@primitive("iota")
def _iota(graph: Graph, results: Sequence[Result], *, dimension: int, **_: Any) -> Value:
    shape, dtype = results[0]
    (length,) = static((shape[dimension],), "iota")
    held = tuple(length if axis == dimension else 1 for axis in range(len(shape)))
    return Value(shape, dtype, held, array=np.arange(length, dtype=dtype).reshape(held))
