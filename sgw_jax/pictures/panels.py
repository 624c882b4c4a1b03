"""One picture of an image and its predicted maps: tiles with titles, the classes that occur, colour bars."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import cv2
import jax.numpy as jnp
import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sgw_jax.tasks.base import Legend

TILE = 480  # pixels of a tile's longer side; smaller images are enlarged by whole factors, so that pixels stay crisp
NARROWEST = 240  # a column's least width: room for title and legend beside a narrow picture
ASPECT = 1.8  # width / height that the arrangement of the tiles aims at
MARGIN, GAP, SPACE = 32, 28, 10  # around the panel, between tiles, between a tile's parts
TITLE_SIZE, TEXT_SIZE, LINE, SWATCH, BAR = 22, 15, 23, 13, 12
TOP = TITLE_SIZE + SPACE  # of a tile's picture
LEGEND_LINES = 5
BARS = ("depth", "disparity", "mask", "angle")  # kinds of maps with a colour bar
INK, SOFT_INK, OUTLINE, PAPER = (26, 28, 32), (104, 108, 116), (196, 199, 205), (255, 255, 255)


class Drawn(Protocol):
    """What a panel shows of an image: a `Task`, or a map of how sure the network is of one."""

    @property
    def name(self) -> str: ...
    @property
    def target(self) -> dict[str, Any]: ...
    def valid(self, target: Any) -> Any: ...
    def draw(self, decoded: np.ndarray, like: np.ndarray | None = None) -> np.ndarray: ...
    def legend(self, values: np.ndarray | None = None) -> Legend: ...


class Lettering:
    """A font of one size: PIL's own for ASCII, DejaVu Sans (from matplotlib) for what that one lacks."""

    def __init__(self, size: int) -> None:
        fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
        self._ascii, self._other = ImageFont.load_default(size), ImageFont.truetype(fonts / "DejaVuSans.ttf", size - 1)

    def write(
        self, draw: ImageDraw.ImageDraw, place: tuple[float, float], text: str, anchor: str, strong: bool = True
    ) -> None:
        """Writes one line; the anchor is PIL's."""
        draw.text(place, text, INK if strong else SOFT_INK, self._font(text), anchor=anchor)

    def length(self, text: str) -> float:
        """Pixels from the start to the end of the text."""
        return self._font(text).getlength(text)

    def shortened(self, text: str, room: float) -> str:
        """The text, or as much of its end as fits behind an ellipsis where it is wider than `room`."""
        if self.length(text) <= room:
            return text
        while text and self.length(f"... {text}") > room:
            text = text[1:]
        return f"... {text}" if text else ""

    def _font(self, text: str) -> Any:
        return self._ascii if text.isascii() else self._other


class Panel:
    """Draws panels; the fonts are loaded once."""

    def __init__(self) -> None:
        self._title, self._text = Lettering(TITLE_SIZE), Lettering(TEXT_SIZE)

    def draw(
        self, image: np.ndarray, maps: Mapping[str, np.ndarray], tasks: Sequence[Drawn], name: str = ""
    ) -> Image.Image:
        """The panel: the image first, then one tile per task.

        Args:
          image: uint8 (height, width, 3).
          maps: task name -> decoded map of the image's height and width.
          name: what the first tile says beside the image's size, for example the file's name.

        Each picture is drawn by `Task.draw` and shares its colour range with `Task.legend`. Under a task of kind
        "labels" stand the classes that occur, the largest first; under one of BARS a colour bar; under "vectors" the
        colours of the legend.
        """
        tile = tile_size(*image.shape[:2])
        width = max(tile[1], NARROWEST)
        tiles = [
            self.tile("Image", size_remark(image.shape, name), scaled(image, tile), None, width),
            *(
                self.tile(
                    title(task),
                    "",
                    coloured(task, maps[task.name], tile),
                    self.legend(task, maps[task.name], width),
                    width,
                )
                for task in tasks
            ),
        ]
        return arranged(tiles)[0]

    def legend(self, task: Drawn, values: np.ndarray, width: int, absent: bool = False) -> Image.Image:
        """What explains a task's colours, of a width in pixels.

        Args:
          task: whose.
          values: the map that is explained, or several below each other.
          width: of the legend.
          absent: whether classes that do not occur follow those that do.

        Returns:
          A picture.
        """
        kind = task.target["kind"]
        if kind in BARS:
            return self._colour_bar(task, values, width)
        entries = task.legend(values)
        if kind == "labels":
            here = present(entries, values)
            entries = [*here, *(entry for entry in entries if absent and entry not in here)]
        return self._swatches(entries, width)

    def tile(self, title: str, remark: str, picture: np.ndarray, legend: Image.Image | None, width: int) -> Image.Image:
        """A title, a remark at the end of its line, the picture below them (TOP pixels down) and its legend."""
        bottom = TOP + picture.shape[0]
        height = bottom + (SPACE + legend.height if legend else 0)
        tile = Image.new("RGB", (width, height), PAPER)
        draw = ImageDraw.Draw(tile)
        baseline = TITLE_SIZE - 3
        self._title.write(draw, (0, baseline), title, "ls")
        room = width - self._title.length(title) - 2 * SPACE
        self._text.write(draw, (width, baseline), self._text.shortened(remark, room), "rs", strong=False)
        tile.paste(Image.fromarray(picture), (0, TOP))
        if legend:
            tile.paste(legend, (0, bottom + SPACE))
        return tile

    def _swatches(self, legend: Legend, width: int) -> Image.Image:
        """Coloured squares and their texts in columns, as many as LEGEND_LINES hold; the last place counts the rest."""
        if not legend:
            return self._note("no valid value", width)
        widest = SWATCH + SPACE + max(math.ceil(self._text.length(text)) for text, _ in legend)
        columns = max(1, min((width + SPACE) // (widest + SPACE), len(legend)))
        places = columns * LEGEND_LINES
        shown = legend if len(legend) <= places else legend[: places - 1]
        cell = min(width // columns, widest + 3 * SPACE)
        picture = Image.new("RGB", (width, LINE * math.ceil(min(len(legend), places) / columns)), PAPER)
        draw = ImageDraw.Draw(picture)
        for index, (text, colour) in enumerate(shown):
            row, column = divmod(index, columns)
            left, middle = column * cell, row * LINE + LINE // 2
            top = middle - SWATCH // 2
            box = (left, top, left + SWATCH - 1, top + SWATCH - 1)
            draw.rectangle(box, colour, outline=OUTLINE if min(colour) > 200 else None)
            text = self._text.shortened(text, cell - SWATCH - SPACE)
            self._text.write(draw, (left + SWATCH + 7, middle), text, "lm")
        if len(shown) < len(legend):
            place = ((columns - 1) * cell, (LEGEND_LINES - 1) * LINE + LINE // 2)
            self._text.write(draw, place, f"+ {len(legend) - len(shown)} more", "lm", strong=False)
        return picture

    def _colour_bar(self, task: Drawn, values: np.ndarray, width: int) -> Image.Image:
        """The colours from the least to the greatest value, over the legend's evenly spaced ticks."""
        ends, ticks = colour_range(task, values), [text for text, _ in task.legend(values)]
        if ends is None:
            return self._note("no valid value", width)
        ramp = np.linspace(*ends, width, dtype=np.float32)[None]
        picture = Image.new("RGB", (width, BAR + LINE), PAPER)
        colours = task.draw(ramp, like=values)
        picture.paste(Image.fromarray(np.repeat(colours, BAR, axis=0)), (0, 0))
        draw = ImageDraw.Draw(picture)
        draw.rectangle((0, 0, width - 1, BAR - 1), outline=OUTLINE)
        last = len(ticks) - 1
        if last < 1:
            return picture
        # All ticks where there is room for them, else every other one, else the ends.
        widest = max(self._text.length(text) for text in ticks) + 2 * SPACE
        strides = [n for n in (1, 2, last) if last % n == 0]
        stride = next((n for n in strides if (last // n + 1) * widest <= width), strides[-1])
        for index in range(0, len(ticks), stride):
            anchor = "lt" if index == 0 else "rt" if index == last else "mt"
            place = (round(index / last * (width - 1)), BAR + 6)
            self._text.write(draw, place, ticks[index], anchor)
        return picture

    def _note(self, text: str, width: int) -> Image.Image:
        picture = Image.new("RGB", (width, LINE), PAPER)
        self._text.write(ImageDraw.Draw(picture), (0, LINE // 2), text, "lm", strong=False)
        return picture


def arranged(tiles: Sequence[Image.Image]) -> tuple[Image.Image, list[tuple[int, int]]]:
    """The tiles, of one width, in rows on one picture, and the place (left, top) of each."""
    width = tiles[0].width
    columns = column_count(len(tiles), width, max(tile.height for tile in tiles))
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    heights = [max(tile.height for tile in row) for row in rows]
    total = (2 * MARGIN + columns * width + (columns - 1) * GAP, 2 * MARGIN + sum(heights) + (len(rows) - 1) * GAP)
    picture, places, top = Image.new("RGB", total, PAPER), [], MARGIN
    for row, height in zip(rows, heights, strict=True):
        for column, tile in enumerate(row):
            places.append((MARGIN + column * (width + GAP), top))
            picture.paste(tile, places[-1])
        top += height + GAP
    return picture, places


def title(task: Drawn) -> str:
    """A task's name as a heading."""
    return task.name.replace("_", " ").capitalize()


def size_remark(shape: Sequence[int], name: str = "") -> str:
    """What stands beside the title of an image: its name, if it has one, and its size."""
    size = f"{shape[1]} x {shape[0]}"
    return f"{name}   {size}" if name else size


def coloured(task: Drawn, values: np.ndarray, tile: tuple[int, int], like: np.ndarray | None = None) -> np.ndarray:
    """A map's picture of a tile's size, uint8 (height, width, 3), in the colours of `like`'s range, else its own."""
    # Twice the tile's resolution is plenty: colours are then averaged, and the whole map need not be coloured.
    stride = max(1, min(values.shape[0] // (2 * tile[0]), values.shape[1] // (2 * tile[1])))
    return scaled(task.draw(values[::stride, ::stride], like=values if like is None else like), tile)


def tile_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) of a tile: the longer side at most TILE, and enlarged by a whole factor only."""
    factor = TILE / max(height, width)
    factor = math.floor(factor) if factor >= 1 else factor
    return max(1, round(height * factor)), max(1, round(width * factor))


def column_count(tiles: int, width: int, height: int) -> int:
    """The number of columns for tiles of this size: a shape near ASPECT with few empty places."""

    def cost(columns: int) -> float:
        rows = math.ceil(tiles / columns)
        return abs(math.log(columns * width / (rows * height) / ASPECT)) + 0.25 * (rows * columns - tiles)

    return min(range(1, tiles + 1), key=cost)


def present(legend: Legend, labels: np.ndarray) -> Legend:
    """The entries (entry i is class i) whose class occurs, the most frequent first."""
    counts = np.bincount(labels.ravel(), minlength=len(legend))[: len(legend)]
    order = np.argsort(-counts, kind="stable")
    return [legend[index] for index in order if counts[index]]


def colour_range(task: Drawn, values: np.ndarray) -> tuple[float, float] | None:
    """The values at the two ends of a colour bar; None where no pixel is valid. A mask's are always 0 and 1."""
    if task.target["kind"] == "mask":
        return 0.0, 1.0
    valid = values[np.asarray(task.valid(jnp.asarray(values)))]
    return (float(valid.min()), float(valid.max())) if valid.size else None


def scaled(picture: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    if picture.shape[:2] == size:
        return picture
    shrinks = picture.shape[0] > size[0] or picture.shape[1] > size[1]
    return cv2.resize(picture, size[::-1], interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_NEAREST)
