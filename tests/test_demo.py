"""The page without a browser: what it takes, the values that it sends, its text, its address, and the Space's files."""

import base64
import gzip
import html
import json
import re
import socket
import struct
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

from sgw_jax.__main__ import _parser, main
from sgw_jax.data_pipelines.errors import InputError, MissingPackageError
from sgw_jax.demo import codes, server, uploads, view
from sgw_jax.export import space
from sgw_jax.tasks import TASKS, Depth, SemSeg
from sgw_jax.tasks.normals import Normals

ROOT = Path(__file__).parent.parent


def zeros_png(width: int, height: int) -> bytes:
    """A black picture of one bit a pixel: two hundred million of them are 25 kB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compressobj()
    data = b"".join(rows.compress(bytes(1 + -(-width // 8))) for _ in range(height)) + rows.flush()
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


# --- uploads


@pytest.mark.parametrize("format", uploads.FORMATS)
def test_a_photograph_is_read_whatever_its_suffix(format: str, tmp_path: Path) -> None:
    path = tmp_path / "upload"
    Image.new("RGB", (6, 4), (200, 30, 90)).save(path, format=format)
    image = uploads.read_upload(path, "photo.jpg")
    assert image.shape == (4, 6, 3)
    assert image.dtype == np.uint8
    assert np.abs(image.astype(int) - (200, 30, 90)).max() <= 8  # JPEG's and WebP's loss


def refused(content: bytes, folder: Path, name: str = "photo.jpg") -> str:
    path = folder / "secret" / "upload"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(InputError) as found:
        uploads.read_upload(path, name)
    assert str(folder) not in str(found.value)  # nothing of the server's folders
    return str(found.value)


def test_what_is_no_image_is_refused(tmp_path: Path) -> None:
    assert refused(b"just text", tmp_path) == (
        "photo.jpg is no image that is read here; allowed are BMP, JPEG, PNG, WEBP."
    )


@pytest.mark.parametrize("format", ["GIF", "EPS", "TIFF"])
def test_formats_that_are_not_allowed_are_not_opened(format: str, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "image", format=format)
    assert "is no image that is read here" in refused((tmp_path / "image").read_bytes(), tmp_path)


@pytest.mark.parametrize(
    ("width", "height", "found"),
    [
        (20_000, 10_000, "more pixels than anybody's photograph"),  # beyond what PIL opens
        (12_000, 9_000, "more pixels than anybody's photograph"),  # PIL warns, which is an error here
        (10_000, 7_000, "10000 x 7000 pixels"),
    ],
)
def test_too_many_pixels_are_refused_by_the_header(width, height, found, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(uploads, "read_image", None)  # nothing is decoded
    message = refused(zeros_png(width, height)[:64], tmp_path, "large.png")
    assert message == f"large.png has {found}; allowed are 64 megapixels. Shrink it."


@pytest.mark.filterwarnings("default:Image size:PIL.Image.DecompressionBombWarning")
def test_where_the_library_only_warns_too_many_pixels_are_refused(tmp_path: Path) -> None:
    with pytest.warns(Image.DecompressionBombWarning):
        assert "12000 x 9000 pixels" in refused(zeros_png(12_000, 9_000)[:64], tmp_path)


def test_too_many_bytes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "LARGEST_FILE", 2**20)
    assert refused(bytes(2**21), tmp_path) == "photo.jpg has 2 MiB; allowed are 1. Save it smaller."


@pytest.mark.parametrize("kept", [24, 45])  # within the header, within the pixels
def test_a_truncated_file_is_refused(kept: int, tmp_path: Path) -> None:
    assert refused(zeros_png(40, 30)[:kept], tmp_path).startswith("photo.jpg")


def test_large_photographs_are_shrunk() -> None:
    assert uploads.shrunk(np.zeros((10, 4096, 3), np.uint8)).shape == (5, 2048, 3)
    image = np.zeros((2048, 7, 3), np.uint8)
    assert uploads.shrunk(image) is image


# --- values


def unpacked(found: codes.Codes) -> np.ndarray:
    """As the page's script reads them."""
    dtype = np.dtype("<u2" if found.array.itemsize == 2 else "u1")
    code = np.frombuffer(gzip.decompress(base64.b64decode(found.packed())), dtype).reshape(found.array.shape)
    missing = (code == codes.NO_VALUE) & (dtype.itemsize == 2)
    return np.where(missing, np.nan, np.asarray(found.low) + np.asarray(found.step) * code)


def test_numbers_come_back_to_half_a_step() -> None:
    values = np.random.default_rng(0).normal(size=(5, 7, 3)).astype(np.float32) * (1, 10, 1000)
    values[..., 1] = 0.25  # no range
    values[2, 3] = (np.nan, np.inf, -np.inf)
    found = codes.encode(values.astype(np.float32))
    known = np.isfinite(values)
    read = unpacked(found)
    np.testing.assert_array_equal(np.isfinite(read), known)
    # Half a step, and the rounding of the division and the product in float64.
    bound = np.asarray(found.step) / 2 * (1 + 1e-9)
    assert (np.abs(read - values.astype(np.float32))[known] <= np.broadcast_to(bound, values.shape)[known]).all()


def test_labels_come_back_as_they_are() -> None:
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(unpacked(codes.encode(labels))[..., 0], labels)


def test_a_map_without_a_value_says_so() -> None:
    assert np.isnan(unpacked(codes.encode(np.full((2, 2), np.nan, np.float32)))).all()


def test_pixels_are_picked_at_the_centres_of_even_parts() -> None:
    values = np.arange(6 * 12).reshape(6, 12)
    np.testing.assert_array_equal(codes.sampled(values, 4), values[[1, 4]][:, [1, 4, 7, 10]])
    np.testing.assert_array_equal(codes.sampled(values, 12), values)
    assert codes.sampled(np.zeros((1, 5000))).shape == (1, codes.GRID)


# --- text


def test_the_view_has_a_picture_a_task_and_takes_no_names_for_code() -> None:
    evil = "<script>${1}{{2}}`'\""
    tasks = [
        SemSeg(name="see<b>", num_classes=2, class_names=(evil, "road")),
        TASKS["depth"](),
        Normals(axes="opengl"),
        TASKS["edges"](),
    ]
    maps = {
        "see<b>": np.array([[0, 1], [0, 0]], np.uint8),
        "depth": np.array([[1, 2], [3, 5]], np.float32),
        "normals": np.broadcast_to(np.array([0, 0, 1], np.float32), (2, 2, 3)),
        "edges": np.array([[0, 0.25], [0.5, 1]], np.float32),
    }
    page = view.view(maps, tasks, evil) + view.refusal(evil) + view.heading(evil, tasks, evil)
    assert page.count("<figure") == page.count("data:image/png;base64,") == 4
    assert "<script" not in page
    assert "see<b>" not in page
    assert not re.search(r"[{}$`]", page)
    assert [tick for tick in ("1 m", "3 m", "5 m") if f"<span>{tick}</span>" in page] == ["1 m", "3 m", "5 m"]
    about = [json.loads(html.unescape(data)) for data in re.findall(r'data-about="([^"]*)"', page)]
    assert [found["kind"] for found in about] == ["labels", "depth", "vectors", "mask"]
    assert about[0]["classes"][0][0] == evil
    assert about[1]["unit"] == "m"
    assert about[2]["signs"] == [1, -1, -1]


def test_a_depth_without_a_valid_value_is_drawn() -> None:
    assert "no valid value" in view.view({"depth": np.zeros((2, 3), np.float32)}, [Depth()], "")


def test_the_rest_of_a_long_legend_is_counted() -> None:
    labels = np.arange(20, dtype=np.uint8)[None]
    page = view.view({"semseg": labels}, [SemSeg(num_classes=20)], "")
    assert "+ 9 more" in page
    assert page.count("</b>class ") == view.LISTED - 1


# --- the address and the command


@pytest.fixture
def taken() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield listening.getsockname()[1]


def test_a_port_in_use_is_named(taken: int, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(InputError, match=rf"--port: {taken} of 127\.0\.0\.1 is in use"):
        server.serve(None, port=taken)
    assert main(["demo", "--model=nowhere", f"--port={taken}"]) == 1  # before the model is looked for
    assert f"error: --port: {taken} of 127.0.0.1 is in use" in capsys.readouterr().err


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(InputError, match=r"--host: 192\.0\.2\.1 is no address of this machine"):
        server.check_address("192.0.2.1", 7860)


def test_without_gradio_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "sgw_jax.demo.page", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        free = listening.getsockname()[1]
    with pytest.raises(MissingPackageError, match=r'needs gradio, .*"sgw_jax\[demo\]"'):
        server.serve(None, port=free)


@pytest.mark.parametrize(
    "arguments", [[], ["--workdir=a", "--model=b"], ["--model=b", "--port=0"], ["--model=b", "--port=65536"]]
)
def test_arguments_that_cannot_be_are_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit, match="2"):
        _parser().parse_args(["demo", *arguments])
    assert "usage: sgw-jax demo" in capsys.readouterr().err


def test_the_page_is_this_machines_alone_unless_told() -> None:
    assert _parser().parse_args(["demo", "--model=b"]).host == server.HOST == "127.0.0.1"
    assert _parser().parse_args(["demo", "--model=b"]).port == server.PORT


# --- the Space


def metadata(folder: Path) -> dict[str, object]:
    """Of the card; YAML whose values are JSON."""
    _, head, _ = (folder / "README.md").read_text().split("---\n")
    return {key: json.loads(value) for key, value in (line.split(": ", 1) for line in head.splitlines())}


def test_a_space_that_loads_a_model_of_the_hub(tmp_path: Path) -> None:
    found = space.save_space(SimpleNamespace(), tmp_path / "page", license="mit", model="org/rooms")
    assert {path.name for path in found.iterdir()} == {"app.py", "requirements.txt", "README.md"}
    about = metadata(found)
    assert (about["sdk"], about["app_file"], about["license"]) == ("gradio", "app.py", "mit")
    assert about["models"] == ["org/rooms"]
    app = (found / "app.py").read_text()
    compile(app, "app.py", "exec")
    assert 'from_pretrained("org/rooms")' in app
    with pytest.raises(OSError, match="holds"):
        space.save_space(SimpleNamespace(), found, model="org/rooms")


def test_a_space_has_a_version_of_gradio_that_the_extra_allows() -> None:
    (line,) = re.findall(r'^DEMO = \["(.+?)"\]', (ROOT / "setup.py").read_text(), re.M)
    assert Requirement(line).specifier.contains(space.SDK)


@pytest.mark.parametrize("options", [{"model": "no name"}, {"model": 'a"/b'}, {"license": "Apache 2"}])
def test_names_that_can_be_none_are_refused(options: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError):
        space.save_space(SimpleNamespace(), tmp_path / "page", **options)
    assert not (tmp_path / "page").exists()
