"""Products of arrays and convolutions, as operators of ONNX."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from sgw_jax.export.onnx.graph import Batch, Graph, Length, Shape, Value
from sgw_jax.export.onnx.lowering import Result, primitive, unknown


@primitive("dot_general")
def _dot_general(
    graph: Graph, results: Sequence[Result], left: Value, right: Value, *, dimension_numbers: Any, **_: Any
) -> Value:
    """MatMul of (batch ..., rows, summed) and (batch ..., summed, columns), which other axes are merged to."""
    (left_summed, right_summed), (left_batch, right_batch) = dimension_numbers
    result = results[0]
    left_free = [axis for axis in range(len(left.shape)) if axis not in (*left_summed, *left_batch)]
    right_free = [axis for axis in range(len(right.shape)) if axis not in (*right_summed, *right_batch)]
    if not left_batch and left.array is not None and right.array is None:
        # A matrix that is known stands on the right, so that the axes of the other need not be merged.
        swapped = Result(
            tuple(right.shape[i] for i in right_free) + tuple(left.shape[i] for i in left_free), result.dtype
        )
        numbers = ((right_summed, left_summed), ((), ()))
        turned = _dot_general(graph, [swapped], right, left, dimension_numbers=numbers)
        count = len(right_free)
        return graph.transposed(turned, [*range(count, len(result.shape)), *range(count)])
    # Products are summed in the type of the result.
    left, right = (
        graph.transposed(graph.cast(graph.whole(value, summed), result.dtype), order)
        for value, summed, order in (
            (left, left_summed, [*left_batch, *left_free, *left_summed]),
            (right, right_summed, [*right_batch, *right_summed, *right_free]),
        )
    )
    batch, rows, summed = len(left_batch), len(left_free), len(left_summed)
    left = merged(graph, left, batch + rows, summed)
    right = merged(graph, right, batch, summed)
    right = merged(graph, right, batch + 1, len(right_free))
    if batch or not rows:
        left = merged(graph, left, batch, rows)
    made = graph.node("MatMul", graph.name(left), graph.name(right))
    over = tuple(b if a == 1 else a for a, b in zip(left.held[:batch], right.held[:batch], strict=True))
    held = (*over, *left.held[batch:-1], right.held[-1])
    shape = (*result.shape[:batch], *left.shape[batch:-1], right.shape[-1])
    product = Value(shape, result.dtype, held, made)
    # Axes that were merged were written out; one that stands alone is held as it was.
    left_held = held[batch:-1] if len(held) - batch - 1 == rows else result.shape[batch : batch + rows]
    right_held = (held[-1],) if len(right_free) == 1 else result.shape[batch + rows :]
    return graph.reshaped(product, result.shape, (*over, *left_held, *right_held))


def merged(graph: Graph, value: Value, first: int, count: int) -> Value:
    """Axes one behind the other as one: of none an axis of length 1, one alone as it is."""
    if count == 1:
        return value
    value = graph.whole(value, range(first, first + count))
    length = product_of(value.shape[first : first + count])
    shape, held = ((*old[:first], length, *old[first + count :]) for old in (value.shape, value.held))
    return graph.reshaped(value, shape, held)


def product_of(lengths: Shape) -> Length:
    """Their product, in which the batch may be once."""
    times = 1
    for length in lengths:
        times *= length.times if isinstance(length, Batch) else length
    open_ones = [length for length in lengths if isinstance(length, Batch)]
    if len(open_ones) > 1:
        raise unknown("reshape", "of two axes over the batch")
    return Batch(times) if open_ones else times


@primitive("conv_general_dilated")
def _conv(
    graph: Graph,
    results: Sequence[Result],
    image: Value,
    kernel: Value,
    *,
    dimension_numbers: Any,
    window_strides: Sequence[int],
    padding: Sequence[Any],
    lhs_dilation: Sequence[int],
    rhs_dilation: Sequence[int],
    feature_group_count: int,
    batch_group_count: int,
    **_: Any,
) -> Value:
    if batch_group_count != 1 or any(step != 1 for step in lhs_dilation):
        raise unknown("conv_general_dilated", "with dilated images or groups over the batch")
    result, numbers = results[0], dimension_numbers
    image, kernel = (graph.cast(graph.whole(value), result.dtype) for value in (image, kernel))
    made = graph.node(
        "Conv",
        graph.name(graph.transposed(image, numbers.lhs_spec)),
        graph.name(graph.transposed(kernel, numbers.rhs_spec)),
        strides=[int(step) for step in window_strides],
        pads=[int(low) for low, _ in padding] + [int(high) for _, high in padding],
        dilations=[int(step) for step in rhs_dilation],
        group=int(feature_group_count),
    )
    shape = tuple(result.shape[axis] for axis in numbers.out_spec)
    return graph.transposed(
        Value(shape, result.dtype, shape, made), [int(axis) for axis in np.argsort(numbers.out_spec)]
    )
