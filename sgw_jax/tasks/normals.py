"""Surface normals: L1 loss between unit vectors, mean angle over the data set."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sgw_jax.tasks.base import IGNORED_COLOUR, Legend, Sums, Task, count, ratio

ANGLES = (11.25, 22.5, 30.0)
# Inside the root of the norm. The gradient of a zero prediction is then finite (at most 1e4 per unit of loss), and a
# prediction of length 1 is not changed in float32.
EPSILON = 1e-8


@dataclasses.dataclass(frozen=True)
class Normals(Task):
    """One direction per pixel: camera frame x right, y down, z forward.

    A visible surface faces its ray, which on the optical axis is z < 0.

    Target float (batch, height, width, 3), unit vectors; invalid where all-zero or not finite. The prediction is not
    normalised; with n(v) = v / sqrt(|v|^2 + 1e-8):
    Loss: |n(prediction) - target| summed over the three channels and the valid pixels; the count is of PIXELS, so the
    loss is three times a mean over elements. The target is not normalised again (InvPT). The weight 10 is InvPT's.

    Metrics of the angle 2 atan2(|p - g|, |p + g|) between the normalised p and g, which unlike an arc cosine is exact
    near 0 and 180 degrees; pooled over the pixels of the data set:
      mean: degrees.   within_11.25, within_22.5, within_30: percent of the pixels with a smaller angle.
    A prediction of zero is 90 degrees from everything. "published" is the same: the field's code only adds a round
    trip through (n + 1) * 255 / 2 in floating point, which changes nothing but the last digits.
    """

    kind: ClassVar[str] = "normals"

    name: str = "normals"
    weight: float = 10.0

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
    def units(self) -> dict[str, str]:
        return {"mean": "deg", **{f"within_{angle:g}": "%" for angle in ANGLES}}

    def valid(self, target: Array) -> Bool[Array, "batch height width"]:
        return jnp.all(jnp.isfinite(target), axis=-1) & jnp.any(target != 0, axis=-1)

    def loss_terms(
        self, prediction: Array, target: Array, statistics: Sums | None = None
    ) -> tuple[Float[Array, ""], Int[Array, ""]]:
        del statistics
        predicted, target = self.decode(prediction), self.vector_target(prediction, target)
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
        return {"angle": jnp.sum(jnp.where(valid, angle, 0)), "within": within, "pixels": count(valid)}

    def metric_values(self, sums: Sums) -> dict[str, float]:
        pixels = int(sums["pixels"])
        within = zip(ANGLES, np.asarray(sums["within"]), strict=True)
        return {
            "mean": ratio(sums["angle"], pixels),
            **{f"within_{angle:g}": 100 * ratio(number, pixels) for angle, number in within},
        }

    def decode(self, prediction: Array) -> Array:
        """float32 unit vectors (..., height, width, 3)."""
        return _unit(self.float32(prediction))

    def draw(self, decoded: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
        """(n + 1) / 2 of (x, -y, -z): right is red, up is green, and a surface that faces the camera light blue."""
        del like
        normals = np.asarray(decoded, np.float32)
        valid = np.asarray(self.valid(jnp.asarray(normals)))
        shown = np.where(valid[..., None], normals, 0) * np.array([1, -1, -1], np.float32)
        picture = np.clip(np.rint((shown + 1) * 127.5), 0, 255).astype(np.uint8)
        picture[~valid] = IGNORED_COLOUR
        return picture

    def legend(self, values: np.ndarray | None = None) -> Legend:
        del values
        faces = {"right": (1, 0, 0), "left": (-1, 0, 0), "up": (0, -1, 0), "down": (0, 1, 0), "camera": (0, 0, -1)}
        colours = self.draw(np.array([list(faces.values())], np.float32))[0]
        return [(f"faces {name}", (int(r), int(g), int(b))) for name, (r, g, b) in zip(faces, colours, strict=True)]


def _unit(vectors: Array) -> Array:
    return vectors * jax.lax.rsqrt(jnp.sum(jnp.square(vectors), axis=-1, keepdims=True) + EPSILON)
