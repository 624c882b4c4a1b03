"""Prediction over image files: files and folders in, panels (PNG) and arrays (npz) out, few of them in memory."""

import contextlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, TypeVar

import jax
import numpy as np
from PIL import Image, ImageOps
from rich.console import Console

from sgw_jax.data_pipelines import atomic
from sgw_jax.data_pipelines.errors import InputError, MissingFileError, files_named
from sgw_jax.data_pipelines.progress import counted
from sgw_jax.pictures.panels import Panel
from sgw_jax.prediction.predictor import Predictor
from sgw_jax.tasks.base import Task

SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
AHEAD = 4  # files read before they are needed; bounds what is in memory

Item = TypeVar("Item")
Result = TypeVar("Result")


def predict_files(
    workdir: Path | str, inputs: Sequence[Path | str], output: Path | str, console: Console, which: str | int = "best"
) -> list[Path]:
    """Writes `<name>.png`, a panel of the image and its maps, and `<name>.npz`, the maps, for every image.

    The arrays have the tasks' names; the class names of a task with labels are beside them as `<task>_classes`. A name
    is the file's stem; where several files share it, the folder comes before it. Files of an earlier call are replaced,
    each at once: a reader sees the old or the new. Images are read as they are needed, so there may be any number. With
    several processes each takes its share.

    Args:
      inputs: image files, and folders, whose images (SUFFIXES; not those of folders within) are taken sorted by name.
      output: directory for the results, made if missing.

    Raises, before anything is written:
      FileNotFoundError: an input does not exist.
      ValueError: a folder without images, an image that cannot be read to its end, results that would replace an input.
      CheckpointError: there is no complete checkpoint.

    Returns the panels' paths.
    """
    files = find_images(inputs)
    output = Path(output)
    names = output_names(files)
    check_output(output, inputs, files, names)
    predictor = Predictor.from_workdir(workdir, which)
    for _ in counted(in_background(check_file, files), "check", len(files), console):
        pass

    with files_named("--output cannot be made"):
        output.mkdir(parents=True, exist_ok=True)
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
    )
    return written


def find_images(inputs: Sequence[Path | str]) -> list[Path]:
    """The image files that the inputs name, each once, in order."""
    files: dict[Path, Path] = {}
    for path in map(Path, inputs):
        if path.is_dir():
            found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.is_file())
            if not found:
                raise InputError(f"{path} is a directory without images; looked for *{', *'.join(SUFFIXES)}.")
        elif path.exists():
            found = [path]
        else:
            raise MissingFileError(f"{path} does not exist; give image files or directories of images.")
        files |= {file.resolve(): file for file in found if file.resolve() not in files}
    if not files:
        raise InputError("predict: no input; give image files or directories of images.")
    return list(files.values())


def output_names(files: Sequence[Path]) -> list[str]:
    """The files' stems; with the folder's name before it where several share one; numbered where that is not enough.

    No two are equal, nor differ by case alone, which some file systems take for equal.
    """
    shared = Counter(file.stem.casefold() for file in files)
    names: list[str] = []
    taken: set[str] = set()
    for file in files:
        folder = file.resolve().parent.name
        wanted = file.stem if shared[file.stem.casefold()] == 1 or not folder else f"{folder}_{file.stem}"
        name, number = wanted, 2
        while name.casefold() in taken:
            name, number = f"{wanted}_{number}", number + 1
        taken.add(name.casefold())
        names.append(name)
    return names


def check_output(output: Path, inputs: Sequence[Path | str], files: Sequence[Path], names: Sequence[str]) -> None:
    """Raises where a panel would replace an image that is an input, or be taken for an input the next time."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output: {output} is a file; give a directory.")
    if output.resolve() in {Path(path).resolve() for path in inputs if Path(path).is_dir()}:
        raise InputError(f"--output: {output} is also an input, whose images the panels would join; give another.")
    images = {file.resolve() for file in files}
    for name in names:
        target = (output / f"{name}.png").resolve()
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
    with _opened(path) as image:
        return np.array(ImageOps.exif_transpose(image).convert("RGB"))


def check_file(path: Path) -> None:
    """Raises what `read_image` would, at a fraction of the cost: JPEGs are decoded at an eighth of their size."""
    with _opened(path) as image:
        image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
        image.load()


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            # PIL would clip 16-bit and floating-point values at 255.
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"its pixels have more than 8 bits (mode {image.mode}), convert it to 8 bits")
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path} cannot be read: {error}.") from error


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
