"""The page in Chromium: a photograph in, six pictures, values and arrays out; what goes wrong leaves it serving."""

import contextlib
import http.client
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image
from test_demo import zeros_png

from sgw_jax.configs import base
from sgw_jax.demo.uploads import LARGEST_FILE
from sgw_jax.experiment.build import build
from sgw_jax.export.space import save_space
from sgw_jax.prediction.confidence_maps import confidence_maps
from sgw_jax.prediction.predictor import Predictor
from sgw_jax.run.saved_run import abstract_variables
from sgw_jax.sharding import make_mesh

pytest.importorskip("gradio", reason="the extra [demo]")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright, the browser's client")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]

TASK_NAMES = ("semseg", "depth", "normals", "edges", "saliency", "human_parts")
SIZE = (64, 96)
PATIENCE = 60_000  # milliseconds
READINGS = ".sgw-reading"
# Of a value: shown with two decimals, stored as float16 below 1, sent in steps of a range below 10.
ROUNDING = 0.005 + 2**-12 + 10 / 2**17
# Of an angle: shown in whole degrees, and of a vector that points straight up, where 1 - cos(angle) is stored.
TURN = 0.5 + math.degrees(math.sqrt(2 * 2**-12))
UNDER_WAY = "#sgw-result .progress-text"


@pytest.fixture(scope="module")
def predictor(tmp_path_factory: pytest.TempPathFactory) -> Predictor:
    """The smallest network of all six tasks, its parameters drawn at random."""
    config = base.get_config()
    config.tasks, config.interaction = TASK_NAMES, "kem"
    config.data.update({"size": SIZE, "lengths": {"train": 8, "validation": 0, "test": 0}, "threads": 1})
    config.backbones.vit.update({"width": 8, "depth": 4, "num_heads": 2, "patch_size": 16})
    config.interactions.kem.update({"num_slots": 2, "top_k": 4})
    config.channels, config.stride = 8, 8
    config.update({"steps": 2, "batch_size": 8, "checkpoint_every": 2, "eval_every": 2})
    experiment = build(config, tmp_path_factory.mktemp("cache"), mesh=make_mesh({}, jax.devices()[:1]))
    rng = np.random.default_rng(0)

    def drawn(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        value = rng.normal(0, 0.3, leaf.shape) if leaf.dtype == np.float32 else np.zeros(leaf.shape)
        return value.astype(leaf.dtype)

    variables = jax.tree.map(drawn, abstract_variables(experiment.model, SIZE))
    return Predictor(experiment.model, variables, experiment.tasks, SIZE, config=experiment.config, step=2)


@pytest.fixture(scope="module")
def model(predictor: Predictor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return predictor.save_pretrained(tmp_path_factory.mktemp("saved") / "tiny")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return listening.getsockname()[1]


@contextlib.contextmanager
def running(command: list[str], port: int, folder: Path, **variables: str) -> Iterator[subprocess.Popen]:
    """A server in a process of its own, once it answers; `folder` is where it starts, its home and its place for
    temporary files."""
    places = {name: folder / name for name in ("cwd", "home", "temporary")}
    for place in places.values():
        place.mkdir()
    cache = (
        Path(jax.config.jax_compilation_cache_dir or folder) / "pages"
    )  # of programs and fonts; all servers share it
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("GRADIO_")},
        "PYTHONPATH": str(Path(__file__).parent.parent),
        "HOME": str(places["home"]),
        "TMPDIR": str(places["temporary"]),
        "JAX_COMPILATION_CACHE_DIR": str(cache / "sgw_jax" / "xla"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
        "XDG_CACHE_HOME": str(cache),
        "MPLCONFIGDIR": str(cache),
        "HTTP_PROXY": "http://127.0.0.1:9",  # of the web outside, where nobody answers
        **variables,
    }
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=places["cwd"], env=environment, stdout=log, stderr=log)
    try:
        for _ in range(PATIENCE // 100):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10).close()
                break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.1)
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def demo(model: Path, port: int) -> list[str]:
    return [sys.executable, "-m", "sgw_jax", "demo", f"--model={model}", f"--port={port}"]


@pytest.fixture(scope="module")
def address(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of a page that all tests share: what one of them breaks, the next ones find."""
    port = free_port()
    folder = tmp_path_factory.mktemp("served")
    with running(demo(model, port), port, folder) as process:
        yield f"http://127.0.0.1:{port}/"
        assert process.poll() is None
    log = (folder / "log").read_text()
    assert "Traceback" not in log, log


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = ["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"]
    options += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
    with playwright.sync_playwright() as client:
        found = client.chromium.launch(executable_path=CHROMIUM, args=options)
        yield found
        found.close()


@pytest.fixture
def tab(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Opens the page; asserts at the end that nothing was asked of another server, and no script failed."""
    contexts, asked, wrong = [], [], []

    def opened(width: int = 1280, height: int = 860, at: str = address) -> Any:
        context = browser.new_context(viewport={"width": width, "height": height}, permissions=["camera"])
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        page.on("request", lambda request: asked.append(request.url))
        page.on("websocket", lambda socket: asked.append(socket.url))
        page.on("response", lambda found: wrong.append(f"{found.status} {found.url}") if found.status >= 400 else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(at)
        page.wait_for_selector("#sgw-photo input[type=file]", state="attached")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert asked
    assert not [url for url in asked if not url.startswith(("http://127.0.0.1:", "data:", "blob:"))]
    # Gradio asks after the progress of uploads that never began: a picture of the webcam, a file too large.
    assert not [what for what in wrong if "upload_progress?upload_id=" not in what]


def photograph(folder: Path, width: int, height: int) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), np.uint8)
    path = folder / "a photo.jpg"
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return path


def give(page: Any, path: Path) -> None:
    page.set_input_files("#sgw-photo input[type=file]", path)


def await_pictures(page: Any) -> None:
    page.wait_for_selector(".sgw-map")
    assert [figure.get_attribute("data-task") for figure in page.locator(".sgw-map").all()] == list(TASK_NAMES)
    assert page.evaluate("[...document.querySelectorAll('.sgw-map img')].every((image) => image.naturalWidth > 0)")


def await_readings(page: Any) -> list[str]:
    page.wait_for_function(
        f"[...document.querySelectorAll('{READINGS}')].every((one) => one.textContent) && "
        f"document.querySelectorAll('{READINGS}').length"
    )
    return page.locator(READINGS).all_inner_texts()


def numbers(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"-?\d+\.?\d*", text.replace("\u2212", "-"))]


def test_six_pictures_values_and_arrays(tab: Callable, tmp_path: Path) -> None:
    page, path = tab(), photograph(tmp_path, 96, 64)
    give(page, path)
    await_pictures(page)
    page.wait_for_selector("#sgw-download:not([disabled])")
    with page.expect_download() as download:
        page.click("#sgw-download")
    assert download.value.suggested_filename == "a photo.npz"
    with np.load(download.value.path(), allow_pickle=False) as file:
        arrays = dict(file)
    assert arrays.keys() == {*TASK_NAMES, "semseg_classes", "human_parts_classes"}
    assert {name: arrays[name].shape[:2] for name in TASK_NAMES} == dict.fromkeys(TASK_NAMES, (64, 96))

    for place, (row, column) in {".sgw-map[data-task=depth] img": (40, 70), "#sgw-photo img": (10, 20)}.items():
        box = page.locator(place).bounding_box()
        # The photograph's own frame may be wider than it.
        scale = min(box["width"] / 96, box["height"] / 64)
        left, top = box["x"] + (box["width"] - 96 * scale) / 2, box["y"] + (box["height"] - 64 * scale) / 2
        page.mouse.move(left + (column + 0.5) * scale, top + (row + 0.5) * scale)
        page.wait_for_timeout(300)
        read = dict(zip(TASK_NAMES, await_readings(page), strict=True))
        here = {name: arrays[name][row, column] for name in TASK_NAMES}
        for name in ("semseg", "human_parts"):
            assert read[name] == arrays[f"{name}_classes"][here[name]]
        assert read["depth"].endswith(" m")
        for name in ("depth", "edges", "saliency"):
            np.testing.assert_allclose(numbers(read[name]), [here[name]], rtol=0, atol=ROUNDING)
        *vector, across, up = numbers(read["normals"])
        np.testing.assert_allclose(vector, here["normals"], rtol=0, atol=ROUNDING)
        x, y, z = here["normals"].astype(np.float64)
        angles = np.degrees([np.arctan2(x, -z), np.arcsin(np.clip(-y, -1, 1))])
        np.testing.assert_allclose([across, up], np.abs(angles), rtol=0, atol=TURN)
        for angle, word in zip(angles, (("left", "right"), ("down", "up")), strict=True):
            assert abs(angle) < TURN or word[int(angle > 0)] in read["normals"]


def test_how_sure_the_network_is_and_tiles(tab: Callable, predictor: Predictor, tmp_path: Path) -> None:
    page = tab()
    give(page, photograph(tmp_path, 192, 128))
    await_pictures(page)
    first = page.locator(".sgw-map[data-task=depth]").get_attribute("data-codes")
    page.get_by_label("as it is, in tiles").click()
    page.wait_for_function(
        "(first) => document.querySelector('.sgw-map[data-task=depth]')?.dataset.codes !== first", arg=first
    )
    page.get_by_label("Show how sure it is").click()
    page.wait_for_selector(".sgw-map[data-task=normals_spread]")
    names = [*TASK_NAMES, *(shown.name for shown in confidence_maps(predictor.tasks))]
    assert len(names) > len(TASK_NAMES)
    assert [figure.get_attribute("data-task") for figure in page.locator(".sgw-map").all()] == names
    page.locator(".sgw-map[data-task=normals_spread] img").hover()
    read = dict(zip(names, await_readings(page), strict=True))
    assert re.fullmatch(r"\d+\.\d\d deg", read["normals_spread"])


def test_what_is_refused_leaves_it_serving(tab: Callable, tmp_path: Path) -> None:
    page = tab()
    (tmp_path / "text.jpg").write_text("just text")
    give(page, tmp_path / "text.jpg")
    page.get_by_text("text.jpg is no image that is read here").wait_for()
    (tmp_path / "large.png").write_bytes(zeros_png(20_000, 10_000))
    give(page, tmp_path / "large.png")
    page.get_by_text("large.png has more pixels than anybody's photograph").wait_for()
    assert not page.locator(".sgw-map").count()
    give(page, photograph(tmp_path, 96, 64))
    await_pictures(page)


def test_a_tab_closed_in_between_leaves_it_serving(tab: Callable, tmp_path: Path) -> None:
    page = tab()
    give(page, photograph(tmp_path, 2048, 1536))
    page.wait_for_selector(UNDER_WAY, state="attached")
    page.context.close()
    page = tab()
    give(page, photograph(tmp_path, 96, 64))
    await_pictures(page)


def test_a_photograph_of_the_webcam(tab: Callable) -> None:
    page = tab()
    page.click("#sgw-photo [aria-label='Capture from camera']")
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_selector("#sgw-photo video")
    page.wait_for_function("document.querySelector('#sgw-photo video')?.videoWidth > 0")
    page.click("#sgw-photo [aria-label='capture photo']")
    await_pictures(page)


def test_it_fits_a_phone(tab: Callable, tmp_path: Path) -> None:
    page = tab(390, 844)
    give(page, photograph(tmp_path, 96, 64))
    await_pictures(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.locator(".sgw-map[data-task=normals] img").click()
    assert await_readings(page)


def upload_status(address: str, content: bytes) -> int:
    head = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n\r\n'
    body = head + content + b"\r\n--x--\r\n"
    connection = http.client.HTTPConnection(urllib.parse.urlparse(address).netloc, timeout=60)
    kind = {"Content-Type": "multipart/form-data; boundary=x", "Content-Length": str(len(body))}
    with contextlib.closing(connection):
        connection.putrequest("POST", "/gradio_api/upload")
        for name, value in kind.items():
            connection.putheader(name, value)
        connection.endheaders()
        with contextlib.suppress(ConnectionError):  # it may answer before all has come
            connection.send(body)
        return connection.getresponse().status


def test_uploads_are_limited_and_other_files_are_not_given(
    tab: Callable, address: str, model: Path, tmp_path: Path
) -> None:
    page = tab()
    (tmp_path / "large.png").write_bytes(bytes(LARGEST_FILE + 1))
    give(page, tmp_path / "large.png")
    page.get_by_text("exceed the maximum allowed size").first.wait_for()
    assert upload_status(address, bytes(LARGEST_FILE + 1)) == 413  # who asks without the page
    for path in (model / "config.json", Path("/etc/passwd")):
        assert page.request.get(f"{address}gradio_api/file={path}").status in (403, 404)
    give(page, photograph(tmp_path, 96, 64))
    await_pictures(page)


def test_it_ends_on_ctrl_c_in_between_and_leaves_nothing(tab: Callable, model: Path, tmp_path: Path) -> None:
    port = free_port()
    with running(demo(model, port), port, tmp_path) as process:
        page = tab(at=f"http://127.0.0.1:{port}/")
        assert list((tmp_path / "temporary").iterdir())
        give(page, photograph(tmp_path, 2048, 1536))
        page.wait_for_selector(UNDER_WAY, state="attached")
        page.context.close()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0, (tmp_path / "log").read_text()
    assert "Traceback" not in (tmp_path / "log").read_text()
    for name in ("temporary", "cwd", "home"):
        assert not list((tmp_path / name).iterdir())


@pytest.mark.slow
def test_a_space_runs_by_its_own_app(tab: Callable, predictor: Predictor, tmp_path: Path) -> None:
    folder = save_space(predictor, tmp_path / "rooms", license="mit")
    assert {path.name for path in folder.iterdir()} == {"app.py", "requirements.txt", "README.md", "model"}
    port = free_port()
    with running([sys.executable, str(folder / "app.py")], port, tmp_path, GRADIO_SERVER_PORT=str(port)) as process:
        address = f"http://127.0.0.1:{port}/"
        page = tab(at=address)
        assert page.title() == "rooms"
        upload = {"path": "/etc/passwd", "orig_name": "passwd", "meta": {"_type": "gradio.FileData"}}
        asked = {"data": [upload, "shrunk, in one look", False], "fn_index": 0, "session_hash": "forged"}
        assert page.request.post(f"{address}gradio_api/queue/join", data=asked).ok
        told = page.request.get(f"{address}gradio_api/queue/data?session_hash=forged").text()
        assert '"success":false' in told
        assert "passwd is no image" not in told  # nobody read it
        give(page, photograph(tmp_path, 96, 64))
        await_pictures(page)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0, (tmp_path / "log").read_text()
