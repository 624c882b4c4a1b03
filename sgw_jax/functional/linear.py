"""Linear maps and layer normalisation as functions of their parameters, by the names of flax.linen's."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def dense(
    params: Mapping[str, Array], inputs: Float[Array, "*batch inputs"], *, dtype: Any = jnp.float32
) -> Float[Array, "*batch outputs"]:
    """``x W + b`` in the dtype; ``params``: "kernel" (inputs, outputs) and, if there is one, "bias" (outputs,)."""
    outputs = jnp.matmul(inputs.astype(dtype), params["kernel"].astype(dtype))
    return outputs + params["bias"].astype(dtype) if "bias" in params else outputs


def layer_norm(
    params: Mapping[str, Array],
    inputs: Float[Array, "*batch width"],
    *,
    epsilon: float = 1e-6,
    dtype: Any = jnp.float32,
) -> Float[Array, "*batch width"]:
    """``(x - mean) / sqrt(variance + epsilon) * scale + bias`` over the last axis; in float32, then in the dtype."""
    wide = inputs.astype(jnp.promote_types(inputs.dtype, jnp.float32))
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(jnp.mean(jnp.square(centred), axis=-1, keepdims=True) + epsilon)
    return (normed * params["scale"] + params["bias"]).astype(dtype)
