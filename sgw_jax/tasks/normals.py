"""Surface normals: L1 loss between unit vectors, mean angle over the data set."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.tasks.base import IGNORED_COLOUR, Legend, Sums, Task, count, ratio

ANGLES = (5.0, 7.5, 11.25, 22.5, 30.0)
DIGIT = 64  # the histogram of angles has DIGIT^2 bins
# Inside the root of the norm, in the loss. The gradient of a zero prediction is then finite (at most 1e4 per unit of
# loss), and a prediction of length 1 is not changed in float32.
EPSILON = 1e-8
# Signs that bring vectors to the camera's frame, x right, y down, z forward (OpenCV's), from that of the labels.
AXES = {"opencv": (1, 1, 1), "opengl": (1, -1, -1)}
WORDS = {"opencv": "x right, y down, z forward", "opengl": "x right, y up, z towards the viewer"}


@dataclasses.dataclass(frozen=True)
class Normals(Task):
    """One direction per pixel, in the axes of the labels: `axes` "opencv" is x right, y down, z forward; "opengl" is
    x right, y up, z towards the viewer.

    A visible surface faces its ray, which on the optical axis is z < 0 with "opencv", z > 0 with "opengl". Predictions
    are in the axes of the labels. Losses and metrics do not depend on the axes; pictures and legends do, and are the
    same of the same surface.

    Target float (batch, height, width, 3), unit vectors; invalid where all-zero or not finite. The prediction is not
    normalised; with n(v) = v / sqrt(|v|^2 + 1e-8):
    Loss: |n(prediction) - target| summed over the three channels and the valid pixels; the count is of PIXELS, so the
    loss is three times a mean over elements. The target is not normalised again (InvPT). The weight 10 is InvPT's.

    Metrics of the angle 2 atan2(|p - g|, |p + g|) between p / |p| and g / |g|, whatever their lengths, which unlike an
    arc cosine is exact near 0 and 180 degrees; pooled over the pixels of the data set:
      mean, rmse: degrees.   within_5 .. within_30: percent of the pixels with a smaller angle, of `ANGLES`.
      median: degrees, from a histogram whose k-th of 4096 bins is 180 [(k/4096)^2, ((k+1)/4096)^2]: the error is below
        the bin's width, at most 0.01 degrees at 2, 0.02 at 9, 0.09 at 180.
    A prediction of zero is 90 degrees from everything.

    "published" computes the same: the field's code only adds a round trip through (n + 1) * 255 / 2 in floating point,
    which changes nothing but the last digits. InvPT counts more pixels where an 8-bit zero is stored as 127 or 128: a
    vector of length 0.007, which its metric normalises. So does ours, but our sources make vectors shorter than 1/2
    invalid.
    """

    kind: ClassVar[str] = "normals"

    name: str = "normals"
    weight: float = 10.0
    axes: str = "opencv"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.axes not in AXES:
            raise InputError(f"Task {self.name!r}: axes is {self.axes!r}; choose one of {tuple(AXES)}.")

    @property
    def channels(self) -> int:
        return 3

    @property
    def target(self) -> dict[str, Any]:
        return {"kind": "vectors", "fill": 0.0, "resample": "nearest"}

    @property
    def metric(self) -> str:
        return "mean"

    @property
    def higher_is_better(self) -> bool:
        return False

    @property
    def directions(self) -> dict[str, bool]:
        return {name: name.startswith("within") for name in self.units}

    @property
    def units(self) -> dict[str, str]:
        angles = {"mean": "deg", "median": "deg", "rmse": "deg"}
        return {**angles, **{f"within_{angle:g}": "%" for angle in ANGLES}}

    def valid(self, target: Array) -> Bool[Array, "batch height width"]:
        return jnp.all(jnp.isfinite(target), axis=-1) & jnp.any(target != 0, axis=-1)

    def loss_terms(
        self, prediction: Array, target: Array, statistics: Sums | None = None
    ) -> tuple[Float[Array, ""], Int[Array, ""]]:
        del statistics
        predicted, target = _softened(self.float32(prediction)), self.vector_target(prediction, target)
        valid = self.valid(target)
        error = jnp.sum(jnp.abs(predicted - jnp.where(valid[..., None], target, 0)), axis=-1)
        return jnp.sum(jnp.where(valid, error, 0)), count(valid)

    def metric_sums(self, prediction: Array, target: Array) -> Sums:
        predicted, target = self.decode(prediction), self.vector_target(prediction, target)
        valid = self.valid(target)
        truth = _unit(jnp.where(valid[..., None], target, 1).astype(jnp.float32))
        apart = jnp.linalg.norm(predicted - truth, axis=-1)
        angle = jnp.rad2deg(2 * jnp.arctan2(apart, jnp.linalg.norm(predicted + truth, axis=-1)))
        within = jnp.stack([count(valid & (angle < limit)) for limit in ANGLES])
        return {
            "angle": jnp.sum(jnp.where(valid, angle, 0)),
            "squared": jnp.sum(jnp.where(valid, jnp.square(angle), 0)),
            "histogram": _histogram(angle, valid),
            "within": within,
            "pixels": count(valid),
        }

    def metric_values(self, sums: Sums) -> dict[str, float]:
        pixels = int(sums["pixels"])
        within = zip(ANGLES, np.asarray(sums["within"]), strict=True)
        return {
            "mean": ratio(sums["angle"], pixels),
            "median": _median(np.asarray(sums["histogram"], np.int64)),
            "rmse": math.sqrt(ratio(sums["squared"], pixels)),
            **{f"within_{angle:g}": 100 * ratio(number, pixels) for angle, number in within},
        }

    def decode(self, prediction: Array) -> Array:
        """float32 unit vectors (..., height, width, 3)."""
        return _unit(self.float32(prediction))

    def averageable(self, prediction: Array) -> Array:
        """Directions: no loss sees a vector's length, and a pass of long ones would outweigh the others."""
        return _unit(self.float32(prediction))

    def spread(self, mean: Float[Array, "... channels"], variance: Float[Array, "..."]) -> Float[Array, "..."] | None:
        """The angle, in degrees, whose cosine is the mean cosine of the angles to the mean direction.

        With r the length of the mean of unit vectors, that mean cosine is r and the variance 1 - r^2; so it is
        atan2(sqrt(variance), r), which is exact near 0. It is the root mean square angle where all are equal, and
        differs from it by their fourth powers where not.
        """
        return jnp.rad2deg(jnp.arctan2(jnp.sqrt(variance), jnp.linalg.norm(mean, axis=-1)))

    def draw(self, decoded: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
        """(n + 1) / 2 of (right, up, towards the camera): right is red, up green, what faces the camera light blue."""
        del like
        normals = np.asarray(decoded, np.float32)
        valid = np.asarray(self.valid(jnp.asarray(normals)))
        shown = np.where(valid[..., None], normals, 0) * self._signs * np.array([1, -1, -1], np.float32)
        picture = np.clip(np.rint((shown + 1) * 127.5), 0, 255).astype(np.uint8)
        picture[~valid] = IGNORED_COLOUR
        return picture

    def legend(self, values: np.ndarray | None = None) -> Legend:
        del values
        faces = {"right": (1, 0, 0), "left": (-1, 0, 0), "up": (0, -1, 0), "down": (0, 1, 0), "camera": (0, 0, -1)}
        colours = self.draw(np.array([list(faces.values())], np.float32) * self._signs)[0]
        return [(f"faces {name}", (int(r), int(g), int(b))) for name, (r, g, b) in zip(faces, colours, strict=True)]

    @property
    def axes_in_words(self) -> str:
        """Where x, y and z point."""
        return WORDS[self.axes]

    @property
    def _signs(self) -> np.ndarray:
        return np.array(AXES[self.axes], np.float32)


def _softened(vectors: Array) -> Array:
    """v / sqrt(|v|^2 + EPSILON), whose gradient is finite at 0."""
    return vectors * jax.lax.rsqrt(jnp.sum(jnp.square(vectors), axis=-1, keepdims=True) + EPSILON)


def _unit(vectors: Array) -> Array:
    """v / |v| at any length, 0 of 0: the largest component is made 1 first, so that no square is lost."""
    largest = jnp.max(jnp.abs(vectors), axis=-1, keepdims=True)
    scaled = vectors / jnp.where(largest > 0, largest, 1)
    length = jnp.linalg.norm(scaled, axis=-1, keepdims=True)
    return scaled / jnp.where(length > 0, length, 1)


def _histogram(angle: Array, valid: Array) -> Int[Array, " bins"]:
    """How many valid pixels lie in each bin of the median."""
    bins = jnp.clip(jnp.sqrt(angle / 180) * DIGIT**2, 0, DIGIT**2 - 1).astype(jnp.int32)
    return jax.lax.platform_dependent(bins, valid, tpu=_counts_by_products, default=_counts_by_scatter)


def _counts_by_scatter(bins: Array, valid: Array) -> Int[Array, " bins"]:
    return jnp.zeros(DIGIT**2, jnp.int32).at[bins.reshape(-1)].add(valid.reshape(-1).astype(jnp.int32))


def _counts_by_products(bins: Array, valid: Array) -> Int[Array, " bins"]:
    """The same without a scatter, which a TPU does slowly; a CPU takes a hundred times as long.

    A bin's number has two digits; the counts of a row are the product of the digits' one-hot matrices, of zeros and
    ones and thus exact in float32. Row by row, nothing of size pixels x bins exists.
    """
    digits = jnp.arange(DIGIT)[:, None]

    def add_row(total: Array, row: tuple[Array, Array]) -> tuple[Array, None]:
        number, counted = (values[:, None] for values in row)
        high = ((number // DIGIT == digits) & counted).astype(jnp.float32)
        low = (number % DIGIT == digits).astype(jnp.float32)
        return total + jnp.einsum("biw,bjw->bij", high, low).astype(jnp.int32), None

    rows = (jnp.moveaxis(bins, 1, 0), jnp.moveaxis(valid, 1, 0))
    total, _ = jax.lax.scan(add_row, jnp.zeros((bins.shape[0], DIGIT, DIGIT), jnp.int32), rows)
    return jnp.sum(total, axis=0).reshape(-1)


def _median(histogram: np.ndarray) -> float:
    """The mean of the two middle angles, each as far into its bin as its rank among the bin's."""
    number = int(histogram.sum())
    if not number:
        return math.nan
    upto = np.cumsum(histogram)

    def ranked(rank: int) -> float:
        place = int(np.searchsorted(upto, rank, side="right"))
        low, high = (180 * ((place + side) / len(histogram)) ** 2 for side in (0, 1))
        inside = rank - (upto[place] - histogram[place])
        return float(low + (high - low) * (inside + 0.5) / histogram[place])

    return (ranked((number - 1) // 2) + ranked(number // 2)) / 2
