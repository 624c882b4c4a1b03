"""JAX's primitives as ONNX operators: a function for each that a network's forward pass is made of.

A function takes the graph, the results' shapes and types, the operands, and the primitive's parameters, and returns the
value, or a list of them. Operators are those of opset 18; every one of them is in onnxruntime for any device.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax import lax

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.export.onnx_graph import Batch, Graph, Length, Shape, Value, static

OPSET = 18


class Result(NamedTuple):
    """What a primitive's result is: a shape and a type."""

    shape: Shape
    dtype: np.dtype


Lowering = Callable[..., Any]
PRIMITIVES: dict[str, Lowering] = {}
# Those that treat each entry by itself: of constants they are computed without being written out.
ELEMENTWISE: set[str] = set()


def primitive(*names: str) -> Callable[[Lowering], Lowering]:
    """Registers a function under the names of primitives."""

    def register(function: Lowering) -> Lowering:
        PRIMITIVES.update(dict.fromkeys(names, function))
        return function

    return register


def elementwise(*names: str) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Registers what makes, of the names of tensors, the name of one that has an entry for each of theirs."""

    def register(function: Callable[..., str]) -> Callable[..., str]:
        def lowered(graph: Graph, results: Sequence[Result], *operands: Value, **parameters: Any) -> Value:
            name = function(graph, *map(graph.name, operands), result=results[0], **parameters)
            return graph.made(results[0], name, common(results[0].shape, operands))

        PRIMITIVES.update(dict.fromkeys(names, lowered))
        ELEMENTWISE.update(names)
        return function

    return register


def common(shape: Shape, operands: Sequence[Value]) -> Shape:
    """How a result of entry by entry is held: an axis is written out if one operand's is."""
    held: list[Length] = [1] * len(shape)
    for operand in operands:
        for axis, length in enumerate(operand.held):
            if length != 1:
                held[axis] = length
    return tuple(held)


# --- entry by entry

PLAIN = {
    "abs": "Abs",
    "add": "Add",
    "add_any": "Add",
    "ceil": "Ceil",
    "cos": "Cos",
    "div": "Div",
    "eq": "Equal",
    "erf": "Erf",
    "exp": "Exp",
    "floor": "Floor",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "le": "LessOrEqual",
    "log": "Log",
    "logistic": "Sigmoid",
    "lt": "Less",
    "max": "Max",
    "min": "Min",
    "mul": "Mul",
    "neg": "Neg",
    "pow": "Pow",
    "sign": "Sign",
    "sin": "Sin",
    "sqrt": "Sqrt",
    "sub": "Sub",
    "tan": "Tan",
    "tanh": "Tanh",
}


def _plain(name: str, onnx_name: str) -> None:
    @elementwise(name)
    def lowered(graph: Graph, *names: str, result: Result, **_: Any) -> str:
        return graph.node(onnx_name, *names)


for _name, _onnx_name in PLAIN.items():
    _plain(_name, _onnx_name)


def _logical(name: str) -> None:
    @elementwise(name)
    def lowered(graph: Graph, *names: str, result: Result, **_: Any) -> str:
        kind = name.capitalize()
        return graph.node(kind if result.dtype == np.bool_ else f"Bitwise{kind}", *names)


for _name in ("and", "or", "xor", "not"):
    _logical(_name)


@elementwise("ne")
def _ne(graph: Graph, left: str, right: str, *, result: Result, **_: Any) -> str:
    return graph.node("Not", graph.node("Equal", left, right))


@elementwise("rsqrt")
def _rsqrt(graph: Graph, name: str, *, result: Result, **_: Any) -> str:
    return graph.node("Reciprocal", graph.node("Sqrt", name))


@elementwise("square")
def _square(graph: Graph, name: str, *, result: Result, **_: Any) -> str:
    return graph.node("Mul", name, name)


@elementwise("integer_pow")
def _integer_pow(graph: Graph, name: str, *, y: int, result: Result, **_: Any) -> str:
    return graph.node("Pow", name, graph.array(np.asarray(y, result.dtype)))


@elementwise("exp2")
def _exp2(graph: Graph, name: str, *, result: Result, **_: Any) -> str:
    return graph.node("Pow", graph.array(np.asarray(2, result.dtype)), name)


@elementwise("erfc")
def _erfc(graph: Graph, name: str, *, result: Result, **_: Any) -> str:
    return graph.node("Sub", graph.array(np.asarray(1, result.dtype)), graph.node("Erf", name))


@elementwise("log1p")
def _log1p(graph: Graph, name: str, *, result: Result, **_: Any) -> str:
    """To 6e-8, float32's last bit of 1: ONNX has no operator that is exact near 0."""
    return graph.node("Log", graph.node("Add", name, graph.array(np.asarray(1, result.dtype))))


@elementwise("expm1")
def _expm1(graph: Graph, name: str, *, result: Result, **_: Any) -> str:
    return graph.node("Sub", graph.node("Exp", name), graph.array(np.asarray(1, result.dtype)))


@elementwise("is_finite")
def _is_finite(graph: Graph, name: str, *, result: Result, **_: Any) -> str:
    return graph.node("Not", graph.node("Or", graph.node("IsInf", name), graph.node("IsNaN", name)))


@elementwise("rem")
def _rem(graph: Graph, left: str, right: str, *, result: Result, **_: Any) -> str:
    return graph.node("Mod", left, right, fmod=1)  # the sign is the dividend's, as lax.rem has it


@elementwise("round")
def _round(graph: Graph, name: str, *, rounding_method: Any, result: Result, **_: Any) -> str:
    if rounding_method != lax.RoundingMethod.TO_NEAREST_EVEN:
        raise unknown("round", "away from zero")
    return graph.node("Round", name)


@elementwise("clamp")
def _clamp(graph: Graph, low: str, name: str, high: str, *, result: Result, **_: Any) -> str:
    return graph.node("Min", graph.node("Max", name, low), high)


@elementwise("select_n")
def _select_n(graph: Graph, which: str, *cases: str, result: Result, **_: Any) -> str:
    if len(cases) != 2:
        raise unknown("select_n", f"of {len(cases)} cases")
    return graph.node("Where", which, cases[1], cases[0])


@primitive("convert_element_type")
def _convert(graph: Graph, results: Sequence[Result], value: Value, **_: Any) -> Value:
    return graph.cast(value, results[0].dtype)


ELEMENTWISE.add("convert_element_type")


@primitive("stop_gradient", "copy", "sharding_constraint", "optimization_barrier")
def _same(graph: Graph, results: Sequence[Result], *values: Value, **_: Any) -> list[Value]:
    return list(values)


# --- shapes


@primitive("broadcast_in_dim")
def _broadcast(
    graph: Graph, results: Sequence[Result], value: Value, *, broadcast_dimensions: Sequence[int], **_: Any
) -> Value:
    held: list[Length] = [1] * len(results[0].shape)
    for axis, length in zip(broadcast_dimensions, value.held, strict=True):
        held[axis] = length
    return graph.reshaped(value, results[0].shape, tuple(held))


@primitive("reshape", "squeeze", "expand_dims")
def _reshape(graph: Graph, results: Sequence[Result], value: Value, **_: Any) -> Value:
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


# --- reductions and selection


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
    return _reshape(graph, [result], part)


def _as_is(size: Any) -> Any:
    """A size of JAX's: a number, or for the batch its text."""
    return int(size) if isinstance(size, int | np.integer) else "batch"


def _as_is_length(length: Length) -> Any:
    return "batch" if isinstance(length, Batch) else length


# --- products


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


def unknown(name: str, how: str = "") -> InputError:
    """The error of what cannot be made of ONNX."""
    return InputError(
        f"export: the network computes {name}{f' ({how})' if how else ''}, which export to ONNX has no operators for; "
        "use --format=stablehlo, which takes every network."
    )
