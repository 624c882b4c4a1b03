"""The values that the page shows under the pointer: a map's pixels as small integers, which a browser decodes."""

import base64
import dataclasses
import gzip

import numpy as np

NO_VALUE = 2**16 - 1  # the code of what is not finite
GRID = 720  # pixels of the longer side of what is sent: a picture's width on a screen of double density


@dataclasses.dataclass(frozen=True)
class Codes:
    """Integers (height, width, channels) that stand for low[c] + step[c] * code.

    Labels stand for themselves, uint8. Numbers take 65535 even steps between the least and the greatest of their
    channel, so that one differs from what it stands for by at most step / 2: for depth up to 10 m a tenth of a
    millimetre. NO_VALUE is what is not finite.
    """

    array: np.ndarray
    low: tuple[float, ...]
    step: tuple[float, ...]

    def packed(self) -> str:
        """Little-endian, by rows, compressed by gzip, in base64."""
        data = self.array.astype(self.array.dtype.newbyteorder("<")).tobytes()
        return base64.b64encode(gzip.compress(data, compresslevel=1, mtime=0)).decode()


def encode(values: np.ndarray) -> Codes:
    """The codes of a map: labels uint8 (H, W), or floats (H, W) or (H, W, C)."""
    channels = values.reshape(*values.shape[:2], -1)
    if values.dtype == np.uint8:
        return Codes(channels, (0.0,) * channels.shape[2], (1.0,) * channels.shape[2])
    finite = np.isfinite(channels)
    low = np.min(channels, axis=(0, 1), where=finite, initial=np.inf).astype(np.float64)
    high = np.max(channels, axis=(0, 1), where=finite, initial=-np.inf).astype(np.float64)
    low, high = (np.where(np.isfinite(end), end, 0.0) for end in (low, high))
    step = (high - low) / (NO_VALUE - 1)
    scaled = (np.where(finite, channels, low) - low) / np.where(step > 0, step, 1)
    array = np.where(finite, np.rint(scaled), NO_VALUE).astype(np.uint16)
    return Codes(array, tuple(low.tolist()), tuple(step.tolist()))


def sampled(values: np.ndarray, longest: int = GRID) -> np.ndarray:
    """Every n-th pixel of an array (H, W, ...), so that its longer side has at most `longest`: values, no means of
    them, for the mean of two labels or directions is none."""
    height, width = values.shape[:2]
    rows, columns = (_places(length, max(height, width), longest) for length in (height, width))
    return values[rows[:, None], columns]


def _places(length: int, longer: int, longest: int) -> np.ndarray:
    """The pixels nearest the centres of as many even parts of a side as its share of `longest` has."""
    parts = length if longer <= longest else max(1, round(length * longest / longer))
    return (2 * np.arange(parts) + 1) * length // (2 * parts)
