"""Saliency: balanced cross-entropy, maximum F measure and IoU of the salient region."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sgw_jax.tasks.base import Sums, ratio
from sgw_jax.tasks.calibration import ECE
from sgw_jax.tasks.mask import MaskTask, logit_of, maximum_f, positive

THRESHOLDS = tuple(step / 20 for step in range(1, 20))  # 0.05 .. 0.95
BETA_SQUARED = 0.3


@dataclasses.dataclass(frozen=True)
class Saliency(MaskTask):
    """One logit per pixel. `MaskTask` describes the target.

    Loss: two-class cross-entropy (the classes' logits are 0 and x) with the weights of the batch,
    w = negative / valid for the positive class and 1 - w for the other, summed over the valid pixels and divided by
    their number, not by the sum of the weights (InvPT). The weight 5 is InvPT's.

    Metrics, in percent, from counts pooled over the data set:
      max_f: the greatest F, beta^2 = 0.3, of p >= t over t = 0.05, 0.10 .. 0.95, with p = sigmoid(x).
      iou: intersection over union of p >= 0.5 with the salient pixels (one class; older tables call it mIoU).
      mae: mean |p - y|, with y = 1 for the salient pixels and 0 for the others; not in percent.
      ece: the expected calibration error of p, see calibration.py.
    `image_scores` adds, at the end of a run, what is computed of each image on the host: S- and E-measure, weighted F
    and their like, of evaluation/saliency.py.

    "published" applies the sigmoid to p once more before max_f's thresholds, as InvPT's family does. sigmoid(p) lies in
    [0.5, 0.731], so only four of the 19 thresholds still divide the pixels: p >= 0.2007, 0.4055, 0.6190, 0.8473.

    Thresholds are compared as logits: sigmoid(x) >= t is x >= logit(t), which no rounding of a sigmoid can upset.
    """

    kind: ClassVar[str] = "saliency"

    name: str = "saliency"
    weight: float = 5.0
    image_scores: bool = False

    @property
    def scores_images(self) -> bool:
        return self.image_scores

    @property
    def directions(self) -> dict[str, bool]:
        return {"max_f": True, "iou": True, "mae": False, ECE: False}

    @property
    def units(self) -> dict[str, str]:
        return {"max_f": "%", "iou": "%", "mae": "", ECE: "%"}

    def loss_terms(
        self, prediction: Array, target: Array, statistics: Sums | None = None
    ) -> tuple[Float[Array, ""], Int[Array, ""]]:
        balance = self.batch_statistics(target) if statistics is None else statistics
        weight = (balance["count"] - balance["positive"]) / jnp.maximum(balance["count"], 1)
        return self.weighted_bce(prediction, target, weight)

    def metric_sums(self, prediction: Array, target: Array) -> Sums:
        probabilities = [logit_of(t) for t in THRESHOLDS] if self.protocol == "published" else THRESHOLDS
        target = self.scalar_target(prediction, target)
        error = jnp.abs(self.decode(prediction) - positive(target))
        return {
            **self.threshold_sums(prediction, target, [logit_of(p) for p in (*probabilities, 0.5)]),  # the last: iou
            "calibration": self.calibration(prediction, target),
            "absolute": jnp.sum(jnp.where(self.valid(target), error, 0)),
        }

    def metric_values(self, sums: Sums) -> dict[str, float]:
        self.check_range(sums)
        predicted, inside = np.asarray(sums["predicted"]), np.asarray(sums["true_positive"])
        pooled = {**sums, "predicted": predicted[:-1], "true_positive": inside[:-1]}
        union = int(predicted[-1]) + int(sums["positive"]) - int(inside[-1])
        return {
            "max_f": maximum_f(pooled, BETA_SQUARED, self.protocol),
            "iou": 100 * ratio(inside[-1], union),
            "mae": ratio(sums["absolute"], int(sums["pixels"])),
            ECE: self.calibration_error(sums),
        }
