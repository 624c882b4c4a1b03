"""Cityscapes: semantic segmentation in 19 classes and disparity, from the files of the data set's own site.

root/leftImg8bit/{train,val}/<city>/<id>_leftImg8bit.png        8-bit RGB, 1024 x 2048; 2975 and 500
root/gtFine/{train,val}/<city>/<id>_gtFine_labelIds.png         8-bit, the official label numbers 0..33
root/disparity/{train,val}/<city>/<id>_disparity.png            16-bit, (v - 1) / 256 pixels, 0 = invalid
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

import numpy as np

from sgw_jax.data_pipelines import readers
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.transforms import Example

# The official numbers of the 19 evaluated classes, in the order of Cityscapes.CLASSES; the other 15 of 0..33 are void.
# The 35th label, licence plate, is number -1: the official tool does not draw it, and another's cast to 8 bits is 255.
LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
LAST_LABEL_ID = 33
SKY = 23
RAIL_TRACK = 10
PROTOCOLS = ("exact", "published")
LICENCE_PLATE = 255
INVALID_DISPARITY = -1.0
SUFFIXES = {
    "image": ("leftImg8bit", "_leftImg8bit.png"),
    "labels": ("gtFine", "_gtFine_labelIds.png"),
    "disparity": ("disparity", "_disparity.png"),
}
NEEDED = {"semseg": ("labels",), "depth": ("disparity", "labels")}


class Cityscapes:
    """Source over those files (picklable; opens files only when an item is read); `ids` are <city>/<id>.

      semseg  uint8, 19 classes, 255 = void.
      depth   float32 disparity in pixels of the full-size image, -1 = invalid, 0 = infinitely far and valid. Its task
              is Depth(quantity="disparity", zero_is_valid=True). Like the peers, nothing here divides it when the
              image is made smaller.

    What disparity 0 means follows `protocol`:
      "exact"      the sky is 0, whatever was measured there; a stored 1 is 0.
      "published"  QUIRK of MTMamba: its "sky" is label number 10. That is the sky's place among the 19 classes, but in
                   the files it is `rail track`, so that rail tracks are 0 and the sky is as measured, mostly invalid.
                   A stored 1 is invalid too.

    The items are what leftImg8bit/<split> holds, in the order of their names. There is no test split, for its labels
    are not public.

    Raises ValueError when constructed for an unknown split, task or protocol, no image, and missing files, all counted;
    when an item is read, for a file that is damaged, not of this form, of another size than the image, or an unknown
    label.
    """

    TASKS = ("semseg", "depth")
    SPLIT_SIZES: ClassVar[dict[str, int]] = {"train": 2975, "validation": 500}  # as published; not enforced
    CLASSES = (
        "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation",
        "terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
    )  # fmt: skip
    COLOURS = (
        (128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153),
        (250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60), (255, 0, 0),
        (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32),
    )  # fmt: skip

    # The categories of the data set's own tool, of class numbers.
    CATEGORIES = (
        ("flat", (0, 1)), ("construction", (2, 3, 4)), ("object", (5, 6, 7)), ("nature", (8, 9)), ("sky", (10,)),
        ("human", (11, 12)), ("vehicle", (13, 14, 15, 16, 17, 18)),
    )  # fmt: skip

    def __init__(
        self, root: str | os.PathLike, split: str, tasks: Iterable[str] | None = None, protocol: str = "exact"
    ) -> None:
        if protocol not in PROTOCOLS:
            raise InputError(f"Cityscapes: protocol is {protocol!r}; allowed: {', '.join(PROTOCOLS)}")
        self.protocol = protocol
        self.root = Path(root)
        self.split = split
        self._folder = readers.archive_split(split, "Cityscapes")
        self.tasks = readers.archive_tasks(tasks, self.TASKS, "Cityscapes")
        directory, suffix = SUFFIXES["image"]
        images = (self.root / directory / self._folder).glob(f"*/[!.]*{suffix}")
        self.ids = tuple(sorted(f"{path.parent.name}/{path.name.removesuffix(suffix)}" for path in images))
        if not self.ids:
            raise InputError(
                f"{self.root / directory / self._folder} holds no <city>/<id>{suffix}; unpack leftImg8bit_trainvaltest"
            )
        readers.require_files((p for i in range(len(self)) for p in self.files(i)), f"Cityscapes, split {split!r},")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        id_ = self.ids[index]
        image = readers.read(self._path("image", id_), f"image of id {id_!r}", readers.read_image)
        maps = {}
        for part in self._parts():
            path, what = self._path(part, id_), f"{part} of id {id_!r}"
            maps[part] = readers.read(path, what, {"labels": _label_ids, "disparity": _disparity}[part])
            if maps[part].shape != image.shape[:2]:
                raise InputError(
                    f"{path}, {what}: it is {maps[part].shape[0]} x {maps[part].shape[1]} (height x width); "
                    f"allowed: its image's {image.shape[0]} x {image.shape[1]}"
                )
        example = {"image": image}
        if "semseg" in self.tasks:
            example["semseg"] = _CLASS_OF[maps["labels"]]
        if "depth" in self.tasks:
            published = self.protocol == "published"
            disparity, far = maps["disparity"], maps["labels"] == (RAIL_TRACK if published else SKY)
            if published:
                disparity = np.where(disparity == 0, np.float32(INVALID_DISPARITY), disparity)
            example["depth"] = np.where(far, np.float32(0), disparity)
        return example

    def _parts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(part for task in self.tasks for part in NEEDED[task]))

    def _path(self, part: str, id_: str) -> Path:
        directory, suffix = SUFFIXES[part]
        return self.root / directory / self._folder / (id_ + suffix)

    def file_of(self, index: int) -> str:
        """Path of the item's image."""
        return str(self._path("image", self.ids[index]))

    def size_of(self, index: int) -> tuple[int, int]:
        """(height, width) of the item's image, by its header."""
        path = self._path("image", self.ids[index])
        return readers.read(path, f"image of id {self.ids[index]!r}", readers.read_picture_size)

    def files(self, index: int) -> tuple[Path, ...]:
        """Every file that the item is read from."""
        return tuple(self._path(part, self.ids[index]) for part in ("image", *self._parts()))

    def fingerprint(self) -> dict[str, object]:
        return {
            "name": "cityscapes",
            "split": self.split,
            "tasks": list(self.tasks),
            "protocol": self.protocol,
            "length": len(self),
            "ids": readers.digest(self.ids),
        }


def _class_table() -> np.ndarray:
    table = np.full(256, readers.IGNORE, np.uint8)
    table[list(LABEL_IDS)] = np.arange(len(LABEL_IDS))
    table.flags.writeable = False
    return table


_CLASS_OF = _class_table()


def _label_ids(path: Path) -> np.ndarray:
    labels = readers.read_labels(path)
    wrong = np.unique(labels[(labels > LAST_LABEL_ID) & (labels != LICENCE_PLATE)])
    if wrong.size:
        raise readers.WrongFileError(
            f"a label map with the values {readers.first_few(wrong.tolist())}",
            f"the official label numbers 0..{LAST_LABEL_ID}, and {LICENCE_PLATE} = licence plate",
        )
    return labels


def _disparity(path: Path) -> np.ndarray:
    stored = readers.read_16_bits(path, "a 16-bit grey PNG, 256 times the disparity in pixels, plus 1")
    values = (stored.astype(np.float32) - 1) / np.float32(256)  # exact: 16 bits and a power of two
    return np.where(stored == 0, np.float32(INVALID_DISPARITY), values)
