"""Maps of how sure a network is of its maps, as panels draw them and files store them."""

import dataclasses
from typing import Any

import numpy as np

from sgw_jax.tasks.base import Legend

COLORMAP = "viridis"


@dataclasses.dataclass(frozen=True)
class Sureness:
    """One such map, as `Predictor` gives it: float (height, width).

    Args:
      name: of the map.
      kind: of its values: "mask" for numbers from 0 to 1, "depth", "disparity" or "angle" (degrees).
      unit: of its values.
    """

    name: str
    kind: str
    unit: str = ""

    @property
    def target(self) -> dict[str, Any]:
        """As of a `Task`."""
        return {"kind": self.kind}

    def valid(self, target: Any) -> np.ndarray:
        """Where it is a number."""
        return np.isfinite(np.asarray(target))

    def draw(self, decoded: np.ndarray, like: np.ndarray | None = None) -> np.ndarray:
        """uint8 (height, width, 3): the least value is dark, the greatest of `like` light."""
        return self._colours(np.asarray(decoded, np.float32), *self._range(decoded if like is None else like))

    def legend(self, values: np.ndarray | None = None) -> Legend:
        """Five ticks over the range of the values."""
        low, high = self._range(values)
        ticks = np.linspace(low, high, 5)
        texts = (f"{tick:.3g} {self.unit}".strip() for tick in ticks)
        colours = self._colours(ticks, low, high)
        return [(text, (int(r), int(g), int(b))) for text, (r, g, b) in zip(texts, colours, strict=True)]

    def _range(self, values: np.ndarray | None) -> tuple[float, float]:
        if self.kind == "mask" or values is None:
            return 0.0, 1.0
        seen = np.asarray(values)[self.valid(values)]
        return (float(seen.min()), float(seen.max())) if seen.size else (0.0, 1.0)

    def _colours(self, values: np.ndarray, low: float, high: float) -> np.ndarray:
        import matplotlib  # here, because it is slow to import and only pictures need it

        share = np.clip((np.nan_to_num(values, nan=low) - low) / max(high - low, 1e-9), 0, 1)
        return np.ascontiguousarray(matplotlib.colormaps[COLORMAP](share, bytes=True)[..., :3])
