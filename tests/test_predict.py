"""Prediction: the checkpoint alone suffices, geometry against NumPy, files in and out, panels."""

import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import sgw_jax
from sgw_jax.__main__ import _parser
from sgw_jax.configs import base
from sgw_jax.data_pipelines import progress
from sgw_jax.data_pipelines.scenes import SEMSEG_CLASSES
from sgw_jax.data_pipelines.transforms import IMAGE_MEAN, IMAGE_STD
from sgw_jax.experiment.build import build
from sgw_jax.pictures import panels
from sgw_jax.prediction import background, image_files
from sgw_jax.prediction.outputs import replacing
from sgw_jax.prediction.predict_files import predict_files
from sgw_jax.prediction.predictor import Predictor
from sgw_jax.prediction.source import Source
from sgw_jax.run.checkpoints import CheckpointError
from sgw_jax.run.saved_run import open_run, saved_model
from sgw_jax.tasks import TASKS, Depth, SemSeg
from sgw_jax.train import train

SIZE = (32, 64)
TASK_NAMES = ("semseg", "depth", "normals", "saliency")
QUIET = Console(quiet=True)


@pytest.fixture(scope="session")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, with averaged parameters and constants (sKEM)."""
    config = base.get_config()
    config.tasks, config.interaction = TASK_NAMES, "skem"
    config.data.update({"size": SIZE, "lengths": {"train": 8, "validation": 0, "test": 0}, "threads": 1})
    config.backbones.vit.update({"width": 16, "depth": 4, "num_heads": 2, "patch_size": 16})
    config.interactions.skem.update({"num_slots": 4, "top_k": 8, "etf_vertices": 6})
    config.channels, config.stride = 8, 8
    config.update({"steps": 2, "batch_size": 8, "checkpoint_every": 2, "eval_every": 2, "ema_decay": 0.9})
    folder = tmp_path_factory.mktemp("run")
    train(build(config, folder / "cache"), folder / "run", QUIET)
    return folder / "run"


@pytest.fixture(scope="session")
def predictor(workdir: Path) -> Predictor:
    return sgw_jax.load(workdir)


@pytest.fixture(scope="session")
def raw_predictions(workdir: Path):
    """The network itself: normalised image (H, W, 3) of the training size -> raw predictions (H, W, C)."""
    run = open_run(workdir)
    model = saved_model(run)
    variables = run.variables(model)
    apply = jax.jit(model.apply)
    return lambda image: {name: np.asarray(raw)[0] for name, raw in apply(variables, image[None]).items()}


def noise(*size: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


# --- from a checkpoint


@pytest.mark.slow
def test_the_checkpoints_alone_suffice_in_a_fresh_process(workdir: Path, predictor: Predictor, tmp_path: Path) -> None:
    shutil.copytree(workdir / "checkpoints", tmp_path / "moved" / "checkpoints")
    image = noise(50, 70)
    np.save(tmp_path / "image.npy", image)
    code = """
import sys, numpy as np, sgw_jax
predictor = sgw_jax.load(sys.argv[1] + "/moved")
maps = predictor(np.load(sys.argv[1] + "/image.npy"))
names = {task.name: task.class_names for task in predictor.tasks if hasattr(task, "class_names")}
np.savez(sys.argv[1] + "/maps.npz", step=predictor.step, names=names["semseg"], **maps)
"""
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir or ""}
    environment = {**os.environ, **{key: value for key, value in cache.items() if value}}
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, env=environment)
    expected = predictor(image)
    with np.load(tmp_path / "maps.npz") as found:
        assert int(found["step"]) == predictor.step == 2
        assert tuple(found["names"]) == SEMSEG_CLASSES
        for name in TASK_NAMES:  # the same program on the same numbers
            np.testing.assert_array_equal(found[name], expected[name])


def test_predictor_says_what_it_is(predictor: Predictor) -> None:
    assert tuple(task.name for task in predictor.tasks) == TASK_NAMES
    assert predictor.size == SIZE
    assert predictor.config.interaction == "skem"


def test_averaged_parameters_are_used(workdir: Path) -> None:
    """The average of two steps (weights of the first three parameter sets) is not the last set."""
    run = open_run(workdir)
    model = saved_model(run)
    used = run.variables(model)["params"]
    structure = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), used)
    for name, same in (("ema", True), ("params", False)):
        saved = run.checkpoints.restore_variables({name: structure}, run.step)[name]
        equal = [np.array_equal(a, b) for a, b in zip(jax.tree.leaves(saved), jax.tree.leaves(used), strict=True)]
        assert all(equal) is same


def test_no_checkpoint_is_an_error(tmp_path: Path, workdir: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        sgw_jax.load(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        sgw_jax.load(tmp_path)
    with pytest.raises(ValueError, match="'best' or 'last'"):
        Predictor.from_workdir(workdir, "first")


# --- geometry


def interpolated(raw: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear with aligned pixel centres and repeated borders, in float64."""
    raw = raw.astype(np.float64)
    for axis, length in enumerate(size):
        known = (np.arange(raw.shape[axis]) + 0.5) / raw.shape[axis]
        wanted = (np.arange(length) + 0.5) / length
        raw = np.apply_along_axis(lambda line, x=wanted, xp=known: np.interp(x, xp, line), axis, raw)
    return raw


def check_decoded(maps: dict[str, np.ndarray], raw: dict[str, np.ndarray]) -> None:
    """Decoded maps against raw predictions at the same pixels.

    Tolerance: both are rounded to float32 after a handful of operations on values of the size of the raw prediction.
    """
    scale = {
        name: max(1.0, float(np.abs(values).max())) * 32 * np.finfo(np.float32).eps for name, values in raw.items()
    }
    best, second = np.sort(raw["semseg"], axis=-1)[..., ::-1][..., :2].transpose(2, 0, 1)
    clear = best - second > 2 * scale["semseg"]  # where the two largest logits do not tie
    assert clear.mean() > 0.9
    np.testing.assert_array_equal(maps["semseg"][clear], raw["semseg"].argmax(-1)[clear])
    np.testing.assert_allclose(maps["depth"], np.maximum(raw["depth"][..., 0], 0), rtol=0, atol=scale["depth"])
    length = np.linalg.norm(raw["normals"], axis=-1, keepdims=True)
    allowed = (scale["normals"] / length).max() + scale["normals"]
    np.testing.assert_allclose(maps["normals"], raw["normals"] / length, rtol=0, atol=allowed)
    probability = 1 / (1 + np.exp(-raw["saliency"][..., 0]))
    np.testing.assert_allclose(maps["saliency"], probability, rtol=0, atol=scale["saliency"])


def test_an_image_of_the_training_size_gets_the_networks_own_prediction(predictor: Predictor, raw_predictions) -> None:
    image = noise(*SIZE)
    normalised = ((image / 255 - IMAGE_MEAN) / IMAGE_STD).astype(np.float32)
    raw, maps = raw_predictions(normalised), predictor(image)
    assert {name: (values.dtype.name, values.shape) for name, values in maps.items()} == {
        "semseg": ("uint8", SIZE),
        "depth": ("float32", SIZE),
        "normals": ("float32", (*SIZE, 3)),
        "saliency": ("float32", SIZE),
    }
    np.testing.assert_array_equal(maps["semseg"], raw["semseg"].argmax(-1))
    np.testing.assert_array_equal(maps["depth"], np.maximum(raw["depth"][..., 0], 0))
    check_decoded(maps, raw)


@pytest.mark.parametrize(
    ("size", "fitted"),
    [((96, 192), (32, 64)), ((96, 42), (32, 14)), ((30, 192), (10, 64)), ((160, 320), (32, 64)), ((96, 3), (32, 1))],
    ids=["same aspect", "portrait", "panorama", "five times", "one column"],
)
def test_scaled_padded_and_restored(size, fitted, predictor: Predictor, raw_predictions) -> None:
    """The scales are odd whole numbers: averaging areas is then the mean over blocks, never between two levels."""
    factor = size[0] // fitted[0]
    image = noise(*size)
    blocks = image.reshape(fitted[0], factor, fitted[1], factor, 3).astype(np.float64)
    shrunk = np.rint(blocks.mean(axis=(1, 3)))
    top, left = ((outer - inner) // 2 for outer, inner in zip(SIZE, fitted, strict=True))
    padded = np.zeros((*SIZE, 3), np.float32)
    window = np.s_[top : top + fitted[0], left : left + fitted[1]]
    padded[window] = (shrunk / 255 - IMAGE_MEAN) / IMAGE_STD
    raw = {name: interpolated(values[window], size) for name, values in raw_predictions(padded).items()}
    check_decoded(predictor(image), raw)


class Echo:
    """Stands for a network: its depth is the image's red level, and NaN in the padding."""

    def apply(self, variables, image):
        red = (image[..., :1] * IMAGE_STD[0] + IMAGE_MEAN[0]) * 255
        return {"depth": jax.numpy.where(jax.numpy.all(image == 0, axis=-1, keepdims=True), np.nan, red)}


@pytest.fixture(scope="module")
def echo() -> Predictor:
    return Predictor(Echo(), {}, [Depth()], SIZE, batch_size=2)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [(1, 1), (1, 900), (700, 1), (33, 64), (5, 7), (301, 199), (640, 480)])
def test_padding_never_reaches_the_result(size, echo: Predictor) -> None:
    depth = echo(np.full((*size, 3), 200, np.uint8))["depth"]
    assert depth.shape == size
    np.testing.assert_allclose(depth, 200, rtol=1e-5)  # float32, a few operations


@pytest.mark.parametrize("size", [(48, 200), (200, 48), (250, 130)])
@pytest.mark.parametrize("axis", [0, 1])
def test_maps_lie_where_the_image_lies(size, axis, echo: Predictor) -> None:
    """A ramp of one level per pixel comes back but for the rounding of the small copy's levels, at most 1/2.

    A shift by half a pixel of the copy would be 1.5 levels and more.
    """
    levels = np.arange(size[axis], dtype=np.uint8)
    image = np.broadcast_to(levels[:, None, None] if axis == 0 else levels[:, None], (*size, 3))
    border = int(np.ceil(max(size[0] / SIZE[0], size[1] / SIZE[1])))  # where the copy's last pixel is repeated
    found = np.moveaxis(echo(image)["depth"], axis, 0)[border:-border]
    assert np.abs(found - levels[border:-border, None]).max() <= 0.5 + 1e-3  # and float32


# --- kinds of input


def test_one_batch_list_and_stream_agree(workdir: Path, predictor: Predictor) -> None:
    """Whatever shares a batch with an image, also the filling of the last one, changes nothing but rounding."""
    paired = Predictor.from_workdir(workdir, batch_size=2)
    images = np.stack([noise(40, 60, seed=seed) for seed in range(3)])
    batch, listed = paired(images), paired([*images, noise(90, 30)])
    streamed = list(paired.stream(iter(images)))
    for name in TASK_NAMES:
        assert isinstance(listed[name], list)
        assert listed[name][3].shape[:2] == (90, 30)
        for row, image in enumerate(images):
            single = predictor(image)[name]
            for found in (batch[name][row], listed[name][row], streamed[row][name]):
                assert found.dtype == single.dtype
                if name == "semseg":
                    assert np.mean(found == single) > 0.999  # ties
                else:
                    np.testing.assert_allclose(found, single, rtol=1e-4, atol=1e-4)


def test_floats_are_eight_bits(echo: Predictor) -> None:
    image = noise(20, 30)
    expected = echo(image)["depth"]
    for kind in (np.float16, np.float32, np.float64):
        np.testing.assert_array_equal(echo((image / 255).astype(kind))["depth"], expected)
    np.testing.assert_array_equal(echo(image[:, ::-1])["depth"], echo(np.ascontiguousarray(image[:, ::-1]))["depth"])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((8, 8), np.uint8), r"image has shape \(8, 8\).*grey"),
        (np.zeros((8, 8, 4), np.uint8), r"shape \(8, 8, 4\).*alpha"),
        (np.zeros((2, 8, 8, 1), np.uint8), r"image 0 has shape \(8, 8, 1\)"),
        (np.zeros((0, 8, 3), np.uint8), "shape"),
        (np.zeros((8, 8, 3), np.int32), "int32; allowed are uint8"),
        (np.full((8, 8, 3), 255.0), r"from 255 to 255.*\[0, 1\]"),
        (np.full((8, 8, 3), np.nan), "nan"),
        (np.zeros((0, 8, 8, 3), np.uint8), "no image"),
        ([], "list of images is empty"),
        ([np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8)], "image 1 has shape"),
        ("photo.jpg", "shape"),
    ],
)
def test_what_is_no_image_is_named(images, message: str, echo: Predictor) -> None:
    with pytest.raises(ValueError, match=message):
        echo(images)


def test_batch_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        Predictor(Echo(), {}, [Depth()], SIZE, batch_size=0)  # type: ignore[arg-type]


def test_streams_hold_few_images(echo: Predictor) -> None:
    """Neither the network nor the threads run ahead of the consumer by more than their bound."""
    pulled = 0

    def images() -> Iterator[np.ndarray]:
        nonlocal pulled
        for _ in range(100):
            pulled += 1
            yield noise(4, 4)

    stream = echo.stream(images())
    next(stream)
    assert pulled == echo.batch_size
    pulled = 0
    threaded = background.in_background(np.sum, images(), ahead=3)
    next(threaded)
    assert pulled == 3
    threaded.close()


# --- files


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(noise(20, 30)).save(folder / "b.png")
    Image.fromarray(noise(24, 16, seed=1)).convert("RGBA").save(folder / "A.PNG")
    Image.fromarray(noise(40, 40, seed=2)[..., 0]).save(folder / "grey.bmp")
    turned = Image.Exif()
    turned[0x0112] = 6  # stored on its side
    Image.fromarray(noise(16, 48, seed=3)).save(folder / "turned.jpg", exif=turned)
    (folder / "notes.txt").write_text("no image")
    (folder / "._b.png").write_bytes(b"\x00\x05\x16\x07")  # macOS leaves such files on foreign disks
    (folder / "folder").mkdir()
    return folder


def test_files_become_panels_and_arrays(workdir: Path, predictor: Predictor, pictures: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "output"
    written = predict_files(Source(workdir), [pictures, pictures / "b.png"], output, QUIET)
    assert written == ["A", "b", "grey", "turned"]
    assert {path.name for path in output.iterdir()} == {"predictions.json", ".predictions.lock"} | {
        f"{stem}{suffix}" for stem in ("A", "b", "grey", "turned") for suffix in (".png", ".npz")
    }
    with np.load(output / "b.npz", allow_pickle=False) as arrays:
        assert set(arrays) == {*TASK_NAMES, "semseg_classes"}
        assert tuple(arrays["semseg_classes"]) == SEMSEG_CLASSES
        types = {"semseg": "uint8", "depth": "float32", "normals": "float16", "saliency": "float32"}
        assert {name: str(arrays[name].dtype) for name in TASK_NAMES} == types
        for name, expected in predictor(noise(20, 30)).items():
            np.testing.assert_array_equal(arrays[name], expected.astype(types[name]))
    with np.load(output / "turned.npz", allow_pickle=False) as arrays:
        assert arrays["normals"].shape == (48, 16, 3)
    with Image.open(output / "b.png") as panel:
        # The first tile is the image, enlarged 16 times.
        top = panels.MARGIN + panels.TITLE_SIZE + panels.SPACE
        tile = np.asarray(panel)[top : top + 320, panels.MARGIN : panels.MARGIN + 480]
        np.testing.assert_array_equal(tile[8::16, 8::16], noise(20, 30))


def test_nothing_is_written_where_an_image_is_cut_off(
    workdir: Path, predictor: Predictor, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Predictor, "from_workdir", lambda *_: predictor)
    whole = (pictures / "turned.jpg").read_bytes()
    (pictures / "z_cut.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"^1 of 5 images .*z_cut\.jpg, an image: .*[Tt]runcated.*--skip_bad"):
        predict_files(Source(workdir), [pictures], tmp_path / "output", QUIET)
    assert not (tmp_path / "output").exists()


def test_bad_images_are_left_out_and_listed(
    predictor: Predictor, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.setattr(Predictor, "from_workdir", lambda *_: predictor)
    for path in pictures.iterdir():
        if path.is_file() and path.name != "grey.bmp":
            path.unlink()
    (pictures / "[b]odd.png").write_text("no image")
    (pictures / "folder.png").mkdir()
    os.mkfifo(pictures / "pipe.jpg")
    (pictures / "lost.jpg").symlink_to("nowhere")
    written = predict_files(Source("run"), [pictures], tmp_path / "[out]", Console(), skip_bad=True)
    assert written == ["grey"]
    assert (tmp_path / "[out]" / "grey.png").exists()
    said = capfd.readouterr()
    assert f"1 panels (png) and arrays (npz) in {tmp_path}/[out]," in said.out
    first, *listed = said.err.splitlines()
    assert first.startswith("4 of 5 images were left out")
    for line, name, why in zip(
        listed,
        ("[b]odd.png", "folder.png", "lost.jpg", "pipe.jpg"),
        ("UnidentifiedImageError", "a directory", "FileNotFoundError", "a named pipe"),
        strict=True,
    ):
        assert f"{pictures / name}, an image: " in line
        assert why in line
    (pictures / "grey.bmp").unlink()
    for spelt in ("--skip_bad", "--skip-bad"):
        assert _parser().parse_args(["predict", "--workdir=a", "--output=b", spelt, "c.png"]).skip_bad
    with pytest.raises(ValueError, match=r"^4 of 4 images cannot be read"):
        predict_files(Source("run"), [pictures], tmp_path / "none", Console(), skip_bad=True)
    assert not (tmp_path / "none").exists()


def exif(entries: dict[int, tuple[int, int, bytes]]) -> bytes:
    """EXIF of little-endian TIFF entries tag -> (type, count, value of at most 4 bytes)."""
    listed = b"".join(struct.pack("<HHI4s", tag, *entry) for tag, entry in sorted(entries.items()))
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + listed + struct.pack("<I", 0)


ORIENTATION, X_RESOLUTION, ASCII, SHORT, RATIONAL = 0x0112, 0x011A, 2, 3, 5


@pytest.mark.parametrize("resolution", [(ASCII, 4, b"abc\0"), (RATIONAL, 1, b"\0\0\0\0")])
def test_odd_exif_entries_do_not_keep_a_picture_from_its_orientation(resolution, tmp_path: Path) -> None:
    """Pillow's `exif_transpose` fails over them: it writes all entries anew, of which only one is asked for here."""
    pixels = noise(2, 3)
    upright = {2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.transpose(1, 0, 2)}
    upright |= {6: np.rot90(pixels, -1), 7: pixels[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(pixels)}
    for orientation in range(10):
        turned = exif({ORIENTATION: (SHORT, 1, struct.pack("<I", orientation)), X_RESOLUTION: resolution})
        Image.fromarray(pixels).save(tmp_path / "odd.webp", exif=turned, lossless=True)
        np.testing.assert_array_equal(image_files.read_image(tmp_path / "odd.webp"), upright.get(orientation, pixels))


def test_the_readmes_snippets_run(predictor: Predictor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    used, imported = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    Image.fromarray(noise(20, 30)).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sgw_jax, "load", {"runs/scenes": predictor}.__getitem__)
    names: dict[str, Any] = {}
    exec(used, names)
    assert names["maps"]["depth"].shape == (20, 30)
    assert {name: value.shape for name, value in names["features"].items()} == {
        "semseg": (2, 16, 16, 64),
        "depth": (2, 8, 8, 64),
    }
    exec(imported, names)
    assert names["KEM"] is sgw_jax.nnx.KEM


def test_a_palette_with_transparency_is_read_without_a_warning(tmp_path: Path) -> None:
    palette = Image.fromarray(noise(4, 4)).quantize(4)
    palette.save(tmp_path / "palette.png", transparency=b"\x00\x80\xff\xff")
    np.testing.assert_array_equal(image_files.read_image(tmp_path / "palette.png"), np.array(palette.convert("RGB")))


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    Image.fromarray(noise(50, 50)).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:-2000])
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.webp").touch()
    Image.fromarray(np.full((5, 5), 40_000, np.uint16)).save(tmp_path / "deep.png")
    for path in tmp_path.iterdir():
        with pytest.raises(ValueError, match=f"{path.name}, an image: "):
            image_files.read_image(path)


def test_inputs_that_are_not_there(workdir: Path, pictures: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        ([pictures, tmp_path / "missing.png"], "output", FileNotFoundError, r"missing\.png does not exist"),
        ([empty], "output", ValueError, "empty is a directory without images"),
        ([], "output", ValueError, "no input"),
        ([pictures], "pictures", ValueError, "is also an input"),
        ([pictures / "b.png"], "pictures", ValueError, "would replace the input"),
        ([pictures / "b.png"], "pictures/notes.txt", ValueError, "is a file"),
    ]
    for inputs, output, error, message in cases:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(error, match=message):
            predict_files(Source(workdir), inputs, tmp_path / output, QUIET)
        assert sorted(tmp_path.rglob("*")) == before


def test_equal_stems_do_not_meet() -> None:
    files = [Path(name) for name in ("/a/x.png", "/b/x.png", "/b/X.jpg", "/b/y.png", "/c/a_x.png", "/x.bmp")]
    assert image_files.output_names(files) == ["a_x", "b_x", "b_X_2", "y", "a_x_2", "x"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "maps.npz"
    path.write_bytes(b"old")

    def fail() -> None:
        with replacing(path) as file:
            file.write(b"half")
            raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["maps.npz"]
    assert path.read_bytes() == b"old"


# --- panels


@pytest.mark.parametrize("size", [(1, 1), (1, 1500), (64, 96), (1600, 1200)], ids=str)
def test_panels_of_any_size_stay_reasonable(size: tuple[int, int]) -> None:
    tasks = [kind() for kind in TASKS.values()]
    rng = np.random.default_rng(0)
    maps = {}
    for task in tasks:
        raw = rng.normal(size=(*[min(side, 30) for side in size], task.channels)).astype(np.float32)
        small = np.asarray(task.decode(raw))
        maps[task.name] = np.resize(small, (*size, *small.shape[2:]))
    panel = panels.Panel().draw(noise(*size), maps, tasks, "a/very/long/path" * 20)
    assert 240 < panel.width < 4000
    assert 100 < panel.height < 4000


def test_legend_has_the_classes_that_occur_by_size() -> None:
    task = SemSeg(num_classes=5, class_names=("a", "b", "c", "d", "e"))
    labels = np.array([[3, 3, 3], [1, 4, 4], [255, 255, 255]], np.uint8)
    assert [name for name, _ in panels.present(task.legend(), labels)] == ["d", "e", "b"]


def test_colour_bars_end_at_the_maps_values() -> None:
    depth = np.array([[0.0, 2.0], [3.5, np.nan]], np.float32)  # 0 and NaN are invalid
    assert panels.colour_range(Depth(), depth) == (2.0, 3.5)
    assert panels.colour_range(Depth(), np.zeros((2, 2), np.float32)) is None
    assert panels.colour_range(TASKS["edges"](), depth) == (0.0, 1.0)
    panels.Panel().draw(noise(2, 2), {"depth": np.zeros((2, 2), np.float32)}, [Depth()])  # nothing valid: no bar


def test_tiles_shrink_or_grow_by_whole_factors() -> None:
    assert panels.tile_size(960, 1920) == (240, 480)
    assert panels.tile_size(64, 96) == (320, 480)
    assert panels.tile_size(70, 100) == (280, 400)
    assert panels.tile_size(1, 5000) == (1, 480)
    assert panels.column_count(7, 480, 380) == 4
    assert panels.column_count(1, 480, 380) == 1


def test_text_in_other_alphabets_is_drawn() -> None:
    """PIL's own font has ASCII alone; missing glyphs would all look alike."""
    lettering = panels.Lettering(15)
    masks = {bytes(lettering._font(text).getmask(text)) for text in ("Ä", "ß", "Ж", "λ")}
    assert len(masks) == 4


def test_progress_in_a_pipe_is_plain(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 1000, 7))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert list(progress.counted(range(4), "predict", 4, Console(force_terminal=False))) == [0, 1, 2, 3]
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(line.startswith("predict ") and line.endswith("/4") for line in lines)
