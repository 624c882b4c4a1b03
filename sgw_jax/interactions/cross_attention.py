"""Dense cross-task attention: every task's tokens attend to the tokens of all tasks (the baseline KEM argues with)."""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from data_pipelines.errors import InputError
from sgw_jax.functional.tokens import concatenate_tasks, split_tasks
from sgw_jax.layers.attention import attention, split_heads


class CrossTaskAttention(nn.Module):
    """``F <- F + softmax((F W_q)(F W_k)^T / sqrt(C / h)) (F W_v) W_o`` over the tokens F of all tasks together.

    Cost O(n_s^2 C); memory O(n_s x query_chunk), because queries are taken a chunk at a time. No biases, as in KEM.

    Attributes:
      num_heads: h; must divide C.
      query_chunk: queries per chunk; None for all at once.
      pre_norm: LayerNorm on F before the projections.
      dtype: of the computation; softmax stays float32.

    Call: mapping task -> (batch, *space, C); returns the same mapping, shapes and key order.
    """

    num_heads: int = 1
    query_chunk: int | None = 1024
    pre_norm: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Mapping[str, Float[Array, "batch *space channels"]]) -> dict[str, Array]:
        tokens, layout = concatenate_tasks(features, "CrossTaskAttention")
        channels = tokens.shape[-1]
        if channels % self.num_heads:
            raise InputError(
                f"CrossTaskAttention: the features' channels = {channels} do not divide by "
                f"num_heads = {self.num_heads}."
            )
        normed = nn.LayerNorm(dtype=self.dtype, name="norm")(tokens) if self.pre_norm else tokens

        def project(name: str, inputs: Array) -> Array:
            return nn.Dense(channels, use_bias=False, dtype=self.dtype, name=name)(inputs)

        query, key, value = (split_heads(project(name, normed), self.num_heads) for name in ("query", "key", "value"))
        mixed = attention(query, key, value, self.query_chunk).reshape(tokens.shape)
        return split_tasks(tokens + project("output", mixed).astype(tokens.dtype), layout)
