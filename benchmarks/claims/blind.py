"""A task that sees nothing of the image, for comparisons: what it knows of it, the others have told it."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sgw_jax.experiment.experiment import Experiment
from sgw_jax.model import MultiTaskModel


def positions(height: int, width: int, channels: int) -> Float[np.ndarray, "height width channels"]:
    """Where a cell lies: sines and cosines of its row and column, from half a period over the map to one over two
    cells; float32. Channels that do not divide by 4 end in zeros."""
    parts = []
    for axis, length in enumerate((height, width)):
        centres = (np.arange(length) + 0.5) / length
        angles = np.pi * centres[:, None] * np.geomspace(1, length, channels // 4)
        waves = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1)
        parts.append(np.broadcast_to(np.expand_dims(waves, 1 - axis), (height, width, waves.shape[-1])))
    found = np.concatenate(parts, axis=-1)
    return np.pad(found, ((0, 0), (0, 0), (0, channels - found.shape[-1]))).astype(np.float32)


class BlindModel(MultiTaskModel):
    """The network with `positions` for the features of one task, ``blind``. Its stem remains, and learns nothing."""

    blind: str = ""

    def _stems(self, *given: Any) -> dict[str, Array]:
        features: Mapping[str, Array] = super()._stems(*given)
        seen = features[self.blind]
        return {**features, self.blind: jnp.broadcast_to(positions(*seen.shape[1:]), seen.shape).astype(seen.dtype)}


def with_blind_task(experiment: Experiment, task: str) -> Experiment:
    """The experiment with a task that sees nothing.

    Raises:
      SystemExit: no such task; interaction at several scales, of which the finer ones would forget what was exchanged.
    """
    names = [each.name for each in experiment.tasks]
    if task not in names:
        raise SystemExit(f"--blind {task}: the tasks are {', '.join(names)}.")
    model = experiment.model
    if model.scales:
        raise SystemExit(f"--blind {task}: with interaction at several scales, {model.scales}, it is not written.")
    fields = [field.name for field in dataclasses.fields(MultiTaskModel) if field.init]
    given = {name: getattr(model, name) for name in fields if name not in ("parent", "name")}
    return dataclasses.replace(experiment, model=BlindModel(**given, blind=task))
