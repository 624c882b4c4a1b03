"""How a primitive of JAX becomes operators of ONNX: what such a function takes and returns, and where they are kept.

A function takes the graph, the results' shapes and types, the operands, and the primitive's parameters, and returns the
value, or a list of them. Operators are those of opset 18; every one of them is in onnxruntime for any device.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.export.onnx.graph import Graph, Length, Shape, Value

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


def unknown(name: str, how: str = "") -> InputError:
    """The error of what cannot be made of ONNX."""
    return InputError(
        f"export: the network computes {name}{f' ({how})' if how else ''}, which export to ONNX has no operators for; "
        "use --format=stablehlo, which takes every network."
    )
