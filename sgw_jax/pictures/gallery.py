"""One picture of several images with predictions above truth for every task: what a run leaves as examples.png."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from sgw_jax.pictures.panels import GAP, MARGIN, PAPER, TEXT_SIZE, Lettering

TILE_WIDTH = 192
LEAST_WIDTH = 144  # of a tile: what stands beside the rows is as wide
TITLE = 2 * TEXT_SIZE
INNER = 4  # between the prediction and the truth of one image


def gallery(examples: Mapping[str, Any], count: int = 2) -> Image.Image:
    """A column for the image and one per task; for each of the first ``count`` images prediction over truth.

    Args:
      examples: what `diagnostics.collect_examples` returns.
    """
    images, tasks = examples["image"][:count], examples["tasks"]
    height, width = images[0].shape[:2]
    scale = max(TILE_WIDTH // width, -(-LEAST_WIDTH // width))
    tile_width, tile_height = scale * width, scale * height
    columns = 1 + len(tasks)
    block = 2 * tile_height + INNER
    size = (
        2 * MARGIN + columns * tile_width + (columns - 1) * INNER,
        2 * MARGIN + TITLE + len(images) * block + (len(images) - 1) * GAP // 2,
    )
    picture, lettering = Image.new("RGB", size, PAPER), Lettering(TEXT_SIZE)
    draw = ImageDraw.Draw(picture)

    def place(pixels: np.ndarray, column: int, top: int) -> None:
        tile = Image.fromarray(np.ascontiguousarray(pixels)).resize((tile_width, tile_height), Image.Resampling.NEAREST)
        picture.paste(tile, (MARGIN + column * (tile_width + INNER), top))

    for column, name in enumerate(["image", *tasks]):
        left = MARGIN + column * (tile_width + INNER)
        lettering.write(draw, (left, MARGIN + TEXT_SIZE), name.replace("_", " "), "ls")
    for row, image in enumerate(images):
        top = MARGIN + TITLE + row * (block + GAP // 2)
        place(image, 0, top)
        for i, text in enumerate(("upper row: predicted", "lower row: truth")):
            below = top + tile_height + INNER + 2 * TEXT_SIZE + i * 3 * TEXT_SIZE // 2
            lettering.write(draw, (MARGIN, below), text, "ls", strong=False)
        for column, found in enumerate(tasks.values(), start=1):
            place(found["pictures"]["prediction"][row], column, top)
            place(found["pictures"]["truth"][row], column, top + tile_height + INNER)
    return picture
