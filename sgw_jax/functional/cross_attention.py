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
    mask: Mapping[str, Bool[Array, " batch *space"]] | None = None,
    dtype: Any = jnp.float32,
) -> dict[str, Array]:
    """``F <- F + softmax((F W_q)(F W_k)^T / sqrt(C / h)) (F W_v) W_o`` over the tokens F of all tasks together.

    Args:
      params: {"query", "key", "value", "output"}: {"kernel": (C, C)} each, and, for layer normalisation in front of the
        maps, "norm": {"scale", "bias"}.
      features: task -> (batch, *space, C), floating-point, of one C, batch size and dtype.
      num_heads: h; divides C.
      query_chunk: queries at a time; None: all.
      mask: True where a token is real; padding is not attended to and keeps its features.
      dtype: of the computation; softmax stays float32.

    Returns:
      The same mapping: keys, order, shapes and dtype.

    Raises:
      ValueError: features that do not fit together, see `check_features`; masks of other tasks or shapes; a chunk
        below 1.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.functional import cross_task_attention
    >>> features = {"depth": jnp.ones((1, 2, 2, 4)), "edges": jnp.ones((1, 3, 4))}
    >>> params = {name: {"kernel": jnp.eye(4)} for name in ("query", "key", "value", "output")}
    >>> mixed = cross_task_attention(params, features, num_heads=2)
    >>> {name: (value.shape, float(value.mean())) for name, value in mixed.items()}
    {'depth': ((1, 2, 2, 4), 2.0), 'edges': ((1, 3, 4), 2.0)}
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
