"""Resizing of feature maps."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

CUBIC = -0.75  # the free coefficient of the cubic kernel: torch's; jax.image's is -0.5


def resize(
    features: Float[Array, "batch height width channels"], size: tuple[int, int]
) -> Float[Array, "batch new_height new_width channels"]:
    """Bilinear with half-pixel centres and without antialiasing (torch's ``interpolate(align_corners=False)``)."""
    if features.shape[1:3] == tuple(size):
        return features
    shape = (features.shape[0], *size, features.shape[3])
    return jax.image.resize(features, shape, "bilinear", antialias=False).astype(features.dtype)


def places(inner: Any, length: Any, count: int, xp: Any = jnp) -> tuple[Any, Any]:
    """Where the centres of an axis' first ``count`` of ``length`` pixels lie among ``inner`` pixels of the same extent.

    s = (i + 1/2) inner / length - 1/2, kept within [0, inner - 1] so that the border is repeated. It is reckoned in
    integers: at any length s is right to the last bit, and a whole number where inner = length.

    Args:
      inner, length: numbers of pixels, at least 1; inner * length below 2^29.
      count: of pixels asked for; those from ``length`` on lie where the last one does.
      xp: jax.numpy, or NumPy for numbers on the host.

    Returns:
      (floor s, int (count,); s - floor s, float32 (count,)): the lower neighbour and the weight of the next one.
    """
    pixel = xp.minimum(xp.arange(count), length - 1)
    doubled = xp.clip((2 * pixel + 1) * inner - length, 0, 2 * length * (inner - 1))  # 2 length s
    first = doubled // (2 * length)
    share = (doubled - 2 * length * first).astype(np.float32) / xp.asarray(2 * length).astype(np.float32)
    return first, share


def sample(
    values: Float[Array, "height width channels"],
    rectangle: Int[Array, "4"],
    own: Int[Array, "2"],
    canvas: tuple[int, int],
) -> Float[Array, "rows columns channels"]:
    """A rectangle of a map, interpolated bilinearly at the pixels of an image of the size ``own`` that fills it.

    Centres of pixels are aligned (`places`). Nothing outside the rectangle enters, and a map that already has the
    image's size keeps every bit.

    Args:
      values: the map.
      rectangle: top, left, height, width of the part of it that shows the image.
      own: the image's height and width.
      canvas: (rows, columns) of what is returned, at least ``own``; the image lies in its upper left corner, beyond it
        its border is repeated.

    Returns:
      The values at the image's pixels.
    """
    top, left, height, width = rectangle
    y, below = places(height, own[0], canvas[0])
    x, beside = places(width, own[1], canvas[1])
    # Without weight there is no neighbour: what lies beyond the rectangle is not read.
    y, lower = top + y, top + y + (below > 0)
    x, right = left + x, left + x + (beside > 0)
    beside, below = beside[:, None], below[:, None, None]
    rows = values[:, x] * (1 - beside) + values[:, right] * beside
    return rows[y] * (1 - below) + rows[lower] * below


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
