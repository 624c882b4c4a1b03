"""Targets beyond what the cast itself tells: edges, the attended object, and where a depth camera reads nothing."""

import numpy as np

from sgw_jax.data_pipelines.rooms.raycast import Rays

DEPTH_RANGE = 6.5  # metres: the sensor sees no further
JUMP = 0.04  # share of the depth: a larger gap is a depth discontinuity

Slices = tuple[slice, slice]


def edges(instance: np.ndarray, depth: np.ndarray, normals: np.ndarray, rays: Rays) -> np.ndarray:
    """bool (H, W): pixels whose right or lower neighbour is of another instance, or lies across a depth discontinuity.

    Two neighbours of one instance are continuous if the tangent plane of either passes within JUMP of the other, or if
    the two planes cross between them: then neither a slanted surface nor a crease is an edge. Planes are compared in
    inverse depth, where a plane is linear in the pixel grid: n . ray / (n . point).
    instance, depth (H, W); normals (3, H, W) in the camera frame, of every pixel.
    """
    offset = (normals[0] * rays.x + normals[1] * rays.y[:, None] + normals[2]) * depth
    marked = np.zeros(depth.shape, bool)
    down = (slice(None, -1), slice(None)), (slice(1, None), slice(None))
    for here, there in (down, (down[0][::-1], down[1][::-1])):
        ahead = 1 / depth[here] - _inverse_depth(normals, offset, there, here, rays)
        beyond = _inverse_depth(normals, offset, here, there, rays) - 1 / depth[there]
        apart = np.minimum(np.abs(ahead) * depth[here], np.abs(beyond) * depth[there]) > JUMP
        marked[here] |= (instance[here] != instance[there]) | (apart & (ahead * beyond > 0))
    return marked


def _inverse_depth(normals: np.ndarray, offset: np.ndarray, plane: Slices, pixel: Slices, rays: Rays) -> np.ndarray:
    """1 / z at which the rays of the slice `pixel` meet the tangent planes of the slice `plane` beside it."""
    x, y, z = normals[(slice(None), *plane)]
    return (x * rays.x[pixel[1]] + y * rays.y[pixel[0], None] + z) / offset[plane]


def attended(instance: np.ndarray, image: np.ndarray, appeal: np.ndarray) -> np.ndarray:
    """bool (H, W): the pixels of the one object that a viewer would look at first; all False if no object is in view.

    score(object) = sqrt(S) (1 + c) a with
      S the sum over its pixels of exp(-r^2 / (2 0.35^2)), r the distance from the image centre in half diagonals;
      c the contrast: the distance of its mean colour from the image's (RGB) as a share of 255;
      a = appeal[object]: 3 for a person, 1 for furniture and clutter, 0 for the room, its doors and its windows.
    The highest score wins. instance (H, W) int; image (H, W, 3) uint8. Our decision.
    """
    height, width = instance.shape
    rows, columns = np.arange(height) + 0.5 - height / 2, np.arange(width) + 0.5 - width / 2
    squared = (rows[:, None] ** 2 + columns**2) / ((height**2 + width**2) / 4)
    weight = np.exp(-squared / (2 * 0.35**2))
    flat, count = instance.ravel(), len(appeal)
    area = np.maximum(np.bincount(flat, minlength=count), 1)
    centred = np.bincount(flat, weight.ravel(), count)
    channels = np.moveaxis(image.astype(np.float64), 2, 0)
    shift = [np.bincount(flat, channel.ravel(), count) / area - channel.mean() for channel in channels]
    contrast = np.sqrt(sum(s * s for s in shift)) / 255
    score = np.sqrt(centred) * (1 + contrast) * appeal
    winner = int(score.argmax())
    return (instance == winner) & (score[winner] > 0)


def sensor_holes(
    depth: np.ndarray, facing: np.ndarray, glass: np.ndarray, highlights: np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """bool (H, W): where a depth camera would read nothing.

    Glass, strong highlights, beyond DEPTH_RANGE, most surfaces seen at a grazing angle (`facing`: cosine between the
    normal and the ray towards the camera), the shadow of the sensor's projector just right of a nearer surface, and up
    to three random discs.
    """
    height, width = depth.shape
    holes = glass | (highlights > 0.45) | (depth > DEPTH_RANGE)
    holes |= facing < 0.10 + 0.08 * random.random(depth.shape)
    holes[:, 1:] |= (depth[:, 1:] - depth[:, :-1] > 0.35) & (random.random((height, width - 1)) < 0.7)
    for row, column, radius in random.random((int(random.integers(4)), 3)):
        disc = (np.arange(height)[:, None] - row * height) ** 2 + (np.arange(width) - column * width) ** 2
        holes |= disc < ((0.01 + 0.04 * radius) * width) ** 2
    return holes
