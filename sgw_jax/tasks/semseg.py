"""Semantic segmentation: cross-entropy over the labelled pixels, mean IoU over the data set."""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.etf.neural_collapse import dot_regression_loss
from sgw_jax.etf.simplex import simplex_etf
from sgw_jax.tasks.base import IGNORED_COLOUR, Legend, Sums, Task, count, is_number, ratio, scalar_map
from sgw_jax.tasks.colours import spread_colours

IGNORE = 255


@dataclasses.dataclass(frozen=True)
class SemSeg(Task):
    """One class per pixel out of `num_classes`; target int (batch, height, width), 255 = ignore.

    Loss: -log softmax(prediction)[label], summed over the valid pixels (InvPT's cross-entropy). A label that is
    neither 255 nor in [0, num_classes) makes the loss NaN and `metric_values` raise: it is an error of the data.

    `dot_regression` > 0 adds that weight times the dot-regression loss (arXiv 2203.09081, see neural_collapse.py). It
    pulls the features that enter the interaction, and that sKEM selects by, to one fixed vertex per class of a simplex
    ETF. A cell of the feature map has the label at its centre and counts for all pixels that it covers, so that the
    term adds up over micro-batches as the loss does. It needs num_classes <= channels + 1 and is part of training
    alone: losses of an evaluation leave it out. [The paper names no such loss; our decision, off.]

    Metrics, in percent, from true positives, false positives and false negatives pooled over the data set:
      miou: the mean over the classes of tp / (tp + fp + fn). "exact" leaves out a class that is neither predicted nor
        labelled anywhere, its IoU being 0/0; "published" counts it as 0, as the field's code does.
      pixel_accuracy: the share of the valid pixels whose class is right.

    `class_names` and `colours` have one entry per class; left empty, they are generated.
    """

    kind: ClassVar[str] = "semseg"
    configured: ClassVar[tuple[str, ...]] = ("dot_regression",)
    balances_crops: ClassVar[bool] = True
    DEFAULT_NAMES: ClassVar[tuple[str, ...]] = ()  # used where their number is num_classes

    name: str = "semseg"
    num_classes: int = 40
    class_names: tuple[str, ...] = ()
    colours: tuple[tuple[int, int, int], ...] = ()
    dot_regression: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        number = self.num_classes
        if not isinstance(number, int) or isinstance(number, bool) or not 2 <= number <= IGNORE:
            raise InputError(f"Task {self.name!r}: num_classes is {number!r}; give an integer in [2, {IGNORE}].")
        if not is_number(self.dot_regression) or self.dot_regression < 0:
            raise InputError(
                f"Task {self.name!r}: dot_regression is {self.dot_regression!r}; give a finite number >= 0."
            )
        if not self.class_names:
            named = len(self.DEFAULT_NAMES) == number
            names = self.DEFAULT_NAMES if named else tuple(f"class {i}" for i in range(number))
            object.__setattr__(self, "class_names", names)
        if not self.colours:
            object.__setattr__(self, "colours", spread_colours(number))
        for field in ("class_names", "colours"):
            if len(getattr(self, field)) != number:
                raise InputError(
                    f"Task {self.name!r}: {field} has {len(getattr(self, field))} entries and num_classes is {number}; "
                    "give one entry per class, or none."
                )
        for colour in self.colours:
            if len(colour) != 3 or not all(isinstance(c, int) and 0 <= c <= 255 for c in colour):
                raise InputError(f"Task {self.name!r}: colour {colour!r} is not three integers in [0, 255].")

    @property
    def channels(self) -> int:
        return self.num_classes

    @property
    def target(self) -> dict[str, Any]:
        return {"kind": "labels", "fill": float(IGNORE), "resample": "nearest"}

    @property
    def metric(self) -> str:
        return "miou"

    @property
    def higher_is_better(self) -> bool:
        return True

    @property
    def units(self) -> dict[str, str]:
        return {"miou": "%", "pixel_accuracy": "%"}

    def valid(self, target: Array) -> Bool[Array, "batch height width"]:
        return scalar_map(target) != IGNORE

    def loss_terms(
        self, prediction: Array, target: Array, statistics: Sums | None = None
    ) -> tuple[Float[Array, ""], Int[Array, ""]]:
        del statistics
        logits, labels = self.float32(prediction), self.scalar_target(prediction, target)
        valid = self.valid(labels)
        is_label = labels[..., None] == jnp.arange(self.num_classes)
        # A masked sum instead of a gather: its gradient is elementwise, not a scatter.
        label_logit = jnp.sum(jnp.where(is_label, logits, 0), axis=-1)
        loss = jax.nn.logsumexp(logits, axis=-1) - label_logit
        loss = jnp.where(jnp.any(is_label, axis=-1), loss, jnp.nan)
        return jnp.sum(jnp.where(valid, loss, 0)), count(valid)

    @property
    def uses_features(self) -> bool:
        return self.dot_regression > 0

    def feature_loss_sum(self, features: Float[Array, "batch h w channels"], target: Array) -> Float[Array, ""]:
        labels = scalar_map(target)
        cells, pixels = features.shape[1:3], labels.shape[1:3]
        # Integer arithmetic: the pixel at the centre of each cell, for any ratio of the sizes.
        rows, columns = ((2 * jnp.arange(n) + 1) * size // (2 * n) for n, size in zip(cells, pixels, strict=True))
        # A literal in the program, but only channels x classes numbers.
        vertices = jnp.asarray(simplex_etf(self.num_classes, features.shape[-1]), jnp.float32)
        total, _ = dot_regression_loss(features, labels[:, rows[:, None], columns], vertices)
        return self.dot_regression * total * (math.prod(pixels) / math.prod(cells))

    def metric_sums(self, prediction: Array, target: Array) -> Sums:
        labels = self.scalar_target(prediction, target)
        predicted = jnp.argmax(self.float32(prediction), axis=-1)
        valid = self.valid(labels)
        predicted = jnp.where(valid, predicted, IGNORE)

        def counts_of(class_: Array) -> Sums:
            is_label, is_predicted = labels == class_, predicted == class_
            return {
                "true_positive": count(is_label & is_predicted),
                "false_positive": count(is_predicted & ~is_label),
                "false_negative": count(is_label & ~is_predicted),
            }

        # One class at a time: nothing of size pixels x classes exists, and no scatter, which a TPU does slowly.
        return {**jax.lax.map(counts_of, jnp.arange(self.num_classes)), "pixels": count(valid)}

    def metric_values(self, sums: Sums) -> dict[str, float]:
        right, missed = (int(np.asarray(sums[key], np.int64).sum()) for key in ("true_positive", "false_negative"))
        pixels = int(sums["pixels"])
        if right + missed != pixels:
            raise InputError(
                f"Task {self.name!r}: {pixels - right - missed} of {pixels} labelled pixels hold a label that is "
                f"neither {IGNORE} (ignore) nor in [0, {self.num_classes}); correct the labels or num_classes."
            )
        iou = [value for value in self.per_class(sums).values() if not math.isnan(value)]
        return {"miou": ratio(sum(iou), len(iou)), "pixel_accuracy": 100 * ratio(right, pixels)}

    def per_class(self, sums: Sums) -> dict[str, float]:
        """Class name -> IoU in percent; NaN for a class that is absent ("published": 0)."""
        true_positive = np.asarray(sums["true_positive"], np.int64)
        union = true_positive + np.asarray(sums["false_positive"]) + np.asarray(sums["false_negative"])
        if self.protocol == "published" and union.any():
            union = np.maximum(union, 1)
        return {n: 100 * ratio(t, u) for n, t, u in zip(self.class_names, true_positive, union, strict=True)}

    def decode(self, prediction: Array) -> Array:
        """uint8 labels (..., height, width)."""
        return jnp.argmax(self.float32(prediction), axis=-1).astype(jnp.uint8)

    def draw(self, decoded: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
        del like
        palette = np.full((256, 3), IGNORED_COLOUR, np.uint8)
        palette[: self.num_classes] = self.colours
        labels = np.asarray(decoded)
        return palette[labels[..., 0] if labels.ndim == 3 else labels]

    def legend(self, values: np.ndarray | None = None) -> Legend:
        del values
        return list(zip(self.class_names, self.colours, strict=True))

    def regression_target(
        self, target: Array
    ) -> tuple[Float[Array, "batch height width channels"], Bool[Array, "batch height width"]]:
        """One-hot labels."""
        labels = scalar_map(jnp.asarray(target))
        return jax.nn.one_hot(labels, self.num_classes, dtype=jnp.float32), self.valid(labels)

    def from_regression(self, values: Array) -> Float[Array, "batch height width channels"]:
        """log p with p clipped below at 1e-4. Not above: two classes fitted above 1 would tie."""
        return jnp.log(jnp.maximum(jnp.asarray(values, jnp.float32), 1e-4))
