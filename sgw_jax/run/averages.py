"""The parameters that a checkpoint is evaluated by: their averages where there are any."""

from collections.abc import Mapping
from typing import Any

import jax
from flax.traverse_util import unflatten_dict
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from sgw_jax.differentiate import flat, unflat
from sgw_jax.layers.parameter_names import EMA, PARAMS
from sgw_jax.run.checkpoints import Checkpoints


def evaluated_parameters(checkpoints: Checkpoints, step: int, wanted: Mapping[str, Any]) -> dict[str, Array]:
    """Parameters by their paths, each the average if the checkpoint has one, else as trained.

    A parameter that was frozen has no average; of a stack whose lowest blocks were frozen, the last rows have one.

    Args:
      wanted: shapes, dtypes and shardings by path.

    Raises:
      CheckpointError: a parameter that is not there, or of another shape; a damaged checkpoint.
    """
    saved = checkpoints.shapes(step)
    averages = {name: saved[f"{EMA}/{name}"] for name in wanted if f"{EMA}/{name}" in saved}
    kept = {name: leaf for name, leaf in wanted.items() if averages.get(name) != leaf.shape}
    asked = {}
    if kept:
        asked[PARAMS] = unflatten_dict(kept, sep="/")
    if averages:
        averaged = {name: _of_shape(wanted[name], shape) for name, shape in averages.items()}
        asked[EMA] = unflatten_dict(averaged, sep="/")
    found = {name: flat(tree) for name, tree in checkpoints.restore_variables(asked, step).items()}
    whole = {**found.get(EMA, {}), **found.get(PARAMS, {})}
    joined = unflat(found.get(EMA, {}), whole)
    return {name: jax.device_put(joined[name], leaf.sharding) for name, leaf in wanted.items()}


def _of_shape(leaf: Any, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """The leaf with so many rows, on the same devices; of fewer rows whole on each, as they may not divide."""
    place: Any = leaf.sharding
    if shape != leaf.shape and isinstance(place, NamedSharding):
        place = NamedSharding(place.mesh, P())
    return jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=place)
