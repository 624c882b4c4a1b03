"""Resizing and padding of feature maps."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# The free coefficient of the cubic kernel: torch's without antialiasing, and Pillow's, torch's and jax.image's with it.
CUBIC, ANTIALIASED_CUBIC = -0.75, -0.5


def resize(
    features: Float[Array, "batch height width channels"], size: tuple[int, int]
) -> Float[Array, "batch new_height new_width channels"]:
    """Bilinear with half-pixel centres and without antialiasing (torch's ``interpolate(align_corners=False)``)."""
    if features.shape[1:3] == tuple(size):
        return features
    shape = (features.shape[0], *size, features.shape[3])
    return jax.image.resize(features, shape, "bilinear", antialias=False).astype(features.dtype)


def resize_to_stride(
    features: Float[Array, "batch height width channels"], stride: int, new_stride: int, size: tuple[int, int]
) -> Float[Array, "batch new_height new_width channels"]:
    """The map of one stride at another, by exactly their ratio, as a map of ``size``.

    Both lie at the image's top left, so that a cell covers the pixels that its stride says. What reaches beyond
    ``size`` at the bottom and on the right is cropped; what falls short of it is continued by the last row or column.
    """
    multiple = new_stride // math.gcd(stride, new_stride)
    features = pad_to_multiple(features, multiple, mode="edge")
    rows, columns = (length * stride // new_stride for length in features.shape[1:3])
    resized = resize(features, (rows, columns))[:, : size[0], : size[1]]
    below, right = (wanted - found for wanted, found in zip(size, resized.shape[1:3], strict=True))
    return jnp.pad(resized, ((0, 0), (0, below), (0, right), (0, 0)), mode="edge") if below or right else resized


def pad_to_multiple(
    grid: Float[Array, "batch height width channels"], multiple: int, mode: Literal["constant", "edge"] = "constant"
) -> Array:
    """Zeros, or copies of the edge, at the bottom and on the right until both sides divide by ``multiple``."""
    below, right = (-size % multiple for size in grid.shape[1:3])
    return jnp.pad(grid, ((0, 0), (0, below), (0, right), (0, 0)), mode=mode) if below or right else grid


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
    features: Float[Array, "batch height width channels"], size: tuple[int, int], antialias: bool = False
) -> Float[Array, "batch new_height new_width channels"]:
    """Bicubic with half-pixel centres in float32 (torch's ``interpolate(mode="bicubic", align_corners=False)``): how
    pretrained position embeddings are resized. See `cubic_matrix` for the edges and ``antialias``."""
    rows, columns = (
        jnp.asarray(cubic_matrix(old, new, antialias)) for old, new in zip(features.shape[1:3], size, strict=True)
    )
    wide = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    resized = jnp.einsum("ih,jw,bhwc->bijc", rows, columns, wide, precision="highest")
    return resized.astype(features.dtype)


def cubic_matrix(old: int, new: int, antialias: bool = False) -> Float[np.ndarray, "new old"]:
    """Row i holds the weights of the old samples in new sample i: the cubic convolution kernel (Keys 1981) around
    (i + 1/2) old / new - 1/2.

    Its coefficient is a = -0.75, and samples beyond an edge are the edge's. With ``antialias`` it is Pillow's: a =
    -0.5, as wide as a new sample where those are fewer, samples beyond an edge left out and the rest made to sum to 1.
    """
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    if antialias:
        weights = _cubic((np.arange(old) - centre[:, None]) / max(old / new, 1), ANTIALIASED_CUBIC)
        return (weights / weights.sum(1, keepdims=True)).astype(np.float32)
    first = np.floor(centre).astype(int) - 1
    matrix = np.zeros((new, old))
    for tap in range(4):
        weights = _cubic(centre - (first + tap), CUBIC)
        np.add.at(matrix, (np.arange(new), np.clip(first + tap, 0, old - 1)), weights)
    return matrix.astype(np.float32)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    x = np.abs(x)
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))
