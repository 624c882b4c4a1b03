"""Reading a data set's files: lists of ids, pictures, arrays; errors name the file, what it holds and what is allowed.

A reader takes a path and returns an array in a source's encoding (data_pipelines/transforms.py, `Target`); it raises
`WrongFileError` for contents it does not know. `read` calls it and adds the file and its part in the data set.
"""

import codecs
import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
from PIL import Image

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.paths import irregular

Contents = TypeVar("Contents")

IGNORE = 255  # of labels
MILLIMETRES_PER_METRE = 1000
SHORTEST_VECTOR = 0.5
ARCHIVE_SPLITS = {"train": "train", "validation": "val"}  # our names of splits -> those of the published archives


class WrongFileError(Exception):
    """What was found in a file and what is allowed; `read` adds where."""

    def __init__(self, found: str, allowed: str) -> None:
        super().__init__(f"it is {found}; allowed: {allowed}")


def read(path: Path, what: str, reader: Callable[[Path], Contents]) -> Contents:
    """``reader(path)``. Whatever it raises becomes a ValueError that names the file and `what` it was read as.

    What is no regular file is never opened: a pipe would wait for a writer for ever.
    """
    try:
        require_regular(path)
        return reader(path)
    except WrongFileError as wrong:
        raise InputError(f"{path}, {what}: {wrong}") from None
    except Exception as error:  # PIL, NumPy and SciPy raise a dozen kinds for damaged files
        raise InputError(f"{path}, {what}: cannot be decoded ({type(error).__name__}: {error})") from error


def require_regular(path: Path) -> None:
    """Raises for a directory, a pipe or another thing that is no file of bytes: opening a pipe would wait for ever."""
    if found := irregular(path):
        raise WrongFileError(found, "a regular file")


# --- lists of files


def first_few(names: Sequence[object], count: int = 10) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(map(str, names[:count])) + more


def read_ids(path: Path) -> tuple[str, ...]:
    """The ids of a split file, one per line; raises ValueError unless there is one and none stands twice."""
    if not path.exists():
        there = sorted(file.stem for file in path.parent.glob("[!.]*.txt"))
        raise InputError(f"{path}: no such split file; splits in {path.parent}: {', '.join(there) or 'none'}")
    text = read(path, "list of ids", read_text)
    ids = tuple(line.strip() for line in text.splitlines() if line.strip())
    if not ids:
        raise InputError(f"{path} is empty; it needs one id (a file name without its suffix) per line")
    twice = [id_ for id_, count in Counter(ids).items() if count > 1]
    if twice:
        raise InputError(f"{path} lists {len(twice)} ids more than once: {first_few(twice)}; each id may stand once")
    hidden = [id_ for id_ in ids if id_.startswith("._")]
    if hidden:
        raise InputError(
            f"{path} lists {len(hidden)} hidden files, which macOS leaves beside the real ones and which are no "
            f"images: {first_few(hidden)}; take these lines out"
        )
    nested = [id_ for id_ in ids if "/" in id_ or "\\" in id_]
    if nested:
        raise InputError(f"{path} has ids with a folder in them: {first_few(nested)}; allowed: plain file names")
    return ids


def read_text(path: Path) -> str:
    """UTF-8, with or without a byte order mark; another encoding is named."""
    content = path.read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in content:
        raise WrongFileError("no UTF-8 text but UTF-16, or no text", "UTF-8; save it anew in this encoding")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        as_latin = content.splitlines()[line - 1].decode("latin-1").strip()
        raise WrongFileError(
            f"no UTF-8 text, perhaps Latin-1: line {line} is then {as_latin!r}", "UTF-8; save it anew in this encoding"
        ) from None


def require_files(files: Iterable[Path], source: str) -> None:
    """Raises one ValueError that counts all the files missing and names the first ten. Lists each folder once."""
    folders: dict[Path, frozenset[str]] = {}
    missing, total = [], 0
    for path in files:
        total += 1
        if path.parent not in folders:
            folders[path.parent] = frozenset(os.listdir(path.parent)) if path.parent.is_dir() else frozenset()
        if path.name not in folders[path.parent]:
            missing.append(path)
    if missing:
        raise InputError(
            f"{source} lacks {len(missing)} of its {total} files: {first_few(missing)}; "
            "unpack the archive anew, or leave out the tasks that you lack"
        )


def archive_split(split: str, source: str) -> str:
    """What the published archives call our split."""
    if split not in ARCHIVE_SPLITS:
        raise InputError(f"{source}: split is {split!r}; allowed: {', '.join(ARCHIVE_SPLITS)}")
    return ARCHIVE_SPLITS[split]


def archive_tasks(tasks: Iterable[str] | None, allowed: tuple[str, ...], source: str) -> tuple[str, ...]:
    """The tasks to read, None meaning all, in the order of `allowed`."""
    asked = tuple(allowed if tasks is None else tasks)
    unknown = [task for task in asked if task not in allowed]
    if unknown:
        raise InputError(f"{source} has no labels of {first_few(unknown)}; allowed tasks: {', '.join(allowed)}")
    return tuple(task for task in allowed if task in asked)


def digest(ids: Sequence[str]) -> str:
    """SHA-256 of the ids in their order."""
    return hashlib.sha256("\n".join(ids).encode()).hexdigest()


# --- pictures and arrays


def read_picture(path: Path, modes: tuple[str, ...], allowed: str) -> np.ndarray:
    """The stored pixels of a picture whose PIL mode is one of `modes`; a palette picture gives its indices."""
    with Image.open(path) as picture:
        if picture.mode not in modes:
            raise WrongFileError(f"a {picture.format} of mode {picture.mode!r}", allowed)
        return np.array(picture)


def read_picture_size(path: Path) -> tuple[int, int]:
    """(height, width) as a picture's header says, without decoding it."""
    with Image.open(path) as picture:
        return picture.height, picture.width


def read_array_size(path: Path) -> tuple[int, int]:
    """(height, width) as a .npy file's header says, without reading its values."""
    height, width = np.load(path, mmap_mode="r", allow_pickle=False).shape[:2]
    return height, width


def read_array(path: Path, channels: tuple[int, ...] = (), kinds: str = "f") -> np.ndarray:
    """A .npy file (H, W, *channels) as stored; (H, W, 1) is read as (H, W). `kinds`: codes of the allowed dtypes."""
    return checked_array(np.load(path, allow_pickle=False), channels, kinds)


def read_mat(path: Path, key: str) -> np.ndarray:
    """The variable `key` of a MATLAB file (up to version 7)."""
    from scipy.io import loadmat  # only two archives hold such files

    variables = loadmat(path, appendmat=False)
    if key not in variables:
        names = ", ".join(sorted(name for name in variables if not name.startswith("__"))) or "nothing"
        raise WrongFileError(f"a MATLAB file of {names}", f"the variable {key}")
    return variables[key]


def checked_array(values: np.ndarray, channels: tuple[int, ...] = (), kinds: str = "f") -> np.ndarray:
    if not channels and values.ndim == 3 and values.shape[2] == 1:
        values = values[..., 0]
    if values.dtype.kind not in kinds or values.ndim != 2 + len(channels) or values.shape[2:] != channels:
        shape = f"({', '.join(['H', 'W', *map(str, channels)])})"
        raise WrongFileError(
            f"an array {values.dtype} {values.shape}", f"{'floats' if kinds == 'f' else 'numbers'} {shape}"
        )
    return values


def read_image(path: Path) -> np.ndarray:
    pixels = read_picture(path, ("RGB", "L"), "8-bit RGB or grey")
    return pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, axis=-1)


def read_floats(path: Path) -> np.ndarray:
    return read_array(path).astype(np.float32)


def read_labels(path: Path) -> np.ndarray:
    """The stored indices, uint8. PIL spreads the levels of grey pictures of 2 and 4 bits over 0..255: undone here."""
    allowed = "a PNG of 8 bits or fewer, grey or palette"
    with Image.open(path) as picture:
        if picture.format != "PNG":
            lossy = ", whose compression changes labels" if picture.format == "JPEG" else ""
            raise WrongFileError(f"a {picture.format} by its contents{lossy}", allowed)
        if picture.mode not in ("L", "P", "1"):
            raise WrongFileError(f"a PNG of mode {picture.mode!r}", allowed)
        pixels = np.array(picture).astype(np.uint8, copy=False)
        if picture.mode == "L" and (bits := _png_bits(path)) < 8:
            pixels //= 255 // (2**bits - 1)
    return pixels


def _png_bits(path: Path) -> int:
    """Bits of a sample: the byte behind width and height in a PNG's first chunk."""
    with open(path, "rb") as file:
        return file.read(25)[24]


def read_16_bits(path: Path, allowed: str) -> np.ndarray:
    return read_picture(path, ("I;16", "I;16B", "I"), allowed)


def read_millimetres(path: Path) -> np.ndarray:
    pixels = read_16_bits(path, "a 16-bit grey PNG of millimetres, or .npy floats of metres")
    return pixels.astype(np.float32) / np.float32(MILLIMETRES_PER_METRE)


def read_metres(path: Path) -> np.ndarray:
    return checked_metres(read_array(path))


def checked_metres(values: np.ndarray) -> np.ndarray:
    values = values.astype(np.float32)
    negative = values[np.isfinite(values) & (values < 0)]
    if negative.size:
        raise WrongFileError(f"an array with values down to {negative.min()}", "metres; 0 or non-finite = invalid")
    return values


def read_vector_floats(path: Path) -> np.ndarray:
    return unit_or_zero(read_array(path, (3,)).astype(np.float32))


def read_vector_picture(path: Path) -> np.ndarray:
    return unit_or_zero(read_byte_vectors(path))


def read_byte_vectors(path: Path) -> np.ndarray:
    """2 v / 255 - 1 of 8-bit RGB, float32; not yet of unit length."""
    pixels = read_picture(path, ("RGB",), "an 8-bit RGB picture of (n + 1) 255 / 2, or .npy floats (H, W, 3)")
    return pixels.astype(np.float32) * np.float32(2 / 255) - 1


def unit_or_zero(vectors: np.ndarray) -> np.ndarray:
    """Vectors at least 1/2 long at unit length; shorter and non-finite ones, which are no directions, exactly zero."""
    vectors = np.where(np.isfinite(vectors).all(-1, keepdims=True), vectors, np.float32(0))
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.where(length >= SHORTEST_VECTOR, vectors / np.maximum(length, SHORTEST_VECTOR), np.float32(0))


def read_mask_floats(path: Path, kinds: str = "f") -> np.ndarray:
    values = read_array(path, kinds=kinds).astype(np.float32)
    if not (values <= 1).all():  # NaN fails too
        raise WrongFileError(f"an array with values up to {values.max()}", "floats in [0, 1], negative = ignore")
    return values


def read_mask_picture(path: Path) -> np.ndarray:
    pixels = read_picture(path, ("L", "1"), "a grey PNG of up to 8 bits, its highest level = 1, or .npy floats")
    return pixels.astype(np.float32) / np.float32(1 if pixels.dtype == bool else 255)


def shift_labels(values: np.ndarray, numbered_from: int, num_classes: int) -> np.ndarray:
    """Stored numbers -> uint8 labels: `numbered_from` -> 0 and so on; the number below it, "no class" -> 255."""
    stored = np.arange(numbered_from - 1, numbered_from + num_classes)
    wrong = np.unique(values[~np.isin(values, stored)])
    if wrong.size:
        raise WrongFileError(
            f"a label map with the values {first_few(wrong.tolist())}",
            f"the integers {stored[1]}..{stored[-1]}, and {stored[0]} = no class",
        )
    return np.where(values == stored[0], IGNORE, values.astype(np.int64) - numbered_from).astype(np.uint8)


def resized(values: np.ndarray, size: tuple[int, int], interpolation: int = cv2.INTER_NEAREST) -> np.ndarray:
    """`values` at size (height, width), itself where it has that size."""
    if values.shape[:2] == size:
        return values
    return cv2.resize(values, size[::-1], interpolation=interpolation)
