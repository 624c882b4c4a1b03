"""Where tiles lie on an image: offsets, windows that sum to one, and the cutting itself. NumPy alone.

An image lies in the middle of a canvas, along each axis on its own: of the tile's length T if it fits into one, else
the shortest of T + k stride that holds it. Tiles lie on the canvas at multiples of the network's coarsest stride,
evenly spread, the first and the last at its ends, neighbours with `overlap` T in common at least. So all see the same
grid of features [our decision; the price is less than a stride of the mean colour around an image].
"""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, UInt8

from sgw_jax.data_pipelines.transforms import margin, normalise


@dataclasses.dataclass(frozen=True)
class Axis:
    """The tiles along one axis.

    Attributes:
      length: of the image, in pixels.
      tile: length of a tile.
      offsets: of the tiles on the canvas, from 0 on.
    """

    length: int
    tile: int
    offsets: tuple[int, ...]

    @property
    def canvas(self) -> int:
        """Length of the canvas."""
        return self.offsets[-1] + self.tile

    @property
    def margin(self) -> int:
        """Pixels of the canvas before the image; an odd rest is smaller there, as under `transforms.pad`."""
        return margin((self.length, 0), (self.canvas, 0))[0]

    def window(self, number: int) -> Float[np.ndarray, " tile"]:
        """The weights of a tile's pixels, float32: with h(i) = sin^2(pi (i + 1/2) / T) and offsets o,
        h(i) / sum_j h(i + o - o_j) over the tiles that cover the pixel. They sum to one at every pixel of the canvas,
        and are exactly one where there is one tile."""
        place = np.arange(self.tile) + self.offsets[number]
        return (_bell(place - self.offsets[number], self.tile) / self._total(place)).astype(np.float32)

    def _total(self, place: np.ndarray) -> np.ndarray:
        return np.sum([_bell(place - offset, self.tile) for offset in self.offsets], axis=0)


def axis(length: int, tile: int, overlap: float, stride: int) -> Axis:
    """The tiles of length ``tile`` on an image's axis.

    Args:
      length: of the image, in pixels.
      tile: length of a tile.
      overlap: the share of it that neighbours have in common at least, below 1.
      stride: of which offsets are multiples; where tiles may not be that far apart they have any offset.

    Returns:
      As few tiles as do.

    >>> from sgw_jax.prediction.tiles import axis
    >>> axis(length=100, tile=64, overlap=0.25, stride=8)
    Axis(length=100, tile=64, offsets=(0, 40))
    """
    apart = max(1, math.floor(tile * (1 - overlap)))
    stride = stride if stride <= apart else 1
    cells = -(-max(length - tile, 0) // stride)  # that the last tile is away from the first
    widest = apart // stride  # that neighbours may be apart
    steps = -(-cells // widest)
    return Axis(length, tile, tuple(cells * step // max(steps, 1) * stride for step in range(steps + 1)))


@dataclasses.dataclass(frozen=True)
class View:
    """What the network sees in one pass: a tile of the image or of its mirror image.

    Attributes:
      row: of the tile, among the tiles of the axis.
      column: of the tile, likewise; on the canvas of the mirror image where that is seen.
      mirrored: whether it is.
    """

    row: int
    column: int
    mirrored: bool


@dataclasses.dataclass(frozen=True)
class Layout:
    """The views of one image.

    Attributes:
      rows: tiles from above.
      columns: tiles from the left.
      flip: whether the mirror image is seen too.
    """

    rows: Axis
    columns: Axis
    flip: bool

    def views(self) -> Iterator[View]:
        """Row by row of tiles."""
        for row in range(len(self.rows.offsets)):
            for column in range(len(self.columns.offsets)):
                for mirrored in (False, True) if self.flip else (False,):
                    yield View(row, column, mirrored)

    @property
    def single(self) -> bool:
        """Whether there is one view."""
        return len(self.rows.offsets) == len(self.columns.offsets) == 1 and not self.flip

    def left(self, view: View) -> int:
        """The first column of the canvas that a view covers, in [-1, canvas - tile].

        The mirror image lies in the middle of a canvas of its own, so that a picture and its mirror image have the same
        views; where the canvas has an odd rest, its columns are beside those of the image's canvas, hence the -1.
        """
        offset = self.columns.offsets[view.column]
        if not view.mirrored:
            return offset
        return 2 * self.columns.margin + self.columns.length - self.columns.tile - offset

    def across(self, view: View) -> Float[np.ndarray, " tile"]:
        """The weights of a view's columns, from the left of the image."""
        window = self.columns.window(view.column)
        return window[::-1] if view.mirrored else window

    def cut(self, image: UInt8[np.ndarray, "height width 3"], view: View) -> Float[np.ndarray, "rows columns 3"]:
        """What the network is given: the pixels normalised, and 0, the mean colour, where the image ends."""
        rows = self.rows.offsets[view.row] - self.rows.margin
        columns = self.columns.offsets[view.column] - self.columns.margin
        top, left = max(rows, 0), max(columns, 0)
        bottom, right = rows + self.rows.tile, columns + self.columns.tile
        seen = (image[:, ::-1] if view.mirrored else image)[top:bottom, left:right]
        tile = np.zeros((self.rows.tile, self.columns.tile, 3), np.float32)
        top, left = top - rows, left - columns
        tile[top : top + len(seen), left : left + seen.shape[1]] = normalise(np.ascontiguousarray(seen))
        return tile


def _bell(place: np.ndarray, tile: int) -> np.ndarray:
    """sin^2 over a tile, 0 beside it."""
    return np.where((place >= 0) & (place < tile), np.sin(np.pi * (place + 0.5) / tile) ** 2, 0)
