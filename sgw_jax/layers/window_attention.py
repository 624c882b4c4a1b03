"""Attention within the windows of a map, plain or shifted, with a relative position bias."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.layers.attention import in_groups, split_heads
from sgw_jax.layers.resize import pad_to_multiple
from sgw_jax.layers.topk_attention import apply_weights, attention_scores


class WindowAttention(nn.Module):
    """Multi-head self-attention within windows of ``window_size x window_size`` tokens (Liu et al. 2021).

    ``softmax(q k^T / sqrt(dim) + B) v``, where B[i, j] is a learned number per head for the offset of token i from
    token j. With ``shifted`` the windows lie half a window further down and to the right; they go around the map's
    edges, and tokens that meet only because of that do not attend to each other.

    The map is padded with zeros at the bottom and on the right to whole windows. The padding takes part as ordinary
    tokens, whose queries, keys and values are the biases: so do the paper's code and Hugging Face's, and pretrained
    weights expect it.

    Attributes:
      always_partition: what becomes of a map whose shorter side is at most the window. True: it is padded and shifted
        like any other, as in the paper's detection code and Hugging Face's `SwinBackbone`. False: the window shrinks to
        the shorter side and is never shifted, as in the paper's classifier and Hugging Face's `SwinModel` (which fails
        unless that side equals the window; here the offsets that occur are read from the same table).
      chunk: windows x heads of every image that are taken at a time, at least one window; None is all at once. If they
        are not all the windows there are, a group's scores are recomputed in the backward pass, so that no more of them
        exist at a time; the result is the same up to rounding. On a TPU they then stay on the chip, where all of them
        would be written to memory and read.

    Raises:
      ValueError: the width does not divide into num_heads; window_size or chunk < 1.
    """

    num_heads: int
    window_size: int = 7
    shifted: bool = False
    always_partition: bool = True
    chunk: int | None = None
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(
        self, grid: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch height width channels"]:
        batch, height, width, channels = grid.shape
        if channels % self.num_heads:
            raise InputError(f"WindowAttention: width {channels} does not divide into num_heads = {self.num_heads}.")
        if self.chunk is not None and self.chunk < 1:
            raise InputError(f"WindowAttention: chunk is {self.chunk}; it must be positive, or None for all windows.")
        window, shift = self._window_and_shift(height, width)
        padded = jnp.roll(pad_to_multiple(grid, window), (-shift, -shift), (1, 2))
        size = (padded.shape[1], padded.shape[2])
        tokens = to_windows(padded, window)
        projected = nn.Dense(3 * channels, dtype=self.dtype, name="query_key_value")(tokens)
        heads = (split_heads(part, self.num_heads) for part in jnp.split(projected, 3, axis=-1))
        query, key, value = (part.reshape(batch, -1, *part.shape[1:]) for part in heads)
        # Over devices its gradient is summed in every group. A bias per image would be summed once, behind them, but a
        # TPU's compiler then writes more of the backward pass to memory.
        attend = functools.partial(_attend, self._position_bias(window))
        parts = (query, key, value) if shift == 0 else (query, key, value, together(size, window, shift)[None])
        windows = query.shape[1]
        chunk = windows if self.chunk is None else group_size(windows, max(1, self.chunk // self.num_heads))
        mixed = in_groups(attend, parts, chunk).reshape(tokens.shape)

        output = jnp.roll(from_windows(mixed, window, size), (shift, shift), (1, 2))[:, :height, :width]
        return nn.Dense(channels, dtype=self.dtype, name="output")(output)  # padding needs no projection

    def _window_and_shift(self, height: int, width: int) -> tuple[int, int]:
        if self.window_size < 1:
            raise InputError(f"WindowAttention: window_size {self.window_size} must be at least 1.")
        if not self.always_partition and min(height, width) <= self.window_size:
            return min(height, width), 0
        return self.window_size, self.window_size // 2 if self.shifted else 0

    def _position_bias(self, window: int) -> Float[Array, "heads tokens tokens"]:
        offsets = (2 * self.window_size - 1) ** 2
        table = self.param(
            "relative_position_bias_table", nn.initializers.truncated_normal(0.02), (offsets, self.num_heads)
        )
        return jnp.moveaxis(table[offset_index(window, self.window_size)], -1, 0)


def _attend(
    bias: Float[Array, "heads queries keys"],
    query: Float[Array, "batch windows queries heads dim"],
    key: Float[Array, "batch windows keys heads dim"],
    value: Float[Array, "batch windows keys heads dim"],
    allowed: Bool[Array, "1 windows queries keys"] | None = None,
) -> Float[Array, "batch windows queries heads dim"]:
    shape = query.shape
    query, key, value = (part.reshape(-1, *part.shape[2:]) for part in (query, key, value))
    scores = attention_scores(query, key)
    scores += bias.astype(scores.dtype)
    scores = scores.reshape(*shape[:2], *scores.shape[1:])  # (batch, windows, heads, queries, keys)
    weights = jax.nn.softmax(scores, axis=-1, where=None if allowed is None else allowed[:, :, None])
    return apply_weights(weights.reshape(-1, *weights.shape[2:]), value).reshape(shape)


def group_size(windows: int, most: int) -> int:
    """At most so many: a divisor of the windows, unless all of them are less than half of what is allowed."""
    divisor = max(size for size in range(1, min(windows, most) + 1) if windows % size == 0)
    groups = -(-windows // most)
    return divisor if 2 * divisor >= min(windows, most) else -(-windows // groups)


def to_windows(
    grid: Float[Array, "batch height width channels"], window: int
) -> Float[Array, "windows tokens channels"]:
    """The map's windows, each one's tokens in a row; the batch is the slow part of the first axis."""
    batch, height, width, channels = grid.shape
    cells = grid.reshape(batch, height // window, window, width // window, window, channels)
    return jnp.swapaxes(cells, 2, 3).reshape(-1, window**2, channels)


def from_windows(
    tokens: Float[Array, "windows tokens channels"], window: int, size: tuple[int, int]
) -> Float[Array, "batch height width channels"]:
    """Inverse of `to_windows` for a map of ``size``."""
    rows, columns = size[0] // window, size[1] // window
    cells = tokens.reshape(-1, rows, columns, window, window, tokens.shape[-1])
    return jnp.swapaxes(cells, 2, 3).reshape(-1, *size, tokens.shape[-1])


def together(size: tuple[int, int], window: int, shift: int) -> Bool[Array, "windows queries keys"]:
    """Which tokens of a shifted window may attend to each other: those that on both axes went around the edge alike."""
    rows, columns = (
        (wrapped[:, :, None] == wrapped[:, None, :])
        for wrapped in ((np.arange(length) >= length - shift).reshape(-1, window) for length in size)
    )
    # Broadcast in the program: for large maps the whole mask would be megabytes of constants.
    pairs = jnp.logical_and(rows[:, None, :, None, :, None], columns[None, :, None, :, None, :])
    return pairs.reshape(-1, window**2, window**2)


def offset_index(window: int, largest: int) -> Int[np.ndarray, "tokens tokens"]:
    """The row of the bias table for every pair of tokens of a window: (dy + largest - 1) (2 largest - 1) + (dx +
    largest - 1), where (dy, dx) is the query's position less the key's and ``largest`` the window the table is for."""
    position = np.arange(window)
    offset = position[:, None] - position[None, :] + largest - 1
    index = offset[:, None, :, None] * (2 * largest - 1) + offset[None, :, None, :]
    return index.reshape(window**2, window**2)
