"""From geometry to a photograph: lights with cast shadows, highlights, exposure, and a slightly imperfect sensor."""

import dataclasses

import numpy as np

from sgw_jax.data_pipelines.rooms import materials
from sgw_jax.data_pipelines.rooms.raycast import Rays, Solids, shadowed

LIFT = 0.004  # metres: points are lifted off their surface by this before shadow rays start


@dataclasses.dataclass(frozen=True)
class Light:
    """A point light in the camera frame: position (3,) metres, colour (3,) linear RGB radiance at one metre."""

    position: np.ndarray
    colour: np.ndarray


def _unit(vector: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    length = np.sqrt(vector[0] * vector[0] + vector[1] * vector[1] + vector[2] * vector[2])
    return vector / length, length


def shade(
    points: np.ndarray,
    normals: np.ndarray,
    colour: np.ndarray,
    gloss: np.ndarray,
    glow: np.ndarray,
    lights: list[Light],
    casters: Solids,
    ambient: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Radiance (3, n) and the highlight's share of it (n,), by the Blinn-Phong model with inverse-square-like falloff.

    points, normals, colour (3, n), camera frame; gloss, glow (n,); ambient (3, n) linear RGB; `casters` throw shadows.
    """
    view, _ = _unit(-points)
    radiance = colour * (ambient + glow)
    highlights = np.zeros(points.shape[1], np.float32)
    lifted = points + np.float32(LIFT) * normals
    for light in lights:
        towards, distance = _unit(light.position.astype(np.float32)[:, None] - points)
        facing = (normals * towards).sum(axis=0)
        lit = np.flatnonzero(facing > 0)
        lit = lit[~shadowed(casters, np.ascontiguousarray(lifted[:, lit]), light.position)]
        reach = light.colour.astype(np.float32)[:, None] / (0.6 + distance[lit] ** 2)
        halfway, _ = _unit(towards[:, lit] + view[:, lit])
        aligned = np.maximum((halfway * normals[:, lit]).sum(axis=0), 0)
        highlight = gloss[lit] * aligned**32
        radiance[:, lit] += reach * (colour[:, lit] * facing[lit] + 0.6 * highlight)
        highlights[lit] += highlight
    return radiance, highlights


def corner_dimming(points_in_room: np.ndarray, half: np.ndarray) -> np.ndarray:
    """(n,) the share of ambient light that reaches points (3, n), given from the room's centre: less in corners."""
    dim = np.ones(points_in_room.shape[1], np.float32)
    for axis in range(3):
        gap = np.float32(half[axis]) - np.abs(points_in_room[axis])
        dim *= 1 - 0.3 * np.exp(-gap / np.float32(0.35))
    return dim / np.float32(0.7)  # most visible points lie on one face themselves


def _blur(image: np.ndarray, strength: float) -> np.ndarray:
    """A (s, 1 - 2 s, s) kernel along rows, then columns, edges repeated."""
    for axis in (0, 1):
        padded = np.pad(image, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode="edge")
        size = image.shape[axis]
        before, after = (np.take(padded, np.arange(start, start + size), axis=axis) for start in (0, 2))
        image = (1 - 2 * strength) * image + strength * (before + after)
    return image


def photograph(radiance: np.ndarray, rays: Rays, exposure: float, random: np.random.Generator) -> np.ndarray:
    """uint8 (H, W, 3): exposed to a mean level, tone-mapped, vignetted, lightly blurred, with shot and read noise."""
    height, width = len(rays.y), len(rays.x)
    image = radiance.T.reshape(height, width, 3)
    image = image * np.float32(exposure / max(float(np.mean(image)), 1e-6))
    image = _blur(image, 0.08)
    vignette = 1 - 0.18 * (rays.y[:, None] ** 2 + rays.x**2)
    image = image * np.maximum(vignette, 0.2)[..., None]
    image = image * (1 + image / 4) / (1 + image)  # rolls highlights off instead of clipping them
    image = np.clip(image, 0, 1) ** np.float32(1 / 2.2)
    noise = random.standard_normal(image.shape, dtype=np.float32) * (0.008 + 0.012 * (1 - image))
    return np.round(255 * np.clip(image + noise, 0, 1)).astype(np.uint8)


def look_up(palette: list[materials.Material], surface: np.ndarray, name: str) -> np.ndarray:
    """One scalar property of every surface's material, gathered per pixel as float32."""
    return np.array([getattr(m, name) for m in palette], np.float32)[surface]
