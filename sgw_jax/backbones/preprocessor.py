"""preprocessor_config.json: how a model of the hub scales and shifts the pixels that it was trained with."""

import math
from collections.abc import Mapping
from typing import Any

from sgw_jax.backbones.tensors import PretrainedError

Channels = tuple[float, ...]
LARGEST = 255  # of a pixel as it is stored
# Steps of an image processor that change no pixel's value, but for the image's size, which is the caller's here.
HARMLESS = {
    *("do_resize", "do_center_crop", "do_convert_rgb", "do_pad", "do_reduce_labels", "do_thumbnail"),
    *("do_align_long_axis", "do_rescale", "do_normalize"),
}


def normalisation(where: str, options: Mapping[str, Any], default: tuple[Channels, Channels]) -> tuple[Channels, ...]:
    """(mean, standard deviation) of the channels, of pixels in 0..1, that are exactly what the options do.

    With pixels p in 0..255, f = `rescale_factor` (1 without `do_rescale`), o = 1 with `offset` else 0, and mean m and
    deviation s (0 and 1 without `do_normalize`) the model gets (f p - o - m) / s, which of u = p / 255 is
    (u - (m + o) / (255 f)) / (s / (255 f)).

    Args:
      where: the file, for messages.
      options: what it holds.
      default: mean and deviation where `do_normalize` holds and the file gives none.

    Raises:
      PretrainedError: a value of another kind, a step that is not known, or values that contradict each other.
    """
    rescales, normalises = _flag(where, options, "do_rescale", True), _flag(where, options, "do_normalize", True)
    unknown = [key for key in options if key.startswith("do_") and key not in HARMLESS and _flag(where, options, key)]
    if unknown:
        raise PretrainedError(f"{where}: {', '.join(unknown)} is true; of the steps only {sorted(HARMLESS)} are known.")
    factor = _positive(where, "rescale_factor", options.get("rescale_factor", 1 / LARGEST)) if rescales else 1.0
    offset = max(_flag(where, options, "offset"), _flag(where, options, "rescale_offset")) if rescales else 0
    mean: Channels = (0.0, 0.0, 0.0)
    std: Channels = (1.0, 1.0, 1.0)
    if normalises:
        mean = _three(where, "image_mean", options.get("image_mean", default[0]))
        std = _three(where, "image_std", options.get("image_std", default[1]))
        if min(std) <= 0:
            raise PretrainedError(f"{where}: image_std is {list(std)}; it must be positive.")
    if not rescales and max(mean) <= 1:
        raise PretrainedError(
            f"{where}: do_rescale is false, which does not say whether the model's pixels are of 0..255 or of 0..1, "
            f"and image_mean {list(mean)} does not tell. Write do_rescale true with the rescale_factor that it was "
            "trained with, 1/255 for pixels of 0..1."
        )
    low, high = -offset, LARGEST * factor - offset
    span = 1.01 * (high - low)  # a factor may be rounded
    if normalises and (min(mean) < low or max(mean) > low + span or max(std) > span):
        raise PretrainedError(
            f"{where}: image_mean is {list(mean)} and image_std {list(std)}, but pixels times rescale_factor "
            f"{factor:.6g} lie in {low:g}..{high:.4g}; for a mean of 0..255 do_rescale must be false."
        )
    scale = LARGEST * factor
    return tuple((m + offset) / scale for m in mean), tuple(s / scale for s in std)


def _flag(where: str, options: Mapping[str, Any], key: str, default: bool = False) -> bool:
    value = options.get(key, default)
    if not isinstance(value, bool) and not (value is None and key in HARMLESS - {"do_rescale", "do_normalize"}):
        raise PretrainedError(f"{where}: {key} is {value!r}; it must be true or false.")
    return bool(value)


def _positive(where: str, key: str, value: Any) -> float:
    if not _number(value) or value <= 0:
        raise PretrainedError(f"{where}: {key} is {value!r}; it must be a positive number.")
    return float(value)


def _three(where: str, key: str, value: Any) -> Channels:
    if not isinstance(value, list | tuple) or len(value) != 3 or not all(map(_number, value)):
        raise PretrainedError(f"{where}: {key} is {value!r}; it must be three numbers.")
    return tuple(map(float, value))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
