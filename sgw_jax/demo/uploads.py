"""What the page takes: photographs of known formats and bounded size, judged by their headers before any is decoded."""

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.transforms import resize_to_fit
from sgw_jax.prediction.image_files import read_image

FORMATS = ("BMP", "JPEG", "PNG", "WEBP")  # PIL's names; its other readers, some of which start programs, are not tried
LARGEST_FILE = 32 * 2**20  # bytes; the server refuses a longer upload while it arrives
MOST_PIXELS = 64_000_000  # of a decoded photograph, at 3 bytes each
LONGEST_SIDE = 2048  # pixels; larger photographs are shrunk to it, so that no visitor keeps the others waiting


def read_upload(path: Path, name: str) -> np.ndarray:
    """The photograph as RGB uint8 (H, W, 3), upright.

    Args:
      path: where the upload lies.
      name: what the visitor calls it; errors say this, and nothing of the server's folders.

    Raises:
      InputError: another format, whatever its suffix says; too many bytes or pixels; a file that ends early.
    """
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise InputError(f"{name} has {size / 2**20:.0f} MiB; allowed are {LARGEST_FILE // 2**20}. Save it smaller.")
    _check_header(path, name)
    try:
        return read_image(path)
    except InputError as error:
        raise InputError(str(error).replace(str(path), name)) from None


def shrunk(image: np.ndarray) -> np.ndarray:
    """A photograph (H, W, 3) whose longer side is LONGEST_SIDE, itself where it is no longer."""
    return resize_to_fit(image, (LONGEST_SIDE, LONGEST_SIDE)) if max(image.shape) > LONGEST_SIDE else image


def _check_header(path: Path, name: str) -> None:
    """Raises unless the first bytes are those of an image that may be decoded."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            width, height = image.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # of the header alone, too
        raise InputError(_too_many(name, "more pixels than anybody's photograph")) from error
    except UnidentifiedImageError:
        raise InputError(f"{name} is no image that is read here; allowed are {', '.join(FORMATS)}.") from None
    except Exception as error:  # PIL raises a dozen kinds for damaged headers
        raise InputError(f"{name} cannot be decoded: its header is damaged. Save it anew.") from error
    if width * height > MOST_PIXELS:
        raise InputError(_too_many(name, f"{width} x {height} pixels"))


def _too_many(name: str, found: str) -> str:
    return f"{name} has {found}; allowed are {MOST_PIXELS // 10**6} megapixels. Shrink it."
