"""Colours far apart to the eye, for classes without colours of their own."""

import functools

import numpy as np

from sgw_jax.tasks.base import IGNORED_COLOUR


@functools.lru_cache
def spread_colours(number: int) -> tuple[tuple[int, int, int], ...]:
    """`number` colours far apart to the eye: each is the candidate farthest, in CIELAB, from those before it.

    The candidates are a 12^3 grid of sRGB with a lightness of 30 to 90; the first colour keeps away from the grey of
    ignored pixels. (Our decision; deterministic, and a longer palette begins with the shorter one.)
    """
    level = np.linspace(0, 255, 12).round().astype(int)
    candidates = np.stack(np.meshgrid(level, level, level, indexing="ij"), -1).reshape(-1, 3)
    lab = _cielab(candidates)
    candidates, lab = (a[(lab[:, 0] >= 30) & (lab[:, 0] <= 90)] for a in (candidates, lab))
    distance = np.linalg.norm(lab - _cielab(np.array([IGNORED_COLOUR])), axis=-1)
    chosen: list[tuple[int, int, int]] = []
    for _ in range(number):
        best = int(np.argmax(distance))
        red, green, blue = candidates[best].tolist()
        chosen.append((red, green, blue))
        distance = np.minimum(distance, np.linalg.norm(lab - lab[best], axis=-1))
    return tuple(chosen)


def _cielab(srgb: np.ndarray) -> np.ndarray:
    """CIE 1976 L*a*b* (white D65) of 8-bit sRGB, (..., 3)."""
    encoded = srgb / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    xyz = linear @ to_xyz.T / to_xyz.sum(axis=1)
    root = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = np.moveaxis(root, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)
