"""The report's pictures: collected, then encoded together as large as the page allows."""

import base64
import io
import math
from typing import Any

import numpy as np
from PIL import Image

from sgw_jax.data_pipelines.errors import InputError

PICTURE_BYTES = 2_900_000  # of all pictures as base64, so that the page stays below 4 MB
PICTURE_SIZE = 512  # largest longer side of a picture
Record = dict[str, Any]


class Album:
    """Collects pictures first and encodes them together, as large as the page allows."""

    def __init__(self) -> None:
        self._pictures: list[tuple[Image.Image, bool, Record]] = []

    def add(self, pixels: np.ndarray, alt: str, photo: bool = False) -> Record:
        """A place for the picture; its "src" is filled by `encode`. Drawn maps are shrunk without mixing colours."""
        place = {"alt": alt, "src": "", "width": pixels.shape[1], "height": pixels.shape[0]}
        self._pictures.append((Image.fromarray(np.ascontiguousarray(pixels)), photo, place))
        return place

    def encode(self) -> None:
        """Fills every "src" with a data URI."""
        size: float = PICTURE_SIZE
        while True:
            sources = [_data_uri(picture, photo, int(size)) for picture, photo, _ in self._pictures]
            total = sum(map(len, sources))
            if total <= PICTURE_BYTES:
                break
            if size < 16:
                raise InputError(f"report: {len(sources)} pictures are too many for {PICTURE_BYTES} bytes.")
            longest = max(max(picture.size) for picture, _, _ in self._pictures)
            size = 0.95 * min(size, longest) * math.sqrt(PICTURE_BYTES / total)  # bytes grow with the area
        for source, (_, _, place) in zip(sources, self._pictures, strict=True):
            place["src"] = source


def _data_uri(picture: Image.Image, photo: bool, size: int) -> str:
    longer = max(picture.size)
    if longer > size:
        width, height = (max(1, round(side * size / longer)) for side in picture.size)
        picture = picture.resize((width, height), Image.Resampling.BOX if photo else Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def overlay(image: np.ndarray, strength: np.ndarray) -> np.ndarray:
    """The image, dim and grey, with the map (h, w) in [0, 1] glowing on it."""
    height, width = image.shape[:2]
    rows = np.arange(height) * strength.shape[0] // height
    columns = np.arange(width) * strength.shape[1] // width
    glow = strength[rows][:, columns, None]
    grey = 20 + 0.42 * (image.astype(np.float64) @ [0.299, 0.587, 0.114])[..., None]
    return np.rint((1 - glow) * grey + glow * np.array([255, 176, 46])).astype(np.uint8)
