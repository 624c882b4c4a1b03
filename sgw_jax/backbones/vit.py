"""Vision transformer: tokens of patches through one stack of blocks; its taps, or a feature pyramid of them."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.layers.attention import SelfAttention
from sgw_jax.layers.drop_path import DropPath
from sgw_jax.layers.mlp import MLP
from sgw_jax.layers.patch_embed import PATCH_EMBEDS
from sgw_jax.layers.remat import rematerialised
from sgw_jax.layers.resize import depth_to_space, resize, resize_bicubic
from sgw_jax.layers.stack import check_frozen, drop_rates, scan_blocks
from sgw_jax.sharding import constrain_activations

OUTPUTS = ("pyramid", "taps")


def hidden_width(width: int, mlp_ratio: float) -> int:
    """Of an MLP, rounded down; a ratio that was found as hidden / width may fall short of it by a rounding error."""
    return int(width * mlp_ratio + 1e-6)


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP, each on a residual branch with drop path.

    With ``layer_scale`` a learned factor per channel, which starts at that value, multiplies each branch (Touvron et
    al. 2021). Call: (tokens, drop path rate of this layer) -> (tokens, tokens): carry and output of a scan.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    layer_scale: float | None = None
    approximate_gelu: bool = False
    epsilon: float = 1e-6
    attention_chunk: int | None = None
    train: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Float[Array, "batch tokens width"], rate: Array) -> tuple[Array, Array]:
        drop_path = DropPath(name="drop_path")
        normed = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm1")(tokens)
        attention = SelfAttention(self.num_heads, dtype=self.dtype, chunk=self.attention_chunk, name="attention")
        branch = self._scaled("scale1", attention(normed))
        tokens = constrain_activations(tokens + drop_path(branch, rate, self.train))
        normed = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm2")(tokens)
        hidden = hidden_width(tokens.shape[-1], self.mlp_ratio)
        mlp = MLP(hidden, self.approximate_gelu, dtype=self.dtype, name="mlp")
        tokens = constrain_activations(tokens + drop_path(self._scaled("scale2", mlp(normed)), rate, self.train))
        return tokens, tokens

    def _scaled(self, name: str, branch: Array) -> Array:
        if self.layer_scale is None:
            return branch
        scale = self.param(name, nn.initializers.constant(self.layer_scale), (branch.shape[-1],))
        return branch * scale.astype(branch.dtype)


class ViT(nn.Module):
    """ViT (Dosovitskiy et al. 2021), its taps made into a pyramid of maps.

    Blocks are one scanned stack (compile time does not grow with depth; FSDP gathers one layer at a time), optionally
    rematerialised. Four taps, by default the outputs of layers at 1/4, 2/4, 3/4 and 4/4 of the depth (the last layer's
    after the final norm), become the maps of strides 4, 8, 16 and 32 by sub-pixel or strided convolutions (as in
    ViTDet, Li et al. 2022).
    Layer norm only: no running statistics, hence nothing to synchronise over devices, the same function in training
    and evaluation, and k accumulated micro-batches equal to one batch.

    Attributes:
      patch_size, width, depth, num_heads, mlp_ratio: as in the paper.
      image_size: (height, width) in pixels that the position embedding is made for; other sizes interpolate it
        (bicubic, as the original does, see `resize_bicubic`).
      patch_embed: "patch" or "conv" (see layers/patch_embed.py); with "conv" its finer maps join the pyramid.
      class_token: a learned token before those of the patches, as in pretrained models. It is in no output. Its own
        position embedding is part of it.
      layer_scale, approximate_gelu, epsilon: see `Block`; epsilon also of the final norm.
      tapped: layers whose outputs are taken, from 1 on, in ascending order; None is the four above.
      output: "pyramid", or "taps" for the maps themselves.
      drop_path: rate of the last layer, in [0, 1), linear from 0 at the first.
      remat: what a block keeps for the backward pass, see layers/remat.py.
      attention_chunk: queries at a time, see `attention`; None is all.
      frozen_layers: the lowest blocks, through which no gradient goes and in which no path is dropped, see
        layers/stack.py.

    Call: (image (batch, H, W, 3), train) -> {stride: (batch, H / stride, W / stride, width)}; with ``output="taps"``
    {layer: (batch, floor(H / patch_size), floor(W / patch_size), width)}. A pyramid from patches whose size is no power
    of two is made on the image resized so that patches lie as those of the next power do: 14 of 16 pixels.

    Raises:
      ValueError: a pyramid of H or W that 32 (and the patch's stride) does not divide, or from other than four taps; an
        attribute out of the range given above.
    """

    patch_size: int = 16
    width: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    image_size: tuple[int, int] = (224, 224)
    patch_embed: str = "patch"
    class_token: bool = False
    layer_scale: float | None = None
    approximate_gelu: bool = False
    epsilon: float = 1e-6
    tapped: tuple[int, ...] | None = None
    output: Literal["pyramid", "taps"] = "pyramid"
    drop_path: float = 0.0
    remat: str = "none"
    attention_chunk: int | None = None
    dtype: jnp.dtype = jnp.float32
    frozen_layers: int = 0

    strides = (4, 8, 16, 32)

    @property
    def num_layers(self) -> int:
        """Of which ``frozen_layers`` counts."""
        return self.depth

    @nn.compact
    def __call__(self, image: Float[Array, "batch height width 3"], train: bool = False) -> dict[int, Array]:
        self._check(image.shape)
        image = resize(image.astype(self.dtype), self._patched_size(image.shape[1:3]))
        embed = PATCH_EMBEDS[self.patch_embed](self.patch_size, self.width, dtype=self.dtype, name="patch_embed")
        grid, finer = embed(image)
        batch, height, width, channels = grid.shape
        tokens = (grid + self._position_embedding(height, width)).reshape(batch, -1, channels)
        if self.class_token:
            token = self.param("class_token", nn.initializers.normal(0.02), (1, 1, channels)).astype(self.dtype)
            tokens = jnp.concatenate([jnp.broadcast_to(token, (batch, 1, channels)), tokens], axis=1)
        tokens = constrain_activations(tokens)

        # Known when traced: at rate 0 no random number is drawn.
        dropping = train and self.drop_path > 0 and self.frozen_layers < self.depth
        options = (self.mlp_ratio, self.layer_scale, self.approximate_gelu, self.epsilon, self.attention_chunk)
        block = rematerialised(Block, self.remat)(self.num_heads, *options, dropping, self.dtype, name="blocks")
        rates = drop_rates(self.drop_path, self.depth, self.frozen_layers)
        _, outputs = scan_blocks(block, tokens, rates, length=self.depth, frozen=self.frozen_layers)

        taps = {}
        for layer in self._layers():
            tap = outputs[layer - 1]
            if layer == self.depth:
                tap = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm")(tap)
            taps[layer] = tap[:, int(self.class_token) :].reshape(grid.shape)
        return taps if self.output == "taps" else self._pyramid(list(taps.values()), finer)

    def _layers(self) -> tuple[int, ...]:
        return tuple(self.depth * i // 4 for i in (1, 2, 3, 4)) if self.tapped is None else tuple(self.tapped)

    def _pyramid(self, taps: list[Array], finer: dict[int, Array]) -> dict[int, Array]:
        maps = {}
        for stride, tap in zip(self.strides, taps, strict=True):
            level = self._resample(tap, stride)
            if stride in finer:
                level += nn.Conv(tap.shape[-1], (1, 1), dtype=self.dtype, name=f"lateral{stride}")(finer[stride])
            norm = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name=f"pyramid_norm{stride}")
            maps[stride] = constrain_activations(norm(level))
        return maps

    def _resample(self, grid: Array, stride: int) -> Array:
        """The tap at another stride: sub-pixel convolution upwards, strided convolution downwards."""
        name, channels = f"pyramid{stride}", grid.shape[-1]
        if stride <= self._stride():
            factor = self._stride() // stride
            return depth_to_space(nn.Dense(channels * factor**2, dtype=self.dtype, name=name)(grid), factor)
        factor = stride // self._stride()
        return nn.Conv(channels, (factor, factor), factor, padding="VALID", dtype=self.dtype, name=name)(grid)

    @property
    def multiple(self) -> int:
        """What the image's height and width must be multiples of, in pixels, for a pyramid."""
        return max(self._stride(), self.strides[-1])

    def _stride(self) -> int:
        """Of the patches in the pyramid: the next power of two."""
        return 1 << (self.patch_size - 1).bit_length()

    def _patched_size(self, size: tuple[int, ...]) -> tuple[int, int]:
        """The size of the image that is cut into patches."""
        if self.output == "taps":
            return size[0], size[1]
        return size[0] * self.patch_size // self._stride(), size[1] * self.patch_size // self._stride()

    def _position_embedding(self, height: int, width: int) -> Array:
        rows, columns = (length // self.patch_size for length in self._patched_size(self.image_size))
        table = self.param("position_embedding", nn.initializers.normal(0.02), (1, rows, columns, self.width))
        if (height, width) != (rows, columns):
            table = resize_bicubic(table, (height, width))
        return table.astype(self.dtype)

    def _check(self, shape: tuple[int, ...]) -> None:
        if self.patch_size < 1:
            raise InputError(f"ViT: patch_size {self.patch_size} must be at least 1.")
        if self.output not in OUTPUTS:
            raise InputError(f"ViT: output is {self.output!r}; it must be one of {OUTPUTS}.")
        layers = self._layers()
        if self.tapped is None and (self.depth < 4 or self.depth % 4):
            raise InputError(f"ViT: depth {self.depth} must be a multiple of 4, because four layers are tapped.")
        if list(layers) != sorted(set(layers)) or not layers or layers[0] < 1 or layers[-1] > self.depth:
            raise InputError(f"ViT: tapped {layers} must be layers from 1 to {self.depth}, in ascending order.")
        if not 0 <= self.drop_path < 1:
            raise InputError(f"ViT: drop_path {self.drop_path} must be in [0, 1).")
        check_frozen("ViT", self.frozen_layers, self.depth)
        if self.patch_embed not in PATCH_EMBEDS:
            raise InputError(f"ViT: patch_embed {self.patch_embed!r}; it must be one of {sorted(PATCH_EMBEDS)}.")
        if self.output == "taps":
            return
        if len(layers) != len(self.strides):
            raise InputError(f"ViT: a pyramid is made of {len(self.strides)} taps; tapped is {layers}.")
        if shape[1] % self.multiple or shape[2] % self.multiple:
            raise InputError(
                f"ViT: the image is {shape[1]} x {shape[2]}; both must be multiples of {self.multiple}. "
                "Resize, crop or pad it."
            )


@dataclasses.dataclass(frozen=True)
class Size:
    """Width, depth and heads of a named size."""

    width: int
    depth: int
    num_heads: int


SIZES: dict[str, Size] = {
    "tiny": Size(192, 12, 3),
    "small": Size(384, 12, 6),
    "base": Size(768, 12, 12),
    "large": Size(1024, 24, 16),
}


def vit(size: str = "small", **overrides) -> ViT:
    """A ViT of a named size ("tiny", "small", "base", "large"); any attribute of `ViT` can be overridden."""
    if size not in SIZES:
        raise InputError(f"vit: size {size!r}; it must be one of {list(SIZES)}.")
    return ViT(**{**dataclasses.asdict(SIZES[size]), **overrides})


def dinov2(size: str = "small", **overrides) -> ViT:
    """A ViT as DINOv2 trains it (Oquab et al. 2023): patches of 14 pixels, class token, layer scale, by default a
    position embedding for 518 x 518 pixels."""
    if size not in SIZES or size == "tiny":
        raise InputError(f"dinov2: size {size!r}; it must be one of {[name for name in SIZES if name != 'tiny']}.")
    published = {"patch_size": 14, "class_token": True, "layer_scale": 1e-5, "image_size": (518, 518)}
    return ViT(**{**dataclasses.asdict(SIZES[size]), **published, **overrides})
