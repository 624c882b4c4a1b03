"""What the images and labels of a split hold, as numbers that add up: of one item, of some, of all."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from sgw_jax.data_pipelines.transforms import Example, Target, valid_pixels

LEVELS = 256
NOWHERE = np.iinfo(np.int64).max  # the item where a value first stands, if it stands in none
WITH_LEVELS = ("labels", "mask")


@dataclasses.dataclass(frozen=True, eq=False)
class Levels:
    """Where each of the 256 values of 8 bits stands: the labels as they are, a mask's v as the nearest of 255 v.

    pixels: int64 (256,), how many have the value. images: int64 (256,), in how many images. first: int64 (256,), the
    first item that has it.
    """

    pixels: np.ndarray
    images: np.ndarray
    first: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, item: int) -> Self:
        """Of one item's uint8 values."""
        pixels = np.bincount(values.ravel(), minlength=LEVELS)
        there = pixels > 0
        return cls(pixels, there.astype(np.int64), np.where(there, item, NOWHERE))

    def __add__(self, other: Self) -> Self:
        return dataclasses.replace(
            self,
            pixels=self.pixels + other.pixels,
            images=self.images + other.images,
            first=np.minimum(self.first, other.first),
        )

    @property
    def seen(self) -> list[int]:
        """The values that stand somewhere."""
        return np.flatnonzero(self.pixels).tolist()

    def to_dict(self) -> dict[str, list[int]]:
        """Value -> pixels, images, first item; of those that stand somewhere."""
        rows = np.stack([self.pixels, self.images, self.first], axis=1)
        return {str(value): rows[value].tolist() for value in self.seen}

    @classmethod
    def from_dict(cls, stored: Mapping[str, list[int]]) -> Self:
        """Inverse of `to_dict`."""
        rows = np.tile(np.array([0, 0, NOWHERE]), (LEVELS, 1))
        for value, row in stored.items():
            rows[int(value)] = row
        return cls(*rows.T)


@dataclasses.dataclass(frozen=True)
class Spread:
    """The range of the valid values, of vectors of each component: low, high, sum, and the items of the extremes."""

    low: tuple[float, ...]
    high: tuple[float, ...]
    total: tuple[float, ...]
    low_at: tuple[int, ...]
    high_at: tuple[int, ...]

    @classmethod
    def of(cls, values: np.ndarray, item: int) -> Self:
        """Of one item's valid values: float (pixels, components), at least one pixel."""
        low, high, total = (
            tuple(map(float, numbers)) for numbers in (values.min(0), values.max(0), values.sum(0, dtype=np.float64))
        )
        here = (item,) * values.shape[1]
        return cls(low, high, total, here, here)

    def __add__(self, other: Self) -> Self:
        lows = [min(pair) for pair in zip(_pairs(self.low, self.low_at), _pairs(other.low, other.low_at), strict=True)]
        highs = [
            max(pair, key=lambda place: place[0])
            for pair in zip(_pairs(self.high, self.high_at), _pairs(other.high, other.high_at), strict=True)
        ]
        return dataclasses.replace(
            self,
            low=tuple(value for value, _ in lows),
            low_at=tuple(item for _, item in lows),
            high=tuple(value for value, _ in highs),
            high_at=tuple(item for _, item in highs),
            total=tuple(map(sum, zip(self.total, other.total, strict=True))),
        )


def _pairs(values: tuple[float, ...], items: tuple[int, ...]) -> list[tuple[float, int]]:
    return list(zip(values, items, strict=True))


@dataclasses.dataclass(frozen=True)
class TaskFacts:
    """What the labels of one task hold.

    images: that have labels of the task, be they ignored all over. pixels: of these images. valid: of the pixels those
    with a label. shown: the first item with a valid pixel. levels: of labels and masks. spread: of what is valid of
    the other kinds.
    """

    images: int = 0
    pixels: int = 0
    valid: int = 0
    shown: int | None = None
    levels: Levels | None = None
    spread: Spread | None = None

    @classmethod
    def of(cls, values: np.ndarray, target: Target, item: int) -> Self:
        """Of one item, in a source's encoding (`Target`)."""
        valid = valid_pixels(values, target)
        count = int(np.count_nonzero(valid))
        levels = spread = None
        if target.kind == "labels":
            levels = Levels.of(values, item)
        elif target.kind == "mask":
            levels = Levels.of(np.rint(255 * np.clip(values[valid], 0, 1)).astype(np.uint8), item)
        elif count:
            spread = Spread.of(values[valid].reshape(count, -1), item)
        return cls(1, valid.size, count, item if count else None, levels, spread)

    def __add__(self, other: Self) -> Self:
        return dataclasses.replace(
            self,
            images=self.images + other.images,
            pixels=self.pixels + other.pixels,
            valid=self.valid + other.valid,
            shown=_either(self.shown, other.shown, min),
            levels=_either(self.levels, other.levels, Levels.__add__),
            spread=_either(self.spread, other.spread, Spread.__add__),
        )

    @property
    def ignored(self) -> float:
        """The share of the pixels without a label; 0 where there are no pixels."""
        return 1 - self.valid / self.pixels if self.pixels else 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        levels = self.levels and self.levels.to_dict()
        return {
            **{name: getattr(self, name) for name in ("images", "pixels", "valid", "shown")},
            "levels": levels,
            "spread": self.spread and dataclasses.asdict(self.spread),
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        levels, spread = stored["levels"], stored["spread"]
        found = {
            "levels": None if levels is None else Levels.from_dict(levels),
            "spread": None if spread is None else Spread(**{name: tuple(values) for name, values in spread.items()}),
        }
        return cls(**{**stored, **found})


def _either(one: Any, other: Any, both: Any) -> Any:
    """The one that is not None, or ``both`` of the two."""
    if one is None or other is None:
        return one if other is None else other
    return both(one, other)


@dataclasses.dataclass(frozen=True)
class SplitFacts:
    """What a split holds.

    images: how many. sizes: (height, width) -> images of it. tasks: by name. unlabelled: items without labels of any
    task. contents: digest of the pixels -> the items that have them. unreadable: what reading an item raised.
    """

    images: int = 0
    sizes: Mapping[tuple[int, int], int] = dataclasses.field(default_factory=dict)
    tasks: Mapping[str, TaskFacts] = dataclasses.field(default_factory=dict)
    unlabelled: tuple[int, ...] = ()
    contents: Mapping[bytes, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    unreadable: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON, without the digests."""
        return {
            "images": self.images,
            "sizes": [[*size, count] for size, count in sorted(self.sizes.items())],
            "tasks": {name: facts.to_dict() for name, facts in self.tasks.items()},
            "unlabelled": list(self.unlabelled),
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`."""
        return cls(
            images=stored["images"],
            sizes={(height, width): count for height, width, count in stored["sizes"]},
            tasks={name: TaskFacts.from_dict(facts) for name, facts in stored["tasks"].items()},
            unlabelled=tuple(stored["unlabelled"]),
        )


def task_facts(example: Example, targets: Mapping[str, Target], item: int) -> dict[str, TaskFacts]:
    """Of one example, the tasks that it has labels of."""
    return {name: TaskFacts.of(example[name], target, item) for name, target in targets.items() if name in example}
