"""What a program costs, from its trace: multiply-accumulates by module, and what it keeps for the backward pass."""

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from sgw_jax.data_pipelines.errors import InputError


def multiply_accumulates(function: Callable, *args: Any) -> dict[str, int]:
    """MACs of every matrix product and convolution of ``function(*args)``, by the path of the module that makes it.

    A matrix product of (m, k) and (k, n) has m k n; a convolution the size of its output times its window times the
    input channels of a group, without the zeros of a dilated input. Everything else (norms, softmax, additions) is not
    counted, as in the field's tables, whose "FLOPs" are these; floating-point operations are twice as many. A scan
    counts as often as it runs, a branch as its most expensive side. Nothing is computed: ``args`` may be shapes.

    Args:
      function: of arrays alone. Flax's modules name themselves in the trace: "MultiTaskModel/backbone/blocks/...".

    Raises:
      ValueError: a while loop around a product, whose number of turns is not known.
    """
    counts: Counter[str] = Counter()
    for path, times, equation in operations(jax.make_jaxpr(function)(*args).jaxpr):
        macs = _macs(equation)
        if macs and times is None:
            raise InputError(f"cost: {path} multiplies inside a while loop, whose number of turns is not known.")
        counts[path] += macs * (times or 0)
    return {path: count for path, count in counts.items() if count}


def residual_bytes(function: Callable, params: Any, *args: Any) -> int:
    """Bytes that the forward pass of ``function(params, *args)`` keeps for the gradient with respect to ``params``.

    From the trace, before the compiler: arguments themselves are not counted, nor is anything twice. What a fused
    program keeps may be less (a recomputed activation) or more (its layouts).
    """

    def forward(params: Any, args: Any) -> Any:
        return jax.vjp(lambda p: function(p, *args), params)[1]

    program = jax.make_jaxpr(forward)(params, args).jaxpr
    given = {id(variable) for variable in program.invars}
    # Literals are told by their value: their class has moved between JAX's modules.
    kept = {id(v): v.aval for v in program.outvars if not hasattr(v, "val") and id(v) not in given}
    return sum(_bytes(aval) for aval in kept.values())


def largest_arrays(function: Callable, *args: Any, number: int = 3) -> list[tuple[str, tuple[int, ...], int]]:
    """The largest arrays of ``function(*args)``: (path of the module, shape, bytes), the largest first."""
    found: dict[tuple[str, tuple[int, ...]], int] = {}
    for path, _, equation in operations(jax.make_jaxpr(function)(*args).jaxpr):
        for variable in equation.outvars:
            if hasattr(variable.aval, "dtype"):
                found[path, tuple(variable.aval.shape)] = _bytes(variable.aval)
    ordered = sorted(found.items(), key=lambda item: -item[1])[:number]
    return [(path, shape, size) for (path, shape), size in ordered]


def operations(jaxpr: Any, path: str = "", times: int | None = 1) -> Iterator[tuple[str, int | None, Any]]:
    """Every equation with the path of its module and how often it runs (None inside a while loop)."""
    for equation in jaxpr.eqns:
        own = [name for name in str(equation.source_info.name_stack).split("/") if "." not in name]  # no methods
        here = "/".join(filter(None, (path, *own)))
        inner = list(_programs(equation.params))
        if not inner:
            yield here, times, equation
        elif equation.primitive.name == "cond":
            sides = [list(operations(side, here, times)) for side in inner]
            yield from max(sides, key=lambda side: sum(_macs(op) * (n or 0) for _, n, op in side))
        else:
            turns = {"scan": equation.params.get("length"), "while": None}.get(equation.primitive.name, 1)
            product = None if times is None or turns is None else times * turns
            for program in inner:
                yield from operations(program, here, product)


def by_part(counts: Mapping[str, int], parts: Callable[[str], str]) -> dict[str, int]:
    """Sums of counts under ``parts(path)``."""
    sums: Counter[str] = Counter()
    for path, count in counts.items():
        sums[parts(path)] += count
    return dict(sums)


def _programs(params: Mapping[str, Any]) -> Iterator[Any]:
    """The programs inside an equation: bodies of scans and branches, jitted and rematerialised functions."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if hasattr(item, "eqns"):
                yield item
            elif hasattr(item, "jaxpr") and hasattr(item.jaxpr, "eqns"):
                yield item.jaxpr


def _macs(equation: Any) -> int:
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return math.prod(equation.outvars[0].aval.shape) * math.prod(left[axis] for axis in contracted)
    if equation.primitive.name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
        dilation = math.prod(equation.params["lhs_dilation"])  # the zeros between a strided convolution's gradients
        return math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) // (outputs * dilation)
    return 0


def _bytes(aval: Any) -> int:
    return math.prod(aval.shape) * aval.dtype.itemsize
