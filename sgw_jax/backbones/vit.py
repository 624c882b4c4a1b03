"""Vision transformer: tokens of patches through one stack of blocks; its taps, or a feature pyramid of them."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sgw_jax.backbones.taps import Taps, known_taps
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.layers.attention import QKVBias, SelfAttention
from sgw_jax.layers.drop_path import DropPath
from sgw_jax.layers.mlp import MLP, GatedMLP
from sgw_jax.layers.patch_embed import PATCH_EMBEDS
from sgw_jax.layers.remat import rematerialised
from sgw_jax.layers.resize import depth_to_space, pad_to_multiple, resize, resize_bicubic
from sgw_jax.layers.rotary import rotation_of_grid
from sgw_jax.layers.stack import check_frozen, drop_rates, scan_blocks
from sgw_jax.sharding import constrain_activations

OUTPUTS = ("pyramid", "taps")


def hidden_width(width: int, mlp_ratio: float) -> int:
    """Of an MLP, rounded down; a ratio that was found as hidden / width may fall short of it by a rounding error."""
    return int(width * mlp_ratio + 1e-6)


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP, each on a residual branch with drop path.

    With ``layer_scale`` a learned factor per channel, which starts at that value, multiplies each branch (Touvron et
    al. 2021). ``gated``: `GatedMLP` in place of `MLP`; ``qkv_bias``: see `SelfAttention`.

    Call: (tokens, drop path rate of this layer, rotation of queries and keys or None) -> (tokens, tokens): carry and
    output of a scan.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    layer_scale: float | None = None
    approximate_gelu: bool = False
    epsilon: float = 1e-6
    attention_chunk: int | None = None
    train: bool = False
    dtype: jnp.dtype = jnp.float32
    gated: bool = False
    qkv_bias: QKVBias = "all"

    @nn.compact
    def __call__(
        self,
        tokens: Float[Array, "batch tokens width"],
        rate: Array,
        rotation: Float[Array, "2 patches half"] | None = None,
    ) -> tuple[Array, Array]:
        drop_path = DropPath(name="drop_path")
        normed = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm1")(tokens)
        attention = SelfAttention(
            self.num_heads, dtype=self.dtype, chunk=self.attention_chunk, qkv_bias=self.qkv_bias, name="attention"
        )
        branch = self._scaled("scale1", attention(normed, rotation))
        tokens = constrain_activations(tokens + drop_path(branch, rate, self.train))
        normed = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm2")(tokens)
        hidden = hidden_width(tokens.shape[-1], self.mlp_ratio)
        if self.gated:
            mlp: nn.Module = GatedMLP(hidden, dtype=self.dtype, name="mlp")
        else:
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
      antialias: of that interpolation (DINOv2 with registers).
      rope_theta: the longest period of rotary position embeddings in place of a learned table, see layers/rotary.py
        (DINOv3); None is the table. The random shifts and scales of coordinates in DINOv3's pretraining are left out.
      patch_embed: "patch" or "conv" (see layers/patch_embed.py); with "conv" its finer maps join the pyramid.
      class_token: a learned token before those of the patches, as in pretrained models. It is in no output. Its own
        position embedding is part of it.
      registers: learned tokens behind the class token, without a position (Darcet et al. 2024). They are in no output.
      layer_scale, approximate_gelu, epsilon, gated, qkv_bias: see `Block`; epsilon also of the final norm.
      tapped: layers whose outputs are taken, from 1 on, in ascending order; None is the four above.
      output: "pyramid", or "taps" for the maps themselves.
      drop_path: rate of the last layer, in [0, 1), linear from 0 at the first.
      remat: what a block keeps for the backward pass, see layers/remat.py.
      attention_chunk: queries at a time, see `attention`; None is all.
      frozen_layers: the lowest blocks, through which no gradient goes and in which no path is dropped, see
        layers/stack.py.

    Call: (image (batch, H, W, 3), train, taps) -> {stride: (batch, h, w, width)} with strides 4, 8, 16 and 32, h =
    ceil(H / stride), w = ceil(W / stride), of any image size: the image is padded to whole patches, a map to whole
    cells of the next (zeros, at the bottom and on the right), and what reaches beyond the image is cropped. With
    ``output="taps"`` {layer: (batch, floor(H / patch_size), floor(W / patch_size), width)}, as in the originals. A
    pyramid from patches whose size is no power of two is made on the image resized so that patches lie as those of the
    next power do: 14 of 16 pixels. ``taps``: of the same image, if they are known: nothing below them is computed, see
    `known_taps`.

    Raises:
      ValueError: a pyramid from other than four taps; taps of an image smaller than a patch; an attribute out of the
        range given above.
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
    antialias: bool = False
    rope_theta: float | None = None
    registers: int = 0
    gated: bool = False
    qkv_bias: QKVBias = "all"

    strides = (4, 8, 16, 32)

    @property
    def fixed_size(self) -> str:
        """Why a program for images of any size cannot be made; "" where it can."""
        if self.rope_theta is None:
            return "the ViT's position embedding is a table, which is resized to one size"
        if self.attention_chunk is not None:
            return f"the ViT takes attention_chunk = {self.attention_chunk} queries at a time"
        return "" if self.output == "pyramid" else "the ViT's taps leave out what does not fill a patch"

    @property
    def num_layers(self) -> int:
        """Of which ``frozen_layers`` counts."""
        return self.depth

    @nn.compact
    def __call__(
        self, image: Float[Array, "batch height width 3"], train: bool = False, taps: Taps | None = None
    ) -> dict[int, Array]:
        size = (image.shape[1], image.shape[2])
        self._check(size)
        taps = known_taps(self, taps, lambda: self._taps(image, train))
        maps = [taps[f"layer{layer}"] for layer in self._layers()]
        if self.output == "taps":
            return dict(zip(self._layers(), maps, strict=True))
        return self._pyramid(maps, {stride: taps[f"stride{stride}"] for stride in self._finer()}, size)

    @nn.nowrap  # a part of the call: operations keep their paths
    def _taps(self, image: Array, train: bool) -> dict[str, Array]:
        """The maps of the tapped layers and, with `ConvStem`, those of its strides."""
        size = (image.shape[1], image.shape[2])
        image = image.astype(self.dtype)
        if self.output == "pyramid":
            image = resize(pad_to_multiple(image, self._stride()), self._patched_size(size))
        embed = PATCH_EMBEDS[self.patch_embed](self.patch_size, self.width, dtype=self.dtype, name="patch_embed")
        grid, finer = embed(image)
        batch, height, width, channels = grid.shape
        positioned = grid + self._position_embedding(height, width) if self.rope_theta is None else grid
        first = [self._tokens("class_token", 1)] if self.class_token else []
        if self.registers:
            first.append(self._tokens("register_tokens", self.registers))
        copies = [jnp.broadcast_to(token, (batch, *token.shape[1:])) for token in first]
        tokens = constrain_activations(jnp.concatenate([*copies, positioned.reshape(batch, -1, channels)], axis=1))
        rotation = None
        if self.rope_theta is not None:
            rotation = rotation_of_grid(height, width, self.width // self.num_heads, self.rope_theta)

        # Known when traced: at rate 0 no random number is drawn.
        dropping = train and self.drop_path > 0 and self.frozen_layers < self.depth
        block = rematerialised(Block, self.remat)(
            self.num_heads,
            mlp_ratio=self.mlp_ratio,
            layer_scale=self.layer_scale,
            approximate_gelu=self.approximate_gelu,
            epsilon=self.epsilon,
            attention_chunk=self.attention_chunk,
            train=dropping,
            dtype=self.dtype,
            gated=self.gated,
            qkv_bias=self.qkv_bias,
            name="blocks",
        )
        rates = drop_rates(self.drop_path, self.depth, self.frozen_layers)
        _, outputs = scan_blocks(block, tokens, rates, rotation, length=self.depth, frozen=self.frozen_layers)

        taps = {f"stride{stride}": finer[stride] for stride in self._finer()}
        for layer in self._layers():
            tap = outputs[layer - 1]
            if layer == self.depth:
                tap = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm")(tap)
            taps[f"layer{layer}"] = tap[:, int(self.class_token) + self.registers :].reshape(grid.shape)
        return taps

    def _layers(self) -> tuple[int, ...]:
        return tuple(self.depth * i // 4 for i in (1, 2, 3, 4)) if self.tapped is None else tuple(self.tapped)

    def _finer(self) -> tuple[int, ...]:
        """Strides of the patch embedding's own maps that join the pyramid."""
        if self.patch_embed != "conv" or self.output == "taps":
            return ()
        return tuple(stride for stride in self.strides if stride < self.patch_size)

    def _pyramid(self, taps: list[Array], finer: dict[int, Array], size: tuple[int, int]) -> dict[int, Array]:
        maps = {}
        for stride, tap in zip(self.strides, taps, strict=True):
            rows, columns = (-(-length // stride) for length in size)
            level = self._resample(tap, stride)[:, :rows, :columns]
            if stride in finer:
                lateral = nn.Conv(tap.shape[-1], (1, 1), dtype=self.dtype, name=f"lateral{stride}")
                level += lateral(finer[stride][:, :rows, :columns])
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
        merge = nn.Conv(channels, (factor, factor), factor, padding="VALID", dtype=self.dtype, name=name)
        return merge(pad_to_multiple(grid, factor))

    def _stride(self) -> int:
        """Of the patches in the pyramid: the next power of two."""
        return 1 << (self.patch_size - 1).bit_length()

    def _patched_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size of the image that is cut into patches."""
        if self.output == "taps":
            return size
        rows, columns = (-(-length // self._stride()) for length in size)
        return rows * self.patch_size, columns * self.patch_size

    def _tokens(self, name: str, number: int) -> Array:
        return self.param(name, nn.initializers.normal(0.02), (1, number, self.width)).astype(self.dtype)

    def _position_embedding(self, height: int, width: int) -> Array:
        rows, columns = (length // self.patch_size for length in self._patched_size(self.image_size))
        table = self.param("position_embedding", nn.initializers.normal(0.02), (1, rows, columns, self.width))
        if (height, width) != (rows, columns):
            table = resize_bicubic(table, (height, width), self.antialias)
        return table.astype(self.dtype)

    def _check(self, size: tuple[int, int]) -> None:
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
        if self.registers < 0:
            raise InputError(f"ViT: registers is {self.registers}; it must not be negative.")
        if self.rope_theta is not None and self.width % (4 * self.num_heads):
            raise InputError(
                f"ViT: rotary positions need heads whose width is a multiple of 4; width {self.width} has "
                f"{self.num_heads} heads."
            )
        if self.output == "pyramid" and len(layers) != len(self.strides):
            raise InputError(f"ViT: a pyramid is made of {len(self.strides)} taps; tapped is {layers}.")
        if self.output == "taps" and min(size) < self.patch_size:
            raise InputError(f"ViT: the image is {size[0]} x {size[1]}; a patch has {self.patch_size} pixels a side.")


@dataclasses.dataclass(frozen=True)
class Size:
    """Width, depth, heads and MLP of a named size."""

    width: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    gated: bool = False


SIZES: dict[str, Size] = {
    "tiny": Size(192, 12, 3),
    "small": Size(384, 12, 6),
    "base": Size(768, 12, 12),
    "large": Size(1024, 24, 16),
}


def sized(family: str, sizes: Mapping[str, Size], size: str, overrides: Mapping[str, Any]) -> ViT:
    """The ViT of a named size of a family, with the overrides.

    Raises:
      ValueError: no such size.
    """
    if size not in sizes:
        raise InputError(f"{family}: size {size!r}; it must be one of {list(sizes)}.")
    return ViT(**{**dataclasses.asdict(sizes[size]), **overrides})


def vit(size: str = "small", **overrides) -> ViT:
    """A ViT of a named size ("tiny", "small", "base", "large"); any attribute of `ViT` can be overridden."""
    return sized("vit", SIZES, size, overrides)
