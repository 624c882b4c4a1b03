"""Videos as files: upright RGB frames with their times out of what cameras write, H.264 that browsers play into mp4."""

import contextlib
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Console

from sgw_jax.data_pipelines import atomic
from sgw_jax.data_pipelines.errors import InputError, extra_named, files_named
from sgw_jax.data_pipelines.progress import counted
from sgw_jax.data_pipelines.readers import WrongFileError, require_regular

with extra_named("prediction of videos", "video"):
    import av
    from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

ALLOWED = "mp4, mov, mkv, webm or avi with a video in it"
WHOLE = "a whole file; copy or record it again"
UNCERTAIN = Fraction(1, 4)  # seconds that the end may be off where a header counts no frames
# FFmpeg would try all that it knows on a file: playlists that name other files, pictures, text as terminal graphics.
DEMUXERS = {"format_whitelist": "mov,matroska,avi", "protocol_whitelist": "file"}
LENIENT: Any = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}  # titles in Latin-1
UNSPECIFIED = 2  # a matrix or transfer function that the file does not tell
HDR = {16: "PQ", 18: "HLG"}  # transfer functions of more than 8 bits
HIGH_DEFINITION = 720  # rows from which players take untagged colours for BT.709, below for BT.601
QUALITY = {"crf": "18", "preset": "medium"}  # of x264: to the eye as the original
SAMPLES = 8  # frames held of a survey at least, once there are so many, and less than twice as many
SAMPLE_SIDE = 512  # pixels, of their longer side

Write = Callable[[np.ndarray, int, int], None]


@dataclass(frozen=True)
class Frame:
    """One picture of a video.

    image: RGB uint8 (height, width, 3), upright, of square pixels. ticks: its time, in the video's `tick` seconds.
    lasts: how long it is shown, likewise.
    """

    image: np.ndarray
    ticks: int
    lasts: int


@dataclass(frozen=True)
class Video:
    """What `survey` knows of a video that can be read to its end.

    frames: their number. size: (height, width) of each, upright. rate: frames in a second, on average. tick: unit of
    the frames' times, in seconds. samples: frames spread evenly over it, of at most SAMPLE_SIDE pixels. notes: what its
    user should know, a sentence each.
    """

    path: Path
    frames: int
    size: tuple[int, int]
    rate: Fraction
    tick: Fraction
    samples: tuple[np.ndarray, ...]
    notes: tuple[str, ...]


def survey(path: Path, console: Console | None = None) -> Video:
    """Decodes a whole video, which takes a small part of what prediction takes, so that no surprise comes later.

    Args:
      path: of the video.
      console: of the progress; None shows none.

    Returns:
      What is to be known beforehand, with a few of its frames.

    Raises:
      InputError: names the file: it is no video, ends early, or its frames are of different sizes.
    """
    samples: list[np.ndarray] = []
    stride, count, size = 1, 0, (0, 0)
    with opened(path) as video:
        frames = counted(video.frames(), f"check {path.name}", video.told, console)
        for count, frame in enumerate(frames, 1):
            size = frame.image.shape[:2]
            if (count - 1) % stride == 0:
                samples.append(_reduced(frame.image))
            if len(samples) == 2 * SAMPLES:  # every other one: they stay spread evenly, however long it is
                samples, stride = samples[::2], 2 * stride
        return Video(path, count, size, video.rate, video.tick, tuple(samples), video.notes())


def read_frames(path: Path) -> Iterator[Frame]:
    """The frames of a video, one after another, as the survey saw them."""
    with opened(path) as video:
        yield from video.frames()


@contextlib.contextmanager
def opened(path: Path) -> Iterator["Reader"]:
    """The video as a `Reader`; whatever goes wrong with it, here and in the block's reading, names the file.

    Raises:
      InputError: it is no video, is damaged, ends early, or is none of the formats.
    """
    try:
        require_regular(path)
        # A protocol of its own, or a colon in the name would be taken for one.
        with av.open(f"file:{path}", options=dict(DEMUXERS), **LENIENT) as container:
            yield Reader(container)
    except WrongFileError as wrong:
        raise InputError(f"{path}, a video: {wrong}") from None
    except av.FFmpegError as error:
        reason = error.strerror or type(error).__name__
        raise InputError(f"{path}, a video: cannot be decoded ({reason}); allowed: {ALLOWED}.") from error


class Reader:
    """Frames of an open container's best video; pictures that lie beside music, and audio, are left out."""

    def __init__(self, container: Any):
        self._container = container
        self._stream = container.streams.best("video")
        if self._stream is None:
            raise WrongFileError("a file without a video", ALLOWED)
        self._stream.thread_type = "AUTO"
        # PyAV 19 has rationals of its own, which cannot do all that fractions do.
        self.rate = Fraction(self._stream.average_rate or self._stream.guessed_rate or 25)
        self.tick = Fraction(self._stream.time_base)
        self.told = self._stream.frames or None

    def notes(self) -> tuple[str, ...]:
        """What is lost of the video: its sound, and the range of HDR."""
        notes = ["its sound is left out"] if self._container.streams.audio else []
        if transfer := HDR.get(self._stream.codec_context.color_trc):
            notes.append(f"it is HDR ({transfer}) and read without tone mapping, which makes its colours pale")
        return tuple(notes)

    def frames(self) -> Iterator[Frame]:
        """All frames in the order of their times, which begin at 0 and always grow."""
        matrix: tuple[int, ...] | None = None
        first, last, size, number = None, -1, None, 0
        for frame in self._decoded():
            matrix = _display_matrix(frame) or matrix
            image = self._upright(frame, matrix)
            if size is not None and image.shape != size:
                raise WrongFileError(
                    f"one whose frame {number} has {_size(image.shape)} pixels after {_size(size)}",
                    "frames of one size",
                )
            size = image.shape
            # Without a time (raw streams in avi) a frame follows the one before at the video's rate.
            ticks = round(number / self.rate / self.tick) + (first or 0) if frame.pts is None else frame.pts
            first = ticks if first is None else first
            last = max(ticks - first, last + 1)  # what repeats a time, as packed avi does, comes a tick later
            yield Frame(image, last, frame.duration or max(1, round(1 / self.rate / self.tick)))
            number += 1
        if not number:
            raise WrongFileError("a video without frames", ALLOWED)

    def _decoded(self) -> Iterator[Any]:
        """The decoder's frames; raises where the file has fewer than its header says."""
        packets, end, before, longest = 0, 0, None, 0
        for packet in self._container.demux(self._stream):
            if packet.is_corrupt:
                raise WrongFileError(f"damaged after {packets} frames", WHOLE)
            if packet.size:
                packets += 1
                time = packet.dts if packet.pts is None else packet.pts
                end = max(end, (time or 0) + (packet.duration or 0))
                longest = max(longest, 0 if before is None or packet.dts is None else packet.dts - before)
                before = packet.dts
            yield from packet.decode()
        # A trimmed file has more than it shows, and an odd header counts more than there is: time must be missing, too.
        ends, unsure = self._ends(), 1 / self.rate / 2 if self.told else max(UNCERTAIN, longest * self.tick)
        if ends is not None and end * self.tick < ends - unsure and not (self.told and packets >= self.told):
            told = f" of {self.told}" if self.told else f", short of its {float(ends):.4g} s"
            raise WrongFileError(f"one that ends after {packets} frames{told}", WHOLE)

    def _ends(self) -> Fraction | None:
        """When the last frame ends, in seconds, as the header says; None where it does not."""
        stream, container = self._stream, self._container
        if stream.duration is not None:
            return ((stream.start_time or 0) + stream.duration) * self.tick
        if told := re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", stream.metadata.get("DURATION", "")):  # matroska
            hours, minutes, seconds = map(Fraction, told.groups())
            return 3600 * hours + 60 * minutes + seconds
        alone = len(container.streams) == 1 and container.duration is not None
        return Fraction(container.duration, av.time_base) if alone else None

    def _upright(self, frame: Any, matrix: tuple[int, ...] | None) -> np.ndarray:
        untagged = Colorspace.ITU709 if frame.height >= HIGH_DEFINITION else Colorspace.ITU601
        source = {"src_colorspace": untagged} if frame.colorspace == UNSPECIFIED else {}
        image = frame.reformat(format="rgb24", **source).to_ndarray()
        aspect = self._stream.sample_aspect_ratio or 1
        if aspect != 1:  # DVDs, 1440 x 1080: the network knows square pixels only
            width = max(1, round(image.shape[1] * aspect))
            image = cv2.resize(image, (width, image.shape[0]), interpolation=cv2.INTER_LINEAR)
        return image if matrix is None else np.ascontiguousarray(turned(image, matrix))


def turned(image: np.ndarray, matrix: tuple[int, ...]) -> np.ndarray:
    """The picture as it is shown, by the display matrix ((a, b, u), (c, d, v), (x, y, w)) of ISO 14496-12.

    A point (x, y) is shown at (a x + c y, b x + d y), with y downwards.

    Raises:
      WrongFileError: the matrix turns by no right angle.
    """
    across, down = (matrix[0], matrix[4]), (matrix[3], matrix[1])
    if not any(down) and all(across):
        horizontal, vertical = across
    elif not any(across) and all(down):
        image, (horizontal, vertical) = np.swapaxes(image, 0, 1), down
    else:
        raise WrongFileError(f"turned by the matrix {matrix}", "turns by right angles, and mirror images")
    return image[:: 1 if vertical > 0 else -1, :: 1 if horizontal > 0 else -1]


@contextlib.contextmanager
def writing(path: Path, size: tuple[int, int], rate: Fraction, tick: Fraction) -> Iterator[Write]:
    """A function that appends a frame, (image, ticks, lasts), to an mp4, which takes its place when the block ends
    without an error: a killed run leaves nothing under the name.

    H.264 of 4:2:0 and 8 bits in BT.709, which every browser plays, with the index in front, so that it starts before it
    is loaded. Colours are halved along both axes, so that sides must be even: an odd one repeats its last pixels.

    Args:
      size: (height, width) of the images, RGB uint8.
      rate: frames in a second, on average.
      tick: unit of the times, in seconds.

    Raises:
      FileError: it cannot be written.
    """
    height, width = (length + length % 2 for length in size)
    padding = ((0, height - size[0]), (0, width - size[1]), (0, 0))
    with (
        files_named(f"{path} cannot be written"),
        atomic.replacing(path, contended=True) as temporary,
        av.open(f"file:{temporary}", "w", format="mp4", options={"movflags": "+faststart"}) as container,
    ):
        stream = container.add_stream("libx264", rate=rate.limit_denominator(1001), options=dict(QUALITY))
        codec = stream.codec_context
        codec.width, codec.height, codec.pix_fmt = width, height, "yuv420p"
        codec.time_base = stream.time_base = tick
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709

        shown: dict[Any, int] = {}  # of the frames that the encoder holds, by their times

        def mux(frame: Any = None) -> None:
            for packet in stream.encode(frame):
                packet.duration = shown.pop(packet.pts)  # or the last frame would last as long as the average
                container.mux(packet)

        def write(image: np.ndarray, ticks: int, lasts: int) -> None:
            if any(map(any, padding)):
                image = np.pad(image, padding, mode="edge")
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), "rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709)
            frame.pts, frame.time_base = ticks, tick
            shown[ticks] = lasts
            mux(frame)

        yield write
        mux()


def _display_matrix(frame: Any) -> tuple[int, ...] | None:
    found = frame.side_data.get("DISPLAYMATRIX")
    return None if found is None else tuple(np.frombuffer(bytes(found), np.int32).tolist())


def _reduced(image: np.ndarray) -> np.ndarray:
    factor = SAMPLE_SIDE / max(image.shape[:2])
    if factor >= 1:
        return image
    height, width = (max(1, round(length * factor)) for length in image.shape[:2])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]} x {shape[0]}"
