"""Dense multi-head attention, optionally query-chunked so that memory is O(tokens x chunk)."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.layers.rotary import rotate
from sgw_jax.layers.topk_attention import apply_weights, attention_scores

EVEN = 8  # rows of a float32 register of a TPU

QKVBias = Literal["all", "query_value", "none"]


def attention(
    query: Float[Array, "batch queries heads dim"],
    key: Float[Array, "batch tokens heads dim"],
    value: Float[Array, "batch tokens heads width"],
    chunk: int | None = None,
    mask: Bool[Array, "batch tokens"] | None = None,
) -> Float[Array, "batch queries heads width"]:
    """``softmax(q k^T / sqrt(dim)) v`` with scores and softmax in float32; ``mask``: False for keys to leave out.

    With ``chunk`` the queries are taken ``chunk`` at a time and the scores of a chunk are recomputed in the backward
    pass, so that no array of size queries x tokens ever exists; the result is the same up to rounding. On a TPU the
    scores of a chunk stay on the chip: at 1009 tokens, 16 heads of 64 and 4 images a v5e's compiler moves 0.32 GB of
    main memory with chunks of 128, forward and backward, and 1.75 GB without (benchmarks/speed/chunked_attention.py).

    Raises:
      ValueError: chunk < 1.
    """
    if chunk is not None and chunk < 1:
        raise InputError(f"attention: chunk is {chunk}; it must be positive, or None for all queries at once.")
    return in_groups(lambda part: _dense(part, key, value, mask), (query,), query.shape[1] if chunk is None else chunk)


def in_groups(function: Callable[..., Array], parts: Sequence[Array], size: int) -> Array:
    """``function(*parts)``, ``size`` entries of the parts' second axis at a time, recomputed in the backward pass.

    The function must treat the entries independently and keep the axis. The groups are as few as ``size`` allows and
    of one size, a multiple of EVEN where that fits: 2304 entries, 1024 at a time, are three groups of 768. What is
    missing in the last is filled up with copies of the last entry, whose results are dropped. If one group holds all,
    the function is called as it is.
    """
    count = parts[0].shape[1]
    if count <= size:
        return function(*parts)
    even = math.ceil(count / math.ceil(count / size))
    size = min(size, math.ceil(even / EVEN) * EVEN)
    padding = -count % size

    def cut(part: Array) -> Array:
        widths = [(0, padding if axis == 1 else 0) for axis in range(part.ndim)]
        padded = jnp.pad(part, widths, mode="edge") if padding else part
        # Entry i goes to group i mod n: of entries split over devices, each has its part of every group.
        return jnp.moveaxis(padded.reshape(part.shape[0], size, -1, *part.shape[2:]), 2, 0)

    outputs = jax.lax.map(jax.checkpoint(lambda group: function(*group)), tuple(cut(part) for part in parts))
    merged = jnp.moveaxis(outputs, 0, 2)
    return merged.reshape(merged.shape[0], count + padding, *merged.shape[3:])[:, :count]


def _dense(query: Array, key: Array, value: Array, mask: Array | None) -> Array:
    scores = attention_scores(query, key)
    if mask is not None:  # the lowest number, not -inf: a row of padding alone has no NaN
        scores = jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)
    return apply_weights(jax.nn.softmax(scores, axis=-1), value)


def split_heads(tokens: Float[Array, "batch tokens width"], heads: int) -> Float[Array, "batch tokens heads dim"]:
    """Cuts the last axis into heads; the head is its slow part."""
    return tokens.reshape(*tokens.shape[:-1], heads, tokens.shape[-1] // heads)


class SelfAttention(nn.Module):
    """Multi-head self-attention with an output projection (Vaswani et al. 2017; as in ViT).

    Attributes:
      chunk: queries at a time, see `attention`.
      qkv_bias: which of queries, keys and values have a bias: "all", "query_value" (DINOv3, which masks the keys'), or
        "none".

    Call: (tokens, the rotation of queries and keys, see layers/rotary.py; None is none).

    Raises:
      ValueError: a width that does not divide into num_heads; another ``qkv_bias``.
    """

    num_heads: int
    dtype: jnp.dtype = jnp.float32
    chunk: int | None = None
    qkv_bias: QKVBias = "all"

    @nn.compact
    def __call__(
        self, tokens: Float[Array, "batch tokens width"], rotation: Float[Array, "2 patches half"] | None = None
    ) -> Float[Array, "batch tokens width"]:
        width = tokens.shape[-1]
        if width % self.num_heads:
            raise InputError(f"SelfAttention: width {width} does not divide into num_heads = {self.num_heads}.")
        if self.qkv_bias not in get_args(QKVBias):
            raise InputError(f"SelfAttention: qkv_bias is {self.qkv_bias!r}; it must be one of {get_args(QKVBias)}.")
        # One matrix for the three projections keeps the matmul large.
        project = nn.Dense(3 * width, self.qkv_bias == "all", dtype=self.dtype, name="query_key_value")
        query, key, value = jnp.split(project(tokens), 3, axis=-1)
        if self.qkv_bias == "query_value":
            bias = self.param("query_value_bias", nn.initializers.zeros, (2, width)).astype(self.dtype)
            query, value = query + bias[0], value + bias[1]
        query, key, value = (split_heads(part, self.num_heads) for part in (query, key, value))
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        output = attention(query, key, value, self.chunk).reshape(tokens.shape)
        return nn.Dense(width, dtype=self.dtype, name="output")(output)
