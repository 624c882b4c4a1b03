"""Where a ray is inside a convex solid, and which way the solid's surface faces: closed forms in vectorised NumPy.

A solid has local coordinates with its centre at the origin, and three sizes in metres: the half edges of a BOX; the
semi-axes of an ELLIPSOID; bottom radius, top radius and half height of a FRUSTUM about z (equal radii: a cylinder; one
radius 0: a cone); radius, radius and half the axis' length of a CAPSULE about z. Every solid is convex, so a ray is
inside it for one interval (enter, leave) of its parameter; a miss is an empty interval, enter > leave. Everything is
elementwise: no BLAS, hence no dependence on threads.
"""

from collections.abc import Callable

import numpy as np

BOX, ELLIPSOID, FRUSTUM, CAPSULE = KINDS = range(4)

Components = tuple[np.ndarray, np.ndarray, np.ndarray]
Interval = tuple[np.ndarray, np.ndarray]


def _overlap(first: Interval, second: Interval) -> Interval:
    return np.fmax(first[0], second[0]), np.fmin(first[1], second[1])


def slab(half, origin: np.ndarray, direction: np.ndarray) -> Interval:
    """Inside where one coordinate is within +-half."""
    inverse = 1 / direction  # 0 gives infinite bounds of the right signs; fmin and fmax pass over 0 * inf = NaN
    one, other = (-half - origin) * inverse, (half - origin) * inverse
    return np.fmin(one, other), np.fmax(one, other)


def _box(size, origin: Components, direction: Components) -> Interval:
    slabs = [slab(*axis) for axis in zip(size, origin, direction, strict=True)]
    return _overlap(_overlap(slabs[0], slabs[1]), slabs[2])


def _ellipsoid(size, origin: Components, direction: Components) -> Interval:
    (ox, oy, oz), (dx, dy, dz) = ([v / s for v, s in zip(vector, size, strict=True)] for vector in (origin, direction))
    squared = dx * dx + dy * dy + dz * dz
    closest = -(ox * dx + oy * dy + oz * dz) / squared
    px, py, pz = ox + closest * dx, oy + closest * dy, oz + closest * dz
    chord = (1 - (px * px + py * py + pz * pz)) / squared
    half = np.sqrt(np.maximum(chord, 0))
    return np.where(chord >= 0, closest - half, np.inf), np.where(chord >= 0, closest + half, -np.inf)


def _frustum(size, origin: Components, direction: Components) -> Interval:
    """Inside where x^2 + y^2 <= radius(z)^2 and |z| <= half, the radius linear in z: a quadratic in the parameter."""
    (bottom, top, half), (ox, oy, oz), (dx, dy, dz) = size, origin, direction
    slope = (top - bottom) / (2 * half)
    radius, growth = (top + bottom) / 2 + slope * oz, slope * dz
    a = dx * dx + dy * dy - growth * growth
    b = ox * dx + oy * dy - radius * growth
    c = ox * ox + oy * oy - radius * radius
    a = np.where(np.abs(a) < 1e-12, np.float32(1e-12), a)
    discriminant = b * b - a * c
    root = np.sqrt(np.maximum(discriminant, 0)) / np.abs(a)
    middle = -b / a
    enter, leave = middle - root, middle + root
    if np.any(slope):
        # a < 0: steeper than the cone's side, so inside BEYOND the roots, in the nappe towards which the radius grows.
        steep, widening = a < 0, growth > 0
        enter, leave = (
            np.where(steep, np.where(widening, leave, -np.inf), enter),
            np.where(steep, np.where(widening, np.inf, enter), leave),
        )
    enter, leave = _overlap((enter, leave), slab(half, oz, dz))
    met = (discriminant >= 0) | (a < 0)  # a steep ray meets both nappes: below 0 is rounding, of a ray through the apex
    return np.where(met, enter, np.inf), np.where(met, leave, -np.inf)


def _capsule(size, origin: Components, direction: Components) -> Interval:
    """The union of a cylinder and its two end balls; convex, so the hull of the three intervals."""
    radius, _, half = size
    ball = (radius, radius, radius)
    enter, leave = _frustum((radius, radius, half), origin, direction)
    empty = enter > leave
    enter, leave = np.where(empty, np.inf, enter), np.where(empty, -np.inf, leave)
    for end in (-half, half):
        ball_enter, ball_leave = _ellipsoid(ball, (origin[0], origin[1], origin[2] - end), direction)
        enter, leave = np.minimum(enter, ball_enter), np.maximum(leave, ball_leave)
    return enter, leave


_INSIDE: dict[int, Callable[..., Interval]] = {BOX: _box, ELLIPSOID: _ellipsoid, FRUSTUM: _frustum, CAPSULE: _capsule}


def crossing(kind: int, size, origin, direction) -> Interval:
    """(enter, leave) of rays origin + t direction in solids of one kind, in local coordinates; enter > leave: a miss.

    `size`, `origin` and `direction` are triples of arrays (or scalars) that broadcast. The rays first move to their
    points closest to the solid's centre: float32 then resolves the solid, not its distance from the camera.
    """
    (ox, oy, oz), (dx, dy, dz) = origin, direction
    shift = -(ox * dx + oy * dy + oz * dz) / (dx * dx + dy * dy + dz * dz)
    enter, leave = _INSIDE[kind](size, (ox + shift * dx, oy + shift * dy, oz + shift * dz), direction)
    return enter + shift, leave + shift


def _unit(vector: np.ndarray) -> np.ndarray:
    length = np.sqrt(vector[0] * vector[0] + vector[1] * vector[1] + vector[2] * vector[2])
    return vector / np.maximum(length, np.float32(1e-12))


def _box_normal(size: np.ndarray, point: np.ndarray) -> np.ndarray:
    outside = np.abs(point) - size
    face = outside.argmax(axis=0)
    return np.where(np.arange(3)[:, None] == face, np.sign(point), 0)


def _frustum_normal(size: np.ndarray, point: np.ndarray) -> np.ndarray:
    (bottom, top, half), (x, y, z) = size, point
    slope = (top - bottom) / (2 * half)
    along = np.hypot(x, y)
    on_cap = half - np.abs(z) < ((bottom + top) / 2 + slope * z) - along
    side = _unit(np.stack([x, y, -slope * along]))
    cap = np.stack([np.zeros_like(z), np.zeros_like(z), np.sign(z)])
    return np.where(on_cap, cap, side)


def _capsule_normal(size: np.ndarray, point: np.ndarray) -> np.ndarray:
    x, y, z = point
    return _unit(np.stack([x, y, z - np.clip(z, -size[2], size[2])]))


_NORMAL: dict[int, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    BOX: _box_normal,
    ELLIPSOID: lambda size, point: _unit(point / (size * size)),
    FRUSTUM: _frustum_normal,
    CAPSULE: _capsule_normal,
}


def outward_normal(kind: int, size: np.ndarray, point: np.ndarray) -> np.ndarray:
    """Outward unit normals (3, n) at points (3, n) on solids of one kind; size (3, n). All in local coordinates."""
    return _NORMAL[kind](size, point)
