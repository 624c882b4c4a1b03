"""On which side of a product a map is applied: to every token, or to the few rows that come from the slots.

KEM multiplies rows that come from L slots with n_s tokens, one of both mapped: ``(R W_q)(F W_k)^T``. The product is
associative, ``(R W_q W_k^T) F^T``: the same numbers up to rounding, at O(h L n_s C) in place of O(n_s C d_e), and no
mapped copy of the tokens is made or kept for the backward pass [our decision; the paper maps the tokens].
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sgw_jax.etf.simplex import project
from sgw_jax.layers.attention import split_heads
from sgw_jax.layers.topk_attention import attention_scores


class Maps(NamedTuple):
    """The kernels of an attention's query, key and value maps, each (inputs, heads, dim)."""

    query: Float[Array, "rows heads dim"]
    key: Float[Array, "inputs heads dim"]
    value: Float[Array, "inputs heads width"]


def maps_of(params: dict, heads: int, dtype: jnp.dtype) -> Maps:
    """From {"query": {"kernel": (inputs, outputs)}, "key": ..., "value": ...}: cut into heads, in the dtype."""
    return Maps(*(split_heads(params[name]["kernel"].astype(dtype), heads) for name in Maps._fields))


class Tokens(NamedTuple):
    """Tokens as ``values``, or as ``values frame`` where a frame projects them."""

    values: Float[Array, "batch tokens channels"]
    frame: Float[Array, "channels vertices"] | None = None

    @property
    def width(self) -> int:
        """Of the tokens once they are formed."""
        return (self.values if self.frame is None else self.frame).shape[-1]

    def formed(self) -> "Tokens":
        """The product of values and frame, as values."""
        return Tokens(project(*self))


Attend = Callable[[Array, Array, Array], tuple[Array, Array, Array | None]]  # (query, key, value): topk_attention


class Products(Protocol):
    """Where the maps of the tokens are applied."""

    def retrieve(
        self, slots: Float[Array, "batch slots width"], chooser: Tokens, source: Tokens, maps: Maps, attend: Attend
    ) -> tuple[Float[Array, "batch slots heads dim"], Float[Array, "batch heads slots kept"], Int[Array, "..."] | None]:
        """What ``attend`` returns for queries of the slots, keys of ``chooser`` and values of ``source``."""

    def scores(
        self,
        tokens: Tokens,
        kernel: Float[Array, "channels heads dim"],
        key: Float[Array, "batch slots heads dim"],
        scale: float,
    ) -> Float[Array, "batch heads tokens slots"]:
        """``scale (F W)(key)^T`` in float32."""


class OnTokens:
    """Every token is mapped, in the paper's order of products; frames must have been formed."""

    def retrieve(
        self, slots: Array, chooser: Tokens, source: Tokens, maps: Maps, attend: Attend
    ) -> tuple[Array, Array, Array | None]:
        return attend(by_head(slots, maps.query), by_head(chooser.values, maps.key), by_head(source.values, maps.value))

    def scores(self, tokens: Tokens, kernel: Array, key: Array, scale: float) -> Array:
        return attention_scores(by_head(tokens.values, kernel), key, scale)


class OnSlots:
    """The maps meet the slots' rows, a row for each slot and head; the tokens are one head and stay as they are."""

    def retrieve(
        self, slots: Array, chooser: Tokens, source: Tokens, maps: Maps, attend: Attend
    ) -> tuple[Array, Array, Array | None]:
        query = _pulled_back(by_head(slots, maps.query), maps.key, chooser.frame)
        sums, weights, index = attend(query, chooser.values[:, :, None], source.values[:, :, None])
        shape = (slots.shape[0], maps.query.shape[1], slots.shape[1], -1)
        # Weighted sums of unmapped tokens, mapped: what the same weights make of mapped tokens.
        readout = jnp.einsum("bhlk,khd->blhd", project(sums.reshape(shape), source.frame), maps.value)
        return readout, weights.reshape(shape), None if index is None else index.reshape(shape)

    def scores(self, tokens: Tokens, kernel: Array, key: Array, scale: float) -> Array:
        rows = _pulled_back(key, kernel, tokens.frame)
        scores = attention_scores(tokens.values[:, :, None], rows, scale)
        return scores.reshape(*scores.shape[::2], key.shape[2], key.shape[1]).swapaxes(1, 2)


def _pulled_back(
    rows: Float[Array, "batch slots heads dim"],
    kernel: Float[Array, "width heads dim"],
    frame: Float[Array, "channels width"] | None,
) -> Float[Array, "batch heads*slots 1 channels"]:
    """Rows whose products with unmapped tokens are those of ``rows`` with mapped ones."""
    rows = jnp.einsum("blhd,khd->bhlk", rows, kernel)
    # The frame follows the kernel instead of joining it: fewer products, and jax 0.10.2's CPU compiler makes wrong
    # numbers of F (M W) in front of a softmax (test_full_size_widths_are_compiled_right).
    rows = rows if frame is None else project(rows, frame.T)
    return rows.reshape(rows.shape[0], -1, 1, rows.shape[-1])


def by_head(
    inputs: Float[Array, "batch rows channels"], kernel: Float[Array, "channels heads dim"]
) -> Float[Array, "batch rows heads dim"]:
    """The map of every row, by head, in the kernel's dtype."""
    return jnp.einsum("brc,chd->brhd", inputs.astype(kernel.dtype), kernel)


PRODUCTS: dict[str, Products] = {"tokens": OnTokens(), "slots": OnSlots()}


def cheaper(
    tokens: Tokens,
    *,
    reading: int,
    writing: int,
    heads: int,
    width: int,
    selects: bool,
    embeds: bool,
    values_as_they_are: bool,
) -> str:
    """The key of `PRODUCTS` that takes fewer multiply-accumulates for a token and round.

    Args:
      tokens: with their frame, if there is one.
      reading, writing: slots that a token is scored for in the retrieval, and slots that it is written from.
      heads, width: h and d_e.
      selects: with top-k the values of few tokens are summed; without, those of all.
      embeds: task embeddings are added to the tokens behind the frame, which must then be formed.
      values_as_they_are: values are of tokens in front of the frame.
    """
    channels, mapped = tokens.values.shape[-1], tokens.width
    sums = (reading if selects else 2 * reading) + writing  # over all tokens: what is scored, retrieved and written
    on_slots = sums * heads * (mapped if embeds else channels)
    sources = channels if values_as_they_are else mapped
    on_tokens = (2 * mapped + sources + sums) * width
    if tokens.frame is not None and not embeds:
        on_tokens += channels * mapped
    return "slots" if on_slots <= on_tokens else "tokens"
