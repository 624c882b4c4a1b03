"""The tokens of all tasks as one sequence, and back."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from sgw_jax.data_pipelines.errors import InputError


class TokenLayout(NamedTuple):
    """Where each task's tokens lie in the sequence: names, lengths and the maps' shapes, in key order.

    With ``parts`` > 1 the sequence is that many equal parts, each with its rows of every task's map: where maps are
    split over devices by rows, so is the sequence, and joining them moves nothing. A token's index stays the one of a
    sequence in one part.
    """

    names: tuple[str, ...]
    lengths: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    parts: int = 1

    @property
    def part_lengths(self) -> tuple[int, ...]:
        """Tokens of each task in one part."""
        return tuple(length // self.parts for length in self.lengths)

    def locate(self, position: Array, part: Array) -> Array:
        """The token's index from its position in a part."""
        first = _starts(self.part_lengths)
        task = jnp.sum(position[..., None] >= first[1:], axis=-1)
        offset = jnp.asarray(_starts(self.lengths) - first)[task] + jnp.asarray(self.part_lengths)[task] * part
        return (position + offset).astype(jnp.int32)

    def alone(self, place: int) -> "TokenLayout":
        """Of one task's tokens."""
        return TokenLayout((self.names[place],), (self.lengths[place],), (self.shapes[place],), self.parts)

    def tokens_of(self, place: int, tokens: Array) -> Array:
        """One task's tokens of (batch, tokens, ...), in the order of `alone`."""
        start, length = int(_starts(self.part_lengths)[place]), self.part_lengths[place]
        parts = tokens.reshape(tokens.shape[0], self.parts, -1, *tokens.shape[2:])[:, :, start : start + length]
        return parts.reshape(tokens.shape[0], -1, *tokens.shape[2:])

    def repeated(self, vectors: Sequence[Array]) -> Array:
        """A vector of each task, repeated over its tokens: (tokens, width)."""
        rows = zip(vectors, self.part_lengths, strict=True)
        part = jnp.concatenate([jnp.broadcast_to(vector, (length, *vector.shape)) for vector, length in rows])
        return jnp.tile(part, (self.parts, 1))

    def by_index(self, tokens: Array, axis: int) -> Array:
        """An array over the sequence, in the order of the tokens' indices."""
        if self.parts == 1:
            return tokens
        shape = tokens.shape[:axis], tokens.shape[axis + 1 :]
        parts = tokens.reshape(*shape[0], self.parts, -1, *shape[1])
        ends = [*itertools.accumulate(self.part_lengths)][:-1]
        by_task = jnp.split(parts, ends, axis=axis + 1)
        return jnp.concatenate([x.reshape(*shape[0], -1, *shape[1]) for x in by_task], axis=axis)


def _starts(lengths: tuple[int, ...]) -> np.ndarray:
    return np.asarray([0, *itertools.accumulate(lengths)][:-1])


def concatenate_tasks(
    features: Mapping[str, Float[Array, "batch *space channels"]], caller: str, parts: int = 1
) -> tuple[Float[Array, "batch tokens channels"], TokenLayout]:
    """Flattens every map to tokens and joins them along the token axis, after `check_features`.

    Raises:
      ValueError: a map whose rows (its first axis of space) ``parts`` does not divide.
    """
    check_features(features, caller)
    for name, value in features.items():
        if value.shape[1] % parts:
            raise InputError(
                f"{caller}: the map of {name} has {value.shape[1]} rows, which {parts} parts (the mesh's axis of "
                "tokens) do not divide."
            )
    shapes = tuple(value.shape for value in features.values())
    layout = TokenLayout(tuple(features), tuple(math.prod(shape[1:-1]) for shape in shapes), shapes, parts)
    return _joined([value.reshape(value.shape[0], -1, value.shape[-1]) for value in features.values()], parts), layout


def concatenate_mask(
    mask: Mapping[str, Bool[Array, " batch *space"]], layout: TokenLayout, caller: str
) -> Bool[Array, "batch tokens"]:
    """The mask of every map, in the order of the sequence.

    Raises:
      ValueError: masks of other tasks, or of other shapes than the maps without their channels.
    """
    found = {name: tuple(value.shape) for name, value in mask.items()}
    wanted = {name: shape[:-1] for name, shape in zip(layout.names, layout.shapes, strict=True)}
    if found != wanted:
        raise InputError(f"{caller}: the masks have the shapes {found}; they must have {wanted}.")
    flat = [jnp.asarray(mask[name], bool).reshape(shape[0], -1, 1) for name, shape in wanted.items()]
    return _joined(flat, layout.parts)[..., 0]


def _joined(maps: Sequence[Float[Array, "batch length channels"]], parts: int) -> Float[Array, "batch tokens channels"]:
    """One sequence, part by part."""
    if parts == 1:
        return jnp.concatenate(maps, axis=1)
    joined = jnp.concatenate([x.reshape(x.shape[0], parts, -1, x.shape[-1]) for x in maps], axis=2)
    return joined.reshape(joined.shape[0], -1, joined.shape[-1])


def by_name(
    features: Mapping[str, Any] | Sequence[Any] | None, named: Mapping[str, Any], caller: str
) -> tuple[dict[str, Any], Callable[[dict[str, Any]], Any]]:
    """Maps as {name: map}, and how to return them as they were given: a mapping, a list or a tuple (their names are
    their places), or keyword arguments, as `nn.Sequential` passes a mapping on.

    Raises:
      ValueError: an array in place of several maps; maps given both ways.
    """
    if features is None:
        return dict(named), dict
    if named:
        raise InputError(f"{caller}: unexpected arguments {sorted(named)} beside the features.")
    if isinstance(features, Mapping):
        return dict(features), dict
    if isinstance(features, list | tuple):
        kind = type(features) if type(features) in (list, tuple) else tuple
        return {str(i): value for i, value in enumerate(features)}, lambda maps: kind(maps.values())
    shape = getattr(features, "shape", None)
    raise InputError(
        f"{caller}: the features are {type(features).__name__} {shape if shape is not None else ''}; give a mapping "
        "task -> map, or a list of maps. Of one array with an axis of tasks: list(features)."
    )


def check_features(features: Mapping[str, Float[Array, "batch *space channels"]], caller: str) -> None:
    """Raises a ValueError, naming ``caller``, unless there are tasks with batched maps of floating-point numbers and of
    equal channels, batch size and dtype, whose names can be parameters' names."""
    if not features:
        raise InputError(f"{caller}: the mapping of features is empty; it needs at least one task.")
    for name, value in features.items():
        if not isinstance(name, str) or not name or "/" in name:
            raise InputError(f"{caller}: {name!r} cannot be a task's name: give text without '/'.")
        kind = getattr(value, "dtype", type(value).__name__)
        if not hasattr(value, "dtype") or not jnp.issubdtype(kind, jnp.floating):
            raise InputError(f"{caller}: the map of {name} is {kind}; it must be floating-point.")
        if jnp.ndim(value) < 3:
            raise InputError(
                f"{caller}: the map of {name} has shape {jnp.shape(value)}; it must be (batch, *space, channels), such "
                "as (8, 32, 32, 64) or, of tokens, (8, 1024, 64). Of a single map: value[None]."
            )
    found: dict[str, dict[str, Any]] = {
        "the same number of channels": {name: value.shape[-1] for name, value in features.items()},
        "the same batch size": {name: value.shape[0] for name, value in features.items()},
        "the same dtype": {name: str(value.dtype) for name, value in features.items()},
    }
    for what, values in found.items():
        if len(set(values.values())) > 1:
            raise InputError(f"{caller}: all tasks must have {what}, found {values}.")


def split_tasks(tokens: Float[Array, "batch tokens channels"], layout: TokenLayout) -> dict[str, Array]:
    """The inverse of `concatenate_tasks`."""
    parts = tokens if layout.parts == 1 else tokens.reshape(tokens.shape[0], layout.parts, -1, tokens.shape[-1])
    ends = [*itertools.accumulate(layout.part_lengths)][:-1]
    by_task = jnp.split(parts, ends, axis=-2)
    return {name: x.reshape(shape) for name, x, shape in zip(layout.names, by_task, layout.shapes, strict=True)}
