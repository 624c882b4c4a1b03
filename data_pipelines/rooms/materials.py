"""What surfaces are made of: random colours and solid (three-dimensional) patterns, drawn independently of class."""

import colorsys
from typing import NamedTuple

import numpy as np

PLAIN, STRIPES, CHECKS, MARBLE, MOSAIC, PLANKS, DOTS, TILES, GRADIENT = range(9)


class Material(NamedTuple):
    """A pattern m(p) in [0, 1] at the local point p (metres) blends two colours: (1 - m) first + m second, linear RGB.

    `waves` are three vectors in cycles per metre and `phases` three offsets in cycles: q_k = waves[k] . p + phases[k].
    `gloss` in [0, 1] scales the highlight, `glow` is emitted light, and glass gives no depth reading.
    """

    pattern: int
    first: tuple[float, float, float]
    second: tuple[float, float, float]
    waves: tuple[float, ...]
    phases: tuple[float, float, float]
    gloss: float = 0.0
    glow: float = 0.0
    glass: bool = False


_AXES = {  # directions of the three waves; a stripe or brick pattern needs to vary on upright faces of either direction
    STRIPES: ((1.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.7, -0.7, 0.3), (0.6, 0.6, 0.6)),
    PLANKS: ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.35, 0.35, 0.0)),
}


def colour(random: np.random.Generator, low: float = 0.12, high: float = 0.95) -> tuple[float, float, float]:
    """A linear RGB colour of any hue, mostly muted, of brightness `low` to `high` on the display."""
    hue, saturation, value = random.random(3).tolist()
    saturation = 0.7 * saturation * (0.3 + 0.7 * saturation)
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, low + (high - low) * value)
    return red**2.2, green**2.2, blue**2.2


def _waves(pattern: int, scale: float, draws: list[float]) -> tuple[float, ...]:
    """Nine frequencies of `scale` cycles per metre, laid along axes that suit the pattern."""
    if pattern in _AXES:
        options = _AXES[pattern]
        along = options[int(draws[0] * len(options))]
        if pattern == STRIPES:
            return (*(scale * a for a in along), *(0.3 * scale * (d - 0.5) for d in draws[1:7]))
        upright = along[0] == along[1]  # bricks on walls: rows stacked in z
        across = (0.0, 0.0, 3 * scale) if upright else (3.2 * scale * along[1], 3.2 * scale * along[0], 0.0)
        return (*(scale * a for a in along), *across, 0.0, 0.0, 0.0)
    if pattern == MARBLE:  # stretched along one axis it reads as wood grain
        stretch = [1.0, 1.0, 1.0]
        stretch[int(draws[0] * 3)] = 0.15 if draws[1] < 0.6 else 1.0
        return tuple(scale * stretch[k % 3] * (2 * draws[k] - 1) * (1.0 if k < 3 else 1.6) for k in range(9))
    return (scale, 0.0, 0.0, 0.0, scale, 0.0, 0.0, 0.0, scale)


def draw(
    random: np.random.Generator, scale: float = 5.0, low: float = 0.12, high: float = 0.95, busy: float = 0.6
) -> Material:
    """A random material whose pattern has about `scale` cycles per metre; patterned with probability `busy`."""
    draws = random.random(16).tolist()
    first = colour(random, low, high)
    pattern = 1 + int(draws[15] * 7) if draws[14] < busy else PLAIN
    contrast = 0.25 + 0.75 * draws[13]
    second = tuple((1 - contrast) * a + contrast * b for a, b in zip(first, colour(random, low, high), strict=True))
    gloss = max(0.0, draws[12] * 1.6 - 0.6)
    waves = _waves(pattern, scale * 2 ** (2 * draws[11] - 1), draws)
    return Material(pattern, first, (second[0], second[1], second[2]), waves, (draws[8], draws[9], draws[10]), gloss)


def plain(rgb: tuple[float, float, float], gloss: float = 0.0, glow: float = 0.0, glass: bool = False) -> Material:
    return Material(PLAIN, rgb, rgb, (0.0,) * 9, (0.0, 0.0, 0.0), gloss, glow, glass)


def _hash(*cells: np.ndarray) -> np.ndarray:
    """A repeatable uniform value in [0, 1) for each integer cell."""
    mixed = np.zeros(cells[0].shape, np.uint32)
    for cell, prime in zip(cells, (73856093, 19349663, 83492791), strict=False):
        mixed ^= cell.astype(np.int32).view(np.uint32) * np.uint32(prime)
    mixed = (mixed ^ (mixed >> np.uint32(13))) * np.uint32(1274126177)
    return ((mixed >> np.uint32(8)) & np.uint32(0xFFFF)).astype(np.float32) / np.float32(65536)


def _wave(q: np.ndarray) -> np.ndarray:
    return np.sin(np.float32(2 * np.pi) * q)


def _marble(q: np.ndarray) -> np.ndarray:
    return 0.5 + 0.5 * _wave(q[0] + 0.3 * _wave(q[1]) + 0.2 * _wave(q[2]))


def _planks(q: np.ndarray) -> np.ndarray:
    row = np.floor(q[1])
    along = q[0] + 0.5 * row
    gap = (q[1] - row < 0.06) | (along - np.floor(along) < 0.02)
    return np.where(gap, 1.0, 0.75 * _hash(np.floor(along), row))


def _tiles(q: np.ndarray) -> np.ndarray:
    inside = q - np.floor(q)
    return ((inside < 0.07).any(axis=0)).astype(np.float32)


_PATTERNS = {
    STRIPES: lambda q: np.clip(0.5 + 1.6 * _wave(q[0] + 0.04 * _wave(q[1])), 0, 1),
    CHECKS: lambda q: np.mod(np.floor(q[0]) + np.floor(q[1]) + np.floor(q[2]), 2),
    MARBLE: _marble,
    MOSAIC: lambda q: _hash(*np.floor(q)),
    PLANKS: _planks,
    DOTS: lambda q: (((q - np.floor(q) - 0.5) ** 2).sum(axis=0) < 0.12).astype(np.float32),
    TILES: _tiles,
    GRADIENT: lambda q: np.clip(0.5 + q[0] + 0.12 * _wave(q[1]) * _wave(q[2]), 0, 1),
}


def albedo(materials: list[Material], local: np.ndarray, surface: np.ndarray, pixel: np.ndarray) -> np.ndarray:
    """Linear RGB (3, n) of points `local` (3, n), metres, on the surfaces `surface` (n,) that index `materials`.

    `pixel` (n,) is the width of a pixel's footprint in metres: a pattern finer than two pixels fades to its mean, which
    is what a camera sees and keeps it from aliasing.
    """
    pattern = np.array([m.pattern for m in materials])[surface]
    waves = np.array([m.waves for m in materials], np.float32)[surface].T
    phases = np.array([m.phases for m in materials], np.float32)[surface].T
    q = np.stack([sum(waves[3 * k + i] * local[i] for i in range(3)) + phases[k] for k in range(3)])
    blend = np.zeros(len(surface), np.float32)
    for each, function in _PATTERNS.items():
        chosen = np.flatnonzero(pattern == each)
        if len(chosen):
            blend[chosen] = function(q[:, chosen])
    finest = np.sqrt((waves.reshape(3, 3, -1) ** 2).sum(axis=1)).max(axis=0)
    sharp = np.clip(2 - 4 * finest * pixel, 0, 1)
    blend = np.where((pattern != GRADIENT) & (pattern != PLAIN), 0.4 + (blend - 0.4) * sharp, blend)
    first = np.array([m.first for m in materials], np.float32)[surface].T
    second = np.array([m.second for m in materials], np.float32)[surface].T
    return first + (second - first) * blend
