"""Top-k attention: each query keeps its k best keys and normalises over those alone, or over all."""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.layers.placement import Placement

Located = Callable[[Array, Array], Array]  # (position among a shard's tokens, shard) -> the token's index in the whole


def topk_attention(
    query: Float[Array, "batch slots heads dim"],
    key: Float[Array, "batch tokens heads dim"],
    value: Float[Array, "batch tokens heads width"],
    top_k: int | None,
    *,
    scale: float | None = None,
    normalise_over: Literal["kept", "all"] = "kept",
    recall: float | None = None,
    placement: Placement | None = None,
    located: Located | None = None,
    mask: Bool[Array, "batch tokens"] | None = None,
) -> tuple[Float[Array, "batch slots heads width"], Float[Array, "batch heads slots kept"], Int[Array, "..."] | None]:
    """``softmax over the k largest of scale q k^T``, applied to the values (method: retrieve of KEM).

    Per batch item, head and query the k highest scores are kept (ties: the lowest token index), the softmax runs over
    them alone, and every other token gets exactly zero weight and zero gradient: the selection is piecewise constant.
    With ``normalise_over="all"`` the k kept weights are those of the softmax over all tokens, not renormalised (the
    hard competition of the shared workspace): they sum to less than 1, and the others get a gradient through the sum.
    ``top_k=None`` or ``top_k >= tokens`` is plain softmax attention. Scores and softmax are float32 whatever the inputs
    (XLA's fast CPU top-k exists only for float32 scores with both of its outputs used), the result has the dtype
    of ``value``. The k values are gathered, so nothing of size slots x tokens is multiplied with the values.

    Tokens that ``placement`` splits over devices stay where they are (our decision). Each shard finds its own k best;
    the k scores and indices of every shard are gathered, the best k of those are kept, and each shard adds what it
    holds of them to a sum over shards. So 8 B h L k x shards + 4 B L h w bytes are exchanged, whatever the number of
    tokens, where the partitioner left alone gathers all B h L n scores. The result is that of one device up to the
    order of one sum.

    Args:
      scale: of the scores; None is ``1 / sqrt(dim)``.
      recall: None selects exactly; a number in (0, 1] takes `jax.lax.approx_max_k` with this expected share of the true
        k best (fast on TPUs, where it needs no sort; elsewhere it is exact).
      placement: how batch and tokens lie on a mesh; None leaves it to the partitioner.
      located: of tokens whose order is not their numbering; by default shard s holds tokens s n / shards and on.
      mask: False for tokens that are padding: their weight is zero, kept or not. None: all are real.

    Returns:
      output (batch, slots, heads, width), weights (batch, heads, slots, k or tokens) in float32, and the chosen token
      indices of the same shape (None where nothing was selected).

    Raises:
      ValueError: a number of tokens that the shards do not divide.
    """
    how = _How(top_k if top_k is not None and top_k < key.shape[1] else None, scale, normalise_over, recall)
    axes = None if placement is None else placement.axes(key.shape[0])
    if axes is None:
        return _on_one_shard(how, query, key, value, mask)
    if key.shape[1] % axes.shards:
        raise InputError(f"topk_attention: {key.shape[1]} tokens do not divide over {axes.shards} shards.")
    split, whole = P(axes.batch, axes.tokens), P(axes.batch)
    local: Any
    if axes.tokens is None:
        local, weights = functools.partial(_on_one_shard, how), whole
    elif how.top_k is None:
        local, weights = functools.partial(_over_shards_dense, how, axes.tokens), P(axes.batch, None, None, axes.tokens)
    else:
        local, weights = functools.partial(_over_shards, how, axes.tokens, located), whole
    out = (whole, weights, None if how.top_k is None else whole)
    where = None if mask is None else split
    return axes.on_shards(local, (whole, split, split, where), out)(query, key, value, mask)


class _How(NamedTuple):
    """The options of `topk_attention`; ``top_k`` None keeps all."""

    top_k: int | None
    scale: float | None
    normalise_over: str
    recall: float | None


def _on_one_shard(
    how: _How, query: Array, key: Array, value: Array, mask: Array | None
) -> tuple[Array, Array, Array | None]:
    scores = _scores(how, query, key, mask)
    if how.top_k is None:
        weights = _real(jax.nn.softmax(scores, axis=-1), scores, mask)
        return apply_weights(weights, value), weights, None
    best, index = _best(scores, how.top_k, how.recall)
    if how.normalise_over == "kept":
        weights = jax.nn.softmax(best, axis=-1)
    else:
        weights = jnp.exp(best - jax.nn.logsumexp(scores, axis=-1, keepdims=True))
    weights = _real(weights, best, mask)
    return _weigh(weights, value, index), weights, index


def _scores(how: _How, query: Array, key: Array, mask: Array | None) -> Array:
    """Of padding the lowest there is: nothing real is behind it, and a row of padding alone has no NaN."""
    scores = attention_scores(query, key, how.scale)
    return scores if mask is None else jnp.where(mask[:, None, None], scores, jnp.finfo(scores.dtype).min)


def _real(weights: Array, scores: Array, mask: Array | None) -> Array:
    """The weights, none on padding. (A score that is NaN is not the lowest: it stays to be seen.)"""
    return weights if mask is None else jnp.where(scores == jnp.finfo(scores.dtype).min, 0, weights)


def _over_shards(
    how: _How, axis: str, located: Located | None, query: Array, key: Array, value: Array, mask: Array | None
) -> tuple[Array, Array, Array]:
    """`topk_attention` seen from one shard; what it returns is equal on all of them."""
    shard, tokens, top_k = jax.lax.axis_index(axis), key.shape[1], how.top_k or 1
    scores = _scores(how, query, key, mask)
    own = min(top_k, tokens)
    candidates, position = _best(scores, own, how.recall)
    index = shard * tokens + position if located is None else located(position, shard)
    candidates, index = (jax.lax.all_gather(x, axis, axis=3, tiled=True) for x in (candidates, index))
    # In the order of their indices, because top_k takes the first of equals. (A sort by score would lose NaNs.)
    order = jnp.argsort(index, axis=-1)
    best, place = jax.lax.top_k(jnp.take_along_axis(candidates, order, axis=-1), top_k)
    chosen = jnp.take_along_axis(order, place, axis=-1)  # among all candidates
    mine = chosen // own == shard
    if how.normalise_over == "kept":
        weights = jax.nn.softmax(best, axis=-1)
    else:
        weights = jnp.exp(best - _logsumexp(scores, axis))
    weights = jnp.where(mine, _real(weights, best, mask), 0)
    kept = jnp.take_along_axis(position, jnp.where(mine, chosen % own, 0), axis=-1)
    output = _sum(_weigh(weights, value, kept), axis)
    chosen_index = jnp.where(mine, jnp.take_along_axis(index, chosen, axis=-1), 0)
    # Each weight and index from the shard that holds the token: equal everywhere, and gone where nobody reads them.
    return output, jax.lax.psum(weights, axis), jax.lax.psum(chosen_index, axis)


def _over_shards_dense(
    how: _How, axis: str, query: Array, key: Array, value: Array, mask: Array | None
) -> tuple[Array, Array, None]:
    """Softmax over all tokens of all shards, of which each keeps its own weights; sums as large as the slots are
    exchanged."""
    scores = _scores(how, query, key, mask)
    weights = _real(jnp.exp(scores - _logsumexp(scores, axis)), scores, mask)
    return _sum(apply_weights(weights, value), axis), weights, None


def _sum(x: Array, axis: str) -> Array:
    """Over the shards, in float32 at least: narrower sums lose digits, and XLA's CPU compiler aborts on them."""
    return jax.lax.psum(x.astype(jnp.promote_types(x.dtype, jnp.float32)), axis).astype(x.dtype)


def _logsumexp(scores: Array, axis: str) -> Array:
    """Over the last axis of all shards."""
    highest = jax.lax.pmax(jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)), axis)
    return highest + jnp.log(jax.lax.psum(jnp.sum(jnp.exp(scores - highest), axis=-1, keepdims=True), axis))


def _best(scores: Array, top_k: int, recall: float | None) -> tuple[Array, Array]:
    if recall is None:
        return jax.lax.top_k(scores, top_k)
    return jax.lax.approx_max_k(scores, top_k, recall_target=recall)


def _weigh(weights: Array, value: Array, index: Array) -> Float[Array, "batch slots heads width"]:
    """Sum of the chosen values by their weights."""
    by_head = jnp.swapaxes(value, 1, 2)  # (batch, heads, tokens, width)
    batch, heads, slots, kept = index.shape
    flat = index.reshape(batch, heads, slots * kept, 1)
    chosen = jnp.take_along_axis(by_head, flat, axis=2).reshape(batch, heads, slots, kept, value.shape[-1])
    return jnp.einsum("bhlk,bhlkw->blhw", weights.astype(value.dtype), chosen)


def attention_scores(
    query: Float[Array, "batch queries heads dim"],
    key: Float[Array, "batch tokens heads dim"],
    scale: float | None = None,
) -> Float[Array, "batch heads queries tokens"]:
    """``scale q k^T`` in float32 (float64 for float64 inputs); the scale is ``1 / sqrt(dim)`` unless given.

    Of narrower inputs the products of the backward pass are narrow too: the slope of the scores is rounded to the
    inputs' dtype first, where it would otherwise make float32 products of them, several times slower on a GPU.
    """
    wide = jnp.promote_types(query.dtype, jnp.float32)
    if query.dtype == key.dtype != wide:
        # Inside a shard_map both are made to differ over the same axes, so that its sums stay outside the rule.
        axes = _varying_axes(query) | _varying_axes(key)
        scores = _narrow_products(*(_varying(x, axes) for x in (query, key)))
    else:
        scores = jnp.einsum("blhd,bnhd->bhln", query, key, preferred_element_type=wide)
    return scores * jnp.asarray(query.shape[-1] ** -0.5 if scale is None else scale, wide)


@jax.custom_vjp
def _narrow_products(query: Array, key: Array) -> Array:
    return jnp.einsum("blhd,bnhd->bhln", query, key, preferred_element_type=jnp.float32)


def _narrow_products_forward(query: Array, key: Array) -> tuple[Array, tuple[Array, Array]]:
    return _narrow_products(query, key), (query, key)


def _narrow_products_backward(kept: tuple[Array, Array], slope: Array) -> tuple[Array, Array]:
    query, key = kept
    slope = slope.astype(query.dtype)
    return jnp.einsum("bhln,bnhd->blhd", slope, key), jnp.einsum("bhln,blhd->bnhd", slope, query)


_narrow_products.defvjp(_narrow_products_forward, _narrow_products_backward)


def _varying_axes(x: Array) -> frozenset[str]:
    """The axes of a shard_map over whose devices ``x`` may differ."""
    kind: Any = jax.typeof(x)
    kind = getattr(kind, "manual_axis_type", kind)  # jax 0.10.2 has it, others `vma`
    return kind.varying if hasattr(kind, "varying") else kind.vma


def _varying(x: Array, axes: frozenset[str]) -> Array:
    """The same array, said to differ over these axes; its slopes are added up over them in float32."""
    missing = tuple(sorted(axes - _varying_axes(x)))
    if not missing:
        return x
    wide, lax = x.astype(jnp.float32), cast(Any, jax.lax)
    wide = lax.pcast(wide, missing, to="varying") if hasattr(lax, "pcast") else lax.pvary(wide, missing)  # jax < 0.9
    return wide.astype(x.dtype)


def apply_weights(
    weights: Float[Array, "batch heads queries tokens"], value: Float[Array, "batch tokens heads width"]
) -> Float[Array, "batch queries heads width"]:
    """Weighted sum of the values, in the values' dtype."""
    return jnp.einsum("bhln,bnhw->blhw", weights.astype(value.dtype), value)
