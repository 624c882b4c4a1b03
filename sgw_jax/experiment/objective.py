"""The objective of a configuration: how the tasks' losses become one update."""

from typing import Any

from ml_collections import ConfigDict

from sgw_jax.differentiate import Objective
from sgw_jax.experiment.choice import taken
from sgw_jax.experiment.experiment import Data
from sgw_jax.multi_objective import AGGREGATORS, SCALARIZERS, ema_weights, every_k


def build_objective(config: ConfigDict, tasks: int, data: Data) -> Objective:
    """The scalariser or aggregator for a number of tasks; one that counts epochs is told their steps."""
    name = config.objective
    family: dict[str, Any] = {**AGGREGATORS, **SCALARIZERS}
    make = family[name]
    epoch = max(1, len(data.sources.get("train", ())) // config.batch_size)
    found = make(tasks, **config.objectives.get(name, {}), **taken(make, {"steps_per_epoch": epoch}))
    if name in SCALARIZERS:
        return found
    if config.weights_ema is not None:
        found = ema_weights(found, config.weights_ema, tasks)
    return found if config.weights_every == 1 else every_k(found, config.weights_every, tasks)
