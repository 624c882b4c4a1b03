"""Groups of parameters by the names of the linen modules, and a module's parameters as a plain dict."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

Initializer = Callable[..., Array]
lecun_normal = jax.nn.initializers.lecun_normal


def params_of(module: nnx.Module) -> dict[str, Any]:
    """{name: array or dict}: the values of the module's `nnx.Param`s."""
    return nnx.to_pure_dict(nnx.state(module, nnx.Param))


class Dense(nnx.Module):
    """The parameters of a linear map: kernel (inputs, outputs) and, unless ``use_bias`` is False, bias (outputs,)."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        rngs: nnx.Rngs,
        use_bias: bool = True,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer | None = None,
        kernel_metadata: Mapping[str, Any] | None = None,
    ):
        init = lecun_normal() if kernel_init is None else kernel_init
        kernel = init(rngs.params(), (inputs, outputs), param_dtype)
        self.kernel = nnx.Param(kernel, **(kernel_metadata or {}))
        if use_bias:
            self.bias = nnx.Param(jnp.zeros((outputs,), param_dtype))


class Norm(nnx.Module):
    """The parameters of a layer normalisation: scale and bias (width,)."""

    def __init__(self, width: int, *, param_dtype: Any = jnp.float32):
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))
        self.bias = nnx.Param(jnp.zeros((width,), param_dtype))


class Exchange(nnx.Module):
    """The parameters of a self-attention with a norm in front and a gate, from 0, behind."""

    def __init__(self, width: int, **options: Any):
        self.query, self.key, self.value = (Dense(width, width, use_bias=False, **options) for _ in range(3))
        self.norm = Norm(width, param_dtype=options.get("param_dtype", jnp.float32))
        self.gate = nnx.Param(jnp.zeros((1,), options.get("param_dtype", jnp.float32)))


class Attention(nnx.Module):
    """The query, key and value maps of an attention, without biases; each is (inputs, outputs)."""

    def __init__(self, query: tuple[int, int], key: tuple[int, int], value: tuple[int, int], **options: Any):
        self.query = Dense(*query, use_bias=False, **options)
        self.key = Dense(*key, use_bias=False, **options)
        self.value = Dense(*value, use_bias=False, **options)
