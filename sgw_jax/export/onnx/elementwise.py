"""Primitives that treat each entry by itself, as operators of ONNX."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax import lax

from sgw_jax.export.onnx.graph import Graph, Value
from sgw_jax.export.onnx.lowering import ELEMENTWISE, Result, elementwise, primitive, unknown

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
