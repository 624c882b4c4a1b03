"""The embedded data set: procedural furnished rooms with exact targets for six tasks, and nothing to download."""

import operator
from pathlib import Path
from typing import Any

import numpy as np

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.rooms import cache
from sgw_jax.data_pipelines.rooms.record import SEMSEG_CLASSES, SPLITS, VERSION, Collection, render_stored, unpack

__all__ = [
    "LENGTHS",
    "PART_CLASSES",
    "PART_COLOURS",
    "SEMSEG_CLASSES",
    "SEMSEG_COLOURS",
    "SPLITS",
    "VERSION",
    "Scenes",
    "render_scene",
]

LENGTHS = {"train": 2048, "validation": 256, "test": 256}
# How to draw the classes, in their order.
SEMSEG_COLOURS = (
    (203, 199, 188), (150, 111, 72), (236, 236, 248), (92, 190, 255), (139, 69, 19), (236, 160, 36),
    (222, 60, 56), (160, 60, 196), (60, 90, 214), (36, 146, 84), (255, 236, 92), (255, 120, 180),
)  # fmt: skip
PART_COLOURS = (
    (24, 24, 28),
    (255, 196, 150),
    (214, 52, 48),
    (44, 168, 66),
    (58, 200, 206),
    (64, 72, 220),
    (220, 64, 206),
)
PART_CLASSES = ("background", "head", "torso", "upper arms", "lower arms", "upper legs", "lower legs")


def render_scene(seed: int, split: str, index: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Renders one scene: what `Scenes(split, size=size, seed=seed)[index]` returns. See `Scenes` for the fields."""
    return unpack(render_stored(seed, split, index, size))


class Scenes:
    """A random-access source of furnished rooms: `scenes[i]` is a pure function of (seed, split, i, size).

    Bit-equal in every process of one environment, cached or not; across machines and NumPy versions up to rounding.
    No two splits share a scene. The room depends neither on the size nor on the length: a longer split begins alike.

    Fields, with (H, W) = size:
      image        uint8 (H, W, 3), RGB.
      semseg       uint8 (H, W), an index into SEMSEG_CLASSES. Clutter (balls, vases, plants, boxes) is 255 = ignore; a
                   picture counts as wall, a rug as floor.
      depth        float32 (H, W), metres along the camera's axis (z-depth, not ray length), in whole millimetres; 0 =
                   no reading (glass, highlights, out of range, grazing surfaces, projector shadow, random discs).
      normals      float32 (H, W, 3), unit to 1e-4, camera frame x right, y down, z forward, facing the pixel's ray.
                   Off the optical axis that allows z > 0 (a ceiling above a camera that looks down). Zero only where
                   rounding leaves a surface edge-on.
      edges        float32 (H, W) in {0, 1}: instance boundaries and depth discontinuities, one pixel wide, on the left
                   or upper pixel of each pair (`edges` in rooms/targets.py). A crease within an instance is no edge.
      saliency     float32 (H, W) in {0, 1}: the one attended object (`attended` in rooms/targets.py).
      human_parts  uint8 (H, W), an index into PART_CLASSES: a body part exactly on semseg's person pixels, else 0;
                   wholly 255 where no person is visible (the field's protocol: such an image has no labels).

    Args:
      split: "train", "validation" or "test".
      length: number of scenes; default LENGTHS[split].
      size: (height, width) in pixels.
      seed: non-negative; another seed is another data set.
      cache_dir: where `prepare` keeps the rendered split.
      workers: rendering processes of `prepare`; default one per usable core.
      progress: whether `prepare` reports on stderr; default: if there are many scenes to render.

    Raises:
      ValueError: unknown split; length, size or seed out of range.
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
            raise InputError(f"split is {split!r}; Scenes has the splits {', '.join(map(repr, SPLITS))}.")
        length = operator.index(LENGTHS[split] if length is None else length)
        height, width = (operator.index(side) for side in size)
        seed = operator.index(seed)
        if length < 1 or min(height, width) < 8 or seed < 0:
            found = f"{length=}, size={(height, width)}, {seed=}"
            raise InputError(f"Scenes needs length >= 1, size (height, width) >= (8, 8) and seed >= 0; got {found}.")
        self.collection = Collection(split, length, (height, width), seed)
        self.cache_dir = None if cache_dir is None else Path(cache_dir)
        self.workers = workers
        self.progress = progress
        self._prepared_in: Path | None = None
        self._arrays: dict[str, np.ndarray] | None = None

    def prepare(self) -> "Scenes":
        """Renders the split into `cache_dir` unless it is there, and reads from there from now on. Returns itself.

        Raises:
          ValueError: no cache_dir was given, or the cache is damaged (names the file).
        """
        if self.cache_dir is None:
            raise InputError("prepare() needs a cache_dir. Without one leave it out: scenes are rendered when read.")
        cache.prepare(self.collection, self.cache_dir, self.workers, self.progress)
        self._arrays = cache.open_arrays(self.collection, self.cache_dir)
        self._prepared_in = self.cache_dir
        return self

    def __len__(self) -> int:
        return self.collection.length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        index = operator.index(index)
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index} of the {len(self)} {self.collection.split} scenes")
        if self._prepared_in is None:
            return render_scene(self.collection.seed, self.collection.split, index, self.collection.size)
        if self._arrays is None:
            self._arrays = cache.open_arrays(self.collection, self._prepared_in)
        return unpack({name: array[index] for name, array in self._arrays.items()})

    def size_of(self, index: int) -> tuple[int, int]:
        """(height, width) of a scene: all have one size."""
        del index
        return self.collection.size

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_arrays": None}  # another process maps the files itself instead of receiving copies

    def fingerprint(self) -> dict[str, Any]:
        """What the content is a pure function of; JSON-able."""
        return self.collection.fingerprint()
