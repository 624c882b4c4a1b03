"""What furniture is built from: boxes, balls, cylinders, cones and limbs in an object's own frame (z up, metres)."""

import math
from typing import NamedTuple

from sgw_jax.data_pipelines.rooms.intersection import BOX, CAPSULE, ELLIPSOID, FRUSTUM
from sgw_jax.data_pipelines.rooms.materials import Material

Vector = tuple[float, float, float]
UPRIGHT = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0)


class Solid(NamedTuple):
    """One convex solid of an object. `turn` is the row-major rotation from the object's frame to the solid's own."""

    kind: int
    centre: Vector
    size: Vector
    material: Material
    turn: tuple[float, ...] = UPRIGHT
    part: int = 0


def box(x: tuple[float, float], y: tuple[float, float], z: tuple[float, float], material: Material) -> Solid:
    """An upright box by the ranges it fills."""
    centre = ((x[0] + x[1]) / 2, (y[0] + y[1]) / 2, (z[0] + z[1]) / 2)
    return Solid(BOX, centre, ((x[1] - x[0]) / 2, (y[1] - y[0]) / 2, (z[1] - z[0]) / 2), material)


def ball(centre: Vector, radii: Vector, material: Material, turn: tuple[float, ...] = UPRIGHT, part: int = 0) -> Solid:
    return Solid(ELLIPSOID, centre, radii, material, turn, part)


def cone(x: float, y: float, z: tuple[float, float], radii: tuple[float, float], material: Material) -> Solid:
    """An upright frustum: radius radii[0] at height z[0], radii[1] at z[1]. Equal radii make a cylinder."""
    return Solid(FRUSTUM, (x, y, (z[0] + z[1]) / 2), (radii[0], radii[1], (z[1] - z[0]) / 2), material)


def limb(start: Vector, end: Vector, radius: float, material: Material, part: int = 0) -> Solid:
    """A capsule whose axis runs from `start` to `end`."""
    dx, dy, dz = (b - a for a, b in zip(start, end, strict=True))
    length = math.sqrt(dx * dx + dy * dy + dz * dz)
    ax, ay, az = dx / length, dy / length, dz / length
    # Any frame whose third row is the axis will do: cross it with the world axis it leans on least.
    sx, sy, sz = (0.0, az, -ay) if abs(ax) < 0.7 else (-az, 0.0, ax)
    side = math.sqrt(sx * sx + sy * sy + sz * sz)
    sx, sy, sz = sx / side, sy / side, sz / side
    turn = (sx, sy, sz, ay * sz - az * sy, az * sx - ax * sz, ax * sy - ay * sx, ax, ay, az)
    centre = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2, (start[2] + end[2]) / 2)
    return Solid(CAPSULE, centre, (radius, radius, length / 2), material, turn, part)


def legs(x: float, y: float, height: float, thickness: float, round_: bool, material: Material) -> list[Solid]:
    """Four legs centred at (+-x, +-y)."""
    half = thickness / 2
    places = [(i * x, j * y) for i in (-1, 1) for j in (-1, 1)]
    if round_:
        return [cone(a, b, (0, height), (0.7 * half, half), material) for a, b in places]
    return [box((a - half, a + half), (b - half, b + half), (0, height), material) for a, b in places]
