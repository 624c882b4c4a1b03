"""The tokens of all tasks as one sequence, and back."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float


class TokenLayout(NamedTuple):
    """Where each task's tokens lie in the sequence: names, lengths and the maps' shapes, in key order."""

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]


def concatenate_tasks(
    features: Mapping[str, Float[Array, "batch *space channels"]], caller: str
) -> tuple[Float[Array, "batch tokens channels"], TokenLayout]:
    """Flattens every map to tokens and joins them along the token axis, after `check_features`."""
    check_features(features, caller)
    flat = [value.reshape(value.shape[0], -1, value.shape[-1]) for value in features.values()]
    shapes = tuple(value.shape for value in features.values())
    return jnp.concatenate(flat, axis=1), TokenLayout(tuple(features), tuple(f.shape[1] for f in flat), shapes)


def check_features(features: Mapping[str, Float[Array, "batch *space channels"]], caller: str) -> None:
    """Raises a ValueError, naming ``caller``, unless there are tasks with equal channels, batch size and dtype."""
    if not features:
        raise ValueError(f"{caller}: the mapping of features is empty; it needs at least one task.")
    found: dict[str, dict[str, Any]] = {
        "the same number of channels": {name: value.shape[-1] for name, value in features.items()},
        "the same batch size": {name: value.shape[0] for name, value in features.items()},
        "the same dtype": {name: str(value.dtype) for name, value in features.items()},
    }
    for what, values in found.items():
        if len(set(values.values())) > 1:
            raise ValueError(f"{caller}: all tasks must have {what}, found {values}.")


def split_tasks(tokens: Float[Array, "batch tokens channels"], layout: TokenLayout) -> dict[str, Array]:
    """The inverse of `concatenate_tasks`."""
    result, start = {}, 0
    for name, length, shape in zip(layout.names, layout.lengths, layout.shapes, strict=True):
        result[name] = tokens[:, start : start + length].reshape(shape)
        start += length
    return result
