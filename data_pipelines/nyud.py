"""NYUD-v2 with four dense tasks, from any of the three archives whose folders are named alike and whose files are not.

    root/gt_sets/{train,val}.txt     one id per line; 795 and 654
    root/images/<id>                 8-bit RGB
    root/segmentation/<id>           0 = unlabelled, 1..40 = class; .mat: variable `segmentation`
    root/depth/<id>                  metres, 0 or non-finite = invalid; .mat: variable `depth`
    root/normals/<id>                .png, .jpg: 8-bit RGB, 2 v / 255 - 1; .npy: the vectors
    root/edge/<id>                   .png: v / 255; .npy: in [0, 1]

Which archive it is shows in the suffixes of the five folders (`ARCHIVES`). They differ in image size, and in normals,
so that numbers from different archives do not compare.
"""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar

import cv2
import numpy as np

from sgw_jax.data_pipelines import readers
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.transforms import Example

FOLDERS = {"image": "images", "semseg": "segmentation", "depth": "depth", "normals": "normals", "edges": "edge"}
# Archive -> folder -> suffix of its files.
ARCHIVES = {
    "invpt": {"images": ".png", "segmentation": ".png", "depth": ".npy", "normals": ".png", "edge": ".png"},
    "mti_net": {"images": ".jpg", "segmentation": ".png", "depth": ".npy", "normals": ".npy", "edge": ".npy"},
    "astmt": {"images": ".jpg", "segmentation": ".mat", "depth": ".mat", "normals": ".jpg", "edge": ".png"},
}
ORIGINS = {
    "invpt": "NYUDv2.tar.gz of ATRC and InvPT",
    "mti_net": "NYUD_MT.tgz of MTI-Net and the multi-task survey",
    "astmt": "NYUD_MT.tgz of ASTMT",
}
SUFFIXES = (".png", ".jpg", ".npy", ".mat")
NUMBERS = "fiub"  # dtypes allowed in the .npy and .mat files of the archives


class Nyud:
    """Source over one such archive (picklable; opens files only when an item is read).

    Attribute `archive` is the one found: "invpt", "mti_net" or "astmt". Files beside the five suffixes are ignored, a
    folder of a task that is not asked for may be missing.

    Encodings: `Target` of data_pipelines/transforms.py. Normals are made unit; those shorter than 1/2 become exactly
    zero = invalid, because 8 bits cannot store a zero (127 and 128 are -0.004 and 0.004). Their axes are the archive's,
    which no paper states. A target of another size than its image is resized to it: nearest, normals cubic (all three
    archives' loaders do so). 40 classes: unlabelled pixels are 255 (ASTMT itself counted them as a 41st class).

    Raises ValueError when constructed for an unknown split or task, a wrong split file, an archive that is none of the
    three, and missing files, all counted; when an item is read, for a file that is damaged or not of this form.
    """

    TASKS = ("semseg", "depth", "normals", "edges")
    SPLIT_SIZES: ClassVar[dict[str, int]] = {"train": 795, "validation": 654}  # as published; not enforced
    CLASSES = (
        "wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf", "picture",
        "counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat", "clothes",
        "ceiling", "books", "refridgerator", "television", "paper", "towel", "shower curtain", "box", "whiteboard",
        "person", "night stand", "toilet", "sink", "lamp", "bathtub", "bag", "otherstructure", "otherfurniture",
        "otherprop",
    )  # fmt: skip

    def __init__(self, root: str | os.PathLike, split: str, tasks: Iterable[str] | None = None) -> None:
        self.root = Path(root)
        self.split = split
        listed = readers.archive_split(split, "NYUD")
        self.tasks = readers.archive_tasks(tasks, self.TASKS, "NYUD")
        self.ids = readers.read_ids(self.root / "gt_sets" / f"{listed}.txt")
        self.archive = _recognise(self.root, [FOLDERS[field] for field in ("image", *self.tasks)])
        readers.require_files((path for i in range(len(self)) for path in self.files(i)), f"NYUD, split {split!r},")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        id_ = self.ids[index]
        example = {"image": readers.read(self._path("image", id_), f"image of id {id_!r}", readers.read_image)}
        size = example["image"].shape[:2]
        for task in self.tasks:
            path = self._path(task, id_)
            values = readers.read(path, f"task {task!r} of id {id_!r}", _READERS[task, path.suffix])
            if task == "normals":
                example[task] = readers.unit_or_zero(readers.resized(values, size, cv2.INTER_CUBIC))
            else:
                example[task] = readers.resized(values, size)
        return example

    def _path(self, field: str, id_: str) -> Path:
        folder = FOLDERS[field]
        return self.root / folder / (id_ + ARCHIVES[self.archive][folder])

    def file_of(self, index: int) -> str:
        """Path of the item's image."""
        return str(self._path("image", self.ids[index]))

    def size_of(self, index: int) -> tuple[int, int]:
        """(height, width) of the item's image, by its header."""
        path = self._path("image", self.ids[index])
        return readers.read(path, f"image of id {self.ids[index]!r}", readers.read_picture_size)

    def files(self, index: int) -> tuple[Path, ...]:
        """Every file that the item is read from."""
        return tuple(self._path(field, self.ids[index]) for field in ("image", *self.tasks))

    def describe(self) -> str:
        """Which archive this is, in one sentence."""
        return f"NYUD-v2, archive {self.archive!r} ({ORIGINS[self.archive]}): {_listing(ARCHIVES[self.archive])}."

    def fingerprint(self) -> dict[str, object]:
        return {
            "name": "nyud",
            "archive": self.archive,
            "split": self.split,
            "tasks": list(self.tasks),
            "length": len(self),
            "ids": readers.digest(self.ids),
        }


def _recognise(root: Path, required: list[str]) -> str:
    """The one archive whose suffixes the folders have, those that exist of the five."""
    absent = [folder for folder in required if not (root / folder).is_dir()]
    if absent:
        raise InputError(f"{root} has no folder {readers.first_few(absent)}, which NYUD needs for the tasks asked for")
    found = {
        folder: " and ".join(sorted({path.suffix for path in (root / folder).iterdir()} & set(SUFFIXES))) or "no file"
        for folder in FOLDERS.values()
        if (root / folder).is_dir()
    }
    fits = [archive for archive, suffixes in ARCHIVES.items() if found.items() <= suffixes.items()]
    if len(fits) != 1:
        known = "; ".join(f"{archive!r}, {ORIGINS[archive]}: {_listing(ARCHIVES[archive])}" for archive in ARCHIVES)
        raise InputError(
            f"{root} holds {_listing(found)}, which fits {' and '.join(fits) or 'no NYUD archive'}; known archives: "
            f"{known}; unpack one of them into an empty folder"
        )
    return fits[0]


def _listing(suffixes: dict[str, str]) -> str:
    return ", ".join(f"{folder} {suffix}" for folder, suffix in suffixes.items())


def _labels_picture(path: Path) -> np.ndarray:
    return readers.shift_labels(readers.read_labels(path), 1, len(Nyud.CLASSES))


def _labels_mat(path: Path) -> np.ndarray:
    stored = readers.checked_array(readers.read_mat(path, "segmentation"), kinds=NUMBERS)
    return readers.shift_labels(stored, 1, len(Nyud.CLASSES))


def _depth_array(path: Path) -> np.ndarray:
    return readers.checked_metres(readers.read_array(path, kinds=NUMBERS))


def _depth_mat(path: Path) -> np.ndarray:
    return readers.checked_metres(readers.checked_array(readers.read_mat(path, "depth"), kinds=NUMBERS))


def _normals_array(path: Path) -> np.ndarray:
    vectors = readers.read_array(path, (3,), NUMBERS).astype(np.float32)
    return np.where(np.isfinite(vectors).all(-1, keepdims=True), vectors, np.float32(0))  # before any resampling


def _edges_array(path: Path) -> np.ndarray:
    return readers.read_mask_floats(path, NUMBERS)


_READERS: dict[tuple[str, str], Callable[[Path], np.ndarray]] = {
    ("semseg", ".png"): _labels_picture,
    ("semseg", ".mat"): _labels_mat,
    ("depth", ".npy"): _depth_array,
    ("depth", ".mat"): _depth_mat,
    ("normals", ".png"): readers.read_byte_vectors,
    ("normals", ".jpg"): readers.read_byte_vectors,
    ("normals", ".npy"): _normals_array,
    ("edges", ".png"): readers.read_mask_picture,
    ("edges", ".npy"): _edges_array,
}
