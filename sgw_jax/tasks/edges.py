"""Edges: weighted binary cross-entropy, maximum F1 of the edge pixels."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.tasks.base import Sums, ratio
from sgw_jax.tasks.calibration import ECE
from sgw_jax.tasks.mask import MaskTask, bce_terms, logit_of, maximum_f

THRESHOLDS = tuple(step / 100 for step in range(1, 100))  # 0.01 .. 0.99


@dataclasses.dataclass(frozen=True)
class Edges(MaskTask):
    """One logit x per pixel. `MaskTask` describes the target y.

    Loss: w y softplus(-x) + (1 - w)(1 - y) softplus(x), averaged over the valid pixels, with w = `edge_weight`;
    None takes w = negative / valid pixels of the batch (HED). 0.95 and the weight 50 are InvPT's.

    Metrics from sums over the data set:
      max_f: percent; the greatest F1 of sigmoid(x) >= t over t = 0.01, 0.02 .. 0.99 at the exact pixels. It is not the
        field's odsF, which thins the prediction and allows a match within a few pixels, and it reads lower. That one
        (ods, with ois and ap) needs matching on the host: `edge_scores.edge_scores` adds it at the end of a run.
      loss: the loss above, with the balance of the whole data set for w = None. The peers report this number "for
        reference", computed by mistake on sigmoid(x) in place of x; "published" does the same.
      ece: percent; the expected calibration error of sigmoid(x), see calibration.py.
    Thresholds are compared as logits: sigmoid(x) >= t is x >= logit(t), which no rounding of a sigmoid can upset.
    """

    kind: ClassVar[str] = "edges"
    configured: ClassVar[tuple[str, ...]] = ("edge_weight",)
    boundary_scores: ClassVar[bool] = True

    name: str = "edges"
    weight: float = 50.0
    edge_weight: float | None = 0.95

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.edge_weight is not None and not 0 < self.edge_weight < 1:
            raise InputError(
                f"Task {self.name!r}: edge_weight is {self.edge_weight!r}; give a number between 0 and 1, or None for "
                "the balance of each batch."
            )

    @property
    def directions(self) -> dict[str, bool]:
        return {"max_f": True, "loss": False, ECE: False}

    @property
    def units(self) -> dict[str, str]:
        return {"max_f": "%", "loss": "", ECE: "%"}

    def loss_terms(
        self, prediction: Array, target: Array, statistics: Sums | None = None
    ) -> tuple[Float[Array, ""], Int[Array, ""]]:
        if self.edge_weight is not None:
            return self.weighted_bce(prediction, target, self.edge_weight)
        balance = self.batch_statistics(target) if statistics is None else statistics
        weight = (balance["count"] - balance["positive"]) / jnp.maximum(balance["count"], 1)
        return self.weighted_bce(prediction, target, weight)

    def metric_sums(self, prediction: Array, target: Array) -> Sums:
        truth = self.scalar_target(prediction, target)
        valid = self.valid(truth)
        logit = self.float32(prediction)[..., 0]
        logit = self.decode(prediction) if self.protocol == "published" else logit
        positive, negative = bce_terms(logit, jnp.where(valid, truth, 0).astype(jnp.float32))
        return {
            **self.threshold_sums(prediction, target, [logit_of(t) for t in THRESHOLDS]),
            "calibration": self.calibration(prediction, target),
            "positive_loss": jnp.sum(jnp.where(valid, positive, 0)),
            "negative_loss": jnp.sum(jnp.where(valid, negative, 0)),
        }

    def metric_values(self, sums: Sums) -> dict[str, float]:
        self.check_range(sums)
        pixels = int(sums["pixels"])
        weight = self.edge_weight if self.edge_weight is not None else ratio(pixels - int(sums["positive"]), pixels)
        total = weight * float(sums["positive_loss"]) + (1 - weight) * float(sums["negative_loss"])
        values = {"max_f": maximum_f(sums, 1.0, self.protocol), "loss": ratio(total, pixels)}
        return values | {ECE: self.calibration_error(sums)}
