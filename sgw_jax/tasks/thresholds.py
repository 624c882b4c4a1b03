"""Thresholds in float32 that say what they say in float64."""

from collections.abc import Sequence

import numpy as np


def float32_at_least(thresholds: Sequence[float] | np.ndarray) -> np.ndarray:
    """The least float32 not below each float64 threshold: then x >= t in float32 says what it says in float64."""
    wide = np.asarray(thresholds, np.float64)
    narrow = wide.astype(np.float32)
    return np.where(narrow < wide, np.nextafter(narrow, np.float32(np.inf)), narrow)
