"""Weighted means of raw predictions of tiles, in a strip of the canvas as high as a tile, and the maps decoded of it.

At a pixel that passes k = 1, 2 .. saw with weights w_k and values x_k, with W_k = w_1 + .. + w_k and f_k = w_k / W_k:

    mean m_k = m_(k-1) + f_k (x_k - m_(k-1)),    variance v_k = v_(k-1) + f_k ((1 - f_k) |x_k - m_(k-1)|^2 - v_(k-1)).

So what one pass saw, or all alike, stays as it is to the last bit, its variance is 0, and nothing cancels (West 1979).
The strip is a ring of rows: a row of tiles overwrites the rows that are decoded and no longer needed. All arrays lie on
one device; shapes depend on the tile and on the canvas' width in whole tiles, so that few programs serve all images.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sgw_jax.tasks.base import Task

Maps = dict[str, Array]


class Strip(NamedTuple):
    """Rows of the canvas, row r at r modulo their number; with a column more at the left, see `tiles.Layout.left`.

    Attributes:
      values: by task, of raw predictions (`Task.averageable`).
      weight: what has been added, 0 where nothing has.
      decoded: by task, the mean of the passes' decoded values; empty unless their spread is asked for.
      variance: by task, the mean squared distance to it.
    """

    values: dict[str, Float[Array, "1 rows columns channels"]]
    weight: Float[Array, "rows columns"]
    decoded: dict[str, Float[Array, "1 rows columns channels"]]
    variance: dict[str, Float[Array, "1 rows columns 1"]]


class Points(NamedTuple):
    """Points between the pixels (y, x) of a strip and their lower and right neighbours, and how far from the former."""

    y: Int[Array, " points"]
    y_weight: Float[Array, " points"]
    x: Int[Array, " points"]
    x_weight: Float[Array, " points"]


class Blending:
    """The compiled programs that make maps of raw predictions.

    Args:
      tasks: what is predicted.
    """

    def __init__(self, tasks: Sequence[Task]):
        self.tasks = tuple(tasks)
        self.empty = jax.jit(self._empty, static_argnames=("rows", "columns", "spread"))
        self.add = jax.jit(self._added, static_argnames="mirrored", donate_argnums=0)
        self.forget = jax.jit(self._kept, donate_argnums=0)
        self.decode = jax.jit(self._decoded_at, static_argnames="confidence")

    @functools.cached_property
    def measured(self) -> tuple[Task, ...]:
        """The tasks that have a spread."""
        return tuple(task for task in self.tasks if _has_spread(task))

    def _empty(self, *, rows: int, columns: int, spread: bool) -> Strip:
        def zeros(channels: int) -> Array:
            return jnp.zeros((1, rows, columns, channels), jnp.float32)

        measured = self.measured if spread else ()
        return Strip(
            values={task.name: zeros(task.channels) for task in self.tasks},
            weight=jnp.zeros((rows, columns), jnp.float32),
            decoded={task.name: zeros(_decoded_channels(task)) for task in measured},
            variance={task.name: zeros(1) for task in measured},
        )

    def _added(
        self,
        strip: Strip,
        raw: Mapping[str, Float[Array, "batch height width _"]],
        number: Int[Array, ""],
        corner: tuple[Int[Array, ""], Int[Array, ""]],
        down: Float[Array, " height"],
        across: Float[Array, " width"],
        *,
        mirrored: bool,
    ) -> Strip:
        """The strip with one of the batch's raw predictions added.

        Args:
          strip: overwritten.
          raw: of a batch.
          number: which of it.
          corner: row and column of the strip where its upper left pixel lies.
          down, across: the weights of its rows and columns; their product is that of a pixel.
          mirrored: whether the prediction is of the mirror image.
        """
        ring = strip.weight.shape[0]
        row = (jnp.arange(ring) - corner[0]) % ring  # of the prediction, for each row of the strip
        inside, row = row < len(down), jnp.minimum(row, len(down) - 1)
        weight = jnp.where(inside, down[row], 0)[:, None] * across
        place = (0, corner[1])
        before = jax.lax.dynamic_slice(strip.weight, place, weight.shape)
        total = before + weight
        share = jnp.where(weight > 0, weight / jnp.where(total > 0, total, 1), 0)[..., None]

        def moved(mean: Array, new: Array) -> tuple[Array, Array]:
            """The strip of means with new values, and how far they are from it."""
            old = jax.lax.dynamic_slice(mean, (0, 0, corner[1], 0), (1, *new.shape))[0]
            old = jnp.where(before[..., None] > 0, old, 0)  # else it is of rows that were forgotten
            apart = jnp.where(share > 0, new - old, 0)  # what is not seen may be NaN
            return jax.lax.dynamic_update_slice(mean, (old + share * apart)[None], (0, 0, corner[1], 0)), apart

        values, decoded, variance = {}, {}, {}
        for task in self.tasks:
            new = task.averageable(task.float32(raw[task.name][number]))
            new = (task.mirrored(new) if mirrored else new)[row]
            values[task.name], _ = moved(strip.values[task.name], new)
            if task.name in strip.variance:
                decoded[task.name], apart = moved(strip.decoded[task.name], _with_channels(task, task.decode(new)))
                square = (1 - share) * jnp.sum(jnp.square(apart), axis=-1, keepdims=True)
                variance[task.name], _ = moved(strip.variance[task.name], square)
        return Strip(values, jax.lax.dynamic_update_slice(strip.weight, total, place), decoded, variance)

    def _kept(self, strip: Strip, kept: Bool[Array, " rows"]) -> Strip:
        """The strip without the other rows: what has no weight counts as nothing."""
        return strip._replace(weight=jnp.where(kept[:, None], strip.weight, 0))

    def _decoded_at(
        self,
        raw: Mapping[str, Float[Array, "batch height width _"]],
        number: Int[Array, ""],
        spread: tuple[Maps, Maps],
        points: Points,
        *,
        confidence: bool,
    ) -> dict[str, Array]:
        """Every task's decoded prediction at points, of one of a batch of raw predictions; and with ``confidence`` how
        sure it is, the spread being of a strip's (decoded, variance): 0 where these are empty."""
        maps: dict[str, Any] = {}
        for task in self.tasks:
            values = _at(raw[task.name][number], points)[None]
            maps[task.name] = task.decode(values)[0]
            if confidence:
                maps |= {f"{task.name}_{name}": value[0] for name, value in task.confidence(values).items()}
        for task in self.measured if confidence else ():
            name, (decoded, variance) = f"{task.name}_spread", spread
            if task.name in variance:
                mean = _at(decoded[task.name][0], points)
                maps[name] = task.spread(mean, jnp.maximum(_at(variance[task.name][0], points)[..., 0], 0))
            else:
                maps[name] = jnp.zeros(points.y.shape, jnp.float32)
        return maps


def _at(values: Float[Array, "rows columns channels"], points: Points) -> Float[Array, "points channels"]:
    y, y_weight, x, x_weight = points
    below, right = y + (y_weight > 0), x + (x_weight > 0)  # without weight there is no neighbour: no padding leaks
    below = below % len(values)  # of a ring of rows
    y_weight, x_weight = y_weight[:, None], x_weight[:, None]
    upper = values[y, x] * (1 - x_weight) + values[y, right] * x_weight
    lower = values[below, x] * (1 - x_weight) + values[below, right] * x_weight
    return upper * (1 - y_weight) + lower * y_weight


def _decoded_shape(task: Task) -> tuple[int, ...]:
    return jax.eval_shape(task.decode, jax.ShapeDtypeStruct((1, 1, task.channels), jnp.float32)).shape[2:]


def _decoded_channels(task: Task) -> int:
    return int(np.prod(_decoded_shape(task)))


def _with_channels(task: Task, decoded: Array) -> Float[Array, "rows columns channels"]:
    """A decoded map with an axis of channels."""
    return decoded if _decoded_shape(task) else decoded[..., None]


def _has_spread(task: Task) -> bool:
    vector, number = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((_decoded_channels(task),), ()))
    result: Any = jax.eval_shape(task.spread, vector, number)
    return result is not None
