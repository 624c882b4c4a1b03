"""Photometric distortion of 8-bit images: brightness, contrast, saturation, hue, from an explicit generator."""

import dataclasses

import cv2
import numpy as np

from sgw_jax.data_pipelines.errors import InputError


@dataclasses.dataclass(frozen=True)
class ColourDistortion:
    """Magnitudes of `distort_colour` on 8-bit images; each part acts with probability `probability`.

    brightness: shift drawn from [-b, b] grey levels. contrast, saturation: factors drawn from these ranges.
    hue: integer turn drawn from [-h, h), in units of 2 degrees.
    """

    brightness: float = 32.0
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: int = 18
    probability: float = 0.5

    def __post_init__(self) -> None:
        for name in ("contrast", "saturation"):
            low, high = getattr(self, name)
            if not 0 <= low <= high:
                raise InputError(f"ColourDistortion.{name} is ({low}, {high}); allowed: 0 <= low <= high")
        if self.brightness < 0 or not 0 <= self.hue <= 90 or not 0 <= self.probability <= 1:
            raise InputError(f"{self} is out of range; allowed: brightness >= 0, hue in 0..90, probability in [0, 1]")


def distort_colour(image: np.ndarray, rng: np.random.Generator, colour: ColourDistortion) -> np.ndarray:
    """Brightness; contrast either before or after (probability 1/2) saturation and hue. uint8 in, uint8 out.

    The recipe of SSD as ATRC and InvPT use it. Our decision: levels are rounded, and saturation and hue share one trip
    through HSV. Always takes the same number of draws from `rng`.
    """
    acts = rng.random(4) < colour.probability
    shift = rng.uniform(-colour.brightness, colour.brightness) if acts[0] else 0.0
    contrast = rng.uniform(*colour.contrast) if acts[1] else 1.0
    saturation = rng.uniform(*colour.saturation) if acts[2] else 1.0
    turn = int(rng.integers(-colour.hue, colour.hue)) if acts[3] and colour.hue else 0
    contrast_first = rng.random() < 0.5

    image = _map_levels(image, 1.0, shift)
    if contrast_first:
        image = _map_levels(image, contrast, 0.0)
    if saturation != 1 or turn != 0:
        levels = np.arange(256)
        table = np.stack([(levels + turn) % 180, np.clip(np.rint(levels * saturation), 0, 255), levels], axis=-1)
        hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_RGB2HSV), table[None].astype(np.uint8))
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return image if contrast_first else _map_levels(image, contrast, 0.0)


def _map_levels(image: np.ndarray, factor: float, shift: float) -> np.ndarray:
    """factor * level + shift, rounded and clipped to 0..255."""
    if factor == 1 and shift == 0:
        return image
    return cv2.LUT(image, np.clip(np.rint(np.arange(256) * factor + shift), 0, 255).astype(np.uint8))
