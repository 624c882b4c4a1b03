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
from sgw_jax.tasks.calibration import ECE, calibration_error, calibration_sums
from sgw_jax.tasks.colours import spread_colours
from sgw_jax.tasks.one_by_one import count_of_images, sums_one_by_one

IGNORE = 255
BOUNDARY_RATIO = 0.02
COUNTS = ("true_positive", "false_positive", "false_negative")


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
      mean_accuracy: the mean over the labelled classes of tp / (tp + fn).
      frequency_weighted_iou: the mean of the IoU weighted by the classes' shares of the valid pixels.
      dice: the mean over the classes of 2 tp / (2 tp + fp + fn), absent classes as in miou.
      ece: the expected calibration error of the softmax probability of the predicted class, see calibration.py.
      boundary_iou, with `boundary_iou`: miou of the pixels of each mask within `BOUNDARY_RATIO` of the diagonal of its
        outline (Cheng et al. 2021), counts pooled over the data set. Distances are Chebyshev's; the frame's edge and
        ignored pixels end a mask. As they cost two more passes over the labels, they are off.
      category_iou, with `categories`: the mean IoU of unions of classes (Cityscapes), absent ones as in miou.

    `categories` are (name, class numbers) pairs, no class in two of them; a class in none is in a category of none.
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
    boundary_iou: bool = False
    categories: tuple[tuple[str, tuple[int, ...]], ...] = ()

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
        grouped = [class_ for _, classes in self.categories for class_ in classes]
        if len(set(grouped)) != len(grouped) or not set(grouped) <= set(range(number)):
            raise InputError(
                f"Task {self.name!r}: categories hold the classes {grouped}; give each of 0 .. {number - 1} at most "
                "once."
            )

    @property
    def channels(self) -> int:
        return self.num_classes

    @property
    def target(self) -> dict[str, Any]:
        return {"kind": "labels", "fill": float(IGNORE), "resample": "nearest"}

    @property
    def sees_frame(self) -> bool:
        return self.boundary_iou

    @property
    def metric(self) -> str:
        return "miou"

    @property
    def higher_is_better(self) -> bool:
        return True

    @property
    def directions(self) -> dict[str, bool]:
        return {name: name != ECE for name in self.units}

    @property
    def units(self) -> dict[str, str]:
        names = ["miou", "pixel_accuracy", "mean_accuracy", "frequency_weighted_iou", "dice"]
        names += [ECE] + ["boundary_iou"] * self.boundary_iou + ["category_iou"] * bool(self.categories)
        return dict.fromkeys(names, "%")

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
        gaps = calibration_sums(self.confidence(prediction)["probability"], predicted == labels, valid)
        predicted = jnp.where(valid, predicted, IGNORE)

        sums = {**_counts(labels, predicted, self.num_classes), "pixels": count(valid), "calibration": gaps}
        if self.boundary_iou:
            true_rims, rims = (jnp.where(_near_outline(m), m, IGNORE) for m in (labels, predicted))
            sums["boundary"] = _stacked(_counts(true_rims, rims, self.num_classes))
        if self.categories:
            grouped, found = self._categories(labels), self._categories(predicted)
            sums["category"] = _stacked(_counts(grouped, found, len(self.categories)))
        return sums

    def _categories(self, labels: Array) -> Array:
        """Numbers of categories in place of classes, IGNORE of a class in none."""
        found = jnp.full_like(labels, IGNORE)
        for number, (_, classes) in enumerate(self.categories):
            for class_ in classes:
                found = jnp.where(labels == class_, number, found)
        return found

    def metric_values(self, sums: Sums) -> dict[str, float]:
        counts = np.stack([np.asarray(sums[key], np.int64) for key in COUNTS])
        right, _, missed = (int(number) for number in counts.sum(axis=1))
        pixels = int(sums["pixels"])
        if right + missed != pixels:
            raise InputError(
                f"Task {self.name!r}: {pixels - right - missed} of {pixels} labelled pixels hold a label that is "
                f"neither {IGNORE} (ignore) nor in [0, {self.num_classes}); correct the labels or num_classes."
            )
        labelled = counts[0] + counts[2]
        accuracy = [ratio(t, n) for t, n in zip(counts[0], labelled, strict=True) if n]
        iou = self._shares(counts)
        weighted = math.fsum(n * value for n, value in zip(labelled.tolist(), iou, strict=True) if n)
        values = {
            "miou": _mean(iou),
            "pixel_accuracy": 100 * ratio(right, pixels),
            "mean_accuracy": 100 * _mean(accuracy),
            "frequency_weighted_iou": ratio(weighted, pixels),
            "dice": _mean(self._shares(np.stack([2 * counts[0], counts[1], counts[2]]))),
            ECE: calibration_error(sums["calibration"], pixels),
        }
        if self.boundary_iou:
            values["boundary_iou"] = _mean(self._shares(np.asarray(sums["boundary"], np.int64)))
        if self.categories:
            values["category_iou"] = _mean(self._shares(np.asarray(sums["category"], np.int64)))
        return values

    def _shares(self, counts: np.ndarray) -> list[float]:
        """tp / (tp + fp + fn) in percent; NaN where that is 0/0 ("published": 0, unless there is nothing at all)."""
        whole = counts.sum(axis=0)
        if self.protocol == "published" and whole.any():
            whole = np.maximum(whole, 1)
        return [100 * ratio(part, all_) for part, all_ in zip(counts[0], whole, strict=True)]

    def per_class(self, sums: Sums) -> dict[str, float]:
        """Class name -> IoU in percent; NaN for a class that is absent ("published": 0)."""
        iou = self._shares(np.stack([np.asarray(sums[key], np.int64) for key in COUNTS]))
        return dict(zip(self.class_names, iou, strict=True))

    def decode(self, prediction: Array) -> Array:
        """uint8 labels (..., height, width)."""
        return jnp.argmax(self.float32(prediction), axis=-1).astype(jnp.uint8)

    def confidence(self, prediction: Array) -> dict[str, Array]:
        """probability: softmax of the class that `decode` returns; entropy: -sum p ln p / ln num_classes, in [0, 1]."""
        log_share = jax.nn.log_softmax(self.float32(prediction), axis=-1)
        entropy = -jnp.sum(jnp.exp(log_share) * log_share, axis=-1) / math.log(self.num_classes)
        return {"probability": jnp.exp(jnp.max(log_share, axis=-1)), "entropy": jnp.clip(entropy, 0, 1)}

    def from_decoded(self, decoded: np.ndarray) -> np.ndarray:
        """One-hot labels; floats (batch, height, width, num_classes) are scores already."""
        if decoded.ndim == 4:
            return np.asarray(decoded, np.float32)
        return (decoded[..., None] == np.arange(self.num_classes)).astype(np.float32)

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


def _counts(labels: Array, predicted: Array, number: int) -> Sums:
    """`COUNTS` of each class in [0, number)."""

    def counts_of(class_: Array) -> Sums:
        is_label, is_predicted = labels == class_, predicted == class_
        masks = (is_label & is_predicted, is_predicted & ~is_label, is_label & ~is_predicted)
        return {name: count_of_images(mask) for name, mask in zip(COUNTS, masks, strict=True)}

    return sums_one_by_one(counts_of, jnp.arange(number))


def _stacked(counts: Sums) -> Int[Array, "3 classes"]:
    return jnp.stack([counts[key] for key in COUNTS])


def _near_outline(labels: Array) -> Bool[Array, "batch height width"]:
    """Whether a pixel of another label, or the outside, lies within the boundary's width in both directions."""
    width = max(1, round(BOUNDARY_RATIO * math.hypot(*labels.shape[-2:])))
    outside = jnp.pad(labels.astype(jnp.int32), ((0, 0), (width, width), (width, width)), constant_values=-1)
    least, most = outside, outside
    for shape in ((1, 2 * width + 1, 1), (1, 1, 2 * width + 1)):  # a square's minimum is that of its rows' minima
        least = jax.lax.reduce_window(least, jnp.iinfo(jnp.int32).max, jax.lax.min, shape, (1, 1, 1), "VALID")
        most = jax.lax.reduce_window(most, jnp.iinfo(jnp.int32).min, jax.lax.max, shape, (1, 1, 1), "VALID")
    return least != most


def _mean(values: list[float]) -> float:
    """Of those that are defined."""
    known = [value for value in values if not math.isnan(value)]
    return ratio(sum(known), len(known))
