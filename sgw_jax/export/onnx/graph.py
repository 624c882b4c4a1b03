"""An ONNX graph that is being made: its nodes, its constants, and values whose shapes may hold the batch."""

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

from sgw_jax.data_pipelines.errors import InputError

BATCH = "batch"  # the name of the one length that is open


class Batch(NamedTuple):
    """A length of a shape: so many times the batch."""

    times: int = 1


Length = int | Batch
Shape = tuple[Length, ...]


@dataclasses.dataclass(frozen=True)
class Value:
    """What a variable of the program is in the graph.

    An axis along which all entries are equal may be held with length 1 [our decision]: most that JAX broadcasts meets
    an operator that broadcasts by itself, so that nothing is written out, and a batch that constants are repeated over
    stays a constant.

    Attributes:
      shape: as the program has it.
      dtype: of the entries.
      held: shape of the tensor: that of the program, or 1 where an axis is not written out.
      name: of the tensor; "" for a constant, and for parts.
      array: of a constant, of the shape held.
      label: of a parameter, whose axes and type may be others than the network's.
      parts: of a value that is stacked along its first axis, of which single rows may be all that is asked for.
    """

    shape: Shape
    dtype: np.dtype
    held: Shape
    name: str = ""
    array: np.ndarray | None = None
    label: str = ""
    parts: "tuple[Value, ...]" = ()

    @property
    def is_whole(self) -> bool:
        """Whether every axis is written out."""
        return self.held == self.shape


def constant(array: Any, label: str = "") -> Value:
    """A value that is known."""
    known = np.asarray(array)
    return Value(known.shape, known.dtype, known.shape, array=known, label=label)


def tensor_type(dtype: np.dtype) -> int:
    """ONNX's number of a type."""
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


class Graph:
    """Nodes in the order in which they run. Equal nodes and equal constants are one.

    Args:
      images: name of the input from whose first axis the batch is read.
    """

    def __init__(self, images: str):
        self._images = images
        self._nodes: list[Any] = []
        self._known: dict[Any, list[str]] = {}
        self._constants: dict[Any, str] = {}
        self._arrays: dict[str, np.ndarray] = {}

    # --- nodes and constants, by the names of tensors

    def nodes(self, operator: str, inputs: Sequence[str], outputs: int, **attributes: Any) -> list[str]:
        """Adds a node; returns its outputs' names."""
        key = (operator, tuple(inputs), repr(sorted(attributes.items())))
        if key not in self._known:
            count = len(self._nodes)
            names = [f"{operator}_{count}" + (f"_{index}" if index else "") for index in range(outputs)]
            self._nodes.append(
                helper.make_node(operator, list(inputs), names, name=f"{operator}_{count}", **attributes)
            )
            self._known[key] = names
        return self._known[key]

    def node(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node of one output; returns its name."""
        return self.nodes(operator, inputs, 1, **attributes)[0]

    def array(self, array: Any, label: str = "") -> str:
        """The name of a constant tensor."""
        array = np.ascontiguousarray(array).reshape(np.shape(array))  # the first makes vectors of scalars
        key = (str(array.dtype), array.shape, hashlib.sha256(array.data).digest())
        if key not in self._constants:
            name = label if label and label not in self._arrays else f"constant_{len(self._arrays)}"
            self._constants[key], self._arrays[name] = name, array
        return self._constants[key]

    def integers(self, *numbers: int) -> str:
        """The name of a constant vector of int64."""
        return self.array(np.asarray(numbers, np.int64))

    def lengths(self, shape: Shape) -> str:
        """The name of a vector that holds a shape."""
        if not any(isinstance(length, Batch) for length in shape):
            return self.integers(*(int(length) for length in shape if not isinstance(length, Batch)))
        batch = self.node("Shape", self._images, start=0, end=1)
        pieces = [
            self.node("Mul", batch, self.integers(length.times)) if isinstance(length, Batch) else self.integers(length)
            for length in shape
        ]
        return self.node("Concat", *pieces, axis=0)

    # --- values

    def name(self, value: Value) -> str:
        """The tensor that holds a value, axes that are not written out with length 1."""
        if value.array is not None:
            return self.array(value.array, value.label)
        if value.parts:
            rows = [self.name(self.reshaped(self.whole(part), (1, *part.shape))) for part in value.parts]
            return self.node("Concat", *rows, axis=0)
        return value.name

    def made(self, like: Any, name: str, held: Shape | None = None) -> Value:
        """The value of a new tensor; ``like`` has its shape and dtype."""
        return Value(like.shape, like.dtype, like.shape if held is None else held, name)

    def whole(self, value: Value, axes: Sequence[int] | None = None) -> Value:
        """The value with these axes (None: all) written out."""
        held = list(value.held)
        for axis in range(len(held)) if axes is None else axes:
            held[axis] = value.shape[axis]
        if tuple(held) == value.held:
            return value
        if value.array is not None and not any(isinstance(length, Batch) for length in held):
            array = np.broadcast_to(value.array, held)  # type: ignore[arg-type]
            return dataclasses.replace(value, array=array, held=tuple(held), label="")
        name = self.node("Expand", self.name(value), self.lengths(tuple(held)))
        return Value(value.shape, value.dtype, tuple(held), name)

    def reshaped(self, value: Value, shape: Shape, held: Shape | None = None) -> Value:
        """The tensor of a value in another shape, whose axes are held so."""
        held = shape if held is None else held
        if value.array is not None:
            return Value(shape, value.dtype, held, array=value.array.reshape(held), label=value.label)  # type: ignore[arg-type]
        if held == value.held and not value.parts:
            return dataclasses.replace(value, shape=shape)
        if sum(isinstance(length, Batch) for length in held) == 1:
            to = self.integers(*(-1 if isinstance(length, Batch) else length for length in held))
        else:
            to = self.lengths(held)
        return Value(shape, value.dtype, held, self.node("Reshape", self.name(value), to))

    def transposed(self, value: Value, order: Sequence[int]) -> Value:
        """The value with its axes in another order."""
        if list(order) == list(range(len(order))):
            return value
        shape, held = (tuple(lengths[axis] for axis in order) for lengths in (value.shape, value.held))
        if value.array is not None:
            return Value(shape, value.dtype, held, array=value.array.transpose(order), label=value.label)
        if all(length == 1 for length in held):
            return self.reshaped(value, shape, held)
        return Value(shape, value.dtype, held, self.node("Transpose", self.name(value), perm=[int(a) for a in order]))

    def cast(self, value: Value, dtype: Any) -> Value:
        """The value in another type."""
        dtype = np.dtype(dtype)
        if value.dtype == dtype:
            return value
        if value.array is not None:
            with np.errstate(over="ignore"):  # infinite as in JAX, which the run of the file shows
                array = value.array.astype(dtype)
            return Value(value.shape, dtype, value.held, array=array, label=value.label)
        name = self.node("Cast", self.name(value), to=tensor_type(dtype))
        return Value(value.shape, dtype, value.held, name)

    # --- the whole

    def model(self, images: Value, outputs: dict[str, Value], opset: int, ir: int, producer: str, version: str) -> Any:
        """The graph as a model, without the nodes and constants that no output needs."""
        last = [helper.make_node("Identity", [self.name(self.whole(value))], [name]) for name, value in outputs.items()]
        wanted, kept = {name for node in last for name in node.input}, []
        for node in reversed(self._nodes):
            if wanted & set(node.output):
                kept.append(node)
                wanted |= set(node.input)
        arrays = [numpy_helper.from_array(array, name) for name, array in self._arrays.items() if name in wanted]
        graph = helper.make_graph(
            [*reversed(kept), *last],
            producer,
            [_described(self._images, images)],
            [_described(name, value) for name, value in outputs.items()],
            arrays,
        )
        opsets = [helper.make_opsetid("", opset)]
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=ir, producer_name=producer, producer_version=version
        )


def _described(name: str, value: Value) -> onnx.ValueInfoProto:
    """An input or output for a reader: its type, and its shape with the batch by name."""
    shape = [_spelled(length) if isinstance(length, Batch) else length for length in value.shape]
    return helper.make_tensor_value_info(name, tensor_type(value.dtype), shape)


def _spelled(length: Batch) -> str:
    return BATCH if length.times == 1 else f"{length.times}*{BATCH}"


def static(shape: Shape, what: str) -> tuple[int, ...]:
    """The shape as numbers.

    Raises:
      InputError: the batch is in it, where ``what`` cannot have it.
    """
    if any(isinstance(length, Batch) for length in shape):
        raise InputError(f"export: {what} with an open batch cannot be made of ONNX; use --format=stablehlo.")
    return tuple(length for length in shape if not isinstance(length, Batch))
