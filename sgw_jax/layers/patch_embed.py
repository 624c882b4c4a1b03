"""From pixels to tokens: one strided convolution, or a stack of small ones."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sgw_jax.data_pipelines.errors import InputError


class PatchEmbed(nn.Module):
    """Non-overlapping patches, one linear map: the embedding of ViT (Dosovitskiy et al. 2021)."""

    patch_size: int
    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "batch height width 3"]) -> tuple[Array, dict[int, Array]]:
        patch = (self.patch_size, self.patch_size)
        return nn.Conv(self.width, patch, patch, padding="VALID", dtype=self.dtype, name="projection")(image), {}


class ConvStem(nn.Module):
    """Overlapping 3x3 convolutions of stride 2 (Xiao et al. 2021, "Early convolutions help transformers see better").

    Optimises faster from scratch than one patch matrix and leaves finer maps for the feature pyramid: returns the
    tokens and the maps before them, {stride: map}, from stride 2 on.
    """

    patch_size: int
    width: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "batch height width 3"]) -> tuple[Array, dict[int, Array]]:
        steps = self.patch_size.bit_length() - 1
        if steps < 1 or 2**steps != self.patch_size:
            raise InputError(f"ConvStem: patch_size must be a power of two from 2 on, not {self.patch_size}.")
        maps, x = {}, image
        for step in range(1, steps + 1):
            x = nn.Conv(max(self.width >> (steps - step), 16), (3, 3), 2, dtype=self.dtype, name=f"conv{step}")(x)
            x = nn.relu(nn.LayerNorm(dtype=self.dtype, name=f"norm{step}")(x))
            maps[2**step] = x
        tokens = nn.Conv(self.width, (1, 1), dtype=self.dtype, name="projection")(maps.pop(self.patch_size))
        return tokens, maps


PATCH_EMBEDS: dict[str, type[nn.Module]] = {"patch": PatchEmbed, "conv": ConvStem}
