"""Task: one thing to predict at every pixel, with its loss, its metrics and its pictures in one frozen dataclass."""

import abc
import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sgw_jax.data_pipelines.errors import InputError

PROTOCOLS = ("exact", "published")
IGNORED_COLOUR = (40, 40, 40)

HEAD_MARK = "@"  # in a task's name: KIND@LABEL is another task of a kind, with a head of its own

Sums = dict[str, Any]
Legend = list[tuple[str, tuple[int, int, int]]]


@dataclasses.dataclass(frozen=True)
class Task(abc.ABC):
    """The interface of every task. A subclass is a frozen dataclass; its fields have defaults and are plain JSON data.

    Predictions are raw head outputs (batch, height, width, channels) of any float dtype; everything is computed in
    float32. A target with one value per pixel is (batch, height, width), a trailing axis of one is accepted; a
    vector target has the prediction's shape. `valid(target)` says which pixels carry a label. The others contribute
    nothing to any loss, metric or gradient, whatever their target holds, NaN included: without labels sum and count
    are 0.

    Losses add up. With s = `batch_statistics` added over the micro-batches of one large batch, the sums of
    `loss_terms(prediction, target, s)` add up to that of the large batch, and so do the counts; the loss is
    sum / max(count, 1).
    Metrics add up too: `metric_sums` of batches, devices and processes are added on the host (`metrics.add_sums`, in
    int64 and float64), and `metric_values` turns the total into numbers, NaN where there was nothing to measure.

    Attributes:
      name: the key of this task in batches, predictions and results.
      weight: the factor of this task's loss in a weighted sum, >= 0.
      protocol: "exact" computes every metric as it is defined. "published" repeats the known departures of the code
        behind the field's published tables, so that numbers can be set beside them; each class lists its own.

    Raises:
      ValueError: an empty name, a weight that is not a finite number >= 0, an unknown protocol.

    >>> import jax.numpy as jnp
    >>> from sgw_jax import TASKS, Task
    >>> depth = TASKS["depth"](weight=0.5)
    >>> isinstance(depth, Task), depth.channels, depth.metric, depth.units["rmse"]
    (True, 1, 'rmse', 'm')
    >>> prediction, target = jnp.ones((1, 2, 2, 1)), jnp.full((1, 2, 2), 3.0)
    >>> float(depth.loss(prediction, target)), depth.metric_values(depth.metric_sums(prediction, target))["rmse"]
    (2.0, 2.0)
    """

    name: str
    weight: float = 1.0
    protocol: str = "exact"

    kind: ClassVar[str]  # the key in TASKS; a user's own class that sets none is called by its class name
    configured: ClassVar[tuple[str, ...]] = ()  # fields that a configuration sets, by keys of their names
    balances_crops: ClassVar[bool] = False  # whether its classes say which random crops are redrawn (cat_max_ratio)
    boundary_scores: ClassVar[bool] = False  # whether its predictions are boundaries, scored by matching (ODS, OIS, AP)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" not in cls.__dict__:
            cls.kind = cls.__name__

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # lists (from JSON or a config) become tuples: a task can be hashed
            object.__setattr__(self, field.name, _frozen(getattr(self, field.name)))
        if not isinstance(self.name, str) or not self.name:
            raise InputError(f"{self.kind} task: name is {self.name!r}; give a non-empty string.")
        if not is_number(self.weight) or self.weight < 0:
            raise InputError(f"Task {self.name!r}: weight is {self.weight!r}; give a finite number >= 0.")
        if self.protocol not in PROTOCOLS:
            raise InputError(f"Task {self.name!r}: protocol is {self.protocol!r}; choose one of {PROTOCOLS}.")

    def to_dict(self) -> dict[str, Any]:
        """The task as plain JSON-able data, {"kind": ..., **fields}; `task_from_dict` is the inverse."""
        return {"kind": self.kind, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}}

    @property
    @abc.abstractmethod
    def channels(self) -> int:
        """Width of the prediction head."""

    @property
    @abc.abstractmethod
    def target(self) -> dict[str, Any]:
        """How augmentation treats the target, as data for the loader: {"kind": ..., "fill": ..., "resample": ...}."""

    @property
    @abc.abstractmethod
    def metric(self) -> str:
        """The headline metric: a key of `metric_values`, the one `delta_m` compares."""

    @property
    @abc.abstractmethod
    def higher_is_better(self) -> bool:
        """Whether a larger headline metric is better."""

    @property
    def directions(self) -> dict[str, bool]:
        """Whether a larger value is better, of each metric that can be compared; as it stands here, of the headline."""
        return {self.metric: self.higher_is_better}

    @property
    def units(self) -> dict[str, str]:
        """The unit of each metric: "%", "m", "px", "deg" or ""."""
        return {}

    @abc.abstractmethod
    def valid(self, target: Array) -> Bool[Array, "batch height width"]:
        """Which pixels carry a label."""

    @property
    def sees_frame(self) -> bool:
        """Whether a metric looks at the image's frame, so that padding beside an image would change it."""
        return False

    def from_afar(self, prediction: Array, zoom: Array) -> Array:
        """The raw prediction of a view, from that of the view shrunk by ``zoom``, at most 1 and of any shape that
        broadcasts: by the rule of augmentation a shrunk view is one from 1 / zoom as far. A distance is multiplied by
        it, a disparity divided, all else is the same. A task of distances whose raw prediction is not the distance
        itself (a logarithm, say) overrides it."""
        kind = self.target["kind"]
        if kind == "depth":
            return prediction * zoom
        return prediction / zoom if kind == "disparity" else prediction

    def mirrored(self, prediction: Array) -> Array:
        """The raw prediction (..., height, width, channels) of a view, from that of its mirror image, left for right,
        by the rule of augmentation: vectors change the sign of x, which is to the right in either convention of y and
        z; classes stay what they are. A task whose classes have sides (a left and a right arm) overrides it."""
        flipped = prediction[..., ::-1, :]
        return flipped * jnp.array([-1, 1, 1], flipped.dtype) if self.target["kind"] == "vectors" else flipped

    def averageable(self, prediction: Array) -> Array:
        """What of a raw prediction several passes over one pixel may be averaged of; `decode` takes it too.

        As it stands here the prediction itself: metres; logits, whose average is the normalised geometric mean of the
        passes' probabilities, whatever constant a pass adds to all of them. A task whose raw numbers have a part
        without meaning leaves it out.
        """
        return prediction

    def confidence(self, prediction: Array) -> dict[str, Array]:
        """How sure a raw prediction (..., height, width, channels) is, float32 (..., height, width) by name.

        Empty as it stands here: a mask is a probability already, a regression says nothing of itself.
        """
        del prediction
        return {}

    def spread(self, mean: Float[Array, "... channels"], variance: Float[Array, "..."]) -> Float[Array, "..."] | None:
        """How far several passes over a pixel lie apart, in the unit of the map; None: the task has no such measure.

        Args:
          mean: of the passes' decoded values, with an axis of one channel where a map has none.
          variance: the mean squared distance of the passes to it.
        """
        del mean, variance
        return None

    def batch_statistics(self, target: Array) -> Sums:
        """What the loss needs to know of the whole batch, as sums that add over micro-batches: at least the count."""
        return {"count": count(self.valid(target))}

    @abc.abstractmethod
    def loss_terms(
        self, prediction: Array, target: Array, statistics: Sums | None = None
    ) -> tuple[Float[Array, ""], Int[Array, ""]]:
        """(float32 sum of the pixel losses, int32 count of valid pixels) of this target.

        `statistics` are those of the whole batch that this target is a part of; None means this target is all of it.
        """

    @property
    def uses_features(self) -> bool:
        """Whether the loss also has a term on this task's features; the model then returns them in training."""
        return False

    def feature_loss_sum(self, features: Float[Array, "batch h w channels"], target: Array) -> Float[Array, ""]:
        """The float32 sum, over the pixels of `loss_terms`, of a term on the features that enter the interaction."""
        raise NotImplementedError(f"Task {self.name!r} has no loss on features.")

    def loss(self, prediction: Array, target: Array) -> Float[Array, ""]:
        """The mean of the pixel losses over the valid pixels, 0 when there are none."""
        total, number = self.loss_terms(prediction, target)
        return total / jnp.maximum(number, 1)

    @abc.abstractmethod
    def metric_sums(self, prediction: Array, target: Array) -> Sums:
        """Additive sums of one batch; counts are int32 and exact, sums of errors float32."""

    @abc.abstractmethod
    def metric_values(self, sums: Sums) -> dict[str, float]:
        """The metrics of the data set from its added sums, in float64; NaN where there was nothing to measure."""

    def per_class(self, sums: Sums) -> dict[str, float]:
        """Class name -> IoU in percent; empty for a task without classes."""
        del sums
        return {}

    @property
    def scores_images(self) -> bool:
        """Whether its predictions are scored image by image on the host too, as saliency (`saliency_scores`)."""
        return False

    @abc.abstractmethod
    def decode(self, prediction: Array) -> Array:
        """Raw head output (..., height, width, channels) -> what a user wants to hold."""

    def from_decoded(self, decoded: np.ndarray) -> np.ndarray:
        """Inverse of `decode`, in NumPy: float32 raw predictions of maps (batch, height, width), or with channels.

        As it stands here: the map itself, with an axis of one channel where it has none. Others' predictions are scored
        by it.
        """
        values = np.asarray(decoded, np.float32)
        return values[..., None] if values.ndim == 3 else values

    @abc.abstractmethod
    def draw(self, decoded: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
        """uint8 (height, width, 3) picture of one decoded map or target; pixels without a label are dark grey.

        `like` is a second map whose range of values sets the colours, so that two pictures can be compared.
        """

    def legend(self, values: np.ndarray | None = None) -> Legend:
        """(text, colour) of the classes, or of a few ticks of a continuous map over the range of `values`."""
        del values
        return []

    def regression_target(
        self, target: Array
    ) -> tuple[Float[Array, "batch height width channels"], Bool[Array, "batch height width"]]:
        """The target as numbers that a least-squares fit can predict, and the mask of the valid pixels.

        As it stands here: the target itself, 0 where invalid. The linear probe fits it.
        """
        target, valid = jnp.asarray(target), self.valid(target)
        target = target if target.ndim == valid.ndim + 1 else target[..., None]
        return jnp.where(valid[..., None], target, 0).astype(jnp.float32), valid

    def from_regression(self, values: Array) -> Float[Array, "batch height width channels"]:
        """Inverse of `regression_target`: fitted values -> the raw prediction that decodes to them."""
        return jnp.asarray(values, jnp.float32)

    def float32(self, prediction: Array) -> Float[Array, "... channels"]:
        """The prediction in float32, after a check of its width."""
        if prediction.ndim == 0 or prediction.shape[-1] != self.channels:
            raise InputError(
                f"Task {self.name!r}: the prediction has shape {prediction.shape}; its last axis must have "
                f"{self.channels} channels (the raw output of this task's head)."
            )
        return jnp.asarray(prediction, jnp.float32)

    def scalar_target(self, prediction: Array, target: Array) -> Array:
        """The target with one value per pixel, (..., height, width), after a check against the prediction's shape."""
        if target.shape not in (prediction.shape[:-1], (*prediction.shape[:-1], 1)):
            raise InputError(
                f"Task {self.name!r}: the target has shape {target.shape} and the prediction {prediction.shape}; the "
                f"target must be {prediction.shape[:-1]}, with or without a trailing axis of 1."
            )
        return jnp.reshape(target, prediction.shape[:-1])

    def vector_target(self, prediction: Array, target: Array) -> Array:
        """The target with one vector per pixel, after a check against the prediction's shape."""
        if target.shape != prediction.shape:
            raise InputError(
                f"Task {self.name!r}: the target has shape {target.shape} and the prediction {prediction.shape}; "
                "they must be equal."
            )
        return jnp.asarray(target)


def kind_of(name: str) -> str:
    """The kind of task that a configuration's name of one stands for: what is before `HEAD_MARK`.

    >>> from sgw_jax.tasks.base import kind_of
    >>> kind_of("semseg@street"), kind_of("depth")
    ('semseg', 'depth')
    """
    return name.partition(HEAD_MARK)[0]


def scalar_map(values: Array) -> Array:
    """(batch, height, width, 1) -> (batch, height, width); three axes are returned as they are."""
    return values[..., 0] if values.ndim == 4 else values


def count(mask: Array) -> Int[Array, ""]:
    """How many are true, in int32: a float32 sum of ones stops at 2^24."""
    return jnp.sum(mask, dtype=jnp.int32)


def ratio(numerator: float, denominator: float) -> float:
    """A plain float, NaN when the denominator is zero."""
    return float(numerator) / float(denominator) if denominator else math.nan


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(item) for item in value) if isinstance(value, list | tuple) else value
