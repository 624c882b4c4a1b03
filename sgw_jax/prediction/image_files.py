"""Prediction over image files: files and folders in, panels (PNG) and arrays (npz) out, few of them in memory."""

import contextlib
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

import jax
import numpy as np
from PIL import ExifTags, Image
from rich.console import Console

from sgw_jax.data_pipelines import atomic
from sgw_jax.data_pipelines.consoles import messages
from sgw_jax.data_pipelines.errors import InputError, MissingFileError, files_named
from sgw_jax.data_pipelines.progress import counted
from sgw_jax.data_pipelines.readers import WrongFileError, first_few, read
from sgw_jax.pictures.panels import Panel
from sgw_jax.prediction.predictor import Predictor
from sgw_jax.tasks.base import Task

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
TURNS = {  # EXIF orientation -> what brings the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
AHEAD = 4  # files read before they are needed; bounds what is in memory

Item = TypeVar("Item")
Result = TypeVar("Result")


def predict_files(
    workdir: Path | str,
    inputs: Sequence[Path | str],
    output: Path | str,
    console: Console,
    which: str | int = "best",
    skip_bad: bool = False,
) -> list[Path]:
    """Writes `<name>.png`, a panel of the image and its maps, and `<name>.npz`, the maps, for every image.

    The arrays have the tasks' names; the class names of a task with labels are beside them as `<task>_classes`. A name
    is the file's stem; where several files share it, the folder comes before it. Files of an earlier call are replaced,
    each at once: a reader sees the old or the new. Images are read as they are needed, so there may be any number. With
    several processes each takes its share.

    Args:
      inputs: image files, and folders, whose images (SUFFIXES; not hidden ones, nor those of folders within) are taken
        sorted by name.
      output: directory for the results, made if missing.
      skip_bad: leave out images that cannot be read, and list them at the end on standard error.

    Raises, before anything is written:
      FileNotFoundError: an input does not exist.
      ValueError: a folder without images, results that would replace an input, an image that cannot be read to its end
        (with `skip_bad`: all of them).
      CheckpointError: there is no complete checkpoint.

    Returns the panels' paths.
    """
    files = find_images(inputs)
    output = Path(output)
    names = output_names(files)
    check_output(output, inputs, files, names)
    predictor = Predictor.from_workdir(workdir, which)
    bad = unreadable(files, console)
    if bad and (not skip_bad or len(bad) == len(files)):
        raise InputError(
            f"{len(bad)} of {len(files)} images cannot be read, and nothing was written: "
            f"{first_few(list(bad.values()), 3)}. Mend or remove them"
            f"{'' if len(bad) == len(files) else ', or leave them out with --skip_bad'}."
        )
    names = [name for name, file in zip(names, files, strict=True) if file not in bad]
    files = [file for file in files if file not in bad]

    with files_named("--output cannot be made"):
        output.mkdir(parents=True, exist_ok=True)
    total = len(files)
    mine = slice(jax.process_index(), None, jax.process_count())
    files, names = files[mine], names[mine]
    panel = Panel()

    def write(item: tuple[str, str, np.ndarray, dict[str, np.ndarray]]) -> Path:
        name, label, image, maps = item
        with replacing(output / f"{name}.npz") as file:
            np.savez_compressed(file, allow_pickle=False, **maps, **class_names(predictor.tasks))
        with replacing(output / f"{name}.png") as file:
            panel.draw(image, maps, predictor.tasks, label).save(file, format="PNG")
        return output / f"{name}.png"

    def predicted() -> Iterator[tuple[str, str, np.ndarray, dict[str, np.ndarray]]]:
        held: deque[np.ndarray] = deque()  # images that the network has and whose maps are still to come

        def images() -> Iterator[np.ndarray]:
            for image in in_background(read_image, files):
                held.append(image)
                yield image

        for name, file, maps in zip(names, files, predictor.stream(images()), strict=True):
            yield name, file.name, held.popleft(), maps

    written = list(counted(in_background(write, predicted(), ahead=2), "predict", len(files), console))
    console.print(
        f"{len(written)} panels (png) and arrays (npz) in {output}, by step {predictor.step} of {workdir}.",
        soft_wrap=True,
        markup=False,
    )
    if bad:
        errors = messages(quiet=console.quiet)
        errors.print(f"{len(bad)} of {len(bad) + total} images were left out, for they cannot be read:", soft_wrap=True)
        for reason in bad.values():
            errors.print(f"  {reason}", soft_wrap=True)
    return written


def unreadable(files: Sequence[Path], console: Console | None) -> dict[Path, str]:
    """Reads every file as prediction will, and tells of each that cannot be read why."""

    def reason(path: Path) -> str | None:
        try:
            read_image(path)
        except InputError as error:
            return str(error)
        return None

    found = counted(in_background(reason, files), "check", len(files), console)
    return {file: why for file, why in zip(files, found, strict=True) if why is not None}


def find_images(inputs: Sequence[Path | str]) -> list[Path]:
    """The image files that the inputs name, each once, in order; whether they can be read is not asked yet.

    Hidden files of a folder (._photo.jpg, which macOS leaves beside photo.jpg) are no input, as for a shell's `*`.
    """
    files: dict[Path, Path] = {}
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != ".")
            if not found:
                raise InputError(f"{path} is a directory without images; looked for *{', *'.join(SUFFIXES)}.")
        elif path.exists():
            found = [path]
        else:
            raise MissingFileError(f"{path} does not exist; give image files or directories of images.")
        files |= {_real(file): file for file in found if _real(file) not in files}
    if not files:
        raise InputError("predict: no input; give image files or directories of images.")
    return list(files.values())


def _real(path: Path) -> Path:
    """Where a path leads; unlike Path.resolve no error for links in a circle, which reading the file names."""
    return Path(os.path.realpath(path))


def output_names(files: Sequence[Path]) -> list[str]:
    """The files' stems; with the folder's name before it where several share one; numbered where that is not enough.

    No two are equal, nor differ by case alone, which some file systems take for equal.
    """
    shared = Counter(file.stem.casefold() for file in files)
    names: list[str] = []
    taken: set[str] = set()
    for file in files:
        folder = _real(file).parent.name
        wanted = file.stem if shared[file.stem.casefold()] == 1 or not folder else f"{folder}_{file.stem}"
        name, number = wanted, 2
        while name.casefold() in taken:
            name, number = f"{wanted}_{number}", number + 1
        taken.add(name.casefold())
        names.append(name)
    return names


def check_output(
    output: Path, inputs: Sequence[Path | str], files: Sequence[Path], names: Sequence[str], suffix: str = ".png"
) -> None:
    """Raises where a panel would replace a file that is an input, or be taken for an input the next time."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output: {output} is a file; give a directory.")
    if _real(output) in {_real(Path(path)) for path in inputs if Path(path).is_dir()}:
        raise InputError(f"--output: {output} is also an input, which the panels would join; give another.")
    images = {_real(file) for file in files}
    for name in names:
        target = _real(output / f"{name}{suffix}")
        if target in images:
            raise InputError(f"--output: the panel {target.name} would replace the input {target}; give another.")


def class_names(tasks: Iterable[Task]) -> dict[str, np.ndarray]:
    """{"<task>_classes": Unicode array} of the tasks with labels: entry i names label i."""
    labelled = (task for task in tasks if task.target["kind"] == "labels")
    return {f"{task.name}_classes": np.array([name for name, _ in task.legend()], np.str_) for task in labelled}


def read_image(path: Path) -> np.ndarray:
    """RGB uint8 (H, W, 3), turned as the EXIF orientation says; transparency is dropped.

    Raises ValueError, naming the file, where it is no image, ends early, or holds more than 8 bits per channel.
    """
    return read(path, "an image", _pixels)


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        if image.mode.startswith(("I", "F")):  # PIL would clip 16-bit and floating-point values at 255
            raise WrongFileError(f"of more than 8 bits (mode {image.mode})", "8 bits per channel; convert it")
        image.load()
        image.info.pop("transparency", None)  # of a palette, over which PIL would warn
        # Not ImageOps.exif_transpose: it writes all EXIF entries anew, and fails where any has an odd type.
        turn = TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        upright = image if turn is None else image.transpose(turn)
        return np.array(upright.convert("RGB"))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to by `atomic.replacing`."""
    with (
        files_named(f"{path} cannot be written"),
        atomic.replacing(path, contended=True) as temporary,
        temporary.open("wb") as file,
    ):
        yield file


def in_background(function: Callable[[Item], Result], items: Iterable[Item], ahead: int = AHEAD) -> Iterator[Result]:
    """map(function, items) by threads, in order, at most `ahead` items before the consumer."""
    pool = ThreadPoolExecutor(ahead)
    try:
        waiting: deque[Future[Result]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) == ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
