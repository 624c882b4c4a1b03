"""The steps of KEM: slots retrieve tokens, exchange among themselves, write back, and what is written is added."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sgw_jax.functional.linear import layer_norm
from sgw_jax.functional.products import Maps, Products, Tokens, by_head, maps_of
from sgw_jax.functional.tokens import TokenLayout
from sgw_jax.layers.placement import Placement
from sgw_jax.layers.topk_attention import apply_weights, attention_scores, topk_attention


class Seen(NamedTuple):
    """The tokens as the slots see them: what makes keys and queries, and what makes values."""

    chooser: Tokens
    source: Tokens


class Retrieved(NamedTuple):
    """R^ (batch, L, d_e), and behind it the weights (batch, heads, L, kept) of which tokens (None: of all)."""

    readout: Float[Array, "batch slots width"]
    weights: Float[Array, "batch heads slots kept"]
    tokens: Int[Array, "batch heads slots kept"] | None


class Written(NamedTuple):
    """F^ (batch, tokens, C) and the weights (batch, heads, tokens, L) behind it."""

    update: Float[Array, "batch tokens channels"]
    weights: Float[Array, "batch heads tokens slots"]


def retrieve(
    slots: Float[Array, "batch slots width"],
    seen: Seen,
    maps: Maps,
    products: Products,
    top_k: int | None,
    *,
    temperature: float = 1.0,
    recall: float | None = None,
    placement: Placement | None = None,
    layout: TokenLayout | None = None,
    mask: Bool[Array, "batch tokens"] | None = None,
) -> Retrieved:
    """``R^ = topk-softmax((R W_qr)(F W_kr)^T / (temperature sqrt(d))) (F W_vr)`` (the paper's first step).

    Args:
      slots: R (batch, L, d_e).
      seen: the tokens, as what makes keys and as what makes values.
      maps: W_qr, W_kr and W_vr, cut into heads.
      products: on which side W_kr and W_vr are applied: a value of `PRODUCTS`.
      top_k: tokens that a slot keeps per head; None: all.
      temperature: as in the formula.
      recall: expected share of the k best that a TPU finds; None: all, exactly.
      placement: how batch and tokens are split over a mesh.
      layout: where each task's tokens lie; needed where ``placement`` splits them.
      mask: (batch, tokens), False for padding, which no slot retrieves.

    Returns:
      R^ (batch, L, d_e), the weights (batch, heads, L, kept) behind it, and of which tokens they are (None: of all).

    Raises:
      ValueError: tokens that the shards of ``placement`` do not divide.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.functional import retrieve
    >>> from sgw_jax.functional.steps import Seen
    >>> from sgw_jax.functional.products import PRODUCTS, Maps, Tokens
    >>> tokens, kernel = Tokens(jnp.ones((1, 6, 4))), jnp.ones((4, 1, 4))
    >>> maps = Maps(kernel, kernel, kernel)
    >>> found = retrieve(jnp.ones((1, 2, 4)), Seen(tokens, tokens), maps, PRODUCTS["tokens"], top_k=3)
    >>> found.readout.shape, found.weights.shape, found.tokens.shape
    ((1, 2, 4), (1, 1, 2, 3), (1, 1, 2, 3))
    """

    def attend(query: Array, key: Array, value: Array) -> tuple[Array, Array, Array | None]:
        scale = 1 / (temperature * maps.query.shape[-1] ** 0.5)
        located = None if layout is None else layout.locate
        options: dict[str, Any] = {"scale": scale, "recall": recall, "placement": placement, "located": located}
        return topk_attention(query, key, value, top_k, mask=mask, **options)

    readout, weights, index = products.retrieve(slots, seen.chooser, seen.source, maps, attend)
    return Retrieved(readout.reshape(*readout.shape[:2], -1), weights, index)


def retrieve_each(
    slots: Float[Array, "batch slots width"],
    seen: Seen,
    maps: Maps,
    products: Products,
    top_k: int | None,
    layout: TokenLayout,
    *,
    temperature: float = 1.0,
    recall: float | None = None,
    placement: Placement | None = None,
    mask: Bool[Array, "batch tokens"] | None = None,
) -> Retrieved:
    """`retrieve` from every task by itself: slots t L .. t L + L of the T L see the tokens of task t alone.

    So every task has L slots and ``top_k`` tokens for each of them, and none is crowded out by another whose scores are
    higher [our decision].

    Args:
      slots: R (batch, T L, d_e), task by task in the layout's order.
      layout: where each task's tokens lie.
      seen, maps, products, top_k, temperature, recall, placement, mask: as of `retrieve`.

    Returns:
      As `retrieve`, (batch, heads, T L, kept). Where a task has no more than ``top_k`` tokens, or nothing is selected,
      the weights of all tasks are those of all tokens, in the order of their indices, and there are no indices.

    Raises:
      ValueError: as `retrieve`.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.functional.products import PRODUCTS, Maps, Tokens
    >>> from sgw_jax.functional.steps import Seen, retrieve_each
    >>> from sgw_jax.functional.tokens import concatenate_tasks
    >>> tokens, layout = concatenate_tasks({"depth": jnp.zeros((1, 6, 4)), "edges": jnp.ones((1, 6, 4))}, "here")
    >>> maps = Maps(*[jnp.ones((4, 1, 4))] * 3)
    >>> found = retrieve_each(jnp.ones((1, 2, 4)), Seen(*[Tokens(tokens)] * 2), maps, PRODUCTS["tokens"], 3, layout)
    >>> found.readout[0, :, 0].tolist(), found.tokens[0, 0].tolist()
    ([0.0, 4.0], [[0, 1, 2], [6, 7, 8]])
    """
    options: dict[str, Any] = {"temperature": temperature, "recall": recall, "placement": placement}
    found = []
    for place, own in enumerate(jnp.split(slots, len(layout.names), axis=1)):
        alone, start = layout.alone(place), sum(layout.lengths[:place])
        of_task = Seen(*(Tokens(layout.tokens_of(place, kind.values), kind.frame) for kind in seen))
        real = None if mask is None else layout.tokens_of(place, mask)
        readout, weights, index = retrieve(own, of_task, maps, products, top_k, **options, layout=alone, mask=real)
        if index is None:
            weights, index = alone.by_index(weights, 3), jnp.arange(layout.lengths[place])
        found.append((readout, weights, index + start))
    readouts, by_task, tokens = zip(*found, strict=True)
    readout = jnp.concatenate(readouts, axis=1)
    if top_k is not None and top_k < min(layout.lengths):
        return Retrieved(readout, jnp.concatenate(by_task, axis=2), jnp.concatenate(tokens, axis=2))
    spread = [_spread(weights, index, sum(layout.lengths)) for _, weights, index in found]
    return Retrieved(readout, jnp.concatenate(spread, axis=2), None)


def _spread(
    weights: Float[Array, "batch heads slots kept"], index: Int[Array, "*batch kept"], tokens: int
) -> Float[Array, "batch heads slots tokens"]:
    """Weights of some tokens as weights of all."""
    zeros = jnp.zeros(tokens, weights.dtype)
    return jnp.vectorize(lambda w, i: zeros.at[i].set(w), signature="(k),(k)->(n)")(weights, index)


def exchange(
    params: Mapping[str, Any], slots: Float[Array, "batch slots width"], num_heads: int, dtype: Any = jnp.float32
) -> Float[Array, "batch slots width"]:
    """``R^ <- R^ + g softmax((N W_q)(N W_k)^T / sqrt(d)) (N W_v)``, N the layer-normalised R^ [our decision].

    What the slots gathered meets among the few slots, before tokens read it. The gate g starts at 0, so that the module
    starts as the one without.

    Args:
      params: {"query": {"kernel": (d_e, d_e)}, "key": ..., "value": ..., "norm": {"scale", "bias"}, "gate": (1,)}.
      slots: R^ (batch, slots, d_e).
      num_heads: divides d_e.
      dtype: of the computation; scores and softmax stay float32.

    Returns:
      R^ (batch, slots, d_e).

    >>> import jax.numpy as jnp
    >>> from sgw_jax.functional.steps import exchange
    >>> kernels = {name: {"kernel": jnp.eye(4)} for name in ("query", "key", "value")}
    >>> norm = {"scale": jnp.ones(4), "bias": jnp.zeros(4)}
    >>> exchange({**kernels, "norm": norm, "gate": jnp.zeros(1)}, jnp.ones((1, 2, 4)), num_heads=2).shape
    (1, 2, 4)
    """
    maps = maps_of(params, num_heads, dtype)  # type: ignore[arg-type]
    normed = layer_norm(params["norm"], slots, dtype=dtype)
    query, key, value = (by_head(normed, kernel) for kernel in maps)
    weights = jax.nn.softmax(attention_scores(query, key, maps.query.shape[-1] ** -0.5), axis=-1)
    return slots + params["gate"].astype(dtype) * apply_weights(weights, value).reshape(slots.shape)


def write(
    seen: Seen,
    slots: Float[Array, "batch slots width"],
    maps: Maps,
    products: Products,
    gates: Float[Array, "tokens sources"] | None = None,
) -> Written:
    """``F^ = softmax((F W_qw)(R^ W_kw)^T / sqrt(d)) (R^ W_vw)`` (the paper's second step).

    With ``gates`` the slots are as many groups as there are sources, and a token i reads each by itself [our decision]:
    ``F^_i = sum_s g_is softmax((F_i W_qw)(R^_s W_kw)^T / sqrt(d)) (R^_s W_vw)``.

    Args:
      seen: the tokens, whose choosers make the queries.
      slots: R^ (batch, L, d_e), or (batch, T L, d_e), group by group.
      maps: W_qw, W_kw and W_vw, cut into heads.
      products: on which side W_qw is applied: a value of `PRODUCTS`.
      gates: g (tokens, T); None: one softmax over all slots.

    Returns:
      F^ (batch, tokens, C) and the weights (batch, heads, tokens, slots) behind it; with ``gates`` each group's, times
      |g_is| / sum_s |g_is| (1 / T where all are 0), so that they say who is read and sum to 1.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.functional import write
    >>> from sgw_jax.functional.products import PRODUCTS, Maps, Tokens
    >>> from sgw_jax.functional.steps import Seen
    >>> tokens, kernel = Tokens(jnp.ones((1, 6, 4))), jnp.ones((4, 1, 4))
    >>> written = write(Seen(tokens, tokens), jnp.ones((1, 2, 4)), Maps(kernel, kernel, kernel), PRODUCTS["tokens"])
    >>> written.update.shape, written.weights.shape
    ((1, 6, 4), (1, 1, 6, 2))
    """
    scale = maps.query.shape[-1] ** -0.5
    scores = products.scores(seen.chooser, maps.query, by_head(slots, maps.key), scale)
    value = by_head(slots, maps.value)
    if gates is None:
        weights = shown = jax.nn.softmax(scores, axis=-1)
    else:
        groups = jax.nn.softmax(scores.reshape(*scores.shape[:-1], gates.shape[-1], -1), axis=-1)
        weights = (groups * gates[..., None]).reshape(scores.shape)
        size = jnp.abs(gates)
        whole = jnp.sum(size, axis=-1, keepdims=True)
        shares = jnp.where(whole > 0, size / jnp.where(whole > 0, whole, 1), 1 / gates.shape[-1])
        shown = (groups * shares[..., None]).reshape(scores.shape)
    update = apply_weights(weights, value)
    return Written(update.reshape(*update.shape[:2], -1), shown)


def broadcast(
    tokens: Float[Array, "batch tokens channels"], update: Float[Array, "batch tokens channels"]
) -> Float[Array, "batch tokens channels"]:
    """``F <- F + F^`` (the paper's third step, residual weight 1), in the dtype of the tokens.

    Args:
      tokens: F (batch, tokens, C).
      update: F^, of the same shape.

    Returns:
      F + F^ (batch, tokens, C): each task takes its own tokens back.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.functional import broadcast
    >>> broadcast(jnp.ones((1, 1, 2)), jnp.array([[[0.5, -1.0]]])).tolist()
    [[[1.5, 0.0]]]
    """
    return tokens + update.astype(tokens.dtype)
