"""The perceptron of a transformer block: of two layers, or gated."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float


class MLP(nn.Module):
    """``W2 gelu(W1 x)`` with biases; the exact (erf) GELU, or its tanh approximation (Hendrycks and Gimpel 2016)."""

    hidden: int
    approximate: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        hidden = nn.gelu(nn.Dense(self.hidden, dtype=self.dtype, name="hidden")(inputs), self.approximate)
        return nn.Dense(inputs.shape[-1], dtype=self.dtype, name="output")(hidden)


class GatedMLP(nn.Module):
    """``W3 (silu(W1 x) * W2 x)`` with biases: SwiGLU (Shazeer 2020), as in the largest DINOv2 and DINOv3."""

    hidden: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, inputs: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        gate = nn.silu(nn.Dense(self.hidden, dtype=self.dtype, name="gate")(inputs))
        hidden = nn.Dense(self.hidden, dtype=self.dtype, name="hidden")(inputs)
        return nn.Dense(inputs.shape[-1], dtype=self.dtype, name="output")(gate * hidden)
