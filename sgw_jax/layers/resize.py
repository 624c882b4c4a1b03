"""Resizing of feature maps."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

CUBIC = -0.75  # the free coefficient of the cubic kernel: torch's; jax.image's is -0.5


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


def resize_bicubic(
    features: Float[Array, "batch height width channels"], size: tuple[int, int]
) -> Float[Array, "batch new_height new_width channels"]:
    """Bicubic with a = -0.75, half-pixel centres, clamped at the edges and without antialiasing, in float32 (torch's
    ``interpolate(mode="bicubic", align_corners=False)``): how pretrained position embeddings are resized."""
    rows, columns = (jnp.asarray(cubic_matrix(old, new)) for old, new in zip(features.shape[1:3], size, strict=True))
    wide = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    resized = jnp.einsum("ih,jw,bhwc->bijc", rows, columns, wide, precision="highest")
    return resized.astype(features.dtype)


def cubic_matrix(old: int, new: int) -> Float[np.ndarray, "new old"]:
    """Row i holds the weights of the old samples in new sample i: the cubic convolution kernel (Keys 1981) around
    (i + 1/2) old / new - 1/2, where samples beyond an edge are the edge's."""
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    first = np.floor(centre).astype(int) - 1
    matrix = np.zeros((new, old))
    for tap in range(4):
        x = np.abs(centre - (first + tap))
        near = (CUBIC + 2) * x**3 - (CUBIC + 3) * x**2 + 1
        far = CUBIC * (x**3 - 5 * x**2 + 8 * x - 4)
        np.add.at(matrix, (np.arange(new), np.clip(first + tap, 0, old - 1)), np.where(x <= 1, near, far))
    return matrix.astype(np.float32)
