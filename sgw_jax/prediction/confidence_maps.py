"""The maps that a prediction with confidence has beside those of the tasks."""

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from sgw_jax.pictures.sureness import Sureness
from sgw_jax.prediction.blending import Blending
from sgw_jax.tasks.base import Task

SPREADS = {"depth": ("depth", "m"), "vectors": ("angle", "deg")}  # kind of a target -> kind and unit of its spread


def confidence_maps(tasks: Iterable[Task]) -> list[Sureness]:
    """What each of them is, in the order of the tasks.

    Args:
      tasks: of the network.

    Returns:
      By the names that `Predictor` gives them: numbers in [0, 1] by `Task.confidence`, and spreads.
    """
    found = []
    for task in tasks:
        raw = jax.ShapeDtypeStruct((1, 1, 1, task.channels), jnp.float32)
        found += [Sureness(f"{task.name}_{what}", "mask") for what in jax.eval_shape(task.confidence, raw)]
        if Blending([task]).measured:
            kind, unit = SPREADS.get(task.target["kind"], ("disparity", getattr(task, "unit", "")))
            found.append(Sureness(f"{task.name}_spread", kind, unit))
    return found
