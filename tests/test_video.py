"""Videos: frames in with their times, turned upright; panels out that browsers play; slots that last over frames."""

import functools
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from benchmarks.claims import flicker as measured
from benchmarks.measure import Results
from sgw_jax.__main__ import main
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.transforms import normalise
from sgw_jax.evaluation.flicker import flicker
from sgw_jax.interactions import KEM
from sgw_jax.interactions.none import NoInteraction
from sgw_jax.interactions.shared_workspace import WorkspaceInteraction
from sgw_jax.model import MultiTaskModel
from sgw_jax.pictures.film import Film
from sgw_jax.prediction import video_files
from sgw_jax.prediction.inputs import apart
from sgw_jax.prediction.options import Options
from sgw_jax.prediction.predictor import Predictor
from sgw_jax.prediction.slots import CarriedSlots
from sgw_jax.prediction.source import Source
from sgw_jax.prediction.video import predict_videos, predicted, survey_all
from sgw_jax.prediction.video_files import read_frames, survey, writing
from sgw_jax.tasks import Depth, Normals, Saliency, SemSeg

QUIET = Console(quiet=True)
SIZE = (32, 48)
RATE, TICK = Fraction(30000, 1001), Fraction(1, 30000)
COLOURS = np.array([[(255, 0, 0), (0, 255, 0)], [(0, 0, 255), (255, 255, 255)]], np.uint8)
NEAR = 8  # levels that Y'CbCr of 8 bits and the codec may move a flat colour by; a wrong matrix moves it by 20


class Backbone(nn.Module):
    """The image itself, at every stride."""

    @nn.compact
    def __call__(self, image, train=False):
        return {stride: image[:, ::stride, ::stride] for stride in (4, 8)}


def network(interaction=None, tasks=None, **options) -> Predictor:
    tasks = tasks or (Depth(),)
    model = MultiTaskModel(tasks, Backbone(), interaction or KEM(3, top_k=5), channels=8, **options)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *SIZE, 3)))
    return Predictor(model, variables, tasks, SIZE, batch_size=2)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return network(tasks=(SemSeg(num_classes=3), Depth()))


def frame(index: int, size: tuple[int, int] = (40, 64)) -> np.ndarray:
    """Four quarters of different colours, the last of them darker from frame to frame."""
    quarters = COLOURS.copy()
    quarters[1, 1] = 250 - 40 * index
    rows, columns = (np.arange(length) * 2 // length for length in size)
    return quarters[rows[:, None], columns]


def clip(path: Path, times=(0, 1001, 2002, 4004, 5005, 6006), size: tuple[int, int] = (40, 64)) -> Path:
    """Six frames at 30000 / 1001 frames a second, with a pause after the third."""
    with writing(path, size, RATE, TICK) as write:
        for index, time in enumerate(times):
            write(frame(index, size), time, 2 * 1001 if index == 2 else 1001)
    return path


@pytest.fixture(scope="module")
def movie(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip(tmp_path_factory.mktemp("clip") / "a:%03d [b].mp4")  # no name is a pattern, a protocol or markup


# --- files


def test_frames_come_back_with_their_times(movie: Path) -> None:
    found = list(read_frames(movie))
    assert [one.ticks for one in found] == [0, 1001, 2002, 4004, 5005, 6006]
    for index, one in enumerate(found):
        difference = one.image.astype(int) - frame(index)
        assert np.abs(difference[4:16, 4:28]).max() <= NEAR  # inside a quarter: colours bleed over their edges
        assert np.abs(difference[24:36, 36:60]).max() <= NEAR
    known = survey(movie)
    assert (known.frames, known.size, known.tick, known.notes) == (6, (40, 64), TICK, ())
    assert known.rate == Fraction(6 * 30000, 7007)  # six frames until the last one ends


def test_what_is_written_plays_in_browsers(movie: Path) -> None:
    with av.open(f"file:{movie}") as container:
        stream = container.streams.video[0]
        assert (stream.codec.name, stream.format.name) == ("h264", "yuv420p")
        assert (stream.codec_context.colorspace, stream.codec_context.color_range) == (1, 1)  # BT.709, limited
        assert stream.frames == 6
    content = movie.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # it starts before it is loaded


def test_odd_sides_repeat_their_last_pixels(tmp_path: Path) -> None:
    known = survey(clip(tmp_path / "odd.mp4", size=(39, 61)))
    assert known.size == (40, 62)
    (first, *_) = read_frames(tmp_path / "odd.mp4")
    assert np.abs(first.image[-1, 36:].astype(int) - frame(0)[-1, -1]).max() <= NEAR


@pytest.mark.parametrize(
    ("matrix", "upright"),
    [
        ((0, 1, -1, 0), lambda image: np.rot90(image, -1)),  # phones held upright
        ((-1, 0, 0, -1), lambda image: np.rot90(image, 2)),
        ((0, -1, 1, 0), np.rot90),
        ((-1, 0, 0, 1), np.fliplr),  # selfies
    ],
)
def test_turned_as_the_header_says(matrix, upright, movie: Path, tmp_path: Path) -> None:
    content = movie.read_bytes()
    start = content.index(b"tkhd") + 44
    (a, b, c, d) = (65536 * value for value in matrix)
    turned = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path = tmp_path / "turned.mp4"
    path.write_bytes(content[:start] + turned + content[start + 36 :])
    (plain, *_), (found, *_) = read_frames(movie), read_frames(path)
    np.testing.assert_array_equal(found.image, upright(plain.image))
    assert survey(path).size == upright(plain.image).shape[:2]


def test_only_turns_by_right_angles() -> None:
    with pytest.raises(video_files.WrongFileError, match="turned by the matrix"):
        video_files.turned(frame(0), (46341, 46341, 0, -46341, 46341, 0, 0, 0, 1 << 30))


def test_pixels_become_square(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "wide.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 40, "yuv420p"
        stream.codec_context.sample_aspect_ratio = Fraction(4, 3)
        container.mux(stream.encode(av.VideoFrame.from_ndarray(frame(0), "rgb24")))
        container.mux(stream.encode())
    assert survey(tmp_path / "wide.mp4").size == (40, 85)


def test_what_is_lost_is_said(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "loud.mp4"), "w") as container:
        stream, sound = container.add_stream("libx264", rate=25), container.add_stream("aac", rate=48000)
        stream.width, stream.height, stream.pix_fmt = 64, 40, "yuv420p"
        stream.codec_context.color_trc = 16
        samples = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), format="fltp", layout="mono")
        samples.sample_rate = 48000
        container.mux([*stream.encode(av.VideoFrame.from_ndarray(frame(0), "rgb24")), *stream.encode()])
        container.mux([*sound.encode(samples), *sound.encode()])
    first, second = survey(tmp_path / "loud.mp4").notes
    assert first == "its sound is left out"
    assert second.startswith("it is HDR (PQ) and read without tone mapping")


def test_frames_of_one_size(movie: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    upright = video_files.Reader._upright
    sizes = iter(range(6))
    monkeypatch.setattr(video_files.Reader, "_upright", lambda *given: upright(*given)[next(sizes) // 3 :])
    with pytest.raises(InputError, match="one whose frame 3 has 64 x 39 pixels after 64 x 40"):
        survey(movie)


def with_codec(path: Path, codec: str, count: int = 30) -> Path:
    """Noise, so that a part of the file is a part of the frames."""
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for _ in range(count):
            image = random.integers(0, 255, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, "rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    ("suffix", "codec"), [(".mkv", "libx264"), (".webm", "libvpx-vp9"), (".avi", "mpeg4"), (".mov", "libx264")]
)
def test_formats_whole_and_cut_off(suffix: str, codec: str, tmp_path: Path) -> None:
    path = with_codec(tmp_path / f"whole{suffix}", codec)
    known = survey(path)
    assert (known.frames, known.size, known.rate) == (30, (48, 64), 25)
    assert video_files.SAMPLES <= len(known.samples) < 2 * video_files.SAMPLES
    times = [one.ticks * known.tick for one in read_frames(path)]
    assert times == [Fraction(index, 25) for index in range(30)]
    cut = tmp_path / f"cut{suffix}"
    cut.write_bytes(path.read_bytes()[: path.stat().st_size * 6 // 10])
    with pytest.raises(InputError, match=rf"cut\{suffix}, a video: .*(cannot be decoded|ends after|damaged after)"):
        survey(cut)


def test_cut_between_two_frames(movie: Path, tmp_path: Path) -> None:
    """The index in front promises what is not there; no frame is damaged."""
    with av.open(f"file:{movie}") as container:
        last = max((packet.pts, packet.pos) for packet in container.demux() if packet.size)[1]
    (tmp_path / "cut.mp4").write_bytes(movie.read_bytes()[:last])
    with pytest.raises(
        InputError, match=r"cut\.mp4, a video: it is one that ends after \d frames of 6; allowed: a whole"
    ):
        survey(tmp_path / "cut.mp4")


def test_a_trimmed_video_is_whole(tmp_path: Path) -> None:
    """An edit list, as phones write when a clip is trimmed, shows fewer frames than the file holds."""
    content = with_codec(tmp_path / "whole.mov", "libx264").read_bytes()
    place = content.index(b"elst") + 12
    (_, start) = struct.unpack(">Ii", content[place : place + 8])
    (tmp_path / "trimmed.mov").write_bytes(content[:place] + struct.pack(">Ii", 800, start) + content[place + 8 :])
    assert survey(tmp_path / "trimmed.mov").frames == 20  # 0.8 s


@pytest.mark.parametrize(
    "content",
    [b"", b"a text\n" * 50, b"#EXTM3U\n#EXTINF:1,\nfile:///etc/hostname\n", b"ffconcat version 1.0\nfile other.mp4\n"],
    ids=["empty", "text", "playlist", "list"],
)
def test_what_is_no_video(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(content)
    with pytest.raises(InputError, match=r"x\.mp4, a video: cannot be decoded"):
        survey(tmp_path / "x.mp4")


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.mp4")
    with pytest.raises(InputError, match="regular file"):
        survey(tmp_path / "x.mp4")


def test_nothing_under_the_name_when_killed(tmp_path: Path) -> None:
    code = """
import sys, os, numpy as np
from fractions import Fraction
from pathlib import Path
from sgw_jax.prediction.video_files import writing
with writing(Path(sys.argv[1]), (48, 64), Fraction(25), Fraction(1, 25)) as write:
    for index in range(200):
        write(np.random.default_rng(index).integers(0, 255, (48, 64, 3), dtype=np.uint8), index, 1)
    os.kill(os.getpid(), 9)
"""
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x.mp4")], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "x.mp4").exists()
    assert [path.suffix for path in tmp_path.iterdir()] == [".tmp"]


def test_an_error_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "x.mp4").write_bytes(b"earlier")
    with (
        pytest.raises(ValueError, match="Expected numpy array"),
        writing(tmp_path / "x.mp4", (40, 64), RATE, TICK) as write,
    ):
        write(np.zeros((40, 64), np.uint8), 0, 1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"x.mp4": b"earlier"}


# --- prediction


def test_maps_are_those_of_the_decoded_frames(predictor: Predictor, movie: Path) -> None:
    found = list(predicted(predictor, movie))
    assert [one.ticks for one, _ in found] == [one.ticks for one in read_frames(movie)]
    for (_, maps), one in zip(found, read_frames(movie), strict=True):
        for name, expected in predictor(one.image).items():
            np.testing.assert_array_equal(maps[name], expected)


def test_few_frames_are_held(predictor: Predictor, movie: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = 0

    def endless(path: Path) -> Iterator[video_files.Frame]:
        nonlocal given
        (first, *_) = read_frames(path)
        while True:
            given += 1
            yield first

    monkeypatch.setattr("sgw_jax.prediction.video.read_frames", endless)
    stream = predicted(predictor, movie)
    for _ in range(6):
        next(stream)
    assert given == 6  # three batches of two


def test_panels_of_one_layout(predictor: Predictor, movie: Path, tmp_path: Path) -> None:
    videos = survey_all([movie], QUIET)
    (video,) = videos.values()
    (written,) = predict_videos(predictor, videos, tmp_path, QUIET)
    assert written == tmp_path / f"{movie.stem}.mp4"
    known = survey(written)
    assert (known.frames, known.rate, known.tick) == (6, video.rate, TICK)
    assert [one.ticks for one in read_frames(written)] == [one.ticks for one in read_frames(movie)]
    samples = predictor(list(video.samples))
    film = Film((40, 64), predictor.tasks, {name: np.concatenate(maps) for name, maps in samples.items()}, movie.name)
    for (one, maps), shown in zip(predicted(predictor, movie), read_frames(written), strict=True):
        panel = film.panel(one.image, maps)
        assert panel.shape[:2] == film.size
        height, width = film.size
        difference = np.abs(shown.image[:height, :width].astype(int) - panel)
        assert difference.mean() < NEAR  # text and edges lose colour, areas do not


def test_one_task(predictor: Predictor, movie: Path, tmp_path: Path) -> None:
    (written,) = predict_videos(predictor, survey_all([movie], QUIET), tmp_path, QUIET, show="depth")
    assert written.name == f"{movie.stem}_depth.mp4"
    assert survey(written).size == (40, 64)
    with pytest.raises(InputError, match=r"--video=height: choose panels, or one of .* maps: semseg, depth"):
        predict_videos(predictor, {}, tmp_path, QUIET, show="height")


def test_colours_mean_the_same_in_every_frame() -> None:
    """A frame of one depth is coloured by the samples' range, beyond which the colours of its ends stand."""
    depth = Depth()
    film = Film((4, 4), [depth], {"depth": np.array([[1.0, 3.0]], np.float32)})
    blank = np.zeros((4, 4, 3), np.uint8)
    ends = depth.draw(np.array([[1.0, 3.0]], np.float32))[0]
    for metres, colour in ((1, ends[0]), (3, ends[1]), (0.5, ends[0]), (9, ends[1])):
        maps = {"depth": np.full((4, 4), metres, np.float32)}
        np.testing.assert_array_equal(film.picture(depth, maps), np.broadcast_to(colour, (4, 4, 3)))
        panel = film.panel(blank, maps)
        assert np.all(panel == colour, axis=-1).any()
    low, high = (film.panel(blank, {"depth": np.full((4, 4), metres, np.float32)}) for metres in (1, 3))
    changed = np.argwhere(np.any(low != high, axis=-1))
    assert len(changed) == film._tile[0] * film._tile[1]  # the picture alone


def test_legends_name_what_occurs_first() -> None:
    task = SemSeg(num_classes=40, class_names=tuple(f"class {index}" for index in range(40)))
    film = Film((40, 64), [task], {"semseg": np.full((4, 4), 39, np.uint8)})
    other = Film((40, 64), [task], {"semseg": np.full((4, 4), 38, np.uint8)})
    assert film.size == other.size
    assert np.any(film._base != other._base)


# --- slots that last


def by_hand(predictor: Predictor, images: list[np.ndarray], share: float) -> list[dict[str, np.ndarray]]:
    """The loop over module.apply, for images of the network's size."""
    model, variables = predictor.module, predictor.variables
    apply = jax.jit(functools.partial(model.apply, return_slots=True))
    slots, found = model.initial_slots(variables["params"]), []
    for image in images:
        predictions, left = apply(variables, normalise(image)[None].astype(np.float32), slots=slots)
        learned = model.initial_slots(variables["params"])
        slots = {stride: share * left[stride] + (1 - share) * learned[stride] for stride in left}
        found.append({task.name: np.asarray(task.decode(predictions[task.name]))[0] for task in predictor.tasks})
    return found


@pytest.mark.parametrize(("options", "share"), [({}, 0.5), ({"scales": (8,)}, 1.0)], ids=["one scale", "two"])
def test_carried_slots_are_the_loop_by_hand(options, share: float) -> None:
    predictor = network(**options)
    images = [frame(index, SIZE) for index in range(3)]
    carried = CarriedSlots(predictor.module, predictor.variables, share)
    seeing = predictor.with_network(carried)
    expected = by_hand(predictor, images, share)
    for _ in range(2):  # the second video starts anew
        for maps, wanted in zip(seeing.stream(images), expected, strict=True):
            # Two programs of the same sums of float32, of values of order one.
            np.testing.assert_allclose(maps["depth"], wanted["depth"], rtol=0, atol=1e-5)
        carried.restart()
    first, last = predictor([images[0], images[2]])["depth"]
    np.testing.assert_allclose(first, expected[0]["depth"], rtol=0, atol=1e-5)  # the first frame starts as an image
    assert np.abs(last - expected[2]["depth"]).max() > 1e-4  # what is carried is seen


@pytest.mark.parametrize(
    ("interaction", "options", "strides"),
    [
        (KEM(3, top_k=5, slot_dim=6), {"scales": (8,), "persist": True}, [8]),
        (KEM(3, top_k=5, slot_dim=6), {"scales": (8,)}, [8, 4]),
        (WorkspaceInteraction(3), {}, [4]),
    ],
    ids=["persist", "scales", "workspace"],
)
def test_slots_left_fit_those_that_start(interaction, options, strides: list[int]) -> None:
    model = MultiTaskModel((Depth(),), Backbone(), interaction, channels=8, **options)
    assert list(model.starts) == strides

    def run(image):
        variables = model.init(jax.random.key(0), image)
        start = model.initial_slots(variables["params"], 2)
        return start, model.apply(variables, image, slots=start, return_slots=True)[1]

    start, left = jax.eval_shape(run, jnp.zeros((2, *SIZE, 3)))
    width = 6 if isinstance(interaction, KEM) else 8
    assert {stride: value.shape for stride, value in left.items()} == dict.fromkeys(strides, (2, 3, width))
    assert start == left


def test_networks_without_slots_refuse(predictor: Predictor) -> None:
    with pytest.raises(InputError, match=r"carry_slots needs a network whose interaction has slots .* NoInteraction"):
        CarriedSlots(network(NoInteraction()).module, {})
    for share in (0, 1.5, True, "all"):
        with pytest.raises(InputError, match="carry_slots is"):
            CarriedSlots(predictor.module, predictor.variables, share)
    image = jnp.zeros((1, *SIZE, 3))
    with pytest.raises(InputError, match="return_slots needs an interaction with slots; NoInteraction has none"):
        jax.eval_shape(lambda: network(NoInteraction()).module.init(jax.random.key(0), image, return_slots=True))
    with pytest.raises(InputError, match=r"slots of the strides \[16\]; those that start from slots are \[4\]"):
        predictor.module.apply(predictor.variables, image, slots={16: jnp.zeros((1, 3, 8))})


def test_confidence_is_drawn_too(predictor: Predictor, movie: Path, tmp_path: Path) -> None:
    options = Options(confidence=True)
    videos = survey_all([movie], QUIET)
    (written,) = predict_videos(predictor, videos, tmp_path, QUIET, show="semseg_entropy", options=options)
    assert (written.name, survey(written).size) == (f"{movie.stem}_semseg_entropy.mp4", (40, 64))


def test_carried_slots_take_one_pass_a_frame(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="with --resolution or --flip there are several"):
        predict_videos(predictor, {}, tmp_path, QUIET, carry_slots=1.0, options=Options(flip=True))


# --- flicker


def test_flicker_by_hand() -> None:
    labels = np.array([[0, 1], [2, 2]], np.uint8)
    assert flicker(SemSeg(num_classes=3), labels, np.array([[0, 1], [2, 0]], np.uint8)) == {"changed": 25.0}
    before, after = np.array([[1.0, 3.0]], np.float32), np.array([[1.5, 3.0]], np.float32)
    assert flicker(Depth(), before, after) == {"absolute": 0.25, "relative": pytest.approx(100 * 0.5 / 4.25)}
    assert flicker(Saliency(), before / 4, after / 4) == {"absolute": 0.0625}
    turn = np.radians([0, 1e-4, 90])
    vectors = np.stack([np.sin(turn), np.zeros(3), np.cos(turn)], -1)[None]
    still = np.broadcast_to(vectors[:, :1], vectors.shape)
    assert flicker(Normals(), still, vectors)["angle"] == pytest.approx((1e-4 + 90) / 3, rel=1e-9)
    for task, still in ((SemSeg(num_classes=3), labels), (Depth(), before), (Normals(), vectors)):
        assert set(flicker(task, still, still).values()) == {0.0}
    with pytest.raises(InputError, match="maps of depth have shapes"):
        flicker(Depth(), before, before[:, :1])


def test_the_page_has_the_measurements() -> None:
    table = "\n".join(measured.table(Results("flicker").load()["rows"]))
    page = Path(__file__).parent.parent / "docs" / "deploy.md"
    assert table in page.read_text(encoding="utf-8"), f"docs/deploy.md lacks\n{table}"


# --- the command


def test_images_and_videos_apart(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.MOV", "c.png", "._a.mp4", "notes.txt"):
        (tmp_path / name).touch()
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "d.webm").touch()
    (tmp_path / "none").mkdir()
    images, videos = apart([tmp_path, tmp_path / "a.mp4", tmp_path / "only", tmp_path / "none", "photo.jpg"])
    assert images == [tmp_path, tmp_path / "none", Path("photo.jpg")]
    assert videos == [tmp_path / "a.mp4", tmp_path / "b.MOV", tmp_path / "only" / "d.webm"]
    with pytest.raises(FileNotFoundError, match=r"e\.mp4 does not exist"):
        apart([tmp_path / "e.mp4"])


def test_the_command(
    predictor: Predictor, movie: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(Source, "load", lambda _: predictor)
    (tmp_path / "bad.mp4").write_bytes(b"text")
    output, cache = tmp_path / "out", f"--cache_dir={tmp_path / 'cache'}"
    command = ["predict", f"--workdir={tmp_path}", f"--output={output}", cache, "--traceback"]
    assert main([*command, str(movie), str(tmp_path / "bad.mp4")]) == 1
    assert "1 of 2 videos cannot be read, and nothing was written" in capfd.readouterr().err
    assert not output.exists()
    assert (
        main([*command, "--skip_bad", "--video=depth", "--carry_slots=0.5", str(movie), str(tmp_path / "bad.mp4")]) == 0
    )
    assert [path.name for path in output.iterdir()] == [f"{movie.stem}_depth.mp4"]
    assert "left out: " in capfd.readouterr().err
    assert main([*command[:2], f"--output={movie.parent}", *command[3:], str(movie)]) == 1
    assert "would replace the input" in capfd.readouterr().err
    assert main([*command, "--carry_slots=1", "photo.jpg"]) == 1
    assert "--carry_slots is for videos" in capfd.readouterr().err
    for option in ("--arrays=png", "--format=array_record", "--no_panels"):
        assert main([*command, option, str(movie)]) == 1
        assert "--arrays, --format and --no_panels are for images" in capfd.readouterr().err
