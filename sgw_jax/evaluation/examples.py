"""Pictures of a split's first images: photograph, labels, predictions, and what a KEM's slots retrieve."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from sgw_jax.data_pipelines.transforms import IMAGE_MEAN, IMAGE_STD
from sgw_jax.evaluation.inside_kem import Features, apply_and_look, has_kem, intervene, token_layout
from sgw_jax.functional.tokens import TokenLayout
from sgw_jax.sharding import global_batch, replicated
from sgw_jax.tasks.base import Task

SHOWN_SLOTS = 5  # whose retrieve maps `collect_examples` returns

Batch = Mapping[str, Any]


def collect_examples(
    model: nn.Module, variables: Any, batch: Batch, mesh: Mesh, tasks: Sequence[Task], count: int
) -> dict[str, Any]:
    """The first ``count`` images of a (global) batch as pictures, for the report; NumPy arrays throughout.

    Returns:
      image: uint8 (n, H, W, 3).
      tasks: {task: {"prediction": decoded (n, ...), "target": (n, ...), "pictures": {"truth", "prediction"} -> uint8
        (n, H, W, 3), drawn with one range of colours, that of all n targets, and its "legend"}}.
      retrieve: None where the interaction is not a KEM, else {"slots": numbers, "maps": {task: (n, slots, h, w)}}: how
        much attention a slot pays to each token, averaged over heads, in the last round; the maps of a slot sum to 1
        over all tasks. Shown are the SHOWN_SLOTS slots that tokens of these images take most from, in that order.
    """
    is_kem = has_kem(model)

    def run(variables: Any, batch: Batch) -> dict[str, Any]:
        features: Features = {}
        with intervene(features):
            predictions, sown = apply_and_look(model, variables, batch["image"])
        image = batch["image"] * jnp.asarray(IMAGE_STD) + jnp.asarray(IMAGE_MEAN)
        found = {
            "image": jnp.round(255 * jnp.clip(image, 0, 1)).astype(jnp.uint8),
            "prediction": {task.name: task.decode(predictions[task.name]) for task in tasks},
            "target": {task.name: batch[task.name] for task in tasks},
        }
        if is_kem:
            last = {name: value[-1] for name, value in sown.items()}
            found["use"] = jnp.mean(last["write_weights"], axis=(1, 2))
            found["maps"] = _retrieve_maps(last["retrieve_weights"], last.get("retrieve_index"), token_layout(features))
        return jax.tree.map(lambda array: array[:count], found)

    with jax.set_mesh(mesh):
        found = jax.device_get(jax.jit(run, out_shardings=replicated(mesh))(variables, global_batch(batch, mesh)))
    retrieve = None
    if is_kem:
        slots = np.argsort(-found["use"].mean(axis=0), kind="stable")[:SHOWN_SLOTS]
        retrieve = {"slots": slots.tolist(), "maps": {t.name: found["maps"][t.name][:, slots] for t in tasks}}
    return {
        "image": found["image"],
        "tasks": {t.name: _pictures(t, found["prediction"][t.name], found["target"][t.name]) for t in tasks},
        "retrieve": retrieve,
    }


def _retrieve_maps(
    weights: Float[Array, "batch heads slots kept"], index: Int[Array, "..."] | None, layout: TokenLayout
) -> dict[str, Float[Array, "batch slots h w"]]:
    """The weights put back where the tokens were, by task."""
    if index is not None:
        zeros = jnp.zeros(sum(layout.lengths), weights.dtype)
        weights = jnp.vectorize(lambda w, i: zeros.at[i].set(w), signature="(k),(k)->(n)")(weights, index)
    dense = jnp.mean(weights, axis=1)
    parts = jnp.split(dense, np.cumsum(layout.lengths)[:-1], axis=-1)
    return {
        name: part.reshape(*part.shape[:2], *shape[1:-1])
        for name, part, shape in zip(layout.names, parts, layout.shapes, strict=True)
    }


def _pictures(task: Task, predictions: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    together = targets.reshape(-1, *targets.shape[2:])  # one map, its images one below the other
    return {
        "prediction": predictions,
        "target": targets,
        "pictures": {
            "truth": np.stack([task.draw(target, like=together) for target in targets]),
            "prediction": np.stack([task.draw(prediction, like=together) for prediction in predictions]),
        },
        "legend": task.legend(together),
    }
