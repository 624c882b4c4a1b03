"""Renders a drawn room at an image size: the photograph and the exact targets of every task, from the same ray cast."""

import numpy as np

from sgw_jax.data_pipelines.rooms import materials, shading, targets
from sgw_jax.data_pipelines.rooms.layout import Scene
from sgw_jax.data_pipelines.rooms.raycast import Rays, Solids, cast, surface_points
from sgw_jax.data_pipelines.rooms.shading import look_up

IGNORE = 255
BUILT_IN = ("wall", "floor", "ceiling", "window", "door")


def render(
    scene: Scene, size: tuple[int, int], classes: tuple[str, ...], random: np.random.Generator
) -> dict[str, np.ndarray]:
    """Every field of the record, before its compact types: edges and saliency are bool, depth and normals exact.

    `random` draws only what the sensor adds (noise, holes). A surface whose name is not in `classes` is ignored.
    """
    camera = scene.camera
    rays = Rays.through(size, camera.field_of_view)
    room, solids = (s.seen_from(camera.position, camera.orientation) for s in (scene.room, scene.solids))
    depth, surface = cast(room, solids, rays)
    points = np.stack([(rays.x * depth).ravel(), (rays.y[:, None] * depth).ravel(), depth.ravel()])
    flat = surface.ravel()
    local, normals = surface_points(room, solids, points, flat)
    facing = -(points * normals).sum(axis=0) / np.sqrt((points * points).sum(axis=0))
    radiance, highlights = _shade(scene, room, solids, rays, points, local, normals, facing, flat)
    image = shading.photograph(radiance, rays, scene.exposure, random)

    instance, planes = scene.instance[surface], normals.reshape(3, *size)
    glass = look_up(scene.palette, surface, "glass") > 0
    holes = targets.sensor_holes(depth, facing.reshape(size), glass, highlights.reshape(size), random)
    label = np.array([classes.index(name) if name in classes else IGNORE for name in scene.names], np.uint8)
    figures = scene.part[surface].astype(np.uint8)
    return {
        "image": image,
        "semseg": label[surface],
        "depth": np.where(holes, np.float32(0), depth),
        "normals": np.moveaxis(np.where(facing.reshape(size) > 0, planes, 0), 0, 2),
        "edges": targets.edges(instance, depth, planes, rays),
        "saliency": targets.attended(instance, image, _appeal(scene)),
        "human_parts": figures if figures.any() else np.full(size, IGNORE, np.uint8),
    }


def _shade(scene: Scene, room: Solids, solids: Solids, rays: Rays, points, local, normals, facing, surface):
    """Radiance (3, n) and highlights (n,) of the cast points, lit by the scene's lights."""
    camera = scene.camera
    footprint = points[2] / np.float32(rays.focal) / np.maximum(facing, 0.2)
    colour = materials.albedo(scene.palette, local, surface, footprint)
    lights = [shading.Light(np.einsum("ij,j->i", camera.orientation, p - camera.position), c) for p, c in scene.lights]
    inside = points - room.centre[0].astype(np.float32)[:, None]
    in_room = np.stack([sum(np.float32(room.rotation[0, i, j]) * inside[j] for j in range(3)) for i in range(3)])
    ambient = scene.ambient.astype(np.float32)[:, None] * shading.corner_dimming(in_room, room.size[0])
    casters = Solids(*(getattr(solids, name)[scene.casts] for name in ("kind", "centre", "rotation", "size")))
    gloss, glow = (look_up(scene.palette, surface, name) for name in ("gloss", "glow"))
    return shading.shade(points, normals, colour, gloss, glow, lights, casters, ambient)


def _appeal(scene: Scene) -> np.ndarray:
    """Per instance: how strongly it draws the eye (3 a person, 1 an object, 0 the room and what is built into it)."""
    appeal = np.zeros(int(scene.instance.max()) + 1)
    for name, instance in zip(scene.names, scene.instance.tolist(), strict=True):
        appeal[instance] = 3.0 if name == "person" else 0.0 if name in BUILT_IN else 1.0
    return appeal
