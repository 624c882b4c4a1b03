"""Options of prediction: at which resolution, whether averaged over a mirror image, whether with its confidence."""

import dataclasses
from typing import Literal

from sgw_jax.data_pipelines.errors import InputError

__all__ = ["Options"]

LARGEST_OVERLAP = 0.9  # there each pixel is seen by a hundred tiles
LARGEST_SIDE = 2**15  # of an image that is scaled up


@dataclasses.dataclass(frozen=True)
class Options:
    """How a `Predictor` goes about an image; the defaults are one pass of the image as training saw it.

    Args:
      resolution: at what size the network sees an image.
        "fit": the largest copy that fits into the training size.
        "native": the image as it is, in tiles of the training size where it is larger than that.
        An integer N: the copy whose longer side is N pixels, in tiles likewise; N in [1, 32768].
      overlap: the share of a tile's side, in [0, 0.9], that neighbouring tiles have in common at least.
      flip: average the raw predictions with those of the mirror image, mirrored back.
      confidence: add maps, float32 (H, W), of how sure the network is, beside the tasks' own:
        TASK_probability of labels: softmax probability of the chosen class. Masks are probabilities already.
        TASK_entropy of labels: entropy of the classes' probabilities in nats, divided by log(number of classes): 0 is
        sure of one class, 1 knows nothing.
        TASK_spread of depth (in its unit, metres): standard deviation over the passes that saw a pixel, the flips and
        the tiles; of normals (degrees): root mean square angle to the mean direction. 0 where one pass saw it.

    Raises:
      ValueError: another resolution or overlap; a flip or confidence that is neither True nor False.

    >>> from sgw_jax.prediction.options import Options
    >>> Options(resolution="native", flip=True)
    Options(resolution='native', overlap=0.25, flip=True, confidence=False)
    """

    resolution: Literal["fit", "native"] | int = "fit"
    overlap: float = 0.25
    flip: bool = False
    confidence: bool = False

    def __post_init__(self) -> None:
        side = self.resolution
        whole = isinstance(side, int) and not isinstance(side, bool) and 1 <= side <= LARGEST_SIDE
        if side not in ("fit", "native") and not whole:
            raise InputError(
                f"resolution is {side!r}; choose 'fit', 'native' or the longer side in pixels, an integer in [1, "
                f"{LARGEST_SIDE}]."
            )
        number = isinstance(self.overlap, int | float) and not isinstance(self.overlap, bool)
        if not (number and 0 <= self.overlap <= LARGEST_OVERLAP):
            raise InputError(
                f"overlap is {self.overlap!r}; give the share of a tile's side that neighbours have in common, a "
                f"number in [0, {LARGEST_OVERLAP}]."
            )
        for name in ("flip", "confidence"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name} is {getattr(self, name)!r}; choose True or False.")
