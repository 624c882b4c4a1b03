"""NYUv2 with 13 classes and Cityscapes as MTAN released them, made small and stored as arrays; LibMTL uses them too.

root/{train,val}/image/<i>.npy     i = 0, 1, ...; floats (H, W, 3) in [0, 1]
root/{train,val}/label/<i>.npy     (H, W), 0, 1, ... = class, -1 = no class
root/{train,val}/depth/<i>.npy     floats (H, W, 1), 0 = invalid
root/{train,val}/normal/<i>.npy    NYUv2 only: floats (H, W, 3), unit or zero = invalid
root/{train,val}/label_<n>/        Cityscapes in MTAN's own release: labels of n classes, in place of label/
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar

import numpy as np

from sgw_jax.data_pipelines import readers
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.transforms import Example


class _Arrays:
    """What the two sources share. A subclass sets NAME, TASKS and how labels are read."""

    NAME = ""
    TASKS: tuple[str, ...] = ()

    def __init__(self, root: str | os.PathLike, split: str, tasks: Iterable[str] | None) -> None:
        self.root = Path(root)
        self.split = split
        self._folder = self.root / readers.archive_split(split, self.NAME)
        self.tasks = readers.archive_tasks(tasks, self.TASKS, self.NAME)
        self.ids = _count(self._folder / "image")
        readers.require_files((p for i in range(len(self)) for p in self.files(i)), f"{self.NAME}, split {split!r},")

    def _label_folder(self) -> str:
        return "label"

    def _labels(self, path: Path) -> np.ndarray:
        raise NotImplementedError

    def _path(self, field: str, id_: str) -> Path:
        folder = {"image": "image", "semseg": self._label_folder(), "depth": "depth", "normals": "normal"}[field]
        return self._folder / folder / f"{id_}.npy"

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        id_ = self.ids[index]
        task_readers: dict[str, Callable[[Path], np.ndarray]] = {
            "semseg": self._labels,
            "depth": readers.read_metres,
            "normals": readers.read_vector_floats,
        }
        image = readers.read(self._path("image", id_), f"image of id {id_!r}", _image)
        example = {"image": image}
        for task in self.tasks:
            path, what = self._path(task, id_), f"task {task!r} of id {id_!r}"
            values = readers.read(path, what, task_readers[task])
            if values.shape[:2] != image.shape[:2]:
                raise InputError(
                    f"{path}, {what}: it is {values.shape[0]} x {values.shape[1]} (height x width); "
                    f"allowed: its image's {image.shape[0]} x {image.shape[1]}"
                )
            example[task] = values
        return example

    def file_of(self, index: int) -> str:
        """Path of the item's image."""
        return str(self._path("image", self.ids[index]))

    def size_of(self, index: int) -> tuple[int, int]:
        """(height, width) of the item's image, by its header."""
        path = self._path("image", self.ids[index])
        return readers.read(path, f"image of id {self.ids[index]!r}", readers.read_array_size)

    def files(self, index: int) -> tuple[Path, ...]:
        """Every file that the item is read from."""
        return tuple(self._path(field, self.ids[index]) for field in ("image", *self.tasks))

    def fingerprint(self) -> dict[str, object]:
        return {
            "name": self.NAME,
            "split": self.split,
            "tasks": list(self.tasks),
            "length": len(self),
            "ids": readers.digest(self.ids),
        }


class MtanNYUv2(_Arrays):
    """Source over NYUv2 at 288 x 384 (picklable; opens files only when an item is read).

    image    uint8, round(255 x): at most 1/510 from the stored x.
    semseg   13 classes, 255 = no class. The release holds no names; CLASSES has those of the 13-class NYUv2 labels of
             Couprie et al. (2013) in their order.
    depth    metres, 0 = invalid.
    normals  unit; those shorter than 1/2 are exactly zero = invalid. The axes are the archive's.

    Raises ValueError when constructed for an unknown split or task, images that are not numbered 0, 1, ..., and missing
    files, all counted; when an item is read, for a file that is damaged, not of this form or of another size.
    """

    NAME = "mtan_nyuv2"
    TASKS = ("semseg", "depth", "normals")
    SPLIT_SIZES: ClassVar[dict[str, int]] = {"train": 795, "validation": 654}  # as published; not enforced
    CLASSES = (
        "bed", "books", "ceiling", "chair", "floor", "furniture", "objects", "picture", "sofa", "table", "television",
        "wall", "window",
    )  # fmt: skip

    def __init__(self, root: str | os.PathLike, split: str, tasks: Iterable[str] | None = None) -> None:
        super().__init__(root, split, tasks)

    def _labels(self, path: Path) -> np.ndarray:
        return readers.shift_labels(readers.read_array(path, kinds="fi"), 0, len(self.CLASSES))


class MtanCityscapes(_Arrays):
    """Source over Cityscapes at 128 x 256 or 256 x 512 (picklable; opens files only when an item is read).

    image   uint8, round(255 x): at most 1/510 from the stored x.
    semseg  `num_classes` = 2, 7 or 19 classes, 255 = no class; from label_<num_classes>/ if that exists, else label/.
            A label beyond `num_classes` is an error when it is read; fewer classes than `num_classes` are not noticed.
            The release holds no names of classes, so there are none here.
    depth   inverse depth as stored, 0 = invalid: the data set's 16-bit disparity as a fraction of 65535 (they reach
            0.4922 and 32257, lorenmt/mtan issue 25). Its task is Depth(quantity="inverse_depth").

    Raises ValueError as `MtanNYUv2`, and for another `num_classes`.
    """

    NAME = "mtan_cityscapes"
    TASKS = ("semseg", "depth")
    SPLIT_SIZES: ClassVar[dict[str, int]] = {"train": 2975, "validation": 500}  # as published; not enforced
    NUM_CLASSES = (2, 7, 19)

    def __init__(
        self, root: str | os.PathLike, split: str, tasks: Iterable[str] | None = None, num_classes: int = 7
    ) -> None:
        if num_classes not in self.NUM_CLASSES:
            allowed = ", ".join(map(str, self.NUM_CLASSES))
            raise InputError(f"{self.NAME}: num_classes is {num_classes!r}; allowed: {allowed}")
        self.num_classes = num_classes
        own = Path(root) / readers.archive_split(split, self.NAME) / f"label_{num_classes}"
        self._own_label_folder = own.name if own.is_dir() else "label"
        super().__init__(root, split, tasks)

    def _label_folder(self) -> str:
        return self._own_label_folder

    def _labels(self, path: Path) -> np.ndarray:
        return readers.shift_labels(readers.read_array(path, kinds="fi"), 0, self.num_classes)

    def fingerprint(self) -> dict[str, object]:
        return {**super().fingerprint(), "num_classes": self.num_classes}


def _count(folder: Path) -> tuple[str, ...]:
    """Ids "0", "1", ... for the .npy files of `folder`, which must be numbered so."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; it holds the images 0.npy, 1.npy, ...")
    stems = {path.stem for path in folder.glob("[!.]*.npy")}
    ids = tuple(map(str, range(len(stems))))
    missing = [f"{id_}.npy" for id_ in ids if id_ not in stems]
    if missing or not ids:
        raise InputError(
            f"{folder} holds {len(stems)} images but lacks {readers.first_few(missing or ['0.npy'])}; "
            "they must be numbered 0.npy, 1.npy, ... without a gap"
        )
    return ids


def _image(path: Path) -> np.ndarray:
    stored = readers.read_array(path, (3,))
    levels = np.rint(255 * stored)
    if not ((levels >= 0) & (levels <= 255)).all():  # NaN fails too
        raise readers.WrongFileError(f"an array with values from {stored.min()} to {stored.max()}", "floats in [0, 1]")
    return levels.astype(np.uint8)
