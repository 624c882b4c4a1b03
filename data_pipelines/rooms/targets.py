"""Exact targets of a cast scene: edges, the attended object, depth with sensor-like holes, normals that face the camera."""

import numpy as np

from data_pipelines.rooms.raycast import Rays

DEPTH_RANGE = 6.5  # metres: the sensor sees no further
JUMP = 0.06  # metres, plus JUMP_SHARE of the depth: a gap to the neighbour's tangent plane that counts as a depth discontinuity
JUMP_SHARE = 0.02


def edges(instance: np.ndarray, depth: np.ndarray, normals: np.ndarray, rays: Rays) -> np.ndarray:
    """bool (H, W): a pixel whose right or lower neighbour belongs to another instance, or lies across a depth discontinuity.

    Two neighbours of one instance are discontinuous if each lies further than JUMP + JUMP_SHARE z from the other's
    tangent plane along its own ray; so neither a slanted plane nor a crease is an edge. instance, depth (H, W); normals
    (3, H, W) in the camera frame, of every pixel.
    """
    facing = normals[0] * rays.x + normals[1] * rays.y[:, None] + normals[2]
    offset = facing * depth  # the tangent plane of a pixel is {p: n . p = offset}
    marked = np.zeros(depth.shape, bool)
    for axis in (0, 1):
        here, there = (slice(None, -1), slice(None)), (slice(1, None), slice(None))
        if axis == 1:
            here, there = here[::-1], there[::-1]
        gap = np.minimum(
            _distance_to_plane(normals, offset, here, there, rays, depth), _distance_to_plane(normals, offset, there, here, rays, depth)
        )
        limit = JUMP + JUMP_SHARE * np.minimum(depth[here], depth[there])
        marked[here] |= (instance[here] != instance[there]) | (gap > limit)
    return marked


def _distance_to_plane(normals, offset, plane, pixel, rays: Rays, depth: np.ndarray) -> np.ndarray:
    """How far along z each pixel of the slice `pixel` lies from where its ray meets the tangent plane of its neighbour in `plane`."""
    n = normals[(slice(None), *plane)]
    along = n[0] * rays.x[pixel[1]] + n[1] * rays.y[pixel[0], None] + n[2]
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = offset[plane] / along
    # A plane that the neighbour's ray does not meet in front of the camera predicts nothing: infinitely far.
    return np.where((along < 0) & (expected > 0), np.abs(expected - depth[pixel]), np.inf)


def attended(instance: np.ndarray, image: np.ndarray, appeal: np.ndarray) -> np.ndarray:
    """bool (H, W): the pixels of the one object that a viewer would look at first; all False if no object is in view.

    score(object) = sum over its pixels of exp(-r^2 / (2 0.35^2)), r the distance from the image centre in half diagonals,
    times 1 + contrast (the distance of its mean colour from the image's, RGB, as a share of 255),
    times appeal[object]: 2 for a person, 1 for furniture and clutter, 0 for the room, its doors and its windows.
    instance (H, W) int; image (H, W, 3) uint8. Our decision.
    """
    height, width = instance.shape
    rows, columns = np.arange(height) + 0.5 - height / 2, np.arange(width) + 0.5 - width / 2
    squared = (rows[:, None] ** 2 + columns**2) / ((height**2 + width**2) / 4)
    weight = np.exp(-squared / (2 * 0.35**2))
    flat, count = instance.ravel(), len(appeal)
    area = np.maximum(np.bincount(flat, minlength=count), 1)
    centred = np.bincount(flat, weight.ravel(), count)
    shift = [
        np.bincount(flat, channel.ravel(), count) / area - channel.mean() for channel in np.moveaxis(image.astype(np.float64), 2, 0)
    ]
    contrast = np.sqrt(sum(s * s for s in shift)) / 255
    score = centred * (1 + contrast) * appeal
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
