"""The files of predictions: formats and their rounding, lists, shares, what a second call does, killed processes."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from test_predict import workdir  # noqa: F401 [a fixture]

from sgw_jax.__main__ import main
from sgw_jax.data_pipelines import atomic, readers
from sgw_jax.data_pipelines.scenes import SEMSEG_CLASSES
from sgw_jax.prediction import arrays, background, shards
from sgw_jax.prediction.confidence_maps import confidence_maps
from sgw_jax.prediction.image_files import listed_paths, output_names
from sgw_jax.prediction.manifest import network_digest
from sgw_jax.prediction.options import Options
from sgw_jax.prediction.outputs import Form
from sgw_jax.prediction.predict_files import predict_files
from sgw_jax.prediction.predictor import Predictor
from sgw_jax.prediction.shares import Share
from sgw_jax.prediction.source import Source
from sgw_jax.prediction.stored import read_predictions
from sgw_jax.tasks import Depth, Edges, Normals, SemSeg

SIZE = (16, 32)
TASKS = (
    SemSeg(num_classes=len(SEMSEG_CLASSES), class_names=SEMSEG_CLASSES),
    Depth(),
    Normals(),
    Edges(),
    Depth(name="near", quantity="disparity"),
)
MODEL = Source(model="org/tiny")
QUIET = Console(quiet=True)


class Network:
    """Stands for one: raw predictions that differ from pixel to pixel."""

    def apply(self, variables, image):
        x = image * variables["params"]["scale"]
        wave = jnp.sin(x[..., :1] * jnp.arange(1, len(SEMSEG_CLASSES) + 1))
        return {
            "semseg": wave, "depth": 3 + x[..., :1], "normals": x, "edges": x[..., 1:2], "near": 9 + x[..., 2:]
        }  # fmt: skip


def tiny(scale: float = 1.0, tasks=TASKS) -> Predictor:
    variables = {"params": {"scale": jnp.float32(scale)}}
    return Predictor(Network(), variables, tasks, SIZE, batch_size=2, step=7)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return tiny()


@pytest.fixture
def loaded(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> Predictor:
    """`MODEL` is this predictor, compiled once."""
    monkeypatch.setattr(Predictor, "from_pretrained", lambda name: {"org/tiny": predictor}[name])
    return predictor


def write_photos(folder: Path, count: int = 5) -> Path:
    folder.mkdir()
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 256, (18 + index, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"p{index}.png")
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return write_photos(tmp_path / "photos")


def contents(folder: Path) -> dict[str, bytes]:
    """What is in the files that are not hidden."""
    found = sorted(path for path in folder.rglob("[!.]*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


# --- formats


def test_pictures_hold_maps_within_their_rounding(loaded: Predictor, photos: Path, tmp_path: Path) -> None:
    """By the readers of data sets, and back by ours."""
    predict_files(MODEL, [photos], tmp_path / "out", QUIET, form=Form("png"))
    out = tmp_path / "out"
    expected = loaded(np.array(Image.open(photos / "p3.png")))
    np.testing.assert_array_equal(readers.read_labels(out / "semseg" / "p3.png"), expected["semseg"])
    eps = np.finfo(np.float32).eps
    for name, kind, found in (
        ("depth", "depth", readers.read_millimetres(out / "depth" / "p3.png")),
        ("normals", "vectors", readers.read_byte_vectors(out / "normals" / "p3.png")),
        ("edges", "mask", readers.read_mask_picture(out / "edges" / "p3.png")),
    ):
        # Half a level, and the float32 rounding of a few operations on levels.
        allowed = arrays.rounding(kind) * (1 + 1e-6) + 4 * eps * np.abs(expected[name]).max()
        assert np.abs(found - expected[name]).max() <= allowed, name
    for axes, words in (("opencv", "y down, z forward"), ("opengl", "y up")):
        with (tmp_path / "normals.png").open("wb") as file:
            arrays.write_picture(file, expected["normals"], Normals(axes=axes))
        with Image.open(tmp_path / "normals.png") as picture:
            assert words in picture.text["Description"]
    with Image.open(out / "semseg" / "p3.png") as picture:
        assert picture.mode == "P"
        assert json.loads(picture.text[arrays.CLASSES]) == list(SEMSEG_CLASSES)
        colours = np.array(picture.getpalette()).reshape(-1, 3)[: len(SEMSEG_CLASSES)]
    np.testing.assert_array_equal(colours, [colour for _, colour in TASKS[0].legend()])
    read = dict(read_predictions(out))
    assert list(read) == [f"p{index}" for index in range(5)]
    assert tuple(read["p3"]["semseg_classes"]) == SEMSEG_CLASSES
    for name, kind in (("depth", "depth"), ("normals", "vectors"), ("edges", "mask")):
        assert np.abs(read["p3"][name] - expected[name]).max() <= arrays.rounding(kind) * 1.001, name
    np.testing.assert_array_equal(read["p3"]["near"], expected["near"])  # no picture holds a disparity
    read = read["p3"]["normals"] / np.linalg.norm(read["p3"]["normals"], axis=-1, keepdims=True)
    # A vector off by d from one of length 1 is turned by asin d at most.
    turned = np.linalg.norm(np.cross(read, expected["normals"]), axis=-1)
    assert turned.max() <= np.sqrt(3) * arrays.rounding("vectors") + 8 * eps


def test_the_lines_of_deploy_md_read_predictions(loaded: Predictor, photos: Path, tmp_path: Path, monkeypatch) -> None:
    page = (Path(__file__).parents[1] / "docs" / "deploy.md").read_text(encoding="utf-8")
    (snippet,) = (
        part for part in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S) if "read_predictions" in part
    )
    predict_files(MODEL, [photos], tmp_path / "pictures", QUIET)
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(snippet, names)
    assert names["name"] == "p4"
    with pytest.raises(ValueError, match=r"photos holds no predictions\.json"):
        next(read_predictions(photos))
    (tmp_path / "pictures" / "p2.npz").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"p2\.npz: cannot be decoded"):
        list(read_predictions(tmp_path / "pictures"))


def test_score_reads_what_predict_writes(loaded: Predictor, photos: Path, tmp_path: Path, capsys) -> None:
    """Of pictures as of arrays, within what rounding can change."""
    data, rng = tmp_path / "data", np.random.default_rng(0)
    for folder in ("semseg", "depth", "normals", "splits"):
        (data / folder).mkdir(parents=True)
    (data / "images").mkdir()
    (photos / "p0.png").rename(data / "images" / "p0.png")  # one size: score compiles each
    for path in sorted((data / "images").iterdir()):
        size = (18, 30)
        Image.fromarray(rng.integers(0, 12, size, np.uint8)).save(data / "semseg" / path.name)
        np.save(data / "depth" / f"{path.stem}.npy", rng.uniform(1, 9, size).astype(np.float32))
        np.save(data / "normals" / f"{path.stem}.npy", rng.normal(size=(*size, 3)).astype(np.float32))
    for split in ("train", "validation", "test"):
        (data / "splits" / f"{split}.txt").write_text("p0")
    scores = {}
    for kind in ("npz", "png"):
        predict_files(MODEL, [data / "images"], tmp_path / kind, QUIET, form=Form(kind))
        out = tmp_path / f"{kind}.json"
        arguments = [f"--predictions={tmp_path / kind}", f"--json={out}", f"--cache_dir={tmp_path / 'cache'}"]
        config = ["--config=scenes:tasks=semseg+depth+normals", "--config.data.source=folder"]
        assert main(["score", *arguments, *config, f"--config.data.root={data}"]) == 0, capsys.readouterr().err
        scores[kind] = json.loads(out.read_text())["metrics"]
    npz, png = scores["npz"], scores["png"]
    assert png["semseg"] == npz["semseg"]
    # Root mean squares obey the triangle inequality, so does the mean of angles; and float32 sums of 540 values.
    assert png["depth"]["rmse"] == pytest.approx(npz["depth"]["rmse"], abs=arrays.rounding("depth"), rel=1e-5)
    apart = np.degrees(np.arcsin(np.sqrt(3) * arrays.rounding("vectors")) + np.arcsin(np.sqrt(3) * 2.0**-12))
    assert png["normals"]["mean"] == pytest.approx(npz["normals"]["mean"], abs=apart, rel=1e-5)


def test_what_a_picture_cannot_hold_is_named(tmp_path: Path) -> None:
    depth = np.array([[65.535, 65.6, np.inf], [np.nan, 0, 12.3456]], np.float32)
    with (tmp_path / "depth.png").open("wb") as file:
        assert arrays.write_picture(file, depth, Depth()) == 3
    with Image.open(tmp_path / "depth.png") as picture:
        assert picture.text["Warning"].startswith("3 values have no level")
    found = readers.read_millimetres(tmp_path / "depth.png")
    np.testing.assert_allclose(found, [[65.535, 65.535, 65.535], [0, 0, 12.346]], rtol=1e-6)


def test_depth_beyond_16_bits_is_said(loaded: Predictor, photos: Path, tmp_path: Path, monkeypatch, capfd) -> None:
    far = tiny(1e3, TASKS[1:2])
    monkeypatch.setattr(Predictor, "from_pretrained", lambda name: far)
    predict_files(MODEL, [photos / "p0.png"], tmp_path / "out", QUIET, form=Form("png"))
    said = capfd.readouterr().err
    assert said.startswith("1 pictures have no level for some values, which stand at the greatest (65.535 m")
    assert "depth/p0.png (" in said


def test_every_way_of_writing_reads_back_the_same(loaded: Predictor, photos: Path, tmp_path: Path) -> None:
    read = {}
    for format in ("files", "array_record"):
        for kind in ("npz", "png"):
            out = tmp_path / f"{format}_{kind}"
            form = Form(kind, format, panels=kind == "npz")
            assert len(predict_files(MODEL, [photos], out, QUIET, form=form)) == 5
            read[format, kind] = dict(read_predictions(out))
    for kind in ("npz", "png"):
        files, records = read["files", kind], read["array_record", kind]
        assert list(files) == list(records) == [f"p{index}" for index in range(5)]
        for name, maps in files.items():
            assert set(maps) == {*(task.name for task in TASKS), "semseg_classes"}
            for key, values in maps.items():
                np.testing.assert_array_equal(records[name][key], values)
    (record, *_), path = list(shards.records(tmp_path / "array_record_npz")), photos / "p0.png"
    assert record["file"].decode() == str(path)
    assert record["panel.png"] == (tmp_path / "files_npz" / "p0.png").read_bytes()
    assert {path.name for path in (tmp_path / "array_record_png").glob("[!.]*")} == {
        "predictions.json", "predictions-00000-of-00001.array_record"
    }  # fmt: skip


def test_maps_of_confidence_are_stored_and_drawn(loaded: Predictor, photos: Path, tmp_path: Path) -> None:
    drawn = confidence_maps(loaded.tasks)
    kinds = {about.name: about.target["kind"] for about in drawn}
    assert kinds == {
        "semseg_probability": "mask", "semseg_entropy": "mask", "depth_spread": "depth", "normals_spread": "angle",
        "near_spread": "disparity",
    }  # fmt: skip
    options = Options(flip=True, confidence=True)
    expected = loaded(np.array(Image.open(photos / "p0.png")), options)
    assert set(expected) == {*(task.name for task in TASKS), *kinds}
    for kind in ("npz", "png"):
        predict_files(MODEL, [photos / "p0.png"], tmp_path / kind, QUIET, options=options, form=Form(kind))
        ((_, found),) = read_predictions(tmp_path / kind)
        half = {"angle": 180 * 2.0**-11}  # the rounding of numbers up to 180
        for name, stored in kinds.items():
            allowed = half.get(stored, 0) if kind == "npz" or stored == "disparity" else arrays.rounding(stored)
            assert np.abs(found[name] - expected[name]).max() <= allowed * 1.001, name
    with Image.open(tmp_path / "png" / "p0.png") as panel:
        tiles = panel.size
    predict_files(MODEL, [photos / "p0.png"], tmp_path / "plain", QUIET)
    with Image.open(tmp_path / "plain" / "p0.png") as panel:
        assert tiles[0] * tiles[1] > panel.width * panel.height  # of twelve tiles and of six
    with pytest.raises(ValueError, match=r"another call: options\.confidence is True there and False here"):
        predict_files(MODEL, [photos / "p0.png"], tmp_path / "npz", QUIET, options=Options(flip=True))
    ramp = np.linspace(0, 180, 12, dtype=np.float32).reshape(3, 4)
    angle = next(about for about in drawn if about.name == "normals_spread")
    assert [text for text, _ in angle.legend(ramp)] == ["0 deg", "45 deg", "90 deg", "135 deg", "180 deg"]
    assert angle.draw(ramp[:, :2], like=ramp).shape == (3, 2, 3)
    with pytest.raises(ValueError, match="Neither arrays nor panels"):
        Form("none", panels=False)


# --- what a call does beside an earlier one


def test_a_second_call_writes_what_is_missing(loaded: Predictor, photos: Path, tmp_path: Path, capfd) -> None:
    out = tmp_path / "out"
    form = Form("png")
    assert len(predict_files(MODEL, [photos], out, QUIET, form=form)) == 5
    whole = contents(out)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    (out / "depth" / "p1.png").unlink()
    (out / "p4.png").unlink()
    (out / "depth" / "p1.png.99999.tmp").write_bytes(b"half")  # of a killed process
    (out / "depth" / "other.png.99999.tmp").write_bytes(b"not ours")
    capfd.readouterr()
    assert predict_files(MODEL, [photos], out, Console(), form=form) == ["p1", "p4"]
    assert "3 of 5 images are there; going on." in capfd.readouterr().out
    (out / "depth" / "other.png.99999.tmp").unlink()
    assert contents(out) == whole
    kept = [path for path in times if path.stem in ("p0", "p2", "p3")]
    assert {path: path.stat().st_mtime_ns for path in kept} == {path: times[path] for path in kept}
    assert predict_files(MODEL, [photos], out, Console(), form=form) == []
    assert "5 of 5 images are there; nothing to do." in capfd.readouterr().out
    Image.new("RGB", (9, 9)).save(photos / "p9.png")
    assert predict_files(MODEL, [photos], out, QUIET, form=form) == ["p9"]
    assert list(json.loads((out / "predictions.json").read_text())["images"]) == [f"p{i}" for i in (0, 1, 2, 3, 4, 9)]


@pytest.mark.parametrize("format", ["files", "array_record"])
def test_an_interrupted_call_goes_on(
    format: str, loaded: Predictor, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards.Shards.__init__, "__defaults__", (2,))  # images a shard
    form = Form("png", format)
    predict_files(MODEL, [photos], tmp_path / "whole", QUIET, form=form)
    stream = Predictor.stream

    def stopped(self, images, options=None):
        for index, maps in enumerate(stream(self, images, options)):
            if index == 3:
                raise KeyboardInterrupt
            yield maps

    out = tmp_path / "out"
    monkeypatch.setattr(Predictor, "stream", stopped)
    with pytest.raises(KeyboardInterrupt):
        predict_files(MODEL, [photos], out, QUIET, form=form)
    monkeypatch.setattr(Predictor, "stream", stream)
    assert not list(out.rglob("*.tmp"))
    before = contents(out)
    done = [name for name, _ in read_predictions(out)]
    assert 0 < len(done) < 5
    again = predict_files(MODEL, [photos], out, QUIET, form=form)
    assert sorted([*done, *again]) == [f"p{index}" for index in range(5)]  # none twice, none lost
    after = contents(out)
    assert after == contents(tmp_path / "whole")
    assert before.items() <= after.items()


def test_results_of_something_else_are_refused(
    loaded: Predictor, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    predict_files(MODEL, [photos], out, QUIET)
    whole = contents(out)

    def refused(match: str, inputs=(photos,), form=None) -> None:
        with pytest.raises(ValueError, match=match):
            predict_files(MODEL, list(inputs), out, QUIET, form=form)
        assert contents(out) == whole

    refused("predictions of another call: arrays is npz there and png here.*another --output", form=Form("png"))
    refused("format is files there and array_record here", form=Form(format="array_record"))
    other = tmp_path / "other"
    other.mkdir()
    Image.new("RGB", (8, 8)).save(other / "p1.png")
    refused(r"p1\.npz is of .*photos/p1\.png \(\d+ bytes\), and would now be of .*other/p1\.png", [other])
    Image.new("RGB", (8, 8)).save(photos / "p1.png")
    refused(r"p1\.npz is of .*photos/p1\.png .*delete the results")
    changed = tiny(2.0)
    monkeypatch.setattr(Predictor, "from_pretrained", lambda name: changed)
    refused("predictions of another network: org/tiny, step 7, and now org/tiny, step 7")
    monkeypatch.setattr(Predictor, "from_pretrained", lambda name: loaded)
    for suffix in (".png", ".npz"):  # as the message says
        (out / f"p1{suffix}").unlink()
    assert predict_files(MODEL, [photos], out, QUIET) == ["p1"]
    with np.load(out / "p1.npz") as maps:
        assert maps["depth"].shape == (8, 8)
    (out / "predictions.json").unlink()
    whole = contents(out)
    refused(r"p0\.npz is there, but predictions\.json does not say of which image")


def test_a_damaged_manifest_is_named(loaded: Predictor, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    predict_files(MODEL, [photos / "p0.png"], out, QUIET)
    whole = json.loads((out / "predictions.json").read_text())
    for damaged, match in (
        ("{", "is damaged: it is no JSON"),
        ({}, "it has no format, version"),
        ({**whole, "version": 2}, "version 2; this release knows"),
        ({**whole, "images": {"p0": 3}}, "a part of it is missing"),
        ({**whole, "maps": {"depth": {}}}, "a part of it is missing"),
        ({**whole, "settings": []}, "a part of it is missing"),
    ):
        (out / "predictions.json").write_text(damaged if isinstance(damaged, str) else json.dumps(damaged))
        for read in (lambda: predict_files(MODEL, [photos], out, QUIET), lambda: next(read_predictions(out))):
            with pytest.raises(ValueError, match=match):
                read()
    assert not (out / "p1.png").exists()


def test_names_that_differ_by_case_alone_do_not_meet(loaded: Predictor, photos: Path, tmp_path: Path) -> None:
    predict_files(MODEL, [photos / "p0.png"], tmp_path / "out", QUIET)
    (photos / "p1.png").rename(photos / "P0.png")
    with pytest.raises(ValueError, match="results of the name p0, which differs from P0 by case alone"):
        predict_files(MODEL, [photos / "P0.png"], tmp_path / "out", QUIET)


def test_a_disk_without_locks_is_written_to(loaded: Predictor, photos: Path, tmp_path: Path, monkeypatch) -> None:
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    assert len(predict_files(MODEL, [photos], tmp_path / "out", QUIET)) == 5
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]) == 5
    with pytest.raises(OSError, match="not implemented"), atomic.alone(tmp_path / "lock", lambda: None):
        pass


def test_a_network_is_known_by_its_numbers(predictor: Predictor) -> None:
    assert network_digest(predictor) == network_digest(tiny())
    others = [tiny(1.5), tiny(tasks=TASKS[:2])]
    flat = Predictor(Network(), {"params/scale": jnp.float32(1)}, TASKS, SIZE)  # type: ignore[arg-type]
    assert network_digest(flat) == network_digest(predictor)  # as StableHLO has them
    assert len({network_digest(other) for other in [predictor, *others]}) == 3


# --- shares, lists, memory


@pytest.mark.parametrize("format", ["files", "array_record"])
def test_shares_together_are_one_call(
    format: str, loaded: Predictor, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    monkeypatch.setattr(shards.Shards.__init__, "__defaults__", (2,))
    form = Form("png", format)
    predict_files(MODEL, [photos], tmp_path / "whole", QUIET, form=form)
    (photos / "p9.png").write_text("no image")  # in nobody's way but its own share's
    out, written = tmp_path / "out", []
    for share in ("1/2", "0/2"):
        written += predict_files(MODEL, [photos], out, Console(), form=form, share=Share.parse(share), skip_bad=True)
    assert sorted(written) == [f"p{index}" for index in range(5)]
    assert capfd.readouterr().err.count("1 of") == 1
    assert {name for name, _ in read_predictions(out)} == set(written)
    if format == "files":
        assert {name: value for name, value in contents(out).items() if name != "predictions.json"} == {
            name: value for name, value in contents(tmp_path / "whole").items() if name != "predictions.json"
        }


def test_shares_are_disjoint_and_whole() -> None:
    for count in (1, 2, 7, 20):
        found = [Share(index, count).of(range(13)) for index in range(count)]
        assert sorted(item for share in found for item in share) == list(range(13))
    for wrong in ("2/2", "0/0", "1", "-1/2", "a/b", "1/2/3", "0/²"):
        with pytest.raises(ValueError, match="share"):
            Share.parse(wrong)


def test_a_list_names_images_and_folders(loaded: Predictor, photos: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.txt").write_bytes(b"\xef\xbb\xbfphotos/p1.png\r\n\r\nphotos\n")
    assert listed_paths("list.txt") == ["photos/p1.png", "photos"]
    arguments = ["predict", "--model=org/tiny", "--output=out", "--list=list.txt", f"--cache_dir={tmp_path / 'cache'}"]
    assert main([*arguments, "--arrays=png", "--no_panels", "--share=0/2"]) == 0
    assert sorted(path.name for path in (tmp_path / "out" / "normals").iterdir()) == ["p1.png", "p2.png", "p4.png"]
    for content, match in ((b"\n \n", "is empty"), (b"\xff\xfe\0", "UTF-16")):
        (tmp_path / "list.txt").write_bytes(content)
        with pytest.raises(ValueError, match=match):
            listed_paths("list.txt")


def test_names_of_many_files_of_one_name_take_no_time() -> None:
    """Each would be compared with all before it: 200 million look-ups."""
    names = output_names([Path(f"/{number}/cam/img.png") for number in range(20_000)])
    assert names[:3] == ["cam_img", "cam_img_2", "cam_img_3"]
    assert len(set(names)) == len(names)


def test_the_pixels_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(background, "PIXELS", 100)
    for weight, waiting in ((100, 1), (60, 1), (30, 3), (1, 4), (500, 1)):
        pulled = []

        def items(pulled=pulled):
            for item in range(20):
                pulled.append(item)
                yield item

        found = background.in_background(lambda item: item, items(), 4, lambda _, weight=weight: weight)
        assert next(found) == 0
        # One more was taken to see that it does not fit, unless the number was the bound.
        assert len(pulled) == waiting + (waiting < 4)
        assert [0, *found] == list(range(20))


# --- the command


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "one of the arguments --workdir --model is required"),
        (["--workdir=.", "--model=x"], 2, "argument --model: not allowed with argument --workdir"),
        (["--model=org/tiny", "--step=3"], 1, "--checkpoint and --step choose among a run's checkpoints"),
        (["--model=org/tiny", "--arrays=npy"], 1, "--arrays is 'npy'; it must be"),
        (["--model=org/tiny", "--format=tar"], 1, "--format is 'tar'; it must be"),
        (["--model=org/tiny", "--share=3/3"], 1, "the last 2/3"),
        (["--model=org/tiny", "--resolution=large"], 1, "resolution is 'large'; choose 'fit', 'native'"),
        (["--model=org/tiny", "--overlap=0.95"], 1, "overlap is 0.95"),
        (["--model=org/tiny", "--arrays=none", "--no_panels"], 1, "nothing is left to write"),
        (["--model=photos/p0.png"], 1, "is truncated, damaged or no StableHLO file"),
    ],
)
def test_wrong_options_are_named(
    arguments, code, message, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = ["predict", *arguments, "--output=out", "photos", f"--cache_dir={tmp_path / 'cache'}"]
    if code == 2:
        with pytest.raises(SystemExit) as caught:
            main(whole)
        assert caught.value.code == 2
    else:
        assert main(whole) == code
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


# --- processes

FLAGS = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
LAUNCHED = ("launch", "local", "--processes=2", "--devices-per-process=1", "--")


def start(*arguments: str, before: tuple[str, ...] = ()) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "sgw_jax", *before, "predict", *arguments],
        cwd=Path(__file__).parents[1],
        env={**os.environ, **FLAGS},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.multiprocess
@pytest.mark.parametrize("format", ["files", "array_record"])
def test_a_killed_process_loses_no_picture_and_none_is_there_twice(format: str, workdir: Path, tmp_path: Path) -> None:  # noqa: F811
    """Two that know nothing of each other, one of them killed for good; then two that form a program."""
    photos, out, count = write_photos(tmp_path / "photos", 400), tmp_path / "out", 400
    common = (f"--workdir={workdir}", f"--format={format}", "--arrays=png", "--no_panels", str(photos))
    here = (*common, f"--output={out}", f"--cache_dir={tmp_path / 'cache'}")
    pattern = "saliency/*.png" if format == "files" else "*.array_record"  # of the files the last
    doomed = start(*here, "--share=0/2")
    deadline = time.monotonic() + 240
    while not list(out.glob(pattern)):
        assert doomed.poll() is None, doomed.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    doomed.send_signal(signal.SIGKILL)
    doomed.communicate()
    done = {path: path.stat().st_mtime_ns for path in out.glob(pattern)}
    read = [name for name, _ in read_predictions(out)]
    assert 0 < len(read) < count / 2
    other = start(*here, "--share=1/2")
    said, _ = other.communicate(timeout=240)
    assert other.returncode == 0, said
    both = start(*here, before=LAUNCHED)
    said, _ = both.communicate(timeout=240)
    assert both.returncode == 0, said
    assert "going on" in said
    names = [name for name, _ in read_predictions(out)]
    assert sorted(names) == sorted(f"p{index}" for index in range(count))
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert not list(out.rglob("*.tmp"))
    whole = start(*common, f"--output={tmp_path / 'whole'}", f"--cache_dir={tmp_path / 'cache'}")
    said, _ = whole.communicate(timeout=240)
    assert whole.returncode == 0, said
    assert contents(out) == contents(tmp_path / "whole")
