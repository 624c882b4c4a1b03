"""What edges and saliency share: one logit per pixel, a target in [0, 1], weighted BCE, maximum F over thresholds."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.tasks.base import IGNORED_COLOUR, Legend, Sums, Task, count, scalar_map
from sgw_jax.tasks.calibration import calibration_error, calibration_sums
from sgw_jax.tasks.one_by_one import count_of_images, sums_one_by_one
from sgw_jax.tasks.thresholds import float32_at_least

# A target above this (1, and a margin for interpolated targets) is an error of the data, such as the code 255 of
# ignored labels in a float target.
LARGEST_TARGET = 1.001
# Of a probability of 1 that is given as such: its logarithm's bound in PyTorch's binary cross-entropy too.
LARGEST_LOGIT = 100.0


@dataclasses.dataclass(frozen=True)
class MaskTask(Task):
    """One logit x per pixel; target y in [0, 1], (batch, height, width) or with a trailing axis of 1; negative or not
    finite = ignore. A pixel is positive where y >= 0.5. `labelled` and `positive` are this rule, here and wherever else
    such a target is read.

    A target above 1 makes the loss NaN and is refused by `metric_values`.
    """

    @property
    def channels(self) -> int:
        return 1

    @property
    def target(self) -> dict[str, Any]:
        return {"kind": "mask", "fill": -1.0, "resample": "nearest"}

    @property
    def metric(self) -> str:
        return "max_f"

    @property
    def higher_is_better(self) -> bool:
        return True

    def valid(self, target: Array) -> Bool[Array, "batch height width"]:
        return labelled(scalar_map(target))

    def batch_statistics(self, target: Array) -> Sums:
        """The number of valid pixels and of positive ones: the class balance."""
        valid = self.valid(target)
        return {"count": count(valid), "positive": count(positive(scalar_map(target)))}

    def weighted_bce(
        self, prediction: Array, target: Array, weight: float | Array
    ) -> tuple[Float[Array, ""], Int[Array, ""]]:
        """(sum of w y softplus(-x) + (1 - w)(1 - y) softplus(x) over the valid pixels, their count)."""
        logit, target = self.float32(prediction)[..., 0], self.scalar_target(prediction, target)
        valid = self.valid(target)
        present, absent = bce_terms(logit, jnp.where(valid, target, 0))
        loss = weight * present + (1 - weight) * absent
        loss = jnp.where(target > LARGEST_TARGET, jnp.nan, loss)
        return jnp.sum(jnp.where(valid, loss, 0)), count(valid)

    def threshold_sums(self, prediction: Array, target: Array, logits: Sequence[float]) -> Sums:
        """Of the pixels with x >= each of `logits`: how many are predicted and how many of them positive (int32)."""
        logit, target = self.float32(prediction)[..., 0], self.scalar_target(prediction, target)
        valid, true = self.valid(target), positive(target)

        def counts_at(threshold: Array) -> Sums:
            above = logit >= threshold
            return {
                "predicted": count_of_images(above & valid),
                "true_positive": count_of_images(above & true),
            }

        return {
            **sums_one_by_one(counts_at, jnp.asarray(float32_at_least(logits))),
            "positive": count(true),
            "pixels": count(valid),
            "out_of_range": count(valid & (target > LARGEST_TARGET)),
        }

    def calibration(self, prediction: Array, target: Array) -> Float[Array, " bins"]:
        """The sums of `calibration_error`, with sigmoid(x) as the confidence that a pixel is positive."""
        target = self.scalar_target(prediction, target)
        return calibration_sums(self.decode(prediction), positive(target), self.valid(target))

    def calibration_error(self, sums: Sums) -> float:
        """ece, in percent, of sums that hold "calibration" and "pixels"."""
        return calibration_error(sums["calibration"], int(sums["pixels"]))

    def check_range(self, sums: Sums) -> None:
        """Raises where a target was above 1."""
        if int(sums["out_of_range"]):
            raise InputError(
                f"Task {self.name!r}: {int(sums['out_of_range'])} of {int(sums['pixels'])} labelled pixels hold a "
                "target above 1; targets lie in [0, 1] and ignored pixels are negative (not 255)."
            )

    def decode(self, prediction: Array) -> Array:
        """float32 probability (..., height, width)."""
        return jax.nn.sigmoid(self.float32(prediction)[..., 0])

    def from_decoded(self, decoded: np.ndarray) -> np.ndarray:
        """The logit of probabilities, or of uint8 levels v / 255, in [-LARGEST_LOGIT, LARGEST_LOGIT].

        In float64, then rounded as `threshold_sums` rounds its thresholds: level 51 reaches the threshold 0.2.
        """
        probability = decoded / 255 if decoded.dtype == np.uint8 else np.asarray(decoded, np.float64)
        with np.errstate(divide="ignore"):
            logit = np.log(probability) - np.log1p(-probability)
        return float32_at_least(np.clip(logit, -LARGEST_LOGIT, LARGEST_LOGIT))[..., None]

    def draw(self, decoded: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
        del like
        values = np.asarray(decoded, np.float32)
        values = values[..., 0] if values.ndim == 3 else values
        valid = np.asarray(self.valid(jnp.asarray(values)))
        grey = np.rint(255 * np.clip(np.where(valid, values, 0), 0, 1)).astype(np.uint8)
        picture = np.repeat(grey[..., None], 3, axis=-1)
        picture[~valid] = IGNORED_COLOUR
        return picture

    def legend(self, values: np.ndarray | None = None) -> Legend:
        del values
        return [("0", (0, 0, 0)), ("0.5", (128, 128, 128)), ("1", (255, 255, 255))]

    def from_regression(self, values: Array) -> Float[Array, "batch height width channels"]:
        """The logit of the fitted probability, which is clipped to [1e-4, 1 - 1e-4]."""
        probability = jnp.clip(jnp.asarray(values, jnp.float32), 1e-4, 1 - 1e-4)
        return jnp.log(probability) - jnp.log1p(-probability)


def labelled(target: Any) -> Any:
    """Where a mask's target counts: 0 or more, and finite; of NumPy and JAX arrays."""
    return (target >= 0) & (target < math.inf)  # NaN compares as false


def positive(target: Any) -> Any:
    """Which of these pixels belong to the mask: those of 0.5 or more."""
    return labelled(target) & (target >= 0.5)


def bce_terms(logit: Array, target: Array) -> tuple[Array, Array]:
    """y softplus(-x) and (1 - y) softplus(x), the two halves of binary cross-entropy."""
    return target * jax.nn.softplus(-logit), (1 - target) * jax.nn.softplus(logit)


def logit_of(probability: float) -> float:
    """log(p / (1 - p)): sigmoid(x) >= p exactly where x >= logit_of(p); -inf for p <= 0, inf for p >= 1."""
    if not 0 < probability < 1:
        return -math.inf if probability <= 0 else math.inf
    return math.log(probability) - math.log1p(-probability)


def maximum_f(sums: Sums, beta_squared: float, protocol: str) -> float:
    """max over the thresholds of F = (1 + b) P R / (b P + R) in percent, P and R from the pooled counts.

    Written without divisions by P and R, F = (1 + b) tp / (b * positive + predicted), which is 0 where nothing is
    predicted. Without a positive pixel anywhere F is 0/0: NaN, or 0 under "published".
    """
    positive, predicted = int(sums["positive"]), np.asarray(sums["predicted"], np.float64)
    if not int(sums["pixels"]) or (not positive and protocol == "exact"):
        return math.nan
    score = (1 + beta_squared) * np.asarray(sums["true_positive"], np.float64)
    return 100 * float(np.max(score / np.maximum(beta_squared * positive + predicted, 1e-12)))
