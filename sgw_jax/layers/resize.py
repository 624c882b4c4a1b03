"""Resizing of feature maps."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def resize(
    features: Float[Array, "batch height width channels"], size: tuple[int, int]
) -> Float[Array, "batch new_height new_width channels"]:
    """Bilinear with half-pixel centres and without antialiasing (torch's ``interpolate(align_corners=False)``)."""
    if features.shape[1:3] == tuple(size):
        return features
    shape = (features.shape[0], *size, features.shape[3])
    return jax.image.resize(features, shape, "bilinear", antialias=False).astype(features.dtype)


def depth_to_space(
    features: Float[Array, "batch height width packed"], factor: int
) -> Float[Array, "batch tall wide channels"]:
    """Spreads groups of channels over ``factor x factor`` pixels: with a 1x1 convolution before it, a transposed
    convolution whose kernel equals its stride (sub-pixel convolution, Shi et al. 2016). The channel is the fast part
    of the packed axis, the cell's row the slow one."""
    batch, height, width, packed = features.shape
    channels = packed // factor**2
    cells = features.reshape(batch, height, width, factor, factor, channels)
    return jnp.swapaxes(cells, 2, 3).reshape(batch, height * factor, width * factor, channels)
