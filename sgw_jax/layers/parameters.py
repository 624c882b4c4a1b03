"""Linen modules that hold parameters for a function of arrays and compute nothing: called, they return them."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array

Initializer = Callable[..., Any]


def with_axes(init: Initializer, axes: tuple[str | None, ...] | None) -> Initializer:
    """The initializer, its result with logical names of its axes (flax.linen.spmd); None names none."""
    return init if axes is None else nn.with_logical_partitioning(init, axes)


class DenseParameters(nn.Module):
    """Of a linear map, by the names and draws of nn.Dense: {"kernel" (inputs, outputs), "bias" (outputs,)}.

    Attributes:
      axes: logical names of the kernel's two axes; the bias has the second one's.
    """

    inputs: int
    outputs: int
    use_bias: bool = True
    kernel_init: Initializer = nn.initializers.lecun_normal()
    param_dtype: Any = jnp.float32
    axes: tuple[str | None, str | None] | None = None

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        shape = self.inputs, self.outputs
        params = {"kernel": self.param("kernel", with_axes(self.kernel_init, self.axes), shape, self.param_dtype)}
        if self.use_bias:
            zeros = with_axes(nn.initializers.zeros, None if self.axes is None else self.axes[1:])
            params["bias"] = self.param("bias", zeros, (self.outputs,), self.param_dtype)
        return params


class NormParameters(nn.Module):
    """Of a layer normalisation: {"scale", "bias"} (width,), from ones and zeros."""

    width: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        starts = {"scale": nn.initializers.ones, "bias": nn.initializers.zeros}
        return {name: self.param(name, start, (self.width,), self.param_dtype) for name, start in starts.items()}


class ExchangeParameters(nn.Module):
    """Of a self-attention with a norm in front and a gate behind: {"query": {"kernel" (width, width)}, "key", "value",
    "norm", "gate" (1,) from 0}; attributes as `DenseParameters`."""

    width: int
    kernel_init: Initializer = nn.initializers.lecun_normal()
    param_dtype: Any = jnp.float32
    axes: tuple[str | None, str | None] | None = None

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        width, options = self.width, (self.kernel_init, self.param_dtype, self.axes)
        return {
            **{name: DenseParameters(width, width, False, *options, name=name)() for name in ("query", "key", "value")},
            "norm": NormParameters(self.width, self.param_dtype, name="norm")(),
            "gate": self.param("gate", nn.initializers.zeros, (1,), self.param_dtype),
        }


class AttentionParameters(nn.Module):
    """Of the query, key and value maps of an attention, without biases: {"query": {"kernel"}, "key", "value"}.

    Attributes: (inputs, outputs) of each map; the others as `DenseParameters`.
    """

    query: tuple[int, int]
    key: tuple[int, int]
    value: tuple[int, int]
    kernel_init: Initializer = nn.initializers.lecun_normal()
    param_dtype: Any = jnp.float32
    axes: tuple[str | None, str | None] | None = None

    @nn.compact
    def __call__(self) -> dict[str, dict[str, Array]]:
        widths = {"query": self.query, "key": self.key, "value": self.value}
        return {
            name: DenseParameters(inputs, outputs, False, self.kernel_init, self.param_dtype, self.axes, name=name)()
            for name, (inputs, outputs) in widths.items()
        }
