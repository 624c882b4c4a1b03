"""Ray casting a room of convex solids: what each pixel sees, how far away and facing where, and what is in shadow.

Rays leave the origin of the camera frame (x right, y down, z forward) with direction (x, y, 1), so that the parameter
of a hit IS its z-depth.
"""

import dataclasses

import numpy as np

from sgw_jax.data_pipelines.rooms.intersection import (
    BOX,
    CAPSULE,
    FRUSTUM,
    KINDS,
    Components,
    crossing,
    outward_normal,
    slab,
)

ROOM_FACES = 6  # surfaces 0..5 are the room's faces: low x, high x, low y, high y, floor, ceiling; solid i is 6 + i
NEAR = 0.05  # metres: nothing nearer than this along the axis is seen
SHADOW_BLOCK = 4096  # points tested at a time: the (solids, points) culling table then stays in the cache


@dataclasses.dataclass(frozen=True)
class Solids:
    """n solids in one frame: a point p of that frame has the local coordinates rotation[i] @ (p - centre[i]).

    kind (n,) int and size (n, 3) metres are as in `intersection`; centre (n, 3) metres; rotation (n, 3, 3).
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


@dataclasses.dataclass(frozen=True)
class Rays:
    """One ray (x[j], y[i], 1) through the centre of each pixel (i, j); float32; focal in pixels."""

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
        origins, sizes = solids.origins().astype(np.float32), solids.size.astype(np.float32)
        kinds = solids.kind.tolist()
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
    leaves = [
        slab(*axis)[1]
        for axis in zip(room.size[0].astype(np.float32), room.origins()[0].astype(np.float32), direction, strict=True)
    ]
    depth = np.fmin(np.fmin(leaves[0], leaves[1]), leaves[2])
    axis = np.where(leaves[2] == depth, 2, np.where(leaves[1] == depth, 1, 0))
    high = np.choose(axis, [d > 0 for d in direction])
    return depth, (2 * axis + high).astype(np.int32)


def surface_points(
    room: Solids, solids: Solids, points: np.ndarray, surface: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Local coordinates (3, n) of camera-frame `points` (3, n) on their surfaces, and the camera-frame unit normals."""
    faces = np.zeros(ROOM_FACES, int)
    rotation = np.concatenate([room.rotation[faces], solids.rotation]).astype(np.float32)
    centre = np.concatenate([room.centre[faces], solids.centre]).astype(np.float32)
    size = np.concatenate([room.size[faces], solids.size]).astype(np.float32)
    kind = np.concatenate([faces + BOX, solids.kind])[surface]
    offset = [points[i] - centre[surface, i] for i in range(3)]
    turn = [[rotation[surface, i, j] for j in range(3)] for i in range(3)]
    local = np.stack([sum(turn[i][j] * offset[j] for j in range(3)) for i in range(3)])
    normal = np.empty_like(local)
    for each in KINDS:
        chosen = np.flatnonzero(kind == each)
        if len(chosen):
            normal[:, chosen] = outward_normal(each, size[surface[chosen]].T, local[:, chosen])
    normal[:, surface < ROOM_FACES] *= -1  # the room is seen from inside
    return local, np.stack([sum(turn[j][i] * normal[j] for j in range(3)) for i in range(3)])


def shadowed(solids: Solids, points: np.ndarray, light: np.ndarray) -> np.ndarray:
    """(n,) bool: whether a solid stands between each of `points` (3, n) and the point `light` (3,), all in one frame.

    The points should be lifted off their own surface by a few millimetres.
    """
    result = np.zeros(points.shape[1], bool)
    with np.errstate(divide="ignore", invalid="ignore"):
        for start in range(0, points.shape[1], SHADOW_BLOCK):
            block = slice(start, start + SHADOW_BLOCK)
            result[block] = _block_shadowed(solids, points[:, block], light.astype(np.float32))
    return result


def _block_shadowed(solids: Solids, points: np.ndarray, light: np.ndarray) -> np.ndarray:
    shaded = np.zeros(points.shape[1], bool)
    centre, sizes = solids.centre.T.astype(np.float32), solids.size.T.astype(np.float32)
    rotation = np.ascontiguousarray(np.moveaxis(solids.rotation, 0, 2), np.float32)
    lamp = (rotation * (light[:, None] - centre)).sum(axis=1)  # the light in every solid's local coordinates
    which, point = np.nonzero(_may_shade(solids, points, light))
    kinds = solids.kind[which]
    for kind in KINDS:
        chosen = np.flatnonzero(kinds == kind)
        if not len(chosen):
            continue
        solid, seen = which[chosen], point[chosen]
        offset = [points[i, seen] - centre[i, solid] for i in range(3)]
        turn = [[rotation[i, j, solid] for j in range(3)] for i in range(3)]
        start = [turn[i][0] * offset[0] + turn[i][1] * offset[1] + turn[i][2] * offset[2] for i in range(3)]
        ray = [lamp[i, solid] - start[i] for i in range(3)]
        enter, leave = crossing(kind, sizes[:, solid], start, ray)
        shaded[seen[(enter <= leave) & (leave > 0) & (enter < 1)]] = True
    return shaded


def _may_shade(solids: Solids, points: np.ndarray, light: np.ndarray) -> np.ndarray:
    """(solids, points) bool: whether a solid's bounding ball meets the segment from the light to a point."""
    towards = points - light[:, None]
    distance = np.sqrt(towards[0] ** 2 + towards[1] ** 2 + towards[2] ** 2)
    unit = towards / distance
    extents = solids.half_extents()
    radius = np.sqrt((extents * extents).sum(axis=1)).astype(np.float32)[:, None]
    offset = solids.centre.astype(np.float32) - light
    along = offset[:, 0, None] * unit[0]
    along += offset[:, 1, None] * unit[1]
    along += offset[:, 2, None] * unit[2]
    result = along < distance + radius
    result &= along > -radius
    along *= along
    result &= along > (offset * offset).sum(axis=1)[:, None] - radius * radius
    return result
