"""Several sources as one: each with its own tasks, classes and epochs, in shares of the rows that weights say.

Row n of training comes from a source by a pure function of n (`Shares`), and is there example j of the source's own
`Stream`, which is one of (seed, j): so a mixture resumes at any step, and any number of processes, workers and threads
give the same rows. Each source keeps its own epochs; no two share random numbers. In evaluation the sources follow one
another.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from sgw_jax.data_pipelines.batch_names import SOURCE
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.loader import Source, Stream
from sgw_jax.data_pipelines.predictions import item_names
from sgw_jax.data_pipelines.readers import first_few
from sgw_jax.data_pipelines.tap_cache import TapCache
from sgw_jax.data_pipelines.transforms import Augmentation, Example, Size, Target

IGNORED = 255  # of labels
PART = 2  # the first key of what a part's seed is drawn by; PERMUTATION and AUGMENTATION of loader.py are 0 and 1
# What a source need not have.
OPTIONAL = ("ids", "file_of", "files", "size_of", "listing", "describe", "prepare")


@dataclasses.dataclass(frozen=True)
class Part:
    """A source of a mixture, with its targets under the run's names and its labels in the run's classes.

    names: target of the run -> target of the source. maps: target of the run -> class of the run by class of the
    source, 255 = ignored; labels without a map stay. balanced: the labels by which its random crops are balanced, if
    they are (`Augmentation.cat_max_ratio`).
    """

    source: Source
    names: Mapping[str, str]
    maps: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)
    balanced: str | None = None

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Example:
        found = self.source[index]
        example = {"image": found["image"]}
        for name, own in self.names.items():
            if own in found:
                example[name] = mapped(found[own], self.maps[name], name) if name in self.maps else found[own]
        return example

    def __getattr__(self, name: str) -> Any:
        if name in OPTIONAL:
            return getattr(self.source, name)
        raise AttributeError(f"{type(self).__name__} has no {name}")

    def target_file(self, index: int, name: str) -> str:
        """Path of the labels' own file where the source tells it, else the image's."""
        source: Any = self.source
        if hasattr(source, "target_file"):
            return source.target_file(index, self.names[name])
        return source.file_of(index) if hasattr(source, "file_of") else f"item {index}"

    def fingerprint(self) -> dict[str, Any]:
        """The source's own; names and maps are the configuration's."""
        return self.source.fingerprint()


def mapped(labels: np.ndarray, classes: Sequence[int], name: str = "labels") -> np.ndarray:
    """Labels uint8 (H, W) in other classes: ``classes[label]``, and 255 stays.

    Raises:
      InputError: a label that the map has no class for.
    """
    if wrong := sorted(set(np.unique(labels).tolist()) - {*range(len(classes)), IGNORED}):
        raise InputError(
            f"target {name!r} holds the labels {first_few(wrong)}, but its map is of the classes "
            f"0..{len(classes) - 1}, and {IGNORED} = ignored; correct the labels, or number of classes and map"
        )
    table = np.full(256, IGNORED, np.uint8)
    table[: len(classes)] = classes
    return table[labels]


@dataclasses.dataclass(frozen=True)
class Shares:
    """Which source each row of an infinite stream comes from, in shares like the weights: a closed form.

    With weights w_1, w_2 ... the first source takes the rows n at which floor(n s), s = w_1 / (w_1 + w_2 + ...), grows;
    of the rows left, counted from 0, the second takes its share of what is left, and so on. So every beginning of the
    stream, and every run of rows, has each source's share to within a few rows, and how many rows a source had before n
    needs no counting. Shares are fractions: nothing is rounded, on any machine.
    """

    weights: tuple[float, ...]

    def position(self, n: int) -> tuple[int, int]:
        """(place of the source, how many rows it had before) of row n."""
        for place, share in enumerate(self._shares):
            before = math.floor(n * share)
            if math.floor((n + 1) * share) > before:
                return place, before
            n -= before
        raise AssertionError("the last share is 1")

    @functools.cached_property
    def _shares(self) -> tuple[Fraction, ...]:
        weights = [Fraction(weight) for weight in self.weights]
        return tuple(weight / sum(weights[place:]) for place, weight in enumerate(weights))


@dataclasses.dataclass(frozen=True)
class MixedStream:
    """The infinite stream of a mixture's training examples: `example` is a pure function of n."""

    streams: tuple[Stream, ...]
    shares: Shares

    def example(self, n: int) -> Example:
        """The stream's n-th example, with the place of its source as "source", int32 ()."""
        place, own = self.shares.position(n)
        return {**self.streams[place].example(own), SOURCE: np.asarray(place, np.int32)}


@dataclasses.dataclass(frozen=True)
class Mixture:
    """The parts of a mixture one after another, as a source; weights are those of training."""

    parts: Mapping[str, Part]
    weights: Mapping[str, float]

    def stream(
        self, targets: Mapping[str, Target], augmentation: Augmentation, seed: int, taps: TapCache | None = None
    ) -> MixedStream:
        """The training examples, from each part in its share of the rows; taps: of the mixture's items."""
        firsts = itertools.accumulate(map(len, self.parts.values()), initial=0)
        streams = tuple(
            Stream(part, targets, _augmented(augmentation, part), part_seed(seed, place), taps, first)
            for place, (part, first) in enumerate(zip(self.parts.values(), firsts, strict=False))
        )
        return MixedStream(streams, Shares(tuple(self.weights[name] for name in self.parts)))

    def __len__(self) -> int:
        return sum(map(len, self.parts.values()))

    def place(self, index: int) -> tuple[str, int]:
        """(name of the part, item of the part)."""
        if index >= 0:
            for name, part in self.parts.items():
                if index < len(part):
                    return name, index
                index -= len(part)
        raise IndexError(f"the mixture has {len(self)} items")

    def spread(self, count: int) -> list[tuple[int, str]]:
        """(item, its part) of about ``count`` items, as many of every part and at least two, far apart in it."""
        each, start = max(2, -(-count // len(self.parts))), 0
        found = []
        for name, part in self.parts.items():
            number = min(each, len(part))
            found += [(place, start + place * len(part) // number, name) for place in range(number)]
            start += len(part)
        return [(item, name) for _, item, name in sorted(found)]

    def _own(self, index: int) -> tuple[Any, int]:
        name, item = self.place(index)
        return self.parts[name], item

    def __getitem__(self, index: int) -> Example:
        part, item = self._own(index)
        return part[item]

    @functools.cached_property
    def ids(self) -> tuple[str, ...]:
        """PART/ID of every item."""
        return tuple(
            f"{name}/{item_names(part, item)[0]}" for name, part in self.parts.items() for item in range(len(part))
        )

    def file_of(self, index: int) -> str:
        """Path of the item's image where its part has files."""
        part, item = self._own(index)
        return part.file_of(item) if hasattr(part, "file_of") else "/".join(map(str, self.place(index)))

    def target_file(self, index: int, name: str) -> str:
        """Path of the item's labels of a task that it has labels of."""
        part, item = self._own(index)
        return part.target_file(item, name)

    def files(self, index: int) -> tuple[Path, ...]:
        """Every file that the item is read from."""
        part, item = self._own(index)
        return part.files(item) if hasattr(part, "files") else ()

    def size_of(self, index: int) -> Size:
        """(height, width) of the item's image."""
        part, item = self._own(index)
        height, width = part.size_of(item) if hasattr(part, "size_of") else part[item]["image"].shape[:2]
        return height, width

    def listing(self) -> dict[str, int]:
        """PART/FILE -> bytes, of the parts that have files."""
        return {
            f"{name}/{file}": size for name, part in self._having("listing") for file, size in part.listing().items()
        }

    def _having(self, method: str) -> Iterator[tuple[str, Any]]:
        return ((name, part) for name, part in self.parts.items() if hasattr(part, method))

    def fingerprint(self) -> dict[str, Any]:
        """Those of the parts, by name."""
        return {"name": "mixture", **{f"part {name}": part.fingerprint() for name, part in self.parts.items()}}


def part_seed(seed: int, place: int) -> int:
    """The seed of a part's stream: 128 bits that no other part and no other use of the seed has."""
    words = np.random.SeedSequence(seed, spawn_key=(PART, place)).generate_state(2, np.uint64)
    return int(words[0]) << 64 | int(words[1])


def _augmented(augmentation: Augmentation, part: Part) -> Augmentation:
    """Crops are balanced by labels that the part has, or not at all."""
    ratio = None if part.balanced is None else augmentation.cat_max_ratio
    balanced = None if ratio is None else part.balanced
    return dataclasses.replace(augmentation, cat_max_ratio=ratio, cat_max_target=balanced)


@dataclasses.dataclass(frozen=True)
class Chosen:
    """Some items of a source."""

    source: Source
    items: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Example:
        return self.source[self.items[index]]

    def fingerprint(self) -> dict[str, Any]:
        """The source's, and which items."""
        return {**self.source.fingerprint(), "items": list(self.items)}
