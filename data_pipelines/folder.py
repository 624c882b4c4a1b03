"""A plain folder of image files and one folder of files per task as a source, with nothing guessed and nothing skipped.

    root/splits/<split>.txt            one id per line
    root/images/<id>.png .jpg .jpeg    8-bit RGB or grey; an orientation tag is ignored (targets match stored pixels)
    root/<task>/<id>.png .npy          a missing file: that image has no labels of the task

What a target's file may be follows from the target's kind, and its size must be the image's:

    labels     .png grey or palette of up to 8 bits: the index as stored, and `Target.fill` (255) = ignore
    depth      .npy floats (H, W), metres | .png 16-bit grey, millimetres;  0 (or, in .npy, non-finite) = invalid
    disparity  .npy floats (H, W), pixels; non-finite or `Target.fill` = invalid
    vectors    .npy floats (H, W, 3) | .png 8-bit RGB, 2 v / 255 - 1;  shorter than 1/2 or non-finite = invalid, which
               becomes exactly zero (8 bits cannot store it: 127 and 128 are -0.004 and 0.004); all else is made unit
    mask       .npy floats (H, W) in [0, 1], negative = ignore | .png grey of up to 8 bits, v / its highest level
"""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from sgw_jax.data_pipelines import readers
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.file_names import near_names, visible
from sgw_jax.data_pipelines.transforms import Example, Target

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
# The suffixes a target of each kind may have.
TARGET_SUFFIXES = {
    "labels": (".png",),
    "depth": (".npy", ".png"),
    "disparity": (".npy",),
    "vectors": (".npy", ".png"),
    "mask": (".npy", ".png"),
}


class Folder:
    """Source over such a folder (picklable; opens files only when an item is read).

    Raises ValueError when constructed unless the split lists at least one id and no id twice, every listed image exists
    once, and every target has its folder with at least one file for the split. A file that cannot be decoded or is not
    what its kind allows raises ValueError when its item is read, naming the file, the id and the task.
    """

    def __init__(self, root: str | os.PathLike, split: str, targets: Mapping[str, Target]) -> None:
        self.root = Path(root)
        self.split = split
        self.targets = dict(targets)
        for name in {"images", "image", "splits"} & set(targets):
            raise InputError(f"a target is named {name!r}, which the folder {self.root} uses itself; rename the target")
        self.ids = readers.read_ids(self.root / "splits" / f"{split}.txt")
        self.found = {"images": self._find("images", IMAGE_SUFFIXES, "images")}
        missing = [id_ for id_ in self.ids if id_ not in self.found["images"]]
        if missing:
            raise InputError(
                f"{self.root / 'images'} lacks {len(missing)} of the {len(self.ids)} images of split {split!r}: "
                f"{readers.first_few(missing)}; allowed: <id> with one of {', '.join(IMAGE_SUFFIXES)}"
                + self._meant(missing)
            )
        for name, target in self.targets.items():
            suffixes = TARGET_SUFFIXES[target.kind]
            self.found[name] = self._find(name, suffixes, f"task {name!r}")
            if not self.found[name]:
                raise InputError(
                    f"{self.root / name} has no file for any of the {len(self.ids)} ids of split {split!r}; "
                    f"task {name!r} ({target.kind}) needs <id> with one of {', '.join(suffixes)}, or leave the task out"
                    + self._meant(self.ids, name)
                )

    def _find(self, folder: str, suffixes: tuple[str, ...], what: str) -> dict[str, str]:
        return _find_files(self.root / folder, self.ids, suffixes, what)

    def _meant(self, ids: Sequence[str], folder: str = "images") -> str:
        """A hint at files that have other names, and at ids that have a suffix."""
        if any(os.path.splitext(id_)[1].lower() in IMAGE_SUFFIXES for id_ in ids) and folder == "images":
            return f"; {self.root / 'splits' / self.split}.txt lists ids, which are file names without their suffix"
        near = near_names(ids, visible(os.listdir(self.root / folder)))
        return (
            f"; perhaps meant: {readers.first_few(list(near.values()))}, rename or convert these files" if near else ""
        )

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        id_ = self.ids[index]
        example = {"image": readers.read(Path(self.file_of(index)), f"image of id {id_!r}", readers.read_image)}
        for name, target in self.targets.items():
            if id_ in self.found[name]:
                path = self.root / name / self.found[name][id_]
                what = f"task {name!r} ({target.kind}) of id {id_!r}"
                values = readers.read(path, what, _READERS[target.kind, path.suffix])
                if values.shape[:2] != example["image"].shape[:2]:
                    raise InputError(
                        f"{path}, {what}: it is {values.shape[0]} x {values.shape[1]} (height x width); "
                        f"allowed: its image's {example['image'].shape[0]} x {example['image'].shape[1]}"
                    )
                example[name] = values
        return example

    def file_of(self, index: int) -> str:
        """Path of the item's image."""
        return str(self.root / "images" / self.found["images"][self.ids[index]])

    def target_file(self, index: int, name: str) -> str:
        """Path of the item's labels of a task that it has labels of."""
        return str(self.root / name / self.found[name][self.ids[index]])

    def files(self, index: int) -> tuple[Path, ...]:
        """Every file that the item is read from."""
        id_ = self.ids[index]
        return tuple(self.root / folder / files[id_] for folder, files in self.found.items() if id_ in files)

    def size_of(self, index: int) -> tuple[int, int]:
        """(height, width) of the item's image, by its header."""
        return readers.read(Path(self.file_of(index)), f"image of id {self.ids[index]!r}", readers.read_picture_size)

    def fingerprint(self) -> dict[str, object]:
        """Name, split, length, and a SHA-256 over the ids and their files' names and sizes (not their contents)."""
        digest = hashlib.sha256()
        for id_, file, size in self._sizes():
            digest.update(f"{id_}\0{file}\0{size}\n".encode())
        return {"name": "folder", "split": self.split, "length": len(self), "digest": digest.hexdigest()}

    def listing(self) -> dict[str, int]:
        """What the fingerprint's digest is of: every file below the root, and its size in bytes."""
        return {file: size for _, file, size in self._sizes()}

    def _sizes(self) -> Iterator[tuple[str, str, int]]:
        """id, file and size, in the order of the digest."""
        folders = ("images", *sorted(self.targets))
        for id_ in self.ids:
            for folder in folders:
                if id_ in self.found[folder]:
                    file = f"{folder}/{self.found[folder][id_]}"
                    try:
                        yield id_, file, (self.root / file).stat().st_size
                    except OSError as error:  # a link that leads nowhere
                        raise InputError(f"{self.root / file}: {error.strerror or error}") from error


def _find_files(folder: Path, ids: tuple[str, ...], suffixes: tuple[str, ...], what: str) -> dict[str, str]:
    """id -> file name for the ids that have a file; two files for one id are an error."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder; it holds the files of {what}")
    names = set(os.listdir(folder))
    found = {}
    for id_ in ids:
        files = [id_ + suffix for suffix in suffixes if id_ + suffix in names]
        if len(files) > 1:
            raise InputError(f"{folder} has {' and '.join(files)} for id {id_!r} ({what}); keep one of them")
        if files:
            found[id_] = files[0]
    return found


_READERS: dict[tuple[str, str], Callable[[Path], np.ndarray]] = {
    ("labels", ".png"): readers.read_labels,
    ("depth", ".npy"): readers.read_metres,
    ("depth", ".png"): readers.read_millimetres,
    ("disparity", ".npy"): readers.read_floats,
    ("vectors", ".npy"): readers.read_vector_floats,
    ("vectors", ".png"): readers.read_vector_picture,
    ("mask", ".npy"): readers.read_mask_floats,
    ("mask", ".png"): readers.read_mask_picture,
}
