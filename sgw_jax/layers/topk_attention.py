"""Top-k attention: each query keeps its k best keys and normalises over those alone, or over all."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def topk_attention(
    query: Float[Array, "batch slots heads dim"],
    key: Float[Array, "batch tokens heads dim"],
    value: Float[Array, "batch tokens heads width"],
    top_k: int | None,
    *,
    scale: float | None = None,
    normalise_over: Literal["kept", "all"] = "kept",
) -> tuple[Float[Array, "batch slots heads width"], Float[Array, "batch heads slots kept"], Int[Array, "..."] | None]:
    """``softmax over the k largest of scale q k^T``, applied to the values (method: retrieve of KEM).

    Per batch item, head and query the k highest scores are kept (ties: the lowest token index), the softmax runs over
    them alone, and every other token gets exactly zero weight and zero gradient: the selection is piecewise constant.
    With ``normalise_over="all"`` the k kept weights are those of the softmax over all tokens, not renormalised (the
    hard competition of the shared workspace): they sum to less than 1, and the others get a gradient through the sum.
    ``top_k=None`` or ``top_k >= tokens`` is plain softmax attention. Scores and softmax are float32 whatever the inputs
    (XLA's fast CPU top-k exists only for float32 scores with both of its outputs used), the result has the dtype
    of ``value``. The k values are gathered, so nothing of size slots x tokens is multiplied with the values.

    Args:
      scale: of the scores; None is ``1 / sqrt(dim)``.

    Returns:
      output (batch, slots, heads, width), weights (batch, heads, slots, k or tokens) in float32, and the chosen token
      indices of the same shape (None where nothing was selected).
    """
    scores = attention_scores(query, key, scale)
    if top_k is None or top_k >= key.shape[1]:
        weights = jax.nn.softmax(scores, axis=-1)
        return apply_weights(weights, value), weights, None
    best, index = jax.lax.top_k(scores, top_k)
    if normalise_over == "kept":
        weights = jax.nn.softmax(best, axis=-1)
    else:
        weights = jnp.exp(best - jax.nn.logsumexp(scores, axis=-1, keepdims=True))
    by_head = jnp.swapaxes(value, 1, 2)  # (batch, heads, tokens, width)
    batch, heads, slots, _ = index.shape
    flat = index.reshape(batch, heads, slots * top_k, 1)
    chosen = jnp.take_along_axis(by_head, flat, axis=2).reshape(batch, heads, slots, top_k, value.shape[-1])
    output = jnp.einsum("bhlk,bhlkw->blhw", weights.astype(value.dtype), chosen)
    return output, weights, index


def attention_scores(
    query: Float[Array, "batch queries heads dim"],
    key: Float[Array, "batch tokens heads dim"],
    scale: float | None = None,
) -> Float[Array, "batch heads queries tokens"]:
    """``scale q k^T`` in float32 (float64 for float64 inputs); the scale is ``1 / sqrt(dim)`` unless given."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("blhd,bnhd->bhln", query, key, preferred_element_type=wide)
    return scores * jnp.asarray(query.shape[-1] ** -0.5 if scale is None else scale, wide)


def apply_weights(
    weights: Float[Array, "batch heads queries tokens"], value: Float[Array, "batch tokens heads width"]
) -> Float[Array, "batch queries heads width"]:
    """Weighted sum of the values, in the values' dtype."""
    return jnp.einsum("bhln,bnhw->blhw", weights.astype(value.dtype), value)
