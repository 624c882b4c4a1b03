"""Image files to predict on: which ones, what their results are called, and their pixels."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image
from rich.console import Console

from sgw_jax.data_pipelines.errors import InputError, MissingFileError
from sgw_jax.data_pipelines.progress import counted
from sgw_jax.data_pipelines.readers import WrongFileError, read, read_picture_size, read_text
from sgw_jax.prediction.background import in_background

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
        for file in found:
            files.setdefault(real_path(file), file)
    if not files:
        raise InputError("predict: no input; give image files or directories of images.")
    return list(files.values())


def listed_paths(path: Path | str) -> list[str]:
    """The paths of a text file, one a line; empty lines are left out.

    Args:
      path: of the file, in UTF-8.

    Returns:
      Them as they stand there, without the spaces around them.

    Raises:
      ValueError: it cannot be read, is no text, or names nothing.
    """
    lines = [line.strip() for line in read(Path(path), "a list of images", read_text).splitlines()]
    if not any(lines):
        raise InputError(f"{path} is empty; it needs one path of an image or a directory per line.")
    return [line for line in lines if line]


def real_path(path: Path) -> Path:
    """Where a path leads; unlike Path.resolve no error for links in a circle, which reading the file names."""
    return Path(os.path.realpath(path))


def output_names(files: Sequence[Path]) -> list[str]:
    """The files' stems; with the folder's name before it where several share one; numbered where that is not enough.

    No two are equal, nor differ by case alone, which some file systems take for equal.
    """
    shared = Counter(file.stem.casefold() for file in files)
    names: list[str] = []
    taken: set[str] = set()
    numbers: dict[str, int] = {}  # the next of a name that is taken
    for file in files:
        folder = "" if shared[file.stem.casefold()] == 1 else real_path(file).parent.name
        wanted = f"{folder}_{file.stem}" if folder else file.stem
        name = wanted
        while name.casefold() in taken:
            number = numbers.get(wanted.casefold(), 2)
            numbers[wanted.casefold()] = number + 1
            name = f"{wanted}_{number}"
        taken.add(name.casefold())
        names.append(name)
    return names


def unreadable(files: Sequence[Path], console: Console | None) -> dict[Path, str]:
    """Reads every file as prediction will, and tells of each that cannot be read why."""

    def reason(path: Path) -> str | None:
        try:
            read_image(path)
        except InputError as error:
            return str(error)
        return None

    found = counted(in_background(reason, files, pixels=pixel_count), "check", len(files), console)
    return {file: why for file, why in zip(files, found, strict=True) if why is not None}


def pixel_count(path: Path) -> int:
    """Height times width, as the file's header says; 0 where it cannot be read, which reading the file names."""
    try:
        height, width = read(path, "an image", read_picture_size)
    except InputError:
        return 0
    return height * width


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
