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
OF_ALL = ("rmse", "abs_err")  # the metrics of all pixels; the others need g > 0
RATIOS = (1.25, 1.25**2, 1.25**3)
# The first and the last row and column of the frame that count, as shares of its height and width: those of Garg et al.
# 2016 and Eigen et al. 2014 for KITTI, and the part of NYU's 480 x 640 on which depth was projected.
CROPS = {
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
    "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
    "nyu_eigen": (45 / 480, 471 / 480, 41 / 640, 601 / 640),
}


@dataclasses.dataclass(frozen=True)
class Depth(Task):
    """One non-negative number per pixel; target float (batch, height, width) or with a trailing axis of 1.

    A target is valid where it is finite and > 0, or >= 0 with `zero_is_valid` (Cityscapes: the disparity of the sky).
    Loss: |prediction - target|, summed over the valid pixels; raw metres, no logarithm, no activation (InvPT).

    Metrics of p = max(prediction, 0), which is what `decode` returns, against g, pooled over the pixels of the data
    set:
      rmse, abs_err: sqrt(mean (p - g)^2), mean |p - g|.
      abs_rel, sq_rel: mean |p - g| / g, mean (p - g)^2 / g.
      log_rmse, log10: sqrt(mean d^2) of d = ln p - ln g, mean |d| / ln 10, with p no less than `log_floor`.
      silog: 100 sqrt(mean d^2 - (mean d)^2), KITTI's scale-invariant error.
      delta_1, delta_2, delta_3: percent of the pixels with max(p/g, g/p) < 1.25, 1.25^2, 1.25^3.
    All but the first two need g > 0 and count only such pixels; those of d and the deltas are the same of a depth and
    of its inverse.

    They count the valid pixels with `min_depth` < g < `max_depth`, where these are given (the peers use 80), and inside
    `crop`, one of `CROPS`, as shares of the frame as it is (`sees_frame`: an evaluation pads none). `clip` clips p to
    [min_depth, max_depth]. `by_image` takes each metric of each image, and its mean over the images with a counted
    pixel (KITTI's way). The loss looks at none of these five.

    "published" departs in two lines: pixels with g = 0 are left out of rmse and abs_err too (the field evaluates
    0 < g), and p <= 0 becomes 1e-9, which makes log_rmse charge such a pixel about 20; "exact" has the customary floor
    of 1e-3.
    """

    kind: ClassVar[str] = "depth"

    name: str = "depth"
    # "depth": metres, divided by a zoom; "disparity": pixels, and "inverse_depth": of no unit, multiplied by it
    quantity: str = "depth"
    zero_is_valid: bool = False
    max_depth: float | None = None
    min_depth: float | None = None
    clip: bool = False
    crop: str | None = None
    by_image: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.quantity not in COLORMAPS:
            raise InputError(f"Task {self.name!r}: quantity is {self.quantity!r}; choose one of {tuple(COLORMAPS)}.")
        if self.max_depth is not None and not self.max_depth > 0:
            raise InputError(f"Task {self.name!r}: max_depth is {self.max_depth!r}; give a positive number or None.")
        if self.min_depth is not None and not 0 <= self.min_depth < (self.max_depth or math.inf):
            raise InputError(
                f"Task {self.name!r}: min_depth is {self.min_depth!r}; give a number >= 0 and below max_depth, or None."
            )
        if self.clip and None in (self.min_depth, self.max_depth):
            raise InputError(f"Task {self.name!r}: clip needs min_depth and max_depth; give both.")
        if self.crop is not None and self.crop not in CROPS:
            raise InputError(f"Task {self.name!r}: crop is {self.crop!r}; choose one of {tuple(CROPS)}, or None.")

    @property
    def channels(self) -> int:
        return 1

    @property
    def target(self) -> dict[str, Any]:
        kind = "depth" if self.quantity == "depth" else "disparity"
        return {"kind": kind, "fill": -1.0 if self.zero_is_valid else 0.0, "resample": "nearest"}

    @property
    def sees_frame(self) -> bool:
        return self.crop is not None

    @property
    def metric(self) -> str:
        return "rmse"

    @property
    def higher_is_better(self) -> bool:
        return False

    @property
    def directions(self) -> dict[str, bool]:
        return {name: name.startswith("delta") for name in self.units}

    @property
    def unit(self) -> str:
        """The unit of the map itself."""
        return UNITS[self.quantity]

    @property
    def units(self) -> dict[str, str]:
        errors = {"rmse": self.unit, "abs_err": self.unit, "abs_rel": "", "sq_rel": self.unit}
        return {**errors, "log_rmse": "", "log10": "", "silog": "", "delta_1": "%", "delta_2": "%", "delta_3": "%"}

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
        valid = self._counted(target)
        positive = valid & (target > 0)
        if self.protocol == "published":
            predicted = jnp.where(predicted > 0, predicted, 1e-9)
            valid = positive
        if self.clip:
            predicted = jnp.clip(predicted, self.min_depth, self.max_depth)
        truth = jnp.where(positive, target, 1).astype(jnp.float32)
        error = predicted - truth
        absolute = jnp.abs(predicted - jnp.where(valid, target, 0))
        log_error = jnp.log(jnp.maximum(predicted, self.log_floor)) - jnp.log(truth)
        pixels = (-2, -1) if self.by_image else None

        def total(values: Array, mask: Array) -> Array:
            return jnp.sum(jnp.where(mask, values, 0), axis=pixels)

        def number(mask: Array) -> Array:
            return jnp.sum(mask, axis=pixels, dtype=jnp.int32)

        sums = {
            "squared": total(jnp.square(absolute), valid),
            "absolute": total(absolute, valid),
            "pixels": number(valid),
            "relative": total(jnp.abs(error) / truth, positive),
            "squared_relative": total(jnp.square(error) / truth, positive),
            "squared_log": total(jnp.square(log_error), positive),
            "absolute_log": total(jnp.abs(log_error), positive),
            "log": total(log_error, positive),
            "positive_pixels": number(positive),
        }
        for place, limit in enumerate(RATIOS, 1):
            near = (predicted < limit * truth) & (truth < limit * predicted)
            sums["near" if place == 1 else f"near_{place}"] = number(near & positive)
        if not self.by_image:
            return sums
        seen, ratios_seen = sums["pixels"] > 0, sums["positive_pixels"] > 0
        values = self._values(sums, jnp)
        return {
            **{n: jnp.sum(jnp.where(seen if n in OF_ALL else ratios_seen, v, 0)) for n, v in values.items()},
            "images": count(seen),
            "positive_images": count(ratios_seen),
        }

    def metric_values(self, sums: Sums) -> dict[str, float]:
        if not self.by_image:
            return {name: float(value) for name, value in self._values(sums, np).items()}
        images, positive = int(sums["images"]), int(sums["positive_images"])
        return {name: ratio(sums[name], images if name in OF_ALL else positive) for name in self.units}

    def _values(self, sums: Sums, xp: Any) -> Sums:
        """The metrics of sums, or of arrays of sums of one image each; NaN where there is nothing to measure."""

        def mean(name: str, pixels: str = "positive_pixels") -> Any:
            number = xp.asarray(sums[pixels])
            return xp.where(number > 0, sums[name] / xp.maximum(number, 1), xp.nan)

        shares = {f"delta_{n}": 100 * mean("near" if n == 1 else f"near_{n}") for n in range(1, len(RATIOS) + 1)}
        return {
            "rmse": xp.sqrt(mean("squared", "pixels")),
            "abs_err": mean("absolute", "pixels"),
            "abs_rel": mean("relative"),
            "sq_rel": mean("squared_relative"),
            "log_rmse": xp.sqrt(mean("squared_log")),
            "log10": mean("absolute_log") / math.log(10),
            "silog": 100 * xp.sqrt(xp.maximum(mean("squared_log") - xp.square(mean("log")), 0)),
            **shares,
        }

    def _counted(self, target: Array) -> Bool[Array, "batch height width"]:
        """The pixels that the metrics look at."""
        counted = self.valid(target)
        if self.max_depth is not None:
            counted &= target < self.max_depth
        if self.min_depth is not None:
            counted &= target > self.min_depth
        if self.crop is not None:
            height, width = target.shape[-2:]
            sides = zip(CROPS[self.crop], (height, height, width, width), strict=True)
            top, bottom, left, right = (int(share * size + 1e-6) for share, size in sides)
            rows, columns = jnp.arange(height)[:, None], jnp.arange(width)
            counted &= (top <= rows) & (rows < bottom) & (left <= columns) & (columns < right)
        return counted

    def decode(self, prediction: Array) -> Array:
        """float32 metres (or pixels of disparity) (..., height, width), negative predictions as 0."""
        return jnp.maximum(self.float32(prediction)[..., 0], 0)

    def spread(self, mean: Float[Array, "... channels"], variance: Float[Array, "..."]) -> Float[Array, "..."] | None:
        """The standard deviation, in metres (or pixels of disparity)."""
        return jnp.sqrt(variance)

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
