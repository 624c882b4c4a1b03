"""ODS, OIS and AP of a network's edges over a whole split: predictions to the host, counts pooled over processes."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from sgw_jax.evaluation import boundary
from sgw_jax.sharding import batch_sharding, from_all_processes, global_batch
from sgw_jax.tasks.mask import labelled, positive

Batch = Mapping[str, Any]
SCORES = ("ods", "ois", "ap")
LEVELS = 255  # the published protocol saves probabilities as 8-bit pictures


def edge_scores(
    model: nn.Module,
    variables: Any,
    batches: Iterable[Batch],
    mesh: Mesh,
    *,
    task: str = "edges",
    length: int,
    max_dist: float,
    outline_targets: bool = False,
    suppress: bool = False,
    published: bool = False,
    workers: int = 0,
    console: Console | None = None,
) -> dict[str, float]:
    """{"ods", "ois", "ap"} in percent, of the probabilities of an edge task (one logit).

    An image is cut to the frame of its labelled pixels, which undoes the padding, so that distances are shares of the
    original's diagonal; unlabelled pixels inside it count neither as prediction nor as target. `MaskTask` says which
    pixels are labelled and which are edges. Images without any label are left out. Each process matches the images that
    its devices predicted.

    Args:
      batches: as `eval_batches` yields them.   length: of the split; what follows is padding.
      max_dist, outline_targets, suppress: see `boundary.evaluate`.
      published: as InvPT and SEISM compute them. Probabilities are cut down to 8 bits, as they are saved there, and
        suppressed where they are no crest of a ridge; precision is 1 where nothing is predicted (program "seism").
    """

    def run(variables: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
        logit: Any = model.apply(variables, batch["image"])
        probability = jax.nn.sigmoid(logit[task][..., 0].astype(jnp.float32))
        if published:
            probability = jnp.floor(LEVELS * probability).astype(jnp.uint8)
        return probability, batch[task].reshape(probability.shape)

    step = jax.jit(run, out_shardings=batch_sharding(mesh))

    def images() -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        seen = 0
        for batch in batches:
            probability, target = step(variables, global_batch(batch, mesh))
            for row, one, labels in own_rows(probability, target):
                if seen + row < length and np.any(labelled(labels)):
                    yield framed(one, labels)
            seen += probability.shape[0]

    with jax.set_mesh(mesh):
        counts = boundary.counts_of(
            images(),
            max_dist=max_dist,
            outline_targets=outline_targets,
            suppressed=suppress or published,
            workers=workers,
            console=console,
            total=length,
        )
    if jax.process_count() > 1:
        counts = _from_all_processes(counts)
    return scores_of(counts, published)


def scores_of(counts: np.ndarray, published: bool) -> dict[str, float]:
    """`SCORES` in percent, of `boundary.counts_of`."""
    found = boundary.summarise(counts, program="seism" if published else "ours")
    return {name: 100 * found[name] for name in SCORES}


def own_rows(*arrays: jax.Array) -> Iterator[tuple[Any, ...]]:
    """(row of the global batch, that row of every array), for the rows that lie on this process; copies once."""
    for shards in zip(*(array.addressable_shards for array in arrays), strict=True):
        if shards[0].replica_id == 0:
            first = shards[0].index[0].start or 0
            for place, rows in enumerate(zip(*(np.asarray(shard.data) for shard in shards), strict=True)):
                yield first + place, *rows


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
