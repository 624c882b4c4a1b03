"""ODS, OIS and AP of a network's edges over a whole split: predictions to the host, counts pooled over processes."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh
from rich.console import Console

from sgw_jax.evaluation import boundary
from sgw_jax.sharding import batch_sharding, from_all_processes, global_batch
from sgw_jax.tasks.base import Task
from sgw_jax.tasks.mask import labelled, positive
from sgw_jax.tasks.own_size import at_labels, real_rows

Batch = Mapping[str, Any]
SCORES = ("ods", "ois", "ap")
LEVELS = 255  # the published protocol saves probabilities as 8-bit pictures


def edge_scores(
    model: nn.Module, variables: Any, batches: Iterable[Batch], mesh: Mesh, *, task: Task, **options: Any
) -> dict[str, float]:
    """{"ods", "ois", "ap"} in percent, of the probabilities of an edge task (one logit), at the labels' size.

    Args: as of `edge_counts`.
    """
    counts = edge_counts(model, variables, batches, mesh, task=task, **options)
    return scores_of(counts, task.protocol == "published")


def edge_counts(
    model: nn.Module,
    variables: Any,
    batches: Iterable[Batch],
    mesh: Mesh,
    *,
    task: Task,
    max_dist: float,
    outline_targets: bool = False,
    suppress: bool = False,
    workers: int = 0,
    console: Console | None = None,
    total: int | None = None,
) -> np.ndarray:
    """What `edge_scores` makes scores of: the `boundary.counts_of` of all processes' images, one after another.

    An image is cut to the frame of its labelled pixels, which undoes padding, so that distances are shares of the
    original's diagonal; unlabelled pixels inside it count neither as prediction nor as target. `MaskTask` says which
    pixels are labelled and which are edges. Images without any label are left out. Each process matches the images that
    its devices predicted.

    Args:
      batches: as `eval_batches` yields them; rows without an item do not count.
      task: its protocol "published" is as InvPT and SEISM compute them. Probabilities are cut down to 8 bits, as they
        are saved there, and suppressed where they are no crest of a ridge; precision is 1 where nothing is predicted
        (program "seism").
      max_dist, outline_targets, suppress: see `boundary.evaluate`.
      total: images, for the progress bar.
    """
    published = task.protocol == "published"

    def images() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        for probability, labels in probabilities(model, variables, batches, mesh, task, eight_bits=published):
            if np.any(labelled(labels)):
                yield framed(probability, labels)

    with jax.set_mesh(mesh):
        counts = boundary.counts_of(
            images(),
            max_dist=max_dist,
            outline_targets=outline_targets,
            suppressed=suppress or published,
            workers=workers,
            console=console,
            total=total,
        )
    return _from_all_processes(counts) if jax.process_count() > 1 else counts


def scores_of(counts: np.ndarray, published: bool) -> dict[str, float]:
    """`SCORES` in percent, of `boundary.counts_of`."""
    found = boundary.summarise(counts, program="seism" if published else "ours")
    return {name: 100 * found[name] for name in SCORES}


def probabilities(
    model: nn.Module, variables: Any, batches: Iterable[Batch], mesh: Mesh, task: Task, eight_bits: bool = False
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(probability, labels), both (height, width) at the labels' size, of the images that this process's devices have.

    float32, or with `eight_bits` uint8 levels, rounded down.
    """

    def run(variables: Any, batch: Batch) -> tuple[Array, Array, Array]:
        predictions: Any = model.apply(variables, batch["image"])
        logit = at_labels([task], predictions, batch)[task.name][..., 0]
        probability = jax.nn.sigmoid(logit.astype(jnp.float32))
        if eight_bits:
            probability = jnp.floor(LEVELS * probability).astype(jnp.uint8)
        return probability, batch[task.name].reshape(probability.shape), real_rows(batch)

    step = jax.jit(run, out_shardings=batch_sharding(mesh))
    for batch in batches:
        for probability, labels, real in _own_rows(*step(variables, global_batch(batch, mesh))):
            if real:
                yield probability, labels


def _own_rows(*arrays: Array) -> Iterator[tuple[Any, ...]]:
    """The rows of every array that lie on this process; copies once."""
    for shards in zip(*(array.addressable_shards for array in arrays), strict=True):
        if shards[0].replica_id == 0:
            yield from zip(*(np.asarray(shard.data) for shard in shards), strict=True)


def framed(probability: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(prediction, target, ignored) inside the smallest rectangle that holds all labelled pixels."""
    valid = labelled(labels)
    rows, columns = (np.flatnonzero(np.any(valid, axis=axis)) for axis in (1, 0))
    frame = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return probability[frame], positive(labels[frame]), ~valid[frame]


def _from_all_processes(counts: np.ndarray) -> np.ndarray:
    """The counts of all processes' images; processes may have different numbers of them."""
    most = int(from_all_processes(np.asarray(len(counts), np.int32)).max())
    padded = np.zeros((most, *counts.shape[1:]), np.int64)
    padded[: len(counts)] = counts
    gathered = from_all_processes(padded.astype(np.int32))
    return np.asarray(gathered, np.int64).reshape(-1, *counts.shape[1:])
