"""Analytic ray casting of convex solids in vectorised NumPy: what each pixel sees, how far away, facing where, and what shades it.

Rays leave the origin of the camera frame (x right, y down, z forward) with direction (x, y, 1), so that the ray
parameter of a hit IS its z-depth. Every solid is convex, so a ray is inside it for one interval (enter, leave) of its
parameter; a miss is the empty interval (+inf, -inf). Everything is elementwise: no BLAS, hence no dependence on threads.
"""

import dataclasses
from collections.abc import Callable

import numpy as np

BOX, ELLIPSOID, FRUSTUM, CAPSULE = range(4)
ROOM_FACES = 6  # surfaces 0..5 are the room's faces (low x, high x, low y, high y, floor, ceiling); solid i is surface 6 + i
NEAR = 0.05  # metres: nothing nearer than this along the axis is seen

Components = tuple[np.ndarray, np.ndarray, np.ndarray]
Interval = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Solids:
    """n solids in one frame: a point p of that frame has the local coordinates rotation[i] @ (p - centre[i]).

    kind (n,) int: BOX, ELLIPSOID, FRUSTUM or CAPSULE. centre (n, 3) metres. rotation (n, 3, 3). size (n, 3) metres:
    half edges of a box; semi-axes of an ellipsoid; (bottom radius, top radius, half height) of a frustum about local z
    (equal radii: a cylinder; one radius 0: a cone); (radius, radius, half length of the axis) of a capsule about local z.
    """

    kind: np.ndarray
    centre: np.ndarray
    rotation: np.ndarray
    size: np.ndarray

    def seen_from(self, position: np.ndarray, orientation: np.ndarray) -> "Solids":
        """The same solids in the frame whose coordinates are orientation @ (p - position)."""
        centre = np.einsum("ij,nj->ni", orientation, self.centre - position)
        return Solids(self.kind, centre, np.einsum("nij,kj->nik", self.rotation, orientation), self.size)

    def half_extents(self) -> np.ndarray:
        """(n, 3) half edges of each solid's bounding box in its local frame."""
        extents = self.size.copy()
        frustum, capsule = self.kind == FRUSTUM, self.kind == CAPSULE
        extents[frustum, :2] = self.size[frustum, :2].max(axis=1, keepdims=True)
        extents[capsule, 2] += self.size[capsule, 0]
        return extents

    def origins(self) -> np.ndarray:
        """(n, 3) the frame's origin in each solid's local coordinates."""
        return -np.einsum("nij,nj->ni", self.rotation, self.centre)


def _overlap(first: Interval, second: Interval) -> Interval:
    return np.fmax(first[0], second[0]), np.fmin(first[1], second[1])


def _slab(half, origin: np.ndarray, direction: np.ndarray) -> Interval:
    inverse = 1 / direction  # 0 gives an infinite bound of the right sign, and 0 * inf = NaN is passed over by fmin and fmax
    one, other = (-half - origin) * inverse, (half - origin) * inverse
    return np.fmin(one, other), np.fmax(one, other)


def _box(size, origin: Components, direction: Components) -> Interval:
    slabs = [_slab(*axis) for axis in zip(size, origin, direction, strict=True)]
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
    """Inside where x^2 + y^2 <= radius(z)^2 and |z| <= half, with radius linear in z: a quadratic in the ray parameter."""
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
    enter, leave = _overlap((enter, leave), _slab(half, oz, dz))
    return np.where(discriminant >= 0, enter, np.inf), np.where(discriminant >= 0, leave, -np.inf)


def _capsule(size, origin: Components, direction: Components) -> Interval:
    """The hull of two balls: the union of a cylinder and its two end balls, whose intervals overlap wherever they meet."""
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
    """(enter, leave) of the rays origin + t direction in solids of one kind, all in local coordinates; a miss has enter > leave.

    `size`, `origin` and `direction` are triples of arrays (or scalars) that broadcast. The rays are first moved to their
    points closest to the solid's centre: float32 then resolves the solid, not its distance from the camera.
    """
    (ox, oy, oz), (dx, dy, dz) = origin, direction
    shift = -(ox * dx + oy * dy + oz * dz) / (dx * dx + dy * dy + dz * dz)
    enter, leave = _INSIDE[kind](size, (ox + shift * dx, oy + shift * dy, oz + shift * dz), direction)
    return enter + shift, leave + shift


@dataclasses.dataclass(frozen=True)
class Rays:
    """One ray (x[j], y[i], 1) through the centre of each pixel (i, j); x (width,), y (height,) float32; focal in pixels."""

    x: np.ndarray
    y: np.ndarray
    focal: float

    @classmethod
    def through(cls, size: tuple[int, int], field_of_view: float) -> "Rays":
        """`field_of_view` in radians spans the longer side of an image of `size` (height, width)."""
        height, width = size
        focal = max(size) / (2 * np.tan(field_of_view / 2))
        x, y = ((np.arange(n) + 0.5 - n / 2) / focal for n in (width, height))
        return cls(x.astype(np.float32), y.astype(np.float32), float(focal))

    def turned(self, rotation: np.ndarray, rows: slice, columns: slice) -> Components:
        """The directions of a rectangle of pixels in a local frame."""
        x, y = self.x[None, columns], self.y[rows, None]
        row = rotation.astype(np.float32)
        return (
            (row[0, 0] * x + row[0, 2]) + row[0, 1] * y,
            (row[1, 0] * x + row[1, 2]) + row[1, 1] * y,
            (row[2, 0] * x + row[2, 2]) + row[2, 1] * y,
        )


def _pixel_rectangles(solids: Solids, rays: Rays) -> list[tuple[slice, slice] | None]:
    """For each solid the pixels that its bounding box can cover; None where it cannot be seen at all."""
    signs = np.array([(i, j, k) for i in (-1, 1) for j in (-1, 1) for k in (-1, 1)], np.float64)
    offsets = signs[None] * solids.half_extents()[:, None]
    corners = solids.centre[:, None] + np.einsum("nij,nci->ncj", solids.rotation, offsets)
    front, behind = corners[..., 2].max(axis=1) > NEAR, corners[..., 2].min(axis=1) <= NEAR
    z = np.maximum(corners[..., 2], NEAR)
    rectangles = []
    limits = []
    for axis, grid in ((1, rays.y), (0, rays.x)):
        pixels = corners[..., axis] / z * rays.focal + len(grid) / 2
        low = np.where(behind, 0, np.clip(np.floor(pixels.min(axis=1)) - 1, 0, len(grid)))
        high = np.where(behind, len(grid), np.clip(np.ceil(pixels.max(axis=1)) + 1, 0, len(grid)))
        limits.append((low.astype(int).tolist(), high.astype(int).tolist()))
    (top, bottom), (left, right) = limits
    for i, seen in enumerate(front.tolist()):
        visible = seen and top[i] < bottom[i] and left[i] < right[i]
        rectangles.append((slice(top[i], bottom[i]), slice(left[i], right[i])) if visible else None)
    return rectangles


def cast(room: Solids, solids: Solids, rays: Rays) -> tuple[np.ndarray, np.ndarray]:
    """The first surface along each pixel's ray: z-depth in metres (H, W) float32 and surface index (H, W) int32.

    `room` is one box, seen from inside; both in the camera frame.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        depth, surface = _cast_room(room, rays)
        origins, sizes, kinds = solids.origins().astype(np.float32), solids.size.astype(np.float32), solids.kind.tolist()
        for i, rectangle in enumerate(_pixel_rectangles(solids, rays)):
            if rectangle is None:
                continue
            enter, leave = crossing(kinds[i], sizes[i], origins[i], rays.turned(solids.rotation[i], *rectangle))
            nearest = depth[rectangle]
            first = (enter <= leave) & (enter < nearest) & (enter > NEAR)
            np.copyto(nearest, enter, where=first)
            np.copyto(surface[rectangle], np.int32(ROOM_FACES + i), where=first)
    return depth, surface


def _cast_room(room: Solids, rays: Rays) -> tuple[np.ndarray, np.ndarray]:
    everything = slice(None)
    direction = rays.turned(room.rotation[0], everything, everything)
    leaves = [_slab(*axis)[1] for axis in zip(room.size[0].astype(np.float32), room.origins()[0].astype(np.float32), direction, strict=True)]
    depth = np.fmin(np.fmin(leaves[0], leaves[1]), leaves[2])
    axis = np.where(leaves[2] == depth, 2, np.where(leaves[1] == depth, 1, 0))
    high = np.choose(axis, [d > 0 for d in direction])
    return depth, (2 * axis + high).astype(np.int32)


def surface_points(room: Solids, solids: Solids, points: np.ndarray, surface: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Local coordinates (3, n) of camera-frame `points` (3, n) on their surfaces, and the outward unit normals (3, n) there."""
    faces = np.zeros(ROOM_FACES, int)
    rotation = np.concatenate([room.rotation[faces], solids.rotation]).astype(np.float32)
    centre = np.concatenate([room.centre[faces], solids.centre]).astype(np.float32)
    size = np.concatenate([room.size[faces], solids.size]).astype(np.float32)
    kind = np.concatenate([faces + BOX, solids.kind])[surface]
    offset = [points[i] - centre[surface, i] for i in range(3)]
    turn = [[rotation[surface, i, j] for j in range(3)] for i in range(3)]
    local = np.stack([sum(turn[i][j] * offset[j] for j in range(3)) for i in range(3)])
    normal = np.empty_like(local)
    for each, function in _NORMALS.items():
        chosen = np.flatnonzero(kind == each)
        if len(chosen):
            normal[:, chosen] = function(size[surface[chosen]].T, local[:, chosen])
    normal[:, surface < ROOM_FACES] *= -1  # the room is seen from inside
    return local, np.stack([sum(turn[j][i] * normal[j] for j in range(3)) for i in range(3)])


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


_NORMALS: dict[int, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    BOX: _box_normal,
    ELLIPSOID: lambda size, point: _unit(point / (size * size)),
    FRUSTUM: _frustum_normal,
    CAPSULE: _capsule_normal,
}

_SHADOW_BLOCK = 8192  # points tested at a time: bounds the memory of the (solids, points) culling table


def shadowed(solids: Solids, points: np.ndarray, light: np.ndarray) -> np.ndarray:
    """(n,) bool: whether a solid stands between each of `points` (3, n) and the point `light` (3,), all in one frame.

    The points should be lifted off their own surface by a few millimetres.
    """
    result = np.zeros(points.shape[1], bool)
    with np.errstate(divide="ignore", invalid="ignore"):
        for start in range(0, points.shape[1], _SHADOW_BLOCK):
            block = slice(start, start + _SHADOW_BLOCK)
            result[block] = _block_shadowed(solids, points[:, block], light.astype(np.float32))
    return result


def _block_shadowed(solids: Solids, points: np.ndarray, light: np.ndarray) -> np.ndarray:
    shaded = np.zeros(points.shape[1], bool)
    extents = solids.half_extents()
    radius = np.sqrt((extents * extents).sum(axis=1)).astype(np.float32)
    towards = points - light[:, None]
    distance = np.sqrt(towards[0] ** 2 + towards[1] ** 2 + towards[2] ** 2)
    unit = towards / distance
    offset = solids.centre.astype(np.float32) - light
    # A bounding ball can shade a point only if it meets the segment from the light to the point.
    along = offset[:, 0, None] * unit[0] + offset[:, 1, None] * unit[1] + offset[:, 2, None] * unit[2]
    beside = (offset * offset).sum(axis=1)[:, None] - along * along
    near = (beside < (radius * radius)[:, None]) & (along > -radius[:, None]) & (along < distance + radius[:, None])
    kinds = solids.kind
    rotation, sizes, origin = solids.rotation.astype(np.float32), solids.size.astype(np.float32), solids.centre.astype(np.float32)
    for kind in _INSIDE:
        members = np.flatnonzero(kinds == kind)
        which, point = np.nonzero(near[members])
        if not len(which):
            continue
        solid = members[which]
        start = [points[i, point] - origin[solid, i] for i in range(3)]
        ray = [-towards[i, point] for i in range(3)]
        turn = rotation[solid]
        local = [[sum(turn[:, i, j] * vector[j] for j in range(3)) for i in range(3)] for vector in (start, ray)]
        enter, leave = crossing(kind, sizes[solid].T, *local)
        shaded[point[(enter <= leave) & (leave > 0) & (enter < 1)]] = True
    return shaded
