"""Whole images: tiles without seams, mirror images, confidence, several devices."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sgw_jax
from sgw_jax import KEM, TASKS, MultiTaskModel
from sgw_jax.data_pipelines.transforms import normalise
from sgw_jax.export.stablehlo import export_stablehlo
from sgw_jax.prediction.options import Options
from sgw_jax.prediction.predictor import Predictor
from sgw_jax.prediction.tiles import Axis, axis
from sgw_jax.tasks import Depth, SemSeg

SIZE = (32, 64)
EPS = np.finfo(np.float32).eps
NATIVE = Options(resolution="native")


def tasks() -> list[Any]:
    return [kind(num_classes=5) if issubclass(kind, SemSeg) else kind() for kind in TASKS.values()]


class Pixelwise:
    """Stands for a network that looks at each pixel alone: what a tile holds besides changes nothing."""

    coarsest_stride = 8

    def apply(self, variables, image):
        del variables
        return {task.name: self.of(image, task.channels, seed) for seed, task in enumerate(tasks(), 1)}

    def of(self, image, channels: int, seed: int):
        factors = jnp.asarray(np.random.default_rng(seed).normal(size=(channels, 3)) / 5, jnp.float32)
        # One product and sum after another: no matrix product, whose order of sums could depend on the size.
        return jnp.stack([sum(image[..., c] * row[c] for c in range(3)) + 1 for row in factors], axis=-1)


class Shifted(Pixelwise):
    """It sees the neighbour on the right: of the mirror image that is another one."""

    def apply(self, variables, image):
        return super().apply(variables, jnp.roll(image, -1, axis=2) + 0.1 * image)


def predictor(network: Any, size: tuple[int, int] = SIZE, batch_size: int = 3) -> Predictor:
    return Predictor(network, {}, tasks(), size, batch_size=batch_size)


@pytest.fixture(scope="module")
def local() -> Predictor:
    return predictor(Pixelwise())


@pytest.fixture(scope="module")
def sided() -> Predictor:
    return predictor(Shifted())


def noise(*size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def assert_alike(found: dict[str, Any], expected: dict[str, Any]) -> None:
    """Labels are equal; else a few roundings of values whose size is a few units."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        if value.dtype == np.uint8:
            np.testing.assert_array_equal(found[name], value)
        else:
            np.testing.assert_allclose(found[name], value, rtol=0, atol=32 * EPS, err_msg=name)


# --- tiles


@pytest.mark.parametrize("size", [(75, 139), (200, 40), (20, 300), (33, 65)], ids=str)
@pytest.mark.parametrize("overlap", [0, 0.25, 0.9])
def test_tiles_equal_one_pass(size: tuple[int, int], overlap: float, local: Predictor) -> None:
    image = noise(*size)
    assert_alike(local(image, Options("native", overlap)), predictor(Pixelwise(), size)(image))


@pytest.mark.parametrize("size", [SIZE, (20, 64), (32, 9), (5, 7)], ids=str)
def test_what_fits_is_one_pass_to_the_bit(size: tuple[int, int], local: Predictor) -> None:
    image = noise(*size)
    whole, native = local(image), local(image, NATIVE)
    for name, value in whole.items():
        np.testing.assert_array_equal(native[name], value)


@pytest.mark.parametrize(("side", "copy"), [(150, (75, 150)), (40, (20, 40)), (64, (32, 64)), (400, (200, 400))])
def test_a_side_of_ones_own_is_the_longer_one(side: int, copy: tuple[int, int], local: Predictor) -> None:
    """Rows between strips are interpolated too: the image is of another size than the copy."""
    image = noise(90, 180)
    found, expected = local(image, Options(side)), predictor(Pixelwise(), copy)(image)
    # Directions are averaged, raw vectors interpolated; all else is the same. See `Task.averageable`.
    names = expected.keys() - {"normals"} if side > 64 else expected.keys()
    assert_alike({name: found[name] for name in names}, {name: expected[name] for name in names})
    assert found["normals"].shape == (90, 180, 3)


class Tilewise:
    """Each tile is one number, its mean red: as unlike its neighbours as can be."""

    coarsest_stride = 8

    def apply(self, variables, image):
        mean = jnp.mean(image[..., :1], axis=(1, 2), keepdims=True)
        return {"depth": jnp.broadcast_to(mean, (*image.shape[:3], 1)) + 10}


def test_no_seams_where_tiles_disagree() -> None:
    """Half a tile T apart two windows are sin^2 and cos^2: a share changes by at most pi / T a pixel."""
    found = Predictor(Tilewise(), {}, [Depth()], SIZE, batch_size=4)  # type: ignore[arg-type]
    image = np.zeros((32, 192, 3), np.uint8)
    image[:, 96:] = 255
    depth = found(image, Options("native", 0.5))["depth"]
    hard = found(image, Options("native", 0.0))["depth"]
    steps, seam = np.abs(np.diff(depth, axis=1)).max(), np.abs(np.diff(hard, axis=1)).max()
    assert np.ptp(depth) > 2
    assert seam > 1
    assert steps < np.ptp(depth) * math.pi / 64


def test_windows_sum_to_one_on_one_grid() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        length, tile = int(rng.integers(1, 400)), int(rng.integers(16, 96))
        overlap, stride = float(rng.choice([0, 0.1, 0.25, 0.5, 0.9])), int(rng.choice([1, 4, 7, 32]))
        line = axis(length, tile, overlap, stride)
        first, last = line.margin, line.margin + length
        assert first >= 0
        assert last <= line.canvas
        gaps = np.diff(line.offsets)
        if length <= tile:
            assert line.offsets == (0,)
        else:
            assert line.canvas < length + stride
            assert gaps.min() > 0
            assert gaps.max() <= max(1, tile * (1 - overlap))
        if stride <= tile * (1 - overlap):
            assert not any(offset % stride for offset in line.offsets)
        total = np.zeros(line.canvas)
        for number, offset in enumerate(line.offsets):
            total[offset : offset + tile] += line.window(number)
        np.testing.assert_allclose(total, 1, rtol=0, atol=8 * EPS)
    np.testing.assert_array_equal(Axis(20, 32, (0,)).window(0), 1)


def test_programs_are_compiled_once_and_strips_are_no_higher_than_a_tile(local: Predictor, monkeypatch) -> None:
    made = predictor(Pixelwise())
    shapes = []
    empty = made._blending.empty
    monkeypatch.setattr(made._blending, "empty", lambda **sizes: shapes.append(sizes) or empty(**sizes))
    images = [noise(100, 130), noise(500, 150), noise(40, 190)]
    found = list(made.stream(iter(images), NATIVE))
    for image, maps in zip(images, found, strict=True):  # whatever shares a batch
        for name, value in local(image, NATIVE).items():
            np.testing.assert_array_equal(maps[name], value)
    assert [(sizes["rows"], sizes["columns"]) for sizes in shapes] == [(33, 193)] * 3
    assert made._network._apply._cache_size() == 1
    assert made._blending.add._cache_size() == made._blending.decode._cache_size() == 1


def test_streams_hold_few_images() -> None:
    pulled = 0

    def images() -> Iterator[np.ndarray]:
        nonlocal pulled
        for _ in range(100):
            pulled += 1
            yield noise(40, 64)

    stream = predictor(Pixelwise(), batch_size=4).stream(images(), NATIVE)  # of two tiles each
    next(stream)
    assert pulled == 2


# --- mirror images


def mirrored(maps: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    flipped = {name: np.flip(value, 1) for name, value in maps.items()}
    flipped["normals"] = flipped["normals"] * np.array([-1, 1, 1], np.float32)
    return flipped


@pytest.mark.parametrize("size", [(32, 64), (31, 63), (20, 33), (75, 139), (47, 190)], ids=str)
@pytest.mark.parametrize("resolution", ["fit", "native"])
def test_a_mirror_image_has_the_mirror_images_maps(size: tuple[int, int], resolution: Any, sided: Predictor) -> None:
    image, options = noise(*size), Options(resolution, flip=True, confidence=True)
    found, other = sided(image, options), sided(np.flip(image, 1), options)
    # Near 0 a root has half the digits: of the spread the square is compared.
    for maps in (found, other):
        maps |= {name: value**2 for name, value in maps.items() if name.endswith("_spread")}
        maps["normals_spread"] /= 180**2
    assert_alike(other, mirrored(found))
    assert np.abs(sided(image)["depth"] - mirrored(sided(np.flip(image, 1)))["depth"]).max() > 0.1  # alone it has not


def test_the_average_of_two_passes(sided: Predictor) -> None:
    image = noise(*SIZE)
    one, two = sided(image), mirrored(sided(np.flip(image, 1)))
    batches = [normalise(np.ascontiguousarray(view))[None] for view in (image, np.flip(image, 1))]
    raw = [Shifted().apply({}, batch) for batch in batches]
    found = sided(image, Options(flip=True, confidence=True))
    logits = (np.asarray(raw[0]["semseg"][0]) + np.asarray(raw[1]["semseg"][0])[:, ::-1]).astype(np.float64) / 2
    np.testing.assert_array_equal(found["semseg"], logits.argmax(-1))
    share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(found["semseg_probability"], share.max(-1), rtol=0, atol=16 * EPS)
    entropy = -(share * np.log(share)).sum(-1) / math.log(5)
    np.testing.assert_allclose(found["semseg_entropy"], entropy, rtol=0, atol=16 * EPS)
    both = np.stack([one["depth"], two["depth"]]).astype(np.float64)
    np.testing.assert_allclose(found["depth_spread"], both.std(0), rtol=0, atol=16 * EPS)
    cosine = np.sum(one["normals"].astype(np.float64) * two["normals"], axis=-1)
    half = np.rad2deg(np.arccos(np.clip(cosine, -1, 1))) / 2  # from the direction between the two
    far = cosine > -0.99  # where there is one
    np.testing.assert_allclose(found["normals_spread"][far], half[far], rtol=1e-4, atol=1e-3)
    between = one["normals"] + two["normals"]
    between /= np.linalg.norm(between, axis=-1, keepdims=True)
    np.testing.assert_allclose(found["normals"][far], between[far], rtol=0, atol=1e-5)
    mean = np.mean([np.log(m["edges"]) - np.log1p(-m["edges"]) for m in (one, two)], axis=0)
    np.testing.assert_allclose(found["edges"], 1 / (1 + np.exp(-mean)), rtol=0, atol=64 * EPS)


# --- confidence


def test_one_pass_has_no_spread(local: Predictor) -> None:
    for options in (Options(confidence=True), Options("native", 0, confidence=True)):
        found = local(noise(64, 128), options)
        assert set(found) - set(local(noise(2, 2))) == {
            "semseg_probability",
            "semseg_entropy",
            "human_parts_probability",
            "human_parts_entropy",
            "depth_spread",
            "normals_spread",
        }
        for name in ("depth_spread", "normals_spread"):
            assert found[name].dtype == np.float32
            np.testing.assert_array_equal(found[name], 0)


def test_tiles_that_disagree_spread() -> None:
    """Of two passes with weights w and 1 - w the standard deviation is sqrt(w (1 - w)) times their distance."""
    found = Predictor(Tilewise(), {}, [Depth()], SIZE, batch_size=4)  # type: ignore[arg-type]
    image = np.zeros((32, 96, 3), np.uint8)
    image[:, 64:] = 255
    maps = found(image, Options("native", 0.5, confidence=True))
    low, high = maps["depth"].min(), maps["depth"].max()
    share = (maps["depth"].astype(np.float64) - low) / (high - low)
    expected = np.sqrt(share * (1 - share)) * (high - low)
    assert expected.max() > 0.2
    # Near 0 and 1 a rounding of the share, eps, is sqrt(eps) of its root.
    np.testing.assert_allclose(maps["depth_spread"], expected, rtol=0, atol=4 * math.sqrt(EPS))


def test_a_task_by_the_name_of_anothers_confidence_is_refused() -> None:
    class Two:
        def apply(self, variables, image):
            return dict.fromkeys(("depth", "depth_spread"), image[..., :1])

    found = Predictor(Two(), {}, [Depth(), Depth(name="depth_spread")], SIZE)  # type: ignore[arg-type]
    found(noise(4, 4))
    with pytest.raises(ValueError, match="'depth_spread' has the name of a map of 'depth'"):
        found(noise(4, 4), Options(confidence=True))


# --- real networks, devices


FEW = (SemSeg(num_classes=3), TASKS["normals"]())


class Backbone(nn.Module):
    @nn.compact
    def __call__(self, image, train=False):
        return {4: nn.Conv(8, (4, 4), strides=(4, 4))(image)}


@pytest.fixture(scope="module")
def network() -> tuple[MultiTaskModel, Any]:
    model = MultiTaskModel(FEW, Backbone(), KEM(num_slots=2), channels=4)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.ones((1, *SIZE, 3)))


@pytest.mark.slow
@pytest.mark.eight_devices
def test_devices_share_a_batch(network, tmp_path: Path) -> None:
    """Each of the eight computes its row as one device alone does, of a network and of its StableHLO."""
    assert jax.local_device_count() == 8
    images, options = [noise(70, 150), noise(30, 60)], Options("native", flip=True, confidence=True)
    alone = Predictor(network[0], network[1], FEW, SIZE, batch_size=1)(images, options)
    shared = Predictor(network[0], network[1], FEW, SIZE, batch_size=8)
    assert len(shared._network._sharding.device_set) == 8
    export_stablehlo(*network, FEW, SIZE, tmp_path / "a.stablehlo", platforms=["cpu"], any_size=False)
    loaded = Predictor.from_stablehlo(tmp_path / "a.stablehlo", batch_size=8)
    for found in (shared(images, options), loaded(images, options)):
        assert set(found) == set(alone)
        for name, maps in alone.items():
            for one, other in zip(maps, found[name], strict=True):
                np.testing.assert_array_equal(other, one)


# --- options


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"resolution": "full"}, "'full'; choose 'fit', 'native' or"),
        ({"resolution": 0}, "0; choose"),
        ({"resolution": True}, "True; choose"),
        ({"resolution": 512.0}, "512.0; choose"),
        ({"resolution": 10**6}, "1000000; choose"),
        ({"overlap": 1.0}, "overlap is 1.0"),
        ({"overlap": -0.1}, "overlap is -0.1"),
        ({"overlap": math.nan}, "overlap is nan"),
        ({"overlap": "0.5"}, "overlap is '0.5'"),
        ({"flip": 1}, "flip is 1"),
        ({"confidence": None}, "confidence is None"),
    ],
)
def test_options_say_what_they_take(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Options(**given)


def test_the_lines_of_the_page(local: Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parent.parent / "docs" / "deploy.md").read_text(encoding="utf-8")
    monkeypatch.setattr(sgw_jax, "load", {"runs/scenes": local}.__getitem__)
    for title in ("Whole images", "Confidence"):
        section = page.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
        (snippet,) = re.findall(r"^```python\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
        names: dict[str, Any] = {}
        exec(snippet.replace("(480, 640, 3)", "(48, 96, 3)"), names)
        assert names["maps"]["depth"].shape == (48, 96)
    assert names["doubtful"].shape == (48, 96)
