"""Depth in metres, or disparity in pixels: L1 loss, root mean squared error over the data set."""

import dataclasses
import math
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.tasks.base import IGNORED_COLOUR, Legend, Sums, Task, count, ratio, scalar_map

COLORMAPS = {"depth": "magma_r", "disparity": "magma", "inverse_depth": "magma"}  # uniform steps; near is bright
UNITS = {"depth": "m", "disparity": "px", "inverse_depth": ""}


@dataclasses.dataclass(frozen=True)
class Depth(Task):
    """One non-negative number per pixel; target float (batch, height, width) or with a trailing axis of 1.

    A target is valid where it is finite and > 0, or >= 0 with `zero_is_valid` (Cityscapes: the disparity of the sky).
    Loss: |prediction - target|, summed over the valid pixels; raw metres, no logarithm, no activation (InvPT).

    Metrics of p = max(prediction, 0), which is what `decode` returns, against g, pooled over the pixels of the data
    set (not a mean over images). They count the valid pixels with g < `max_depth`, where that is given (the
    peers use 80); the loss does not look at `max_depth`.
      rmse: sqrt(mean (p - g)^2).
      abs_rel, sq_rel: mean |p - g| / g, mean (p - g)^2 / g.
      log_rmse: sqrt(mean (ln p - ln g)^2) with p no less than `log_floor`.
      delta_1: percent of the pixels with max(p/g, g/p) < 1.25.
    The last four need g > 0 and count only such pixels.

    "published" departs in two lines: pixels with g = 0 are left out of rmse too (the field evaluates 0 < g), and
    p <= 0 becomes 1e-9, which makes log_rmse charge such a pixel about 20; "exact" has the customary floor of 1e-3.
    """

    kind: ClassVar[str] = "depth"

    name: str = "depth"
    # "depth": metres, divided by a zoom; "disparity": pixels, and "inverse_depth": of no unit, multiplied by it
    quantity: str = "depth"
    zero_is_valid: bool = False
    max_depth: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantity not in COLORMAPS:
            raise InputError(f"Task {self.name!r}: quantity is {self.quantity!r}; choose one of {tuple(COLORMAPS)}.")
        if self.max_depth is not None and not self.max_depth > 0:
            raise InputError(f"Task {self.name!r}: max_depth is {self.max_depth!r}; give a positive number or None.")

    @property
    def channels(self) -> int:
        return 1

    @property
    def target(self) -> dict[str, Any]:
        kind = "depth" if self.quantity == "depth" else "disparity"
        return {"kind": kind, "fill": -1.0 if self.zero_is_valid else 0.0, "resample": "nearest"}

    @property
    def metric(self) -> str:
        return "rmse"

    @property
    def higher_is_better(self) -> bool:
        return False

    @property
    def unit(self) -> str:
        """The unit of the map itself."""
        return UNITS[self.quantity]

    @property
    def units(self) -> dict[str, str]:
        return {"rmse": self.unit, "abs_rel": "", "log_rmse": "", "sq_rel": self.unit, "delta_1": "%"}

    @property
    def log_floor(self) -> float:
        """The least prediction the logarithm sees."""
        return 1e-9 if self.protocol == "published" else 1e-3

    def valid(self, target: Array) -> Bool[Array, "batch height width"]:
        target = scalar_map(target)
        return jnp.isfinite(target) & (target >= 0 if self.zero_is_valid else target > 0)

    def loss_terms(
        self, prediction: Array, target: Array, statistics: Sums | None = None
    ) -> tuple[Float[Array, ""], Int[Array, ""]]:
        del statistics
        predicted, target = self.float32(prediction)[..., 0], self.scalar_target(prediction, target)
        valid = self.valid(target)
        error = jnp.abs(predicted - jnp.where(valid, target, 0))  # NaN never enters the arithmetic, so nor its gradient
        return jnp.sum(jnp.where(valid, error, 0)), count(valid)

    def metric_sums(self, prediction: Array, target: Array) -> Sums:
        predicted, target = self.decode(prediction), self.scalar_target(prediction, target)
        valid = self.valid(target)
        if self.max_depth is not None:
            valid &= target < self.max_depth
        positive = valid & (target > 0)
        if self.protocol == "published":
            predicted = jnp.where(predicted > 0, predicted, 1e-9)
            valid = positive
        truth = jnp.where(positive, target, 1).astype(jnp.float32)
        error = predicted - truth
        log_error = jnp.log(jnp.maximum(predicted, self.log_floor)) - jnp.log(truth)
        near = (predicted < 1.25 * truth) & (truth < 1.25 * predicted)

        def total(values: Array, mask: Array) -> Array:
            return jnp.sum(jnp.where(mask, values, 0))

        return {
            "squared": total(jnp.square(predicted - jnp.where(valid, target, 0)), valid),
            "pixels": count(valid),
            "relative": total(jnp.abs(error) / truth, positive),
            "squared_relative": total(jnp.square(error) / truth, positive),
            "squared_log": total(jnp.square(log_error), positive),
            "near": count(near & positive),
            "positive_pixels": count(positive),
        }

    def metric_values(self, sums: Sums) -> dict[str, float]:
        positive = int(sums["positive_pixels"])
        return {
            "rmse": math.sqrt(ratio(sums["squared"], int(sums["pixels"]))),
            "abs_rel": ratio(sums["relative"], positive),
            "log_rmse": math.sqrt(ratio(sums["squared_log"], positive)),
            "sq_rel": ratio(sums["squared_relative"], positive),
            "delta_1": 100 * ratio(sums["near"], positive),
        }

    def decode(self, prediction: Array) -> Array:
        """float32 metres (or pixels of disparity) (..., height, width), negative predictions as 0."""
        return jnp.maximum(self.float32(prediction)[..., 0], 0)

    def draw(self, decoded: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
        values = np.asarray(decoded, np.float32)
        values = values[..., 0] if values.ndim == 3 else values
        low, high = self._range(like, values)
        valid = np.asarray(self.valid(jnp.asarray(values)))
        picture = self._colours(np.where(valid, values, low), low, high)
        picture[~valid] = IGNORED_COLOUR
        return picture

    def legend(self, values: np.ndarray | None = None) -> Legend:
        low, high = self._range(values)
        ticks = np.linspace(low, high, 5)
        colours = self._colours(ticks, low, high)
        texts = (f"{tick:.3g} {self.unit}" for tick in ticks)
        return [(text, (int(r), int(g), int(b))) for text, (r, g, b) in zip(texts, colours, strict=True)]

    def _range(self, *maps: np.ndarray | None) -> tuple[float, float]:
        """The least and the greatest valid value of the first map that has any."""
        for values in maps:
            if values is not None:
                values = np.asarray(values, np.float32)
                seen = values[np.isfinite(values) & ((values >= 0) if self.zero_is_valid else (values > 0))]
                if seen.size:
                    return float(seen.min()), float(seen.max())
        return 0.0, self.max_depth or 10.0

    def _colours(self, values: np.ndarray, low: float, high: float) -> np.ndarray:
        import matplotlib  # here, because it is slow to import and only pictures need it

        share = np.clip((values - low) / max(high - low, 1e-9), 0, 1)
        colours = matplotlib.colormaps[COLORMAPS[self.quantity]](share, bytes=True)
        return np.ascontiguousarray(colours[..., :3])
