"""What a frozen backbone makes of the images of a split, kept on disk: its taps, computed once and read thereafter.

A directory holds the taps of one split in two views, the images as the network sees them and their mirror images:

    cache.json      the key (what the taps depend on beside the image), the arrays of a row, the items of a shard
    00000.own       the first shard: CRC-32s of the images, CRC-32s of the rows, the rows, one an item
    00000.mirrored  likewise of the mirrored images

A row is the bytes of its arrays, one after another, little-endian. Files appear whole or not at all, and each is a pure
function of key, source and number; so what an interrupted pass left is good, and the next one makes the rest.

The image's digest says which view an example is in, whatever drew the flip, and that the row is of this very image: of
changed data, or of another item, no row is ever taken. Rows are read by offset, not mapped into memory, where a file
that is cut short would end the process by a bus error.
"""

import dataclasses
import functools
import json
import math
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sgw_jax.data_pipelines.atomic import replacing, write_atomically
from sgw_jax.data_pipelines.batch_names import TAPS
from sgw_jax.data_pipelines.errors import FileError, InputError
from sgw_jax.data_pipelines.json_files import read_object
from sgw_jax.data_pipelines.transforms import Example

VIEWS = ("own", "mirrored")
HEADER = "cache.json"
VERSION = 1
SHARD_BYTES = 2**26
DIGEST = np.dtype("<u4")

Arrays = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> (dtype, shape) of a row's


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file: its number, one of `VIEWS`, and its items."""

    number: int
    view: str
    items: range

    @property
    def name(self) -> str:
        """Of the file."""
        return f"{self.number:05d}.{self.view}"


@dataclasses.dataclass(frozen=True)
class TapCache:
    """The taps of a split on disk; picklable.

    Attributes:
      directory: that holds them.
      arrays: of a row; bfloat16 is held as its 16 bits, "<u2".
      length: number of the split's items.
      shard: number of the items in a file.
    """

    directory: Path
    arrays: Arrays
    length: int
    shard: int

    @functools.cached_property
    def row_bytes(self) -> int:
        """Of one item in one view."""
        return sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in self.arrays.values())

    def shards(self, views: Iterable[str]) -> list[Shard]:
        """All files of these views."""
        starts = range(0, self.length, self.shard)
        return [
            Shard(number, view, range(start, min(start + self.shard, self.length)))
            for view in views
            for number, start in enumerate(starts)
        ]

    def missing(self, views: Iterable[str]) -> list[Shard]:
        """The files that are not there yet.

        Raises:
          InputError: a file that has not the size it was written with.
        """
        return [shard for shard in self.shards(views) if not self._whole(shard)]

    def _whole(self, shard: Shard) -> bool:
        path = self.directory / shard.name
        if not path.exists():
            return False
        found, written = path.stat().st_size, len(shard.items) * (2 * DIGEST.itemsize + self.row_bytes)
        if found != written:
            raise _damaged(path, f"it has {found} bytes where {written} were written")
        return True

    def write(self, shard: Shard, rows: Iterator[tuple[np.ndarray, Example]]) -> None:
        """Writes a file from the next rows: the image at the model's door, and its taps by name."""
        images, digests = np.zeros(len(shard.items), DIGEST), np.zeros(len(shard.items), DIGEST)
        with replacing(self.directory / shard.name) as temporary, temporary.open("wb") as file:
            file.write(bytes(images.nbytes + digests.nbytes))
            for place in range(len(shard.items)):
                image, taps = next(rows)
                row = b"".join(
                    taps[name].astype(dtype, copy=False).tobytes() for name, (dtype, _) in self.arrays.items()
                )
                images[place], digests[place] = digest_of(image), zlib.crc32(row)
                file.write(row)
            file.seek(0)
            file.write(images.tobytes() + digests.tobytes())

    def read(self, item: int, image: np.ndarray) -> Example:
        """The taps of an image of the item at the model's door, by their names in a batch.

        Raises:
          InputError: the file is damaged, or its row is of another image.
        """
        number, place = divmod(item, self.shard)
        wanted, count = digest_of(image), min(self.shard, self.length - number * self.shard)
        for view in VIEWS:
            path = self.directory / Shard(number, view, range(0)).name
            try:
                with path.open("rb") as file:
                    digests = np.frombuffer(file.read(2 * count * DIGEST.itemsize), DIGEST)
                    if len(digests) == 2 * count and digests[place] != wanted:
                        continue
                    file.seek(2 * count * DIGEST.itemsize + place * self.row_bytes)
                    row = file.read(self.row_bytes)
            except FileNotFoundError:  # without flips there is one view
                continue
            if len(digests) < 2 * count or len(row) < self.row_bytes or zlib.crc32(row) != digests[count + place]:
                raise _damaged(path, f"the row of item {item} is not the one that was written")
            return self._arrays(row)
        raise InputError(
            f"{self.directory} holds no row of this image of item {item}, only of the one when the cache was made: the "
            "data changed, or their order. Give another config.backbone_cache, or delete this directory."
        )

    def empty(self) -> Example:
        """Taps of no image: zeros."""
        return self._arrays(bytes(self.row_bytes))

    def _arrays(self, row: bytes) -> Example:
        found, start = {}, 0
        for name, (dtype, shape) in self.arrays.items():
            count = math.prod(shape)
            found[TAPS + name] = np.frombuffer(row, dtype, count, start).reshape(shape)
            start += count * np.dtype(dtype).itemsize
        return found


def open_cache(directory: Path, key: Mapping[str, Any], arrays: Arrays, length: int) -> TapCache:
    """The cache of a split in a directory, begun if there is none.

    Args:
      key: what the taps depend on beside the images, flat and JSON-able.
      arrays, length: as of `TapCache`.

    Raises:
      InputError: the directory holds the taps of another key; it lists what differs.
    """
    check_cache(directory, key)
    path = directory / HEADER
    if not path.exists():
        row = sum(np.dtype(dtype).itemsize * math.prod(shape) for dtype, shape in arrays.values())
        header = {
            "version": VERSION,
            "key": dict(key),
            "arrays": {name: [dtype, list(shape)] for name, (dtype, shape) in arrays.items()},
            "items": length,
            "shard": max(1, min(length, SHARD_BYTES // max(row, 1))),
        }
        directory.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(header, indent=1))
    found = _header(path)
    cache = TapCache(directory, dict(arrays), length, int(found["shard"]))
    lines = [f"items: {found['items']} there, {length} now"] if found["items"] != length else []
    there = {name: (dtype, tuple(shape)) for name, (dtype, shape) in found["arrays"].items()}
    if there != cache.arrays:
        lines.append(f"arrays of an item: {there} there, {cache.arrays} now")
    _refuse(directory, lines)
    return cache


def check_cache(directory: Path, key: Mapping[str, Any]) -> None:
    """Raises an InputError where the directory holds a cache whose key has other values than those given here."""
    if directory.exists() and not directory.is_dir():
        raise FileError(f"config.backbone_cache: {directory} is no directory; give another.")
    if not (directory / HEADER).exists():
        if found := sorted(path.name for path in directory.glob("*")) if directory.is_dir() else []:
            raise InputError(
                f"config.backbone_cache: {directory} has {', '.join(found[:3])}, but no {HEADER}: it is no cache of a "
                "backbone. Give a directory that is empty or not there yet."
            )
        return
    there = _header(directory / HEADER)
    lines = [
        f"{name}: {there['key'].get(name, '(absent)')!r} there, {value!r} now"
        for name, value in key.items()
        if there["key"].get(name, "(absent)") != value
    ]
    if there["version"] != VERSION:
        lines = [f"version of the format: {there['version']} there, {VERSION} now"]
    _refuse(directory, lines)


def _refuse(directory: Path, lines: list[str]) -> None:
    if lines:
        raise InputError(
            f"config.backbone_cache: {directory} holds what another backbone made, or of other images:\n  "
            + "\n  ".join(lines)
            + "\nGive another directory, or delete this one: it is made anew."
        )


def _header(path: Path) -> dict[str, Any]:
    remedy = f"Delete {path.parent}: it is made anew."
    found = read_object(path, remedy, keys=("version", "key", "arrays", "items", "shard"))
    if not isinstance(found["key"], dict) or not isinstance(found["shard"], int) or found["shard"] < 1:
        raise InputError(f"{path} is damaged. {remedy}")
    return found


def _damaged(path: Path, finding: str) -> InputError:
    return InputError(f"The cache of the backbone is damaged at {path}: {finding}. Delete the file: it is made anew.")


def digest_of(image: np.ndarray) -> int:
    """CRC-32 of an image's bytes."""
    return zlib.crc32(np.ascontiguousarray(image).data)


def with_taps(example: Example, taps: TapCache | None, item: int) -> Example:
    """The example with the taps of its image; None adds nothing."""
    return example if taps is None else {**example, **taps.read(item, example["image"])}
