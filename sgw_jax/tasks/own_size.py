"""A network's predictions brought to the frames that labels have: each image's own size."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from sgw_jax.layers.resize import sample
from sgw_jax.sharding import constrain_activations
from sgw_jax.tasks.base import Task


def at_labels(tasks: Sequence[Task], predictions: Mapping[str, Array], batch: Mapping[str, Array]) -> dict[str, Array]:
    """The raw predictions of the tasks where the batch's labels are.

    Without a "geometry" in the batch labels lie as the network's frame does, and predictions are returned as they are.
    With it (data_pipelines/evaluation.py says what it holds), each is sampled from the image's part of the frame at the
    image's own pixels, on a canvas of the labels' size; what lies beyond the image repeats its border and has no label.
    With a "zoom" predictions of distances are those of the unshrunk image (`Task.from_afar`).

    Args:
      tasks: whose predictions are wanted.
      predictions: raw, float (batch, height, width, channels) by task.
      batch: targets by task and, perhaps, geometry int32 (batch, 6) and zoom float32 (batch,).

    Returns:
      Raw predictions (batch, rows, columns, channels) by task.
    """
    if "geometry" not in batch:
        return {task.name: predictions[task.name] for task in tasks}
    geometry, found = batch["geometry"], {}
    for task in tasks:
        canvas = batch[task.name].shape[1], batch[task.name].shape[2]
        brought = jax.vmap(lambda values, row, canvas=canvas: sample(values, row[:4], row[4:], canvas))(
            predictions[task.name], geometry
        )
        if "zoom" in batch:
            brought = task.from_afar(brought, batch["zoom"][:, None, None, None])
        found[task.name] = constrain_activations(brought)
    return found


def real_rows(batch: Mapping[str, Array]) -> Bool[Array, " batch"]:
    """Which rows are images: those whose "item" is not -1; all where the batch names no items."""
    return batch["item"] >= 0 if "item" in batch else jnp.ones(batch["image"].shape[0], bool)
