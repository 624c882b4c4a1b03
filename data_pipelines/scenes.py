"""The embedded data set: procedural furnished rooms, ray cast in NumPy, with exact targets for six tasks and nothing to download."""

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines.rooms.layout import draw_scene
from data_pipelines.rooms.render import render

VERSION = 1  # raise whenever any picture or target changes: it keys the random numbers, the cache and the fingerprint
SPLITS = {"train": 0, "validation": 1, "test": 2}
LENGTHS = {"train": 2048, "validation": 256, "test": 256}
SEMSEG_CLASSES = ("wall", "floor", "ceiling", "window", "door", "table", "chair", "sofa", "bed", "cabinet", "lamp", "person")
PART_CLASSES = ("background", "head", "torso", "upper arms", "lower arms", "upper legs", "lower legs")
IGNORE = 255

# How each field is stored: what the disk holds is what render_scene returns, after _unpack in both cases.
STORED: dict[str, tuple[type, tuple[int, ...]]] = {
    "image": (np.uint8, (3,)),
    "semseg": (np.uint8, ()),
    "depth": (np.uint16, ()),  # whole millimetres, like a depth camera's files
    "normals": (np.int16, (3,)),  # components in units of 1/32767
    "edges": (np.uint8, ()),
    "saliency": (np.uint8, ()),
    "human_parts": (np.uint8, ()),
}


def render_stored(seed: int, split: str, index: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Scene `index` of a split in the compact types of `STORED`."""
    streams = np.random.SeedSequence(seed, spawn_key=(VERSION, SPLITS[split], index)).spawn(2)
    layout, sensor = (np.random.Generator(np.random.Philox(stream)) for stream in streams)
    fields = render(draw_scene(layout), size, SEMSEG_CLASSES, sensor)
    fields["depth"] = np.round(1000 * fields["depth"])
    fields["normals"] = np.round(32767 * fields["normals"])
    fields["normals"][fields["normals"][..., 2] >= 0] = 0
    return {name: fields[name].astype(dtype) for name, (dtype, _) in STORED.items()}


def unpack(stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The record of the data contract from one scene in the types of `STORED`; always fresh arrays."""
    record = {name: np.array(stored[name]) for name in ("image", "semseg", "human_parts")}
    record["depth"] = stored["depth"].astype(np.float32) / np.float32(1000)
    record["normals"] = stored["normals"].astype(np.float32) / np.float32(32767)
    record |= {name: stored[name].astype(np.float32) for name in ("edges", "saliency")}
    return record


def render_scene(seed: int, split: str, index: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Renders one scene: what `Scenes(split, size=size, seed=seed)[index]` returns. See `Scenes` for the fields."""
    return unpack(render_stored(seed, split, index, size))


class Scenes:
    """A random-access source of furnished rooms. `scenes[i]` is a pure function of (seed, split, i, size).

    Bit-equal in every process of one environment, cached or not; across machines and NumPy versions equal up to rounding.
    No two splits share a scene. The room does not depend on the size, nor on the length: a longer split begins alike.

    Fields (H, W = size):
      image        uint8 (H, W, 3) RGB.
      semseg       uint8 (H, W), an index into SEMSEG_CLASSES. Clutter (balls, vases, plants, boxes) is 255 = ignore;
                   a picture is wall, a rug is floor.
      depth        float32 (H, W), metres along the camera's axis (z-depth, not ray length), in whole millimetres;
                   0 = no reading (glass, highlights, beyond range, grazing surfaces, projector shadow, random discs).
      normals      float32 (H, W, 3) unit to 1e-4, camera frame x right, y down, z forward, z < 0; zero where a visible
                   surface turns away from the camera's axis (only near the image's borders).
      edges        float32 (H, W) {0, 1}: instance boundaries and depth discontinuities, one pixel wide, on the left or
                   upper pixel of each pair; see rooms/targets.py `edges`. Creases within an instance are no edges.
      saliency     float32 (H, W) {0, 1}: the one attended object; see rooms/targets.py `attended`.
      human_parts  uint8 (H, W), an index into PART_CLASSES on semseg's person pixels, 0 elsewhere; wholly 255 where no
                   person is visible (the field's protocol: such an image has no labels).

    Args:
      split: "train", "validation" or "test".
      length: number of scenes; default LENGTHS[split].
      size: (height, width) in pixels.
      seed: non-negative; another seed is another data set.
      cache_dir: where `prepare` keeps the rendered split.
      workers: rendering processes of `prepare`; default one per usable core.
      progress: whether `prepare` reports progress on stderr; None: if there is more than a moment's work.

    Raises:
      ValueError: for an unknown split, or a length, size or seed out of range.
    """

    def __init__(
        self,
        split: str,
        length: int | None = None,
        size: tuple[int, int] = (64, 96),
        seed: int = 0,
        cache_dir: str | Path | None = None,
        workers: int | None = None,
        progress: bool | None = None,
    ):
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; Scenes has the splits {', '.join(map(repr, SPLITS))}.")
        self.split = split
        self.length = operator.index(LENGTHS[split] if length is None else length)
        self.size = (operator.index(size[0]), operator.index(size[1]))
        self.seed = operator.index(seed)
        if self.length < 1 or min(self.size) < 8 or self.seed < 0:
            raise ValueError(
                f"Scenes needs length >= 1, a size of at least 8x8 and seed >= 0; got length={length}, size={size}, seed={seed}."
            )
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.workers = workers
        self.progress = progress
        self._prepared = False
        self._fields: dict[str, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index = operator.index(index)
        if not 0 <= index < self.length:
            raise IndexError(f"scene {index} of {self.length} ({self.split})")
        if not self._prepared:
            return render_scene(self.seed, self.split, index, self.size)
        if self._fields is None:
            self._open()
        return unpack({name: values[index] for name, values in self._fields.items()})

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_fields": None}  # memory maps are reopened, not copied, in another process

    def fingerprint(self) -> dict[str, Any]:
        """What the data is a pure function of; JSON-able."""
        return {
            "name": "scenes", "version": VERSION, "split": self.split, "length": self.length, "size": list(self.size), "seed": self.seed,
        }  # fmt: skip
