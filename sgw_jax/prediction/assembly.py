"""One image on its way through a network: its views out, their raw predictions in, its maps row by row."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from sgw_jax.data_pipelines.transforms import resize_to_fit
from sgw_jax.layers.resize import places
from sgw_jax.prediction.blending import Blending, Points, Strip
from sgw_jax.prediction.options import Options
from sgw_jax.prediction.tiles import Axis, Layout, View, axis

PIXELS = 2**16  # decoded at once: one compiled program then serves images of every size


class Assembly:
    """The maps of one image.

    Memory: the image, its copy at the resolution asked for, the decoded maps and, with more than one view, a strip of
    raw predictions as high as a tile and as wide as the copy.

    Args:
      image: uint8 RGB (height, width, 3).
      size: (height, width) of a tile, that of training.
      stride: of which the offsets of tiles are multiples.
      options: resolution, overlap, flip, confidence.
      blending: the programs.
    """

    def __init__(
        self, image: np.ndarray, size: tuple[int, int], stride: int, options: Options, blending: Blending
    ) -> None:
        self._copy = at_resolution(image, size, options.resolution)
        (height, width), (rows, columns) = image.shape[:2], self._copy.shape[:2]
        overlap = options.overlap
        self._layout = Layout(
            axis(rows, size[0], overlap, stride), axis(columns, size[1], overlap, stride), options.flip
        )
        self._confidence, self._blending = options.confidence, blending
        self._size, self._row = (height, width), 0  # the next row of the maps
        self._down, self._across = _sampling(self._layout.rows, height), _sampling(self._layout.columns, width)
        self._strip: Strip | None = None
        self._maps: dict[str, np.ndarray] = {}

    def views(self) -> Iterator[View]:
        """What the network must see, in this order."""
        return self._layout.views()

    def tile(self, view: View) -> np.ndarray:
        """A view for the network, float32 (*size, 3)."""
        return self._layout.cut(self._copy, view)

    def take(self, view: View, raw: Mapping[str, Array], number: int) -> dict[str, np.ndarray] | None:
        """The maps, once the raw prediction of the last view has come: the one with this number of a batch."""
        if self._layout.single:
            self._decode(raw, number, ({}, {}), self._size[0], 0)
            return self._maps
        rows, columns = self._layout.rows, self._layout.columns
        top, strip = rows.offsets[view.row], self._strip
        if strip is None:
            strip = self._blending.empty(
                rows=rows.tile + 1,  # the last row that was decoded is the upper neighbour of the next
                columns=-(-columns.canvas // columns.tile) * columns.tile + 1,
                spread=self._confidence,
            )
        ring = strip.weight.shape[0]
        strip = self._strip = self._blending.add(
            strip,
            raw,
            number,
            (top % ring, self._layout.left(view) + 1),
            rows.window(view.row),
            self._layout.across(view),
            mirrored=view.mirrored,
        )
        if view.column + 1 < len(columns.offsets) or view.mirrored != self._layout.flip:
            return None
        last = view.row + 1 == len(rows.offsets)
        done = rows.canvas if last else rows.offsets[view.row + 1]  # rows of the canvas to which nothing is added
        first, share = self._down
        end = int(np.searchsorted(first + (share > 0), done))
        self._decode(strip.values, 0, (strip.decoded, strip.variance), end, 1)
        if last:
            self._strip = None
            return self._maps
        kept = np.zeros(ring, bool)
        kept[np.arange(done - 1, top + rows.tile) % ring] = True
        self._strip = self._blending.forget(strip, kept)
        return None

    def _decode(self, raw: Mapping[str, Array], number: int, spread: Any, end: int, offset: int) -> None:
        """Writes the maps' rows up to `end`, of raw predictions in a ring of rows with `offset` columns more."""
        height, width = self._size
        ring = next(iter(raw.values())).shape[1]
        (rows, below), (columns, beside) = self._down, self._across
        for start in range(self._row * width, end * width, PIXELS):
            # The last piece is filled up with its last pixel, so that all have one shape.
            pixel = np.minimum(np.arange(start, start + PIXELS), end * width - 1)
            y, x = np.divmod(pixel, width)
            points: tuple[Any, ...] = (rows[y] % ring, below[y], columns[x] + np.int32(offset), beside[x])
            found = self._blending.decode(raw, number, spread, Points(*points), confidence=self._confidence)
            stop = min(start + PIXELS, end * width)
            for name, piece in jax.device_get(found).items():
                if name not in self._maps:
                    self._maps[name] = np.empty((height, width, *piece.shape[1:]), piece.dtype)
                flat = self._maps[name].reshape(height * width, *piece.shape[1:])
                flat[start:stop] = piece[: stop - start]
        self._row = end


def at_resolution(image: np.ndarray, size: tuple[int, int], resolution: str | int) -> np.ndarray:
    """The copy of an image that the network sees, see `Options`; in tiles where it is larger than `size`."""
    if isinstance(resolution, int):
        return resize_to_fit(image, (resolution, resolution))
    inside = image.shape[0] <= size[0] and image.shape[1] <= size[1]
    return resize_to_fit(image, size) if resolution == "fit" or inside else image


def _sampling(line: Axis, length: int) -> tuple[np.ndarray, np.ndarray]:
    """`places` of the pixels of an image, of which the axis has a copy, on its canvas."""
    first, share = places(line.length, length, length, np)
    return first.astype(np.int32) + line.margin, share
