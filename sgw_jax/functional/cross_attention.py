"""Dense cross-task attention as a function of arrays: every task's tokens attend to the tokens of all tasks."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sgw_jax.functional.axes import auto_inside
from sgw_jax.functional.linear import dense, layer_norm
from sgw_jax.functional.tokens import concatenate_mask, concatenate_tasks, split_tasks
from sgw_jax.layers.attention import attention, split_heads


@auto_inside(lambda layouts, rows: layouts)
def cross_task_attention(
    params: Mapping[str, Any],
    features: Mapping[str, Float[Array, "batch *space channels"]],
    *,
    num_heads: int = 1,
    query_chunk: int | None = 1024,
    mask: Mapping[str, Bool[Array, "batch *space"]] | None = None,
    dtype: Any = jnp.float32,
) -> dict[str, Array]:
    """``F <- F + softmax((F W_q)(F W_k)^T / sqrt(C / h)) (F W_v) W_o`` over the tokens F of all tasks together.

    Args:
      params: {"query", "key", "value", "output"}: {"kernel": (C, C)} each, and, for layer normalisation in front of the
        maps, "norm": {"scale", "bias"}.
      mask: True where a token is real; padding is not attended to and keeps its features.
    """
    tokens, layout = concatenate_tasks(features, "CrossTaskAttention")
    real = None if mask is None else concatenate_mask(mask, layout, "CrossTaskAttention")
    normed = layer_norm(params["norm"], tokens, dtype=dtype) if "norm" in params else tokens
    query, key, value = (
        split_heads(dense(params[name], normed, dtype=dtype), num_heads) for name in ("query", "key", "value")
    )
    mixed = attention(query, key, value, query_chunk, real).reshape(tokens.shape)
    update = dense(params["output"], mixed, dtype=dtype).astype(tokens.dtype)
    update = update if real is None else jnp.where(real[..., None], update, 0)
    return split_tasks(tokens + update, layout)
