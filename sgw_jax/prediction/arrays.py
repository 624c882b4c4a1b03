"""How maps are stored and read back: all of an image as npz, or each as a picture in a format that others read.

Of a picture v is what it stores; the second column is what an npz stores:

    labels     uint8      .png indexed, 8-bit: v; with the palette and the names of the classes
    depth      float32    .png 16-bit grey: v / 1000 metres
    vectors    float16    .png 8-bit RGB: 2 v / 255 - 1, axes as the map's
    mask       float32    .png 8-bit grey: v / 255
    angle      float16    .png 16-bit grey: v / 100 degrees
    disparity  float32    no picture but .npz

Half precision: directions are within 0.03 degrees of what was predicted, angles within 1/16 degree. A depth has no
scale that is known before, and masks are compared with thresholds, to another side of which rounding brings many pixels
of an unsure network (0.2 points of the F measure of one that was trained for two steps): both keep all bits.
"""

import io
import json
import math
import zipfile
from collections.abc import Iterable, Mapping
from typing import IO, NamedTuple

import numpy as np
from PIL import Image, PngImagePlugin

from sgw_jax.pictures.panels import Drawn
from sgw_jax.tasks.base import IGNORED_COLOUR, Legend

LEVEL = 3  # of compression: smooth maps get hardly smaller at higher ones, which take twice the time
EPOCH = (1980, 1, 1, 0, 0, 0)  # of every member: equal maps make equal files
STORED = {"vectors": np.float16, "angle": np.float16}  # else as predicted
CLASSES = "Classes"  # of a picture's text: the names as JSON


class Scale(NamedTuple):
    """Of pictures: v = value * factor + offset, rounded.

    Attributes:
      dtype: of v.
      factor: levels for 1 of the map's unit.
      offset: the level of 0.
      says: what the picture says of itself.
    """

    dtype: type[np.unsignedinteger]
    factor: float
    offset: float
    says: str


SCALES = {
    "depth": Scale(np.uint16, 1000, 0, "v / 1000 metres"),
    "vectors": Scale(np.uint8, 127.5, 127.5, "2 v / 255 - 1"),
    "mask": Scale(np.uint8, 255, 0, "v / 255"),
    "angle": Scale(np.uint16, 100, 0, "v / 100 degrees"),
}


def suffix(kind: str) -> str:
    """Of the file of one map."""
    return ".png" if kind == "labels" or kind in SCALES else ".npz"


def write_npz(file: IO[bytes], maps: Mapping[str, np.ndarray], drawn: Iterable[Drawn]) -> None:
    """Writes maps by name as NumPy reads them; the names of a label map's classes as "<task>_classes", entry i of i.

    Args:
      file: to write to.
      maps: by name.
      drawn: what they are; others of the maps are left out.
    """
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=LEVEL) as archive:
        for about in drawn:
            kind = about.target["kind"]
            values = maps[about.name]
            _add(archive, about.name, values.astype(STORED.get(kind, values.dtype)))
            if kind == "labels":
                _add(archive, f"{about.name}_classes", np.array(classes(about), np.str_))


def _add(archive: zipfile.ZipFile, name: str, values: np.ndarray) -> None:
    member = zipfile.ZipInfo(f"{name}.npy", EPOCH)
    member.compress_type = zipfile.ZIP_DEFLATED
    member._compresslevel = LEVEL  # type: ignore[attr-defined]  # which of a member with a date `open` does not set
    with archive.open(member, "w", force_zip64=True) as opened:
        np.lib.format.write_array(opened, values, allow_pickle=False)


def classes(about: Drawn) -> list[str]:
    """The names of a label map's classes, in order."""
    return [name for name, _ in about.legend()]


def write_picture(file: IO[bytes], values: np.ndarray, about: Drawn) -> int:
    """Writes one map as a picture of its kind, and says in its text what the levels mean.

    Args:
      file: to write to.
      values: the map.
      about: what it is.

    Returns:
      How many pixels the picture cannot hold: what is beyond its greatest level stands at that one, what is no number
      at 0.
    """
    kind = about.target["kind"]
    text = PngImagePlugin.PngInfo()
    text.add_itxt("Title", about.name)
    lost = 0
    if kind == "labels":
        picture = Image.fromarray(values.astype(np.uint8, casting="safe"))
        picture.putpalette(_palette(about.legend()))
        text.add_itxt("Description", "v: the class, from 0")
        text.add_itxt(CLASSES, json.dumps(classes(about), ensure_ascii=False))
    else:
        scale = SCALES[kind]
        levels, lost = _levels(values, scale)
        picture = Image.fromarray(levels)
        axes = getattr(about, "axes_in_words", "axes as the labels'")
        text.add_itxt("Description", f"{scale.says}; {axes}" if kind == "vectors" else scale.says)
        if lost:
            text.add_itxt("Warning", f"{lost} values have no level: greater ones stand at the greatest, NaN at 0")
    picture.save(file, "PNG", compress_level=LEVEL, pnginfo=text)
    return lost


def _levels(values: np.ndarray, scale: Scale) -> tuple[np.ndarray, int]:
    """The levels, and how many values have none."""
    most = np.iinfo(scale.dtype).max
    levels = values.astype(np.float32) * np.float32(scale.factor)
    levels += np.float32(scale.offset)
    np.rint(levels, out=levels)
    fits = (levels >= 0) & (levels <= most)  # NaN does not
    lost = levels.size - int(np.count_nonzero(fits))
    if lost:
        levels = np.clip(np.where(np.isnan(levels), 0, levels), 0, most)
    return levels.astype(scale.dtype), lost


def _palette(legend: Legend) -> bytes:
    """256 colours, so that every picture has 8 bits; numbers of no class look as ignored pixels do in panels."""
    colours = [tuple(map(int, colour)) for _, colour in legend][:256]
    return bytes(level for colour in [*colours, *[IGNORED_COLOUR] * (256 - len(colours))] for level in colour)


def read_npz(content: bytes) -> dict[str, np.ndarray]:
    """The arrays of what `write_npz` wrote.

    Args:
      content: of the file.

    Returns:
      The maps, and the names of classes, by name.
    """
    with np.load(io.BytesIO(content), allow_pickle=False) as arrays:
        return {name: arrays[name] for name in arrays.files}


def read_picture(content: bytes, kind: str) -> np.ndarray:
    """The map that a picture stores; vectors are not of unit length, within its rounding.

    Args:
      content: of the file.
      kind: of the map.

    Returns:
      Labels uint8, all else float32, within `rounding(kind)` of what was predicted.
    """
    with Image.open(io.BytesIO(content)) as picture:
        levels = np.array(picture)
    if kind == "labels":
        return levels
    scale = SCALES[kind]
    return ((levels.astype(np.float32) - np.float32(scale.offset)) / np.float32(scale.factor)).astype(np.float32)


def rounding(kind: str) -> float:
    """The largest error of a picture's values, in the map's unit, but for that of float32."""
    return 0.0 if kind == "labels" else 0.5 / SCALES[kind].factor if kind in SCALES else math.nan
