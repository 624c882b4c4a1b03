"""The embedded data set: purity, the cache, the contract, and exactness against independent float64 geometry."""

import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sgw_jax.data_pipelines.rooms import cache, targets
from sgw_jax.data_pipelines.rooms.intersection import BOX, CAPSULE, ELLIPSOID, FRUSTUM, crossing
from sgw_jax.data_pipelines.rooms.raycast import ROOM_FACES, Rays, Solids, cast, shadowed, surface_points
from sgw_jax.data_pipelines.scenes import PART_CLASSES, SEMSEG_CLASSES, SPLITS, Scenes, render_scene

SIZE = (24, 32)
ROOT = Path(__file__).resolve().parents[1]
PERSON = SEMSEG_CLASSES.index("person")


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    return list(one) == list(other) and all(
        one[k].dtype == other[k].dtype and one[k].shape == other[k].shape and one[k].tobytes() == other[k].tobytes()
        for k in one
    )


@pytest.fixture(scope="module")
def records() -> list[dict[str, np.ndarray]]:
    return [render_scene(0, "train", i, SIZE) for i in range(60)]


# Purity


def test_a_scene_is_the_same_in_another_process(tmp_path):
    code = (
        "import sys, pickle; from sgw_jax.data_pipelines.scenes import render_scene\n"
        f"pickle.dump([render_scene(3, 'test', i, {SIZE}) for i in (9, 2)], open(sys.argv[1], 'wb'))"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "scenes")], check=True, cwd=ROOT)
    there = pickle.loads((tmp_path / "scenes").read_bytes())
    assert same(there[0], render_scene(3, "test", 9, SIZE))
    assert same(there[1], Scenes("test", size=SIZE, seed=3)[2])


def test_the_length_changes_no_scene_and_splits_and_seeds_share_none():
    assert same(Scenes("train", 5, SIZE)[4], Scenes("train", 50, SIZE)[4])
    images = [
        render_scene(seed, split, i, SIZE)["image"].tobytes() for seed in (0, 1) for split in SPLITS for i in (0, 1)
    ]
    assert len(set(images)) == len(images)


def test_a_size_shows_the_same_room():
    small, large = (render_scene(0, "train", 4, (h, 2 * h)) for h in (24, 72))
    agree = small["semseg"] == large["semseg"][1::3, 1::3]  # the middle pixel of each 3x3 block has the same ray
    assert agree.all()


def test_arguments_are_checked():
    with pytest.raises(ValueError, match=r"'val'.*'train', 'validation', 'test'"):
        Scenes("val")
    for wrong in ({"length": 0}, {"size": (4, 96)}, {"seed": -1}):
        with pytest.raises(ValueError, match="length >= 1"):
            Scenes("train", **wrong)
    source = Scenes("train", 3, SIZE)
    assert len(source) == 3
    assert len(list(source)) == 3  # the sequence protocol ends at IndexError
    for index in (3, -1):
        with pytest.raises(IndexError, match="of the 3 train scenes"):
            source[index]
    assert json.loads(json.dumps(source.fingerprint()))["length"] == 3
    assert [len(Scenes(split)) for split in SPLITS] == [2048, 256, 256]


# The contract


def test_records_keep_the_contract(records):
    expected = {
        "image": (np.uint8, (*SIZE, 3)),
        "semseg": (np.uint8, SIZE),
        "depth": (np.float32, SIZE),
        "normals": (np.float32, (*SIZE, 3)),
        "edges": (np.float32, SIZE),
        "saliency": (np.float32, SIZE),
        "human_parts": (np.uint8, SIZE),
    }
    for record in records:
        assert {k: (v.dtype.type, v.shape) for k, v in record.items()} == expected
        assert set(np.unique(record["semseg"])) <= {*range(len(SEMSEG_CLASSES)), 255}
        valid = record["depth"] > 0
        assert valid.mean() > 0.5
        assert record["depth"][valid].min() >= 0.05
        assert record["depth"].max() <= targets.DEPTH_RANGE
        length = np.linalg.norm(record["normals"].astype(np.float64), axis=-1)
        visible = length > 0
        # 16-bit components: each is off by at most half of 1/32767, float32 inputs by less; sqrt(3) of that in length.
        np.testing.assert_allclose(length[visible], 1, atol=1e-4)
        for name in ("edges", "saliency"):
            assert set(np.unique(record[name])) <= {0.0, 1.0}
        assert record["image"].std() > 5


def test_every_class_is_learnable_from_enough_pixels(records):
    labels = np.stack([r["semseg"] for r in records])
    share = np.array([(labels == k).mean() for k in range(len(SEMSEG_CLASSES))])
    scenes_with = np.array([(labels == k).any(axis=(1, 2)).mean() for k in range(len(SEMSEG_CLASSES))])
    assert (share > 0.01).all(), dict(zip(SEMSEG_CLASSES, share, strict=True))
    assert (scenes_with > 0.25).all(), dict(zip(SEMSEG_CLASSES, scenes_with, strict=True))
    assert share.max() < 0.5
    assert 0.002 < (labels == 255).mean() < 0.1
    assert 0.8 < np.mean([(r["depth"] > 0).mean() for r in records]) < 0.99
    assert np.mean([(r["normals"] != 0).any(-1).mean() for r in records]) > 0.99


def test_body_parts_are_exactly_the_persons_pixels(records):
    with_people = 0
    for record in records:
        parts, person = record["human_parts"], record["semseg"] == PERSON
        if person.any():
            with_people += 1
            np.testing.assert_array_equal(parts > 0, person)
            assert parts.max() < len(PART_CLASSES)
        else:
            assert (parts == 255).all()
    assert 0.3 < with_people / len(records) < 0.75
    seen = np.unique(np.stack([r["human_parts"] for r in records]))
    assert set(range(len(PART_CLASSES))) <= set(seen.tolist())


# Geometry against closed forms in float64, for a hand-made scene

ROOM = Solids(np.array([BOX]), np.array([[0.0, 0.0, 2.0]]), np.eye(3)[None], np.array([[4.0, 3.0, 4.0]]))


def turned(axis: np.ndarray) -> np.ndarray:
    """A rotation whose third row is the unit vector along `axis`."""
    third = axis / np.linalg.norm(axis)
    first = np.cross(third, [0.3, 1.0, 0.2])
    first /= np.linalg.norm(first)
    return np.stack([first, np.cross(third, first), third])


TILT = turned(np.array([0.4, -1.0, 0.3]))
PLACES = {
    "box": (BOX, [-1.6, 0.7, 3.0], [0.5, 0.3, 0.4]),
    "ellipsoid": (ELLIPSOID, [0.0, 0.8, 2.6], [0.5, 0.3, 0.4]),
    "cylinder": (FRUSTUM, [1.5, 0.6, 3.2], [0.3, 0.3, 0.5]),
    "frustum": (FRUSTUM, [-1.4, -0.8, 3.4], [0.5, 0.2, 0.4]),
    "cone": (FRUSTUM, [0.1, -0.7, 2.9], [0.5, 0.0, 0.5]),
    "capsule": (CAPSULE, [1.5, -0.8, 3.0], [0.25, 0.25, 0.5]),
}
HAND_MADE = Solids(
    np.array([kind for kind, _, _ in PLACES.values()]),
    np.array([centre for _, centre, _ in PLACES.values()]),
    np.stack([TILT] * len(PLACES)),
    np.array([size for _, _, size in PLACES.values()]),
)


def signed(name: str, points: np.ndarray) -> np.ndarray:
    """A float64 function of local points (n, 3) that is negative inside, 0 on the surface and positive outside."""
    x, y, z = points.T
    along = np.hypot(x, y)
    a, b, c = PLACES[name][2]
    if name == "box":
        return np.max(np.abs(points) - [a, b, c], axis=1)
    if name == "ellipsoid":
        return np.sqrt((x / a) ** 2 + (y / b) ** 2 + (z / c) ** 2) - 1
    if name == "capsule":
        return np.hypot(along, z - np.clip(z, -c, c)) - a
    return np.maximum(along - (a + (b - a) * (z + c) / (2 * c)), np.abs(z) - c)


def local(solid: int, points: np.ndarray) -> np.ndarray:
    return (points - HAND_MADE.centre[solid]) @ TILT.T


@pytest.fixture(scope="module")
def hand_made():
    """(rays as float64 directions (n, 3), depth, surface, normals (3, n)) of the hand-made scene."""
    rays = Rays.through((96, 128), 1.4)
    depth, surface = cast(ROOM, HAND_MADE, rays)
    x, y = np.meshgrid(rays.x.astype(np.float64), rays.y.astype(np.float64))
    directions = np.stack([x.ravel(), y.ravel(), np.ones(x.size)], axis=1)
    points = (directions * depth.reshape(-1, 1)).astype(np.float32).T
    _, normals = surface_points(ROOM, HAND_MADE, points, surface.ravel())
    return directions, depth.ravel().astype(np.float64), surface.ravel(), normals.astype(np.float64)


def test_depth_is_the_first_zero_of_the_implicit_surface(hand_made):
    """Marches every ray through the implicit functions in float64, which knows nothing of intervals or quadratics."""
    directions, depth, surface, _ = hand_made
    steps = np.arange(0.02, 6, 0.01)
    for solid, name in enumerate(PLACES):
        hits = np.flatnonzero(surface == ROOM_FACES + solid)
        assert len(hits) > 150, name
        on_surface = signed(name, local(solid, directions[hits] * depth[hits, None]))
        # float32 geometry of a few metres: rounding of 3e-7 relative, through slopes up to about 30 near silhouettes.
        assert np.abs(on_surface).max() < 1e-4, name
        for ray in hits[::17]:
            before = steps[steps < depth[ray] - 0.005]
            for other, other_name in enumerate(PLACES):
                assert (signed(other_name, local(other, before[:, None] * directions[ray])) > 0).all()
    for ray in np.flatnonzero(surface < ROOM_FACES)[::97]:
        before = steps[steps < depth[ray]]
        inside = [(signed(n, local(i, before[:, None] * directions[ray])) < -0.01).any() for i, n in enumerate(PLACES)]
        assert not any(inside)


def test_room_faces_are_where_they_should_be(hand_made):
    directions, depth, surface, normals = hand_made
    points = directions * depth[:, None]
    for face in range(ROOM_FACES):
        axis, side = divmod(face, 2)
        chosen = surface == face
        if face == 4:
            assert not chosen.any()  # low z lies behind the camera
            continue
        expected = ROOM.centre[0, axis] + (2 * side - 1) * ROOM.size[0, axis]
        np.testing.assert_allclose(points[chosen, axis], expected, rtol=1e-5)
        np.testing.assert_array_equal(
            normals[:, chosen], ((1 - 2 * side) * np.eye(3)[axis])[:, None].repeat(chosen.sum(), 1)
        )


def test_normals_are_the_gradient_of_the_implicit_surface(hand_made):
    directions, depth, surface, normals = hand_made
    step = 1e-4
    for solid, name in enumerate(PLACES):
        hits = np.flatnonzero(surface == ROOM_FACES + solid)
        points = local(solid, directions[hits] * depth[hits, None])
        slopes = [signed(name, points + step * e) - signed(name, points - step * e) for e in np.eye(3)]
        gradient = np.stack(slopes, axis=1) @ TILT  # back to the camera frame
        gradient /= np.linalg.norm(gradient, axis=1, keepdims=True)
        cosine = (gradient * normals[:, hits].T).sum(axis=1)
        smooth = cosine > 1 - 1e-5
        # Where the step straddles a crease the gradient is a blend of two faces; elsewhere it is the normal.
        assert smooth.mean() > 0.97, name
        assert ((normals[:, hits].T * directions[hits]).sum(axis=1) < 0).all(), name
        np.testing.assert_allclose(np.linalg.norm(normals[:, hits], axis=0), 1, atol=1e-6)


@pytest.mark.parametrize("name", PLACES)
def test_a_crossing_holds_exactly_the_inside_from_every_direction(name):
    """Rays from all around, some straight along or across the axis, against samples of the implicit function."""
    random = np.random.default_rng(1)
    origin = random.normal(size=(600, 3))
    origin *= 3 / np.linalg.norm(origin, axis=1, keepdims=True)
    origin[:60] = np.eye(3)[np.arange(60) % 3] * np.where(np.arange(60) % 2, 3, -3)[:, None]
    target = random.uniform(-0.6, 0.6, (600, 3))
    target[:60] *= np.arange(60)[:, None] // 30  # through the very centre, parallel to an axis
    kind, _, size = PLACES[name]
    ray = target - origin
    with np.errstate(divide="ignore", invalid="ignore"):
        enter, leave = crossing(kind, np.float32(size), origin.T.astype(np.float32), ray.T.astype(np.float32))
    assert 0.2 < (enter <= leave).mean() < 0.95
    for t in np.linspace(0, 2, 201):
        value = signed(name, origin + t * ray)
        sure = np.abs(value) > 1e-4  # float32
        np.testing.assert_array_equal(((enter <= t) & (t <= leave))[sure], value[sure] < 0)


def test_shadows_agree_with_marching_to_the_light():
    random = np.random.default_rng(0)
    points = random.uniform([-3, -2.5, 1], [3, 2.5, 5.5], (800, 3))
    light = np.array([0.5, -2.0, 1.0])
    result = shadowed(HAND_MADE, points.T.astype(np.float32), light)
    share = np.linspace(0, 1, 400)[1:-1, None]
    deepest = np.array(
        [min(signed(n, local(i, p + share * (light - p))).min() for i, n in enumerate(PLACES)) for p in points]
    )
    clear_cut = np.abs(deepest) > 0.02  # a march of 2 cm steps cannot tell a grazed solid from a missed one
    assert clear_cut.mean() > 0.9
    np.testing.assert_array_equal(result[clear_cut], deepest[clear_cut] < 0)
    assert 0.05 < result.mean() < 0.8


def test_depth_and_normals_of_a_record_tell_of_the_same_planes(records):
    """On any plane 1/z is linear in the pixel grid, and its gradient there is the normal over the plane's distance."""
    checked = 0
    for record in records[:20]:
        depth, normals = record["depth"].astype(np.float64), record["normals"].astype(np.float64)
        flat = np.ones((SIZE[0] - 2, SIZE[1] - 2), bool)
        for dy in range(3):
            for dx in range(3):
                window = np.s_[dy : dy + flat.shape[0], dx : dx + flat.shape[1]]
                flat &= (np.abs(normals[window] - normals[1:-1, 1:-1]).max(-1) < 1e-6) & (record["edges"][window] == 0)
                flat &= depth[window] > 0
        inverse = 1 / np.where(depth > 0, depth, 1)
        # Parallel surfaces (a drawer's front and its body) differ by a centimetre: more than four roundings of 0.5 mm.
        for step in (inverse[1:-1, 2:] + inverse[1:-1, :-2], inverse[2:, 1:-1] + inverse[:-2, 1:-1]):
            flat &= np.abs(step - 2 * inverse[1:-1, 1:-1]) < 3e-3 * inverse[1:-1, 1:-1] ** 2
        across, down = (inverse[1:-1, 2:] - inverse[1:-1, :-2]) / 2, (inverse[2:, 1:-1] - inverse[:-2, 1:-1]) / 2
        # n_x : n_y = d(1/z)/dx : d(1/z)/dy whatever the focal length. Millimetres: 1/z is off by 5e-4 / z^2 at most.
        cross = across * normals[1:-1, 1:-1, 1] - down * normals[1:-1, 1:-1, 0]
        assert (np.abs(cross[flat]) <= 1e-3 * inverse[1:-1, 1:-1][flat] ** 2 + 1e-9).all()
        checked += flat.sum()
    assert checked > 1000


# Edges and saliency


def plane_scene(depths: list[float]) -> tuple[np.ndarray, np.ndarray, Rays]:
    """Depth (6, 8) and normals (3, 6, 8) of panels that face the camera, one per pair of columns."""
    rays = Rays.through((6, 8), 1.0)
    depth = np.repeat(np.array(depths, np.float32), 2)[None].repeat(6, axis=0)
    normals = np.zeros((3, 6, 8), np.float32)
    normals[2] = -1
    return depth, normals, rays


def test_edges_are_instance_boundaries_and_depth_jumps():
    depth, normals, rays = plane_scene([2.0, 2.0, 2.05, 3.0])
    instance = np.repeat([0, 1, 1, 1], 2)[None].repeat(6, axis=0)
    marked = targets.edges(instance, depth, normals, rays)
    expected = np.zeros((6, 8), bool)
    expected[:, 1] = True  # another instance at equal depth
    expected[:, 5] = True  # 0.95 m within one instance; the 5 cm before it are within 4 % of the depth
    np.testing.assert_array_equal(marked, expected)


def test_slanted_planes_and_creases_are_no_edges():
    """A steep floor meeting a wall: neighbouring depths differ by decimetres, yet the surface is continuous."""
    rays = Rays.through((48, 8), 1.2)
    y = rays.y[:, None].astype(np.float64).repeat(8, axis=1)
    floor = np.where(y > 0, 1.2 / np.maximum(y, 1e-9), np.inf)
    depth = np.minimum(floor, 6.0).astype(np.float32)
    normals = np.where(floor < 6, np.array([0.0, -1.0, 0.0])[:, None, None], np.array([0.0, 0.0, -1.0])[:, None, None])
    assert np.abs(np.diff(depth, axis=0)).max() > 0.3
    assert not targets.edges(np.zeros((48, 8), int), depth, normals, rays).any()


def test_the_attended_object_is_central_contrasting_and_rather_a_person():
    image = np.full((32, 32, 3), 128, np.uint8)
    instance = np.zeros((32, 32), int)
    instance[12:20, 4:12], instance[12:20, 20:28] = 1, 2
    instance[0:8, 0:8] = 3
    room, thing, person = 0.0, 1.0, 3.0

    def winner(appeal: list[float], picture: np.ndarray = image) -> set[int]:
        return set(np.unique(instance[targets.attended(instance, picture, np.array(appeal))]).tolist())

    assert winner([room, thing, thing, thing]) == {1}  # equal scores: the first; never the corner or the room
    assert winner([room, thing, person, thing]) == {2}
    bright = image.copy()
    bright[instance == 2] = 250
    assert winner([room, thing, thing, thing], bright) == {2}
    assert winner([room, room, room, room]) == set()


def test_saliency_marks_an_object_of_the_foreground(records):
    room = [SEMSEG_CLASSES.index(name) for name in ("wall", "floor", "ceiling", "window", "door")]
    for record in records:
        chosen = record["semseg"][record["saliency"] == 1]
        assert len(np.unique(chosen)) <= 1
        assert not np.isin(chosen, room).any()
    assert np.mean([r["saliency"].any() for r in records]) > 0.9


# The cache


def test_cached_scenes_are_bit_equal_to_rendered_ones(tmp_path, capfd):
    plain, cached = (Scenes("validation", 7, SIZE, seed=2, cache_dir=c, workers=1) for c in (None, tmp_path))
    assert cached.prepare() is cached
    assert capfd.readouterr().err == ""
    assert all(same(plain[i], cached[i]) for i in range(7))
    assert same(pickle.loads(pickle.dumps(cached))[3], plain[3])
    assert len(pickle.dumps(cached)) < 1000  # maps are reopened elsewhere, not copied
    record = cached[0]
    record["image"][:] = 0  # a caller's array, not the file
    assert same(cached[0], plain[0])
    with pytest.raises(ValueError, match="cache_dir"):
        plain.prepare()


def test_processes_render_the_same_and_report(tmp_path, capfd):
    source = Scenes("train", 10, SIZE, cache_dir=tmp_path, workers=2, progress=True).prepare()
    assert all(same(source[i], render_scene(0, "train", i, SIZE)) for i in range(10))
    report = capfd.readouterr().err
    assert "rendering train scenes 10/10" in report
    before = source.collection.directory(tmp_path).stat().st_mtime_ns
    Scenes("train", 10, SIZE, cache_dir=tmp_path).prepare()  # there already: nothing is rendered again
    assert source.collection.directory(tmp_path).stat().st_mtime_ns == before
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == ["scenes-v1-seed0-train-10-24x32"]


def test_a_failing_worker_is_named_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(cache.json, "dumps", lambda *_, **__: '["nowhere", "train", 10, [24, 32], 0]')
    with pytest.raises(RuntimeError, match=r"(?s)workers ended with.*nowhere"):
        Scenes("train", 10, SIZE, cache_dir=tmp_path, workers=2).prepare()
    assert [p.name for p in tmp_path.iterdir() if not p.name.endswith(".lock")] == []


PREPARE = """
import sys
from sgw_jax.data_pipelines import progress
from sgw_jax.data_pipelines.scenes import Scenes
progress.SECONDS_BETWEEN_LINES = 0.1
Scenes("train", {length}, (24, 32), cache_dir=sys.argv[1], workers={workers}, progress=True).prepare()
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_preparation_is_never_visible(tmp_path, workers):
    command = [sys.executable, "-c", PREPARE.format(length=120, workers=workers), str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL) as process:
        assert process.stderr is not None
        assert b"/120" in process.stderr.readline()
        process.send_signal(signal.SIGKILL)
    assert [p for p in tmp_path.iterdir() if p.is_dir()], "it had already ended, so nothing was tested"
    assert not list(tmp_path.glob("scenes-*"))
    source = Scenes("train", 120, SIZE, cache_dir=tmp_path, workers=2).prepare()
    assert all(same(source[i], render_scene(0, "train", i, SIZE)) for i in (0, 1, 118, 119))
    assert [p.name for p in tmp_path.iterdir() if p.is_dir()] == [source.collection.directory(tmp_path).name]


@pytest.mark.multiprocess
def test_concurrent_preparations_agree(tmp_path):
    command = [sys.executable, "-c", PREPARE.format(length=24, workers=1), str(tmp_path)]
    processes = [subprocess.Popen(command, cwd=ROOT) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    source = Scenes("train", 24, SIZE, cache_dir=tmp_path).prepare()
    assert all(same(source[i], render_scene(0, "train", i, SIZE)) for i in (0, 23))


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: os.truncate(path / "depth.npy", 1000),
        lambda path: (path / "depth.npy").unlink(),
        lambda path: (path / "depth.npy").write_bytes(bytes((path / "depth.npy").stat().st_size)),
        lambda path: os.truncate(path / "meta.json", 20),
    ],
    ids=["truncated", "missing", "zeroed", "no description"],
)
def test_a_damaged_cache_names_the_file_and_the_remedy(tmp_path, damage):
    source = Scenes("test", 2, SIZE, cache_dir=tmp_path, workers=1).prepare()
    directory = source.collection.directory(tmp_path)
    damage(directory)
    with pytest.raises(
        ValueError,
        match=rf"(damaged at .*depth\.npy|meta\.json is damaged).*Delete the directory .*{directory.name}",
    ):
        Scenes("test", 2, SIZE, cache_dir=tmp_path).prepare()
