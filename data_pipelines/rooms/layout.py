"""Draws one furnished room: its size, the camera, what stands where without overlapping, and the lights."""

import dataclasses
import math

import numpy as np

from sgw_jax.data_pipelines.rooms import fixtures, furniture, materials
from sgw_jax.data_pipelines.rooms.figure import person
from sgw_jax.data_pipelines.rooms.floor_plan import FloorPlan, Placed
from sgw_jax.data_pipelines.rooms.intersection import BOX
from sgw_jax.data_pipelines.rooms.raycast import ROOM_FACES, Solids

FACE_NAMES = ("wall", "wall", "wall", "wall", "floor", "ceiling")


@dataclasses.dataclass(frozen=True)
class Camera:
    """position (3,) metres in the room's frame (z up); orientation (3, 3): camera = orientation @ (room - position)."""

    position: np.ndarray
    orientation: np.ndarray
    field_of_view: float  # radians, along the longer image side


@dataclasses.dataclass(frozen=True)
class Scene:
    """One furnished room in its own frame: x in [0, length], y in [0, width], z in [0, height], metres.

    room: one box. solids: everything in it. Per surface (the room's six faces, then the solids): names, the class name;
    instance (surfaces,) int, the object it belongs to (faces 0..5, then objects); part (surfaces,) int, body part or 0;
    palette, its material. casts (solids,) bool: throws a shadow. lights: (position, linear RGB) pairs.
    """

    room: Solids
    solids: Solids
    names: list[str]
    instance: np.ndarray
    part: np.ndarray
    palette: list[materials.Material]
    casts: np.ndarray
    camera: Camera
    lights: list[tuple[np.ndarray, np.ndarray]]
    ambient: np.ndarray
    exposure: float


def _furnish_walls(room: FloorPlan) -> None:
    """Doors, windows and pictures, side by side."""
    if room.chance(0.55):
        room.lean(fixtures.door(room.random))
    for _ in range(1 + room.chance(0.4)):
        if room.chance(0.8):
            room.lean(fixtures.window(room.random), z=room.between(1.35, 1.55))
    for _ in range(int(room.between(0, 3))):
        room.lean(fixtures.picture(room.random), z=room.between(1.4, 1.7))
    room.taken.clear()  # furniture may stand in front of them


def _dine(room: FloorPlan, people: int) -> int:
    """A table with chairs tucked in around it, on which people may sit; returns how many still have no place."""
    group = room.stand(furniture.table(room.random), clear=0.8, margin=0.0)
    if group is None:
        return people
    half = group.piece.half
    sides = [(0.0, -1.0, 0.0), (0.0, 1.0, math.pi), (-1.0, 0.0, -math.pi / 2), (1.0, 0.0, math.pi / 2)]
    room.random.shuffle(sides)
    style = int(room.random.integers(2**32))
    for right, forward, turn in sides[: 1 + int(room.between(0, 4))]:
        seat = furniture.chair(np.random.Generator(np.random.Philox(style)))  # the same draws: one set of chairs
        reach = (half[1] if forward else half[0]) + seat.half[1] + room.between(-0.12, 0.25)
        x, y = group.at(right * reach, forward * reach)
        inside = 0.3 < x < room.size[0] - 0.3 and 0.3 < y < room.size[1] - 0.3
        clear = math.hypot(x - room.eye[0], y - room.eye[1]) > 0.95
        apart = not any(
            abs(x - u) < c + 0.2 and abs(y - v) < d + 0.2 for u, v, c, d in room.taken if (u, v) != (group.x, group.y)
        )
        if inside and clear and apart:
            place = room.put(seat, x, y, group.yaw + turn + room.between(-0.2, 0.2), reserve=(0.3, 0.3))
            if people and room.chance(0.35):
                _sit(room, place)
                people -= 1
    _decorate(room, group)
    return people


def _sit(room: FloorPlan, place: Placed) -> None:
    """A figure on a chair or sofa, facing the way it faces."""
    seat = place.piece
    right = 0.0 if seat.name == "chair" else room.between(-0.5, 0.5) * max(seat.half[0] - 0.35, 0)
    x, y = place.at(right, 0.02 if seat.name == "chair" else 0.05)
    room.put(person(room.random, seat.seat), x, y, place.yaw + room.between(-0.15, 0.15))


def _decorate(room: FloorPlan, place: Placed) -> None:
    """A lamp or some clutter on top of a table or low cabinet."""
    if not 0.3 < place.piece.height < 1.2:
        return
    for side in (-0.5, 0.5):
        if room.chance(0.45):
            lamp = room.chance(0.4)
            item = furniture.table_lamp(room.random) if lamp else furniture.clutter(room.random, small=True)
            x, y = place.at(side * place.piece.half[0], room.between(-0.2, 0.2) * place.piece.half[1])
            room.put(item, x, y, room.between(-3, 3), z=place.piece.height)


def _furnish(room: FloorPlan) -> None:
    """A theme (living room, bedroom, dining room) and then whatever fits."""
    random = room.random
    _furnish_walls(room)
    if room.chance(0.45):
        cover = fixtures.rug(random)
        x, y = room.between(0.35, 0.65) * room.size[0], room.between(0.45, 0.7) * room.size[1]
        room.put(cover, x, y, room.between(-0.2, 0.2))
    people = (1 if room.chance(0.55) else 0) + (1 if room.chance(0.15) else 0)
    theme = random.random()
    if theme < 0.42:
        room.lean(furniture.bed(random), tries=30)
    if theme > 0.30:
        place = room.lean(furniture.sofa(random), tries=24) if room.chance(0.7) else room.stand(furniture.sofa(random))
        if place and people and room.chance(0.35):
            _sit(room, place)
            people -= 1
    if theme > 0.62 or room.chance(0.4):
        people = _dine(room, people)
    for _ in range(people):
        room.stand(person(random), clear=1.1, margin=-0.15, tries=30)
    for _ in range(1 + int(room.between(0, 3))):
        place = room.lean(furniture.cabinet(random))
        if place:
            _decorate(room, place)
    if room.chance(0.5):
        place = room.stand(furniture.table(random, low=room.chance(0.6)))
        if place:
            _decorate(room, place)
    for _ in range(int(room.between(0, 3))):
        room.stand(furniture.chair(random))
    if room.chance(0.65):
        room.stand(furniture.floor_lamp(random), clear=1.2)
    if room.chance(0.5):
        x, y = room.between(0.3, 0.7) * room.size[0], room.between(0.4, 0.75) * room.size[1]
        room.put(furniture.pendant_lamp(random), x, y, 0.0, z=room.size[2])
    for _ in range(int(room.between(0, 4))):
        room.stand(furniture.clutter(random))


def _rotation_z(yaw: np.ndarray) -> np.ndarray:
    """(n, 3, 3) from an object's frame to the room's."""
    c, s, zero = np.cos(yaw), np.sin(yaw), np.zeros_like(yaw)
    return np.stack([np.stack([c, -s, zero], -1), np.stack([s, c, zero], -1), np.stack([zero, zero, zero + 1], -1)], -2)


def _assemble(placed: list[Placed]) -> tuple[Solids, np.ndarray]:
    """All solids in the room's frame, and the object each belongs to."""
    solids = [solid for place in placed for solid in place.piece.solids]
    owner = np.repeat(np.arange(len(placed)), [len(place.piece.solids) for place in placed])
    turn = _rotation_z(np.array([place.yaw for place in placed]))[owner]
    stood = np.array([(place.x, place.y, place.z) for place in placed])[owner]
    centre = stood + np.einsum("nij,nj->ni", turn, np.array([s.centre for s in solids]))
    rotation = np.einsum("nij,nkj->nik", np.array([s.turn for s in solids]).reshape(-1, 3, 3), turn)
    return Solids(np.array([s.kind for s in solids]), centre, rotation, np.array([s.size for s in solids])), owner


def _camera(room: FloorPlan) -> Camera:
    yaw, pitch = room.yaw, room.pitch
    forward = np.array([math.cos(pitch) * math.cos(yaw), math.cos(pitch) * math.sin(yaw), math.sin(pitch)])
    right = np.array([math.sin(yaw), -math.cos(yaw), 0.0])
    down = np.cross(forward, right)
    return Camera(np.array(room.eye), np.stack([right, down, forward]), room.field_of_view)


def _lights(room: FloorPlan) -> list[tuple[np.ndarray, np.ndarray]]:
    """A key light below the ceiling and, mostly, a second one: a lit lamp, or else a weak one anywhere."""

    def tinted(power: float) -> np.ndarray:
        warm = room.between(-0.18, 0.22)
        return power * np.array([1 + warm, 1.0, 1 - warm])

    bulbs = [np.array([p.x, p.y, p.z + p.piece.light]) for p in room.placed if p.piece.light]
    length, width, height = room.size
    key = np.array([room.between(0.2, 0.8) * length, room.between(0.15, 0.7) * width, height - 0.12])
    lights = [(key, tinted(room.between(3.0, 6.0)))]
    if bulbs:
        lights.append((bulbs[int(room.random.random() * len(bulbs))], tinted(room.between(0.6, 2.0))))
    elif room.chance(0.5):
        side = np.array([room.between(0.05, 0.95) * length, room.between(0.1, 0.95) * width, room.between(1.4, 2.2)])
        lights.append((side, tinted(room.between(0.6, 2.5))))
    return lights


def draw_scene(random: np.random.Generator) -> Scene:
    """A random furnished room. Nothing in it depends on the image size."""
    room = FloorPlan(random)
    _furnish(room)
    solids, owner = _assemble(room.placed)
    wall = materials.draw(random, 1.6, 0.45, 0.98, busy=0.5)
    walls = [wall if room.chance(0.85) else materials.draw(random, 1.6, 0.45, 0.98) for _ in range(4)]
    ceiling = materials.draw(random, 1.0, 0.7, 1.0, busy=0.15)
    faces = [*walls, materials.draw(random, 1.4, 0.2, 0.85, busy=0.8), ceiling]
    names = [place.piece.name for place in room.placed]
    owned = owner.tolist()
    half = np.array(room.size) / 2
    return Scene(
        room=Solids(np.array([BOX]), half[None], np.eye(3)[None], half[None]),
        solids=solids,
        names=[*FACE_NAMES, *(names[o] for o in owned)],
        instance=np.concatenate([np.arange(ROOM_FACES), ROOM_FACES + owner]),
        part=np.array([0] * ROOM_FACES + [s.part for place in room.placed for s in place.piece.solids]),
        palette=[*faces, *(s.material for place in room.placed for s in place.piece.solids)],
        casts=np.array([names[o] not in ("lamp", "window") for o in owned]),
        camera=_camera(room),
        lights=_lights(room),
        ambient=room.between(0.25, 0.5) * np.array([1.0, 1.0, room.between(0.9, 1.12)]),
        exposure=room.between(0.28, 0.5),
    )
