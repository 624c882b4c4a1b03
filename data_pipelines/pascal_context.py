"""PASCAL-Context with five dense tasks: the archive PASCAL_MT.tgz of ASTMT, also called PASCALContext.

    root/ImageSets/Context/{train,val}.txt      one id per line; 4998 and 5105
    root/JPEGImages/<id>.jpg                    8-bit RGB
    root/semseg/VOC12/<id>.png                  index 0..20, 255 = void; wins over
    root/semseg/pascal-context/<id>.png         the same, where VOC12 has no file
    root/human_parts/<id>.mat                   `anno`: objects, each with its class, and its parts' names and masks
    root/pascal-context/trainval/<id>.mat       `LabelMap`: one of 459 classes per pixel
    root/normals_distill/<id>.png               8-bit RGB, 2 v / 255 - 1
    root/sal_distill/<id>.png                   8-bit grey

Normals and saliency were distilled from networks, edges and human parts are computed when an item is read.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np

from sgw_jax.data_pipelines import readers
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.transforms import Example

PERSON = 15  # VOC's class index
# The 24 parts of a person in PASCAL-Parts, by the index that they get in PART_CLASSES.
PARTS = {
    1: ("head", "hair", "lear", "rear", "lebrow", "rebrow", "leye", "reye", "nose", "mouth"),
    2: ("neck", "torso"),
    3: ("luarm", "ruarm"),
    4: ("llarm", "rlarm", "lhand", "rhand"),
    5: ("luleg", "ruleg"),
    6: ("llleg", "rlleg", "lfoot", "rfoot"),
}
PART_INDEX = {name: index for index, names in PARTS.items() for name in names}
# The classes of LabelMap whose distilled normals count. The network that made them had seen NYUD, so that ASTMT keeps
# the classes whose name NYUD's 894 also have: 169 of the 459 ('unknown' aside), and tvmonitor (427), which NYUD calls
# television. Sky, grass, ground, water and road are out.
NORMALS_CLASSES = (
    3, 4, 6, 9, 10, 11, 13, 15, 17, 18, 22, 23, 29, 30, 33, 34, 36, 37, 38, 39, 41, 43, 46, 49, 50, 51, 53, 55, 56, 59,
    61, 62, 65, 66, 68, 69, 72, 73, 78, 83, 84, 85, 87, 88, 95, 96, 101, 104, 105, 107, 111, 113, 115, 122, 124, 135,
    141, 142, 143, 146, 150, 154, 157, 158, 159, 165, 172, 174, 181, 183, 184, 191, 193, 195, 197, 199, 202, 213, 215,
    216, 219, 220, 223, 225, 228, 230, 232, 233, 238, 239, 242, 243, 246, 250, 251, 252, 255, 260, 261, 263, 269, 272,
    273, 275, 281, 283, 284, 285, 286, 287, 288, 290, 291, 292, 293, 295, 304, 307, 309, 310, 314, 315, 319, 323, 329,
    330, 331, 336, 342, 345, 349, 350, 351, 352, 355, 357, 368, 370, 371, 374, 379, 380, 383, 384, 397, 401, 403, 405,
    407, 408, 411, 412, 413, 414, 417, 419, 421, 423, 427, 429, 430, 432, 440, 441, 442, 443, 444, 446, 454, 457,
)  # fmt: skip


def _voc_colour(index: int) -> tuple[int, int, int]:
    """VOC's palette: bits 0, 1, 2 of the index are the highest bits of red, green, blue; bits 3, 4, 5 the next; ..."""
    red, green, blue = (
        sum((index >> (3 * level + channel) & 1) << (7 - level) for level in range(8)) for channel in range(3)
    )
    return red, green, blue


class PascalContext:
    """Source over that archive (picklable; opens files only when an item is read).

    Encodings: `Target` of data_pipelines/transforms.py.
      semseg       21 classes, 255 = void.
      human_parts  0 = background, 1..6 = PART_CLASSES. Of the objects of class person, in their order, the parts are
                   painted in their order, each over what is there. A person without annotated parts is background. An
                   image where nothing is painted is 255 all over: its background would drown the parts.
      edges        1 where cv2.Laplacian of LabelMap (4 neighbours, mirrored borders) is not 0, thinned by
                   skimage.morphology.thin, else 0. The numbers of the classes have no meaning, and where their
                   differences cancel, an edge is missed: ASTMT's definition, kept.
      normals      where LabelMap is one of NORMALS_CLASSES, at unit length; elsewhere, and where shorter than 1/2, zero
                   = invalid. The axes are the archive's.
      saliency     1 where the grey level exceeds half of 255, else 0.
    A target of another size than its image is resized to it: nearest, normals cubic (as the archive's loaders do).

    Raises ValueError when constructed for an unknown split or task, a wrong split file, and missing files, all counted;
    when an item is read, for a file that is damaged or not of this form, an unknown name of a part included.
    """

    TASKS = ("semseg", "human_parts", "edges", "normals", "saliency")
    SPLIT_SIZES: ClassVar[dict[str, int]] = {"train": 4998, "validation": 5105}  # as published; not enforced
    CLASSES = (
        "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
        "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
    )  # fmt: skip
    COLOURS = tuple(map(_voc_colour, range(21)))
    PART_CLASSES = ("background", "head", "torso", "upper arms", "lower arms", "upper legs", "lower legs")
    PART_COLOURS = tuple(map(_voc_colour, range(7)))

    def __init__(self, root: str | os.PathLike, split: str, tasks: Iterable[str] | None = None) -> None:
        self.root = Path(root)
        self.split = split
        listed = readers.archive_split(split, "PASCAL-Context")
        self.tasks = readers.archive_tasks(tasks, self.TASKS, "PASCAL-Context")
        self.ids = readers.read_ids(self.root / "ImageSets" / "Context" / f"{listed}.txt")
        voc = self.root / "semseg" / "VOC12"
        self._in_voc = frozenset(os.listdir(voc) if voc.is_dir() else ()) & {f"{id_}.png" for id_ in self.ids}
        every = (path for i in range(len(self)) for path in self.files(i))
        readers.require_files(every, f"PASCAL-Context, split {split!r},")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Example:
        id_ = self.ids[index]
        example = {"image": readers.read(self._path("image", id_), f"image of id {id_!r}", readers.read_image)}
        size = example["image"].shape[:2]
        classes = np.zeros(0)
        if {"edges", "normals"} & set(self.tasks):
            classes = readers.read(self._path("classes", id_), f"class map of id {id_!r}", _class_map)
        for task in self.tasks:
            if task == "edges":
                example[task] = readers.resized(_edges(classes), size)
                continue
            path, what = self._path(task, id_), f"task {task!r} of id {id_!r}"
            if task == "normals":
                vectors = readers.read(path, what, readers.read_byte_vectors)
                if vectors.shape[:2] != classes.shape:
                    found, allowed = (" x ".join(map(str, values.shape[:2])) for values in (vectors, classes))
                    raise InputError(
                        f"{path}, {what}: it is {found} (height x width); "
                        f"allowed: {allowed}, as LabelMap in {self._path('classes', id_)}"
                    )
                vectors = np.where(np.isin(classes, NORMALS_CLASSES)[..., None], vectors, np.float32(0))
                example[task] = readers.unit_or_zero(readers.resized(vectors, size, cv2.INTER_CUBIC))
            else:
                reader = {"semseg": _semseg, "human_parts": _human_parts, "saliency": _saliency}[task]
                example[task] = readers.resized(readers.read(path, what, reader), size)
        return example

    def _path(self, field: str, id_: str) -> Path:
        if field == "semseg":
            return self.root / "semseg" / ("VOC12" if f"{id_}.png" in self._in_voc else "pascal-context") / f"{id_}.png"
        return (
            self.root
            / {
                "image": f"JPEGImages/{id_}.jpg",
                "classes": f"pascal-context/trainval/{id_}.mat",
                "human_parts": f"human_parts/{id_}.mat",
                "normals": f"normals_distill/{id_}.png",
                "saliency": f"sal_distill/{id_}.png",
            }[field]
        )

    def file_of(self, index: int) -> str:
        """Path of the item's image."""
        return str(self._path("image", self.ids[index]))

    def size_of(self, index: int) -> tuple[int, int]:
        """(height, width) of the item's image, by its header."""
        path = self._path("image", self.ids[index])
        return readers.read(path, f"image of id {self.ids[index]!r}", readers.read_picture_size)

    def files(self, index: int) -> tuple[Path, ...]:
        """Every file that the item is read from."""
        fields = ["image", *(task for task in self.tasks if task != "edges")]
        if {"edges", "normals"} & set(self.tasks):
            fields.append("classes")
        return tuple(self._path(field, self.ids[index]) for field in fields)

    def fingerprint(self) -> dict[str, object]:
        return {
            "name": "pascal_context",
            "split": self.split,
            "tasks": list(self.tasks),
            "length": len(self),
            "ids": readers.digest(self.ids),
        }


def _semseg(path: Path) -> np.ndarray:
    labels = readers.read_labels(path)
    wrong = np.unique(labels[(labels >= len(PascalContext.CLASSES)) & (labels != readers.IGNORE)])
    if wrong.size:
        raise readers.WrongFileError(
            f"a label map with the values {readers.first_few(wrong.tolist())}", "0..20, and 255 = void"
        )
    return labels


def _class_map(path: Path) -> np.ndarray:
    return readers.checked_array(readers.read_mat(path, "LabelMap"), kinds="fiu").astype(np.float64)


def _edges(classes: np.ndarray) -> np.ndarray:
    from skimage.morphology import thin  # a second to import, and needed only here

    return thin(cv2.Laplacian(classes, cv2.CV_64F) != 0).astype(np.float32)


def _saliency(path: Path) -> np.ndarray:
    return (readers.read_mask_picture(path) > 0.5).astype(np.float32)


def _human_parts(path: Path) -> np.ndarray:
    annotation: Any = readers.read_mat(path, "anno")[0, 0]  # records by position: image name, objects
    parts = [
        (str(part[0].item()), np.asarray(part[1]) != 0)  # part: name, mask
        for thing in annotation[1].ravel()  # thing: class name, class index, mask, parts
        if int(np.asarray(thing[1]).item()) == PERSON
        for part in thing[3].ravel()
    ]
    unknown = sorted({name for name, _ in parts} - set(PART_INDEX))
    if unknown:
        raise readers.WrongFileError(
            f"an annotation with the person parts {readers.first_few(unknown)}", ", ".join(PART_INDEX)
        )
    if not any(mask.any() for _, mask in parts):
        return np.full((1, 1), readers.IGNORE, np.uint8)  # resized to the image
    labels = np.zeros(parts[0][1].shape, np.uint8)
    for name, mask in parts:
        labels[mask] = PART_INDEX[name]
    return labels
