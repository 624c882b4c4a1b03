"""Every item of a source once, unaugmented, images of any size among them: batches of a few shapes.

A network sees images of one size, and is scored at each image's own. So a batch holds images as the network sees them
(`seen_by_network`, padded, centred) and labels as they are stored, in the upper left corner of a canvas that is large
enough for all of the batch, filled up with `fill`. Canvases are few (`canvases`), for each costs a compiled program.
Beside "image" and the targets a batch of n rows holds

    item      int32 (n,)     which item of the source a row is; -1 a row that fills the batch up, without information
    geometry  int32 (n, 6)   top, left, height, width of the image inside the network's frame, its own height and width
    zoom      float32 (n,)   with fit "pad": the factor, at most 1, by which an image was shrunk to fit the frame

The last two are left out where nothing has to be resampled and one frame holds all: labels then lie where the image
does, padded with it, in the items' own order. What is in which batch is a pure function of the sizes, so that all
processes agree without a word.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import grain
import numpy as np

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.loader import Batches, Rows, Source, batches_over, check_source, read_example, read_item
from sgw_jax.data_pipelines.tap_cache import TapCache, with_taps
from sgw_jax.data_pipelines.transforms import (
    Example,
    Size,
    Target,
    check_example,
    check_fit,
    check_size,
    empty_example,
    finish,
    fit_factor,
    fit_inside,
    margin,
    normalise,
    pad,
    padded,
    seen_by_network,
)

# scored: images as the network sees them, labels at their own size; network: both as the network sees them; own: both
# at their own size, in the corner of the canvas.
View = Literal["scored", "network", "own"]
VIEWS = ("scored", "network", "own")
WASTE = 2  # times the images' own pixels are the most that all canvases have
ALIKE = 1.5  # likewise of one image, while sizes much alike are gathered
ROOM = 2**20  # pixels that the canvases of a batch may have in any case
NO_GEOMETRY = (0, 0, 1, 1, 1, 1)  # of a row without an image


def image_sizes(source: Source, threads: int = 2) -> tuple[Size, ...]:
    """(height, width) of every item: by its header where the source has `size_of`, else the item is read."""

    def size_of(index: int) -> Size:
        height, width = read_item(source, index, _size_of)
        return int(height), int(width)

    with ThreadPoolExecutor(max(threads, 1)) as pool:
        return tuple(pool.map(size_of, range(len(source))))


def _size_of(source: Any, index: int) -> Size:
    return source.size_of(index) if hasattr(source, "size_of") else source[index]["image"].shape[:2]


def needs_geometry(sizes: Sequence[Size], size: Size, fit: str, exact_frames: bool = False) -> bool:
    """Whether predictions must be brought to other frames: "resize" of other sizes, "pad" of larger images.

    With `exact_frames` padding will not do either: of metrics that look at the frame of the image.
    """
    if fit == "resize" or exact_frames:
        return any(own != tuple(size) for own in sizes)
    return any(own[0] > size[0] or own[1] > size[1] for own in sizes)


def canvases(sizes: Sequence[Size], exact: bool = False) -> dict[Size, tuple[int, ...]]:
    """Canvas -> the items on it, in their order: as few canvases as have together `WASTE` times the images' pixels.

    Sizes much alike are gathered first; then the two canvases whose union costs least become one, as long as that
    holds. With `exact` every size is a canvas.
    """
    number = Counter(sizes)
    groups = [_Canvas(own, number[own], [own]) for own in sorted(number, key=lambda size: (-size[0] * size[1], size))]
    if not exact:
        groups = _merged(_alike(groups), WASTE * sum(height * width for height, width in sizes))
    frame_of = {own: group.frame for group in groups for own in group.sizes}
    found: dict[Size, list[int]] = {group.frame: [] for group in groups}
    for item, own in enumerate(sizes):
        found[frame_of[own]].append(item)
    return {frame: tuple(items) for frame, items in found.items()}


@dataclasses.dataclass(frozen=True)
class _Canvas:
    """A frame, the number of items on it, and their sizes."""

    frame: Size
    items: int
    sizes: list[Size]

    @property
    def pixels(self) -> int:
        return self.frame[0] * self.frame[1] * self.items

    def with_other(self, other: "_Canvas") -> "_Canvas":
        frame = max(self.frame[0], other.frame[0]), max(self.frame[1], other.frame[1])
        return _Canvas(frame, self.items + other.items, self.sizes + other.sizes)


def _alike(groups: Sequence[_Canvas]) -> list[_Canvas]:
    """From the largest size to the smallest, each joins the first canvas on which it wastes no more than `ALIKE`."""
    found: list[_Canvas] = []
    for group in groups:
        for place, other in enumerate(found):
            union = other.with_other(group)
            if union.frame[0] * union.frame[1] <= ALIKE * group.frame[0] * group.frame[1]:
                found[place] = union
                break
        else:
            found.append(group)
    return found


def _merged(groups: list[_Canvas], allowed: int) -> list[_Canvas]:
    while len(groups) > 1:
        pairs = [(one, other) for place, one in enumerate(groups) for other in groups[:place]]
        one, other = min(pairs, key=lambda pair: pair[0].with_other(pair[1]).pixels - pair[0].pixels - pair[1].pixels)
        union = [group for group in groups if group is not one and group is not other] + [other.with_other(one)]
        if sum(group.pixels for group in union) > allowed:
            break
        groups = union
    return sorted(groups, key=lambda group: (-group.frame[0] * group.frame[1], group.frame))


@dataclasses.dataclass(frozen=True)
class Lot:
    """One global batch: its items, the number of its rows, of which the first are the items, and its canvas."""

    items: tuple[int, ...]
    rows: int
    canvas: Size


def lots(sizes: Sequence[Size], batch_size: int, size: Size, *, parts: int = 1, exact: bool = False) -> tuple[Lot, ...]:
    """The batches of items on canvases of their sizes (`canvases`).

    A batch has as many rows as keep its canvases within `ROOM`, or within `WASTE` batches of the network's frames, a
    multiple of `parts` and at least that: a single large image costs the memory of its own batch, not of `batch_size`
    such.
    """
    found, room = [], max(WASTE * batch_size * size[0] * size[1], ROOM)
    for canvas, items in canvases(sizes, exact).items():
        fitting = room // (canvas[0] * canvas[1])
        wanted = -(-len(items) // parts) * parts
        rows = min(max(fitting // parts * parts, parts), wanted, batch_size)
        found += [Lot(group, rows, canvas) for group in _groups(items, rows)]
    return tuple(found)


def _groups(items: Sequence[int], length: int) -> Iterator[tuple[int, ...]]:
    for start in range(0, len(items), length):
        yield tuple(items[start : start + length])


@dataclasses.dataclass(frozen=True)
class EvalStream:
    """The batches of a source, in a view: `batch` is a pure function of the batch's number."""

    source: Source
    targets: Mapping[str, Target]
    size: Size
    fit: str
    view: View
    geometry: bool
    lots: tuple[Lot, ...]
    block: tuple[int, int]  # this process's, of how many blocks of a batch's rows
    taps: TapCache | None = None  # as of `Stream`

    def batch(self, number: int) -> Example:
        """This process's rows of a batch."""
        lot = self.lots[number]
        rows = Rows(lot.rows, *self.block)
        examples = [self._row(lot, rows.n(place)) for place in range(rows.block)]
        return {name: np.stack([example[name] for example in examples]) for name in examples[0]}

    def _row(self, lot: Lot, row: int) -> Example:
        if row >= len(lot.items):
            empty = empty_example(self.targets, lot.canvas if self.view == "own" else self.size, lot.canvas)
            if self.taps is not None:
                empty |= self.taps.empty()
            return {**empty, **self._about(-1, NO_GEOMETRY, 1.0)}
        item = lot.items[row]
        return read_example(
            self.source, item, lambda example: with_taps(self._seen(example, item, lot.canvas), self.taps, item)
        )

    def _seen(self, example: Example, item: int, canvas: Size) -> Example:
        check_example(example, self.targets)
        own = (example["image"].shape[0], example["image"].shape[1])
        if self.view == "own":
            return {**finish(example, self.targets, canvas, corner=True), **self._about(item, (0, 0, *own, *own), 1.0)}
        if not self.geometry:
            larger = own[0] > self.size[0] or own[1] > self.size[1]
            whole = fit_inside(example, self.targets, self.size) if self.fit == "resize" or larger else example
            return {**finish(whole, self.targets, self.size), **self._about(item, NO_GEOMETRY, 1.0)}
        seen = seen_by_network(example["image"], self.size, self.fit)
        inner = (seen.shape[0], seen.shape[1])
        # The network of "pad" learned distances at the pixels' own scale: to it a shrunk image is one from further off,
        # by the rule of `zoom`. That of "resize" learned them from images fitted like this one.
        factor = min(1.0, fit_factor(own, self.size)) if inner != own else 1.0
        return {
            "image": pad(normalise(seen), self.size, 0),
            **padded(example, self.targets, canvas, corner=True),
            **self._about(item, (*margin(inner, self.size), *inner, *own), factor),
        }

    def _about(self, item: int, geometry: tuple[int, ...], factor: float) -> Example:
        about = {"item": np.asarray(item, np.int32)}
        if self.geometry:
            about["geometry"] = np.asarray(geometry, np.int32)
        if self.geometry and self.fit == "pad" and self.view == "scored":
            about["zoom"] = np.asarray(factor, np.float32)
        return about


def eval_batches(
    source: Source,
    targets: Mapping[str, Target],
    *,
    batch_size: int,
    size: Size,
    fit: str = "pad",
    view: View = "scored",
    sizes: Sequence[Size] | None = None,
    parts: int = 1,
    exact_frames: bool = False,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    num_threads: int = 2,
    prefetch: int = 4,
    taps: TapCache | None = None,
) -> Batches:
    """Every item once, unaugmented; see the module.

    Every process gets as many batches, all full: rows without an item hold a zero image and targets of `fill` alone,
    which add nothing to a masked metric sum.

    Args:
      batch_size: rows of a batch of all processes, of large canvases fewer.
      size: (height, width) of the network's frame.
      fit: how images come to that size, "resize" or "pad".
      view: "scored", "network" (in the items' order, labels resampled as the image is) or "own".
      sizes: of the items, `image_sizes`, if they are known.
      parts: what the number of a batch's rows must be a multiple of.
      exact_frames: no padding beside an image, for metrics that look at its frame: a canvas for each size.
      process_index, process_count, num_workers, num_threads, prefetch, taps: as of `train_batches`.

    Raises ValueError for an empty source and for counts that do not fit; an example that cannot be read raises
    ExampleError when its batch is reached.
    """
    check_source(source)
    check_size("size", size)
    check_fit(fit)
    if view not in VIEWS:
        raise InputError(f"eval_batches: view is {view!r}; allowed: {', '.join(VIEWS)}")
    Rows(batch_size, process_index, process_count)
    frame = (int(size[0]), int(size[1]))
    known: Sequence[Size] = () if view == "network" else image_sizes(source, num_threads) if sizes is None else sizes
    if view == "own" or needs_geometry(known, frame, fit, exact_frames):
        planned, geometry = lots(known, batch_size, frame, parts=parts, exact=exact_frames), True
    else:
        in_order = _groups(range(len(source)), batch_size)
        planned, geometry = tuple(Lot(items, batch_size, frame) for items in in_order), False
    block = (process_index, process_count)
    stream = EvalStream(source, dict(targets), frame, fit, view, geometry, planned, block, taps)
    dataset = grain.MapDataset.range(len(planned)).map(stream.batch)
    return batches_over(dataset, len(planned), num_workers, num_threads, prefetch)
