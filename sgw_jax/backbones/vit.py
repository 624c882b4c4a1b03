"""Vision transformer with a feature pyramid."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sgw_jax.layers.attention import SelfAttention
from sgw_jax.layers.drop_path import DropPath
from sgw_jax.layers.mlp import MLP
from sgw_jax.layers.patch_embed import PATCH_EMBEDS
from sgw_jax.layers.resize import depth_to_space
from sgw_jax.sharding import constrain_batch


class Block(nn.Module):
    """Pre-norm transformer block: attention and MLP, each on a residual branch with drop path.

    Call: (tokens, drop path rate of this layer) -> (tokens, tokens): carry and output of a scan.
    """

    num_heads: int
    mlp_ratio: float = 4.0
    train: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, tokens: Float[Array, "batch tokens width"], rate: Array) -> tuple[Array, Array]:
        drop_path = DropPath(name="drop_path")
        normed = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm1")(tokens)
        branch = SelfAttention(self.num_heads, dtype=self.dtype, name="attention")(normed)
        tokens = constrain_batch(tokens + drop_path(branch, rate, self.train))
        normed = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm2")(tokens)
        branch = MLP(int(tokens.shape[-1] * self.mlp_ratio), dtype=self.dtype, name="mlp")(normed)
        tokens = constrain_batch(tokens + drop_path(branch, rate, self.train))
        return tokens, tokens


class ViT(nn.Module):
    """ViT (Dosovitskiy et al. 2021) without a class token, its taps made into a pyramid of maps.

    Blocks are one scanned stack (compile time does not grow with depth; FSDP gathers one layer at a time), optionally
    rematerialised. Four taps, the outputs of layers at 1/4, 2/4, 3/4 and 4/4 of the depth (the last after the final
    norm), become the maps of strides 4, 8, 16 and 32 by sub-pixel or strided convolutions (as in ViTDet, Li et al.
    2022).
    Layer norm only: no running statistics, hence nothing to synchronise over devices, the same function in training
    and evaluation, and k accumulated micro-batches equal to one batch.

    Attributes:
      patch_size, width, depth, num_heads, mlp_ratio: as in the paper. patch_size must be a power of two, depth a
        multiple of 4.
      image_size: (height, width) in pixels that the position embedding is made for; other sizes interpolate it.
      patch_embed: "patch" or "conv" (see layers/patch_embed.py); with "conv" its finer maps join the pyramid.
      drop_path: rate of the last layer, in [0, 1), linear from 0 at the first.
      remat: recompute a block's inside in the backward pass.

    Call: (image (batch, H, W, 3), train) -> {stride: (batch, H / stride, W / stride, width)}.

    Raises:
      ValueError: H or W that 32 (and the patch size) does not divide; an attribute out of the range given above.
    """

    patch_size: int = 16
    width: int = 384
    depth: int = 12
    num_heads: int = 6
    mlp_ratio: float = 4.0
    image_size: tuple[int, int] = (224, 224)
    patch_embed: str = "patch"
    drop_path: float = 0.0
    remat: bool = False
    dtype: jnp.dtype = jnp.float32

    strides = (4, 8, 16, 32)

    @nn.compact
    def __call__(self, image: Float[Array, "batch height width 3"], train: bool = False) -> dict[int, Array]:
        self._check(image.shape)
        embed = PATCH_EMBEDS[self.patch_embed](self.patch_size, self.width, dtype=self.dtype, name="patch_embed")
        grid, finer = embed(image.astype(self.dtype))
        batch, height, width, channels = grid.shape
        tokens = constrain_batch((grid + self._position_embedding(height, width)).reshape(batch, -1, channels))

        stack = nn.scan(
            nn.remat(Block, prevent_cse=False) if self.remat else Block,
            variable_axes={"params": 0},
            split_rngs={"params": True, "drop_path": True},
            length=self.depth,
        )
        dropping = train and self.drop_path > 0  # known when traced: at rate 0 no random number is drawn
        blocks = stack(self.num_heads, self.mlp_ratio, dropping, self.dtype, name="blocks")
        _, outputs = blocks(tokens, jnp.linspace(0.0, self.drop_path, self.depth))
        quarter = self.depth // 4
        taps = [outputs[quarter * (i + 1) - 1] for i in range(4)]
        taps[-1] = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name="norm")(taps[-1])

        maps = {}
        for stride, tap in zip(self.strides, taps, strict=True):
            level = self._resample(tap.reshape(grid.shape), stride)
            if stride in finer:
                level += nn.Conv(channels, (1, 1), dtype=self.dtype, name=f"lateral{stride}")(finer[stride])
            norm = nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name=f"pyramid_norm{stride}")
            maps[stride] = constrain_batch(norm(level))
        return maps

    def _resample(self, grid: Array, stride: int) -> Array:
        """The tap at another stride: sub-pixel convolution upwards, strided convolution downwards."""
        name, channels = f"pyramid{stride}", grid.shape[-1]
        if stride <= self.patch_size:
            factor = self.patch_size // stride
            return depth_to_space(nn.Dense(channels * factor**2, dtype=self.dtype, name=name)(grid), factor)
        factor = stride // self.patch_size
        return nn.Conv(channels, (factor, factor), factor, padding="VALID", dtype=self.dtype, name=name)(grid)

    def _position_embedding(self, height: int, width: int) -> Array:
        made_for = tuple(size // self.patch_size for size in self.image_size)
        table = self.param("position_embedding", nn.initializers.normal(0.02), (1, *made_for, self.width))
        if (height, width) != made_for:
            table = jax.image.resize(table, (1, height, width, self.width), "bicubic", antialias=False)
        return table.astype(self.dtype)

    def _check(self, shape: tuple[int, ...]) -> None:
        multiple = max(self.patch_size, self.strides[-1])
        if self.patch_size < 1 or self.patch_size & (self.patch_size - 1):
            raise ValueError(f"ViT: patch_size {self.patch_size} must be a power of two, as {self.strides} are.")
        if shape[1] % multiple or shape[2] % multiple:
            raise ValueError(
                f"ViT: the image is {shape[1]} x {shape[2]}; both must be multiples of {multiple} (pad it)."
            )
        if self.depth < 4 or self.depth % 4:
            raise ValueError(f"ViT: depth {self.depth} must be a multiple of 4, because four layers are tapped.")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"ViT: drop_path {self.drop_path} must be in [0, 1).")
        if self.patch_embed not in PATCH_EMBEDS:
            raise ValueError(f"ViT: patch_embed {self.patch_embed!r}; it must be one of {sorted(PATCH_EMBEDS)}.")


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
        raise ValueError(f"vit: size {size!r}; it must be one of {list(SIZES)}.")
    return ViT(**{**dataclasses.asdict(SIZES[size]), **overrides})
