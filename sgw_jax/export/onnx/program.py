"""A JAX program as an ONNX graph: what of it the input decides becomes nodes, and all else is computed now."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import export
from jax.extend.core import Jaxpr, Literal

from sgw_jax.export.onnx.graph import BATCH, Batch, Graph, Length, Value, constant
from sgw_jax.export.onnx.lowering import Result, unknown
from sgw_jax.export.onnx.primitives import ELEMENTWISE, PRIMITIVES

END = 2**31 - 1  # of an axis, however long
# Calls are followed, whatever they mean for derivatives or compilation: parameter that holds the program.
CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "remat": "jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}


class Program:
    """A function's trace for any batch, and the graph that it becomes.

    Args:
      function: (parameters, images) -> {name: array}, whose images have the batch as their first axis.
      parameters: by name; they are constants of the graph.
      size: of an image, (height, width, channels).
      images: name of the graph's input.

    Raises:
      InputError: a primitive that ONNX has no operator for, by its name.
    """

    def __init__(self, function: Any, parameters: Mapping[str, np.ndarray], size: Sequence[int], images: str):
        (self._batch,) = export.symbolic_shape(BATCH)
        given = jax.ShapeDtypeStruct((self._batch, *size), np.uint8)
        shapes = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in parameters.items()}
        traced, outputs = jax.make_jaxpr(function, return_shape=True)(shapes, given)
        names = sorted(outputs)  # as JAX orders a mapping
        known = [constant(parameters[name], name) for name in sorted(parameters)]
        self.graph = Graph(images)
        self.images = Value(self._shape(given.shape), np.dtype(np.uint8), self._shape(given.shape), images)
        consts = [constant(leaf) for leaf in traced.consts]
        found = self._run(traced.jaxpr, consts, [*known, self.images])
        self.outputs = dict(zip(names, found, strict=True))

    def _run(self, jaxpr: Jaxpr, consts: Sequence[Value], inputs: Sequence[Value]) -> list[Value]:
        """The results of a program."""
        values: dict[Any, Value] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))

        def read(variable: Any) -> Value:
            if isinstance(variable, Literal):
                known: Any = variable
                return constant(np.asarray(known.val, known.aval.dtype))
            return values[variable]

        for equation in jaxpr.eqns:
            found = self._apply(equation, [read(variable) for variable in equation.invars])
            values.update(zip(equation.outvars, found, strict=True))
        return [read(variable) for variable in jaxpr.outvars]

    def _apply(self, equation: Any, operands: list[Value]) -> list[Value]:
        name, parameters = equation.primitive.name, equation.params
        if name in CALLS:
            return self._call(parameters[CALLS[name]], operands)
        if name == "scan":
            return self._scan(equation, operands)
        results = [
            Result(self._shape(variable.aval.shape), np.dtype(variable.aval.dtype)) for variable in equation.outvars
        ]
        if (
            operands
            and all(operand.array is not None for operand in operands)
            and (folded := self._folded(equation.primitive, parameters, operands, results))
        ):
            return folded
        if name not in PRIMITIVES:
            raise unknown(name)
        if name == "slice":
            parameters = {**parameters, **_places(equation.invars[0].aval.shape, parameters)}
        made = PRIMITIVES[name](self.graph, results, *operands, **parameters)
        return made if isinstance(made, list) else [made]

    def _call(self, program: Any, operands: Sequence[Value]) -> list[Value]:
        """The results of a program inside, which JAX holds with its constants or without."""
        consts = [constant(leaf) for leaf in getattr(program, "consts", ())]
        return self._run(getattr(program, "jaxpr", program), consts, operands)

    def _scan(self, equation: Any, operands: list[Value]) -> list[Value]:
        """Step by step: a runtime then plans the whole network as one, which it does not through a loop.

        What is shared, carried and taken row by row is told by ranks; how JAX writes it down changes between releases.
        """
        jaxpr, length, reverse = (equation.params[name] for name in ("jaxpr", "length", "reverse"))
        inner = getattr(jaxpr, "jaxpr", jaxpr)
        num_rows = sum(len(v.shape) > len(i.aval.shape) for v, i in zip(operands, inner.invars, strict=True))
        num_carry = sum(
            len(out.aval.shape) == len(i.aval.shape) for out, i in zip(equation.outvars, inner.outvars, strict=True)
        )
        num_consts = len(operands) - num_carry - num_rows
        shared, carry = operands[:num_consts], operands[num_consts : num_consts + num_carry]
        rows: list[list[Value]] = []
        for step in reversed(range(length)) if reverse else range(length):
            own = [self._row(value, step) for value in operands[num_consts + num_carry :]]
            found = self._call(jaxpr, [*shared, *carry, *own])
            carry = found[:num_carry]
            rows.append(found[num_carry:])
        stacked = []
        for parts in zip(*(reversed(rows) if reverse else rows), strict=True):
            shape = (length, *parts[0].shape)
            stacked.append(Value(shape, parts[0].dtype, shape, parts=parts))
        return [*carry, *stacked]

    def _row(self, value: Value, step: int) -> Value:
        if value.parts:
            return value.parts[step]
        at = step if value.held[0] != 1 else 0
        if value.array is not None:
            label = f"{value.label}/{step}" if value.label else ""
            return Value(value.shape[1:], value.dtype, value.held[1:], array=value.array[at], label=label)
        name = self.graph.node("Gather", self.graph.name(value), self.graph.array(np.asarray(at, np.int64)), axis=0)
        return Value(value.shape[1:], value.dtype, value.held[1:], name)

    def _folded(
        self, primitive: Any, parameters: Mapping[str, Any], operands: list[Value], results: Sequence[Result]
    ) -> list[Value] | None:
        """What JAX makes of constants; None where that has the batch in it."""
        if primitive.name in ("broadcast_in_dim", "reshape", "transpose", "squeeze", "convert_element_type", "iota"):
            return None  # they are made of constants as they are
        if primitive.name in ELEMENTWISE:
            arrays = np.broadcast_arrays(*(operand.array for operand in operands if operand.array is not None))
            (result,) = results
            made = np.asarray(primitive.bind(*arrays, **parameters))
            return [Value(result.shape, result.dtype, made.shape, array=made)]
        shapes = [*(operand.shape for operand in operands), *(result.shape for result in results)]
        has_batch = any(isinstance(length, Batch) for shape in shapes for length in shape)
        if has_batch and primitive.name != "dot_general":
            return None
        # Of constants no axis over the batch is written out: a product for a batch of one is that of any.
        over = [[axis for axis, length in enumerate(value.shape) if isinstance(length, Batch)] for value in operands]
        if has_batch and any(set(a) & set(b) for a, b in zip(over, parameters["dimension_numbers"][0], strict=True)):
            return None
        known = [
            self.graph.whole(value, [axis for axis in range(len(value.shape)) if axis not in skipped]).array
            for value, skipped in zip(operands, over, strict=True)
        ]
        bound = primitive.bind(*known, **parameters)
        found = [np.asarray(leaf) for leaf in (bound if primitive.multiple_results else [bound])]
        return [
            Value(result.shape, result.dtype, array.shape, array=array)
            for result, array in zip(results, found, strict=True)
        ]

    def _shape(self, shape: Sequence[Any]) -> tuple[Length, ...]:
        return tuple(self._length(length) for length in shape)

    def _length(self, length: Any) -> Length:
        """A length as a number, or as how many times the batch it is."""
        if isinstance(length, int | np.integer):
            return int(length)
        times = length // self._batch
        if not isinstance(times, int | np.integer) or times * self._batch != length:
            raise unknown("an axis", f"of length {length}, which is no multiple of the batch")
        return Batch(int(times))


def _places(shape: Sequence[Any], parameters: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Where a slice begins and ends; with the batch in it, it counts from the end, as ONNX does."""
    found: dict[str, list[Any]] = {}
    for name, end in (("start_indices", 0), ("limit_indices", END)):
        ends = zip(parameters[name], shape, strict=True)
        found[name] = [at if isinstance(at, int | np.integer) else (at - length or end) for at, length in ends]
    return found
