"""One scene as a record: what keys its random numbers, the compact types it is stored in, and the way back."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from sgw_jax.data_pipelines.rooms.layout import draw_scene
from sgw_jax.data_pipelines.rooms.render import render

VERSION = 1  # raise whenever any picture or target changes: it keys the random numbers, the cache and the fingerprint
SPLITS = {"train": 0, "validation": 1, "test": 2}
# fmt: off
SEMSEG_CLASSES = (
    "wall", "floor", "ceiling", "window", "door", "table", "chair", "sofa", "bed", "cabinet", "lamp", "person",
)
# fmt: on

# Each field's type and shape beyond (H, W) as stored. A rendered scene goes through the same types, so that a cached
# record is bit-equal to a rendered one.
STORED: dict[str, tuple[type, tuple[int, ...]]] = {
    "image": (np.uint8, (3,)),
    "semseg": (np.uint8, ()),
    "depth": (np.uint16, ()),  # whole millimetres, like a depth camera's files
    "normals": (np.int16, (3,)),  # components in units of 1/32767
    "edges": (np.uint8, ()),
    "saliency": (np.uint8, ()),
    "human_parts": (np.uint8, ()),
}


@dataclasses.dataclass(frozen=True)
class Collection:
    """All that a split's content depends on: split, number of scenes, image size (height, width) and seed."""

    split: str
    length: int
    size: tuple[int, int]
    seed: int

    def directory(self, cache_dir: Path) -> Path:
        height, width = self.size
        return cache_dir / f"scenes-v{VERSION}-seed{self.seed}-{self.split}-{self.length}-{height}x{width}"

    def fingerprint(self) -> dict[str, Any]:
        return {"name": "scenes", "version": VERSION} | dataclasses.asdict(self) | {"size": list(self.size)}

    def shape(self, field: str) -> tuple[int, ...]:
        """The stored shape of one field over all scenes."""
        return (self.length, *self.size, *STORED[field][1])


def render_stored(seed: int, split: str, index: int, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Scene `index` of a split in the types of `STORED`."""
    streams = np.random.SeedSequence(seed, spawn_key=(VERSION, SPLITS[split], index)).spawn(2)
    layout, sensor = (np.random.Generator(np.random.Philox(stream)) for stream in streams)
    fields = render(draw_scene(layout), size, SEMSEG_CLASSES, sensor)
    fields["depth"] = np.round(1000 * fields["depth"])
    fields["normals"] = np.round(32767 * fields["normals"])
    return {name: fields[name].astype(dtype) for name, (dtype, _) in STORED.items()}


def unpack(stored: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The record of the data contract from one scene in the types of `STORED`; always fresh arrays."""
    record = {name: np.array(stored[name]) for name in ("image", "semseg", "human_parts")}
    record["depth"] = stored["depth"].astype(np.float32) / np.float32(1000)
    record["normals"] = stored["normals"].astype(np.float32) / np.float32(32767)
    return record | {name: stored[name].astype(np.float32) for name in ("edges", "saliency")}
