"""The two-layer perceptron of a transformer block."""

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
