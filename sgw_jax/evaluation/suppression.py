"""Non-maximum suppression of soft edges: what is kept is the crest of each ridge, at its own height.

The published step (Dollar and Zitnick's edgesNms, as SEISM applies it to every prediction), from its description:

  1. the orientation across a ridge, from second differences of the map smoothed by a triangle filter;
  2. a pixel p becomes 0 if p * multiplier is below the map (bilinear) at 1 .. radius pixels to either side of it;
  3. within `border` pixels of a side of the image, a pixel is multiplied by its distance from it / border.

All in float32, as there: where the map is flat the orientation is that of rounding errors, but for very few pixels
(2 and 1 of 12,610 in float64) what is suppressed is the same.
"""

import numpy as np
from jaxtyping import Float, Shaped
from scipy.ndimage import correlate1d

SMOOTHING = 4  # radius of the triangle filter
INSIDE = 1.001  # how far from the far side a neighbour is read at most: it needs a pixel behind it


def suppress(
    prediction: Shaped[np.ndarray, "height width"], radius: int = 1, border: int = 5, multiplier: float = 1.01
) -> Float[np.ndarray, "height width"]:
    """The prediction, in [0, 1] or uint8 levels v (v / 255), with all but the crests of its ridges 0; float32."""
    edges = np.asarray(prediction / 255 if prediction.dtype == np.uint8 else prediction, np.float32)
    angle = orientation(edges)
    across, down = np.cos(angle), np.sin(angle)
    crest = edges * np.float32(multiplier)
    kept = edges > 0
    for distance in (*range(-radius, 0), *range(1, radius + 1)):
        kept &= crest >= _beside(edges, distance * down, distance * across)
    border = min(border, *(length // 2 for length in edges.shape))
    kept_edges = np.where(kept, edges, np.float32(0))
    if border:
        for axis, length in enumerate(edges.shape):
            place = np.arange(length)
            damping = np.minimum(np.minimum(place, place[::-1]) / np.float32(border), 1).astype(np.float32)
            kept_edges *= np.expand_dims(damping, 1 - axis)
    return kept_edges


def orientation(edges: Float[np.ndarray, "height width"]) -> Float[np.ndarray, "height width"]:
    """The angle in [0, pi) from the columns' axis to the direction in which the smoothed map curves most, float32."""
    edges = np.asarray(edges, np.float32)
    rising = np.arange(1, SMOOTHING + 1)
    triangle = np.concatenate([rising, [SMOOTHING + 1], rising[::-1]]) / (SMOOTHING + 1) ** 2
    smooth = edges
    for axis in (0, 1):
        smooth = correlate1d(smooth, triangle, axis=axis, mode="reflect")  # the border's pixels repeat, mirrored
    along, down = _slope(smooth, 1), _slope(smooth, 0)
    tangent = _slope(down, 0) * np.sign(-_slope(down, 1)) / (_slope(along, 1) + np.float32(1e-5))
    return np.mod(np.arctan(tangent), np.float32(np.pi))


def _slope(values: np.ndarray, axis: int) -> np.ndarray:
    """Central differences, one-sided at the ends."""
    return np.gradient(values, axis=axis) if values.shape[axis] > 1 else np.zeros_like(values)


def _beside(edges: np.ndarray, down: np.ndarray, across: np.ndarray) -> np.ndarray:
    """The map, bilinear, at every pixel's place moved by (down, across); places outside are moved in."""
    corners, shares = [], []
    for axis, (move, length) in enumerate(zip((down, across), edges.shape, strict=True)):
        start = np.expand_dims(np.arange(length, dtype=np.float32), 1 - axis)
        place = np.clip(start + move, 0, np.float32(max(length - INSIDE, 0)))
        low = place.astype(np.intp)
        corners.append((low, np.minimum(low + 1, length - 1)))
        shares.append(place - low.astype(np.float32))
    (top, bottom), (left, right) = corners
    below, beyond = shares
    upper = edges[top, left] * (1 - beyond) + edges[top, right] * beyond
    lower = edges[bottom, left] * (1 - beyond) + edges[bottom, right] * beyond
    return upper * (1 - below) + lower * below
