"""What a KEM does on a split: what its slots read, who uses them, and what the metrics lose without them."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import entr
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.evaluation.inside_kem import Features, Intervention, apply_and_look, has_kem, intervene, token_layout
from sgw_jax.evaluation.metrics import add_all
from sgw_jax.evaluation.selection import jaccard, selection_between_images, selection_overlap
from sgw_jax.functional.knowledge_extraction import pair_gate_name
from sgw_jax.functional.tokens import TokenLayout
from sgw_jax.sharding import global_batch, replicated
from sgw_jax.tasks.base import Task
from sgw_jax.tasks.own_size import real_rows
from sgw_jax.train_step import make_eval_step

ABLATIONS = ("zeroed", "swapped")
NOISE = 0.1  # of the selection's perturbation: standard deviation, in units of the normalised image (about 6 levels)

Batch = Mapping[str, Any]


def diagnose(
    model: nn.Module,
    variables: Any,
    batches: Iterable[Batch],
    mesh: Mesh,
    tasks: Sequence[Task],
) -> dict[str, Any] | None:
    """How the KEM of a `MultiTaskModel` works on a whole split; exact on any number of devices and processes.

    As in `evaluate`, a jitted step returns sums over a global batch and the host adds them. All attention is averaged
    over images, heads and rounds; T tasks, L slots, k kept tokens, n_s tokens of all tasks.

    Args:
      batches: as `eval_batches` yields them, this process's rows; those without an item, the last of a batch, do not
        count.

    Returns: None where ``model.interaction`` is not a KEM, else plain data (None where a number is not defined):
      tasks: the names, the order of the matrices below.   images: how many counted.
      slot_diversity: 1 - Jaccard overlap (intersection / union) of the token sets that two slots keep in the same
        image, head and round, averaged over all pairs of slots; None without top-k (all are equal) or with one slot.
      retrieve_entropy: entropy of a slot's retrieve weights / log k (log n_s without top-k); 1 = a plain average.
      write_entropy: entropy of a token's write weights / log L; 1 = every token takes all slots alike.
      readout_cosine: mean cosine between the read-outs R^ of the same slot (and round) in two different images, over
        all pairs of images of the split (not of a batch only: the sum over pairs follows from the sum of the unit
        vectors); 1 = the same read-out for every image. A read-out of zero counts as cosine 0.
      selection_stability: Jaccard overlap of the tokens that a slot keeps for an image and for a copy of it with
        Gaussian noise of standard deviation NOISE, drawn alike for every batch; None without top-k. Read it beside
      selection_between_images: the same overlap between two images of a batch; a selection that ignores its input is
        stable under anything. None without top-k or where no batch has two images.
      update_ratio: mean over images of ||F^|| / ||F||, the norms over all tokens and channels.
      task_gates: {task: the learned factor of its update}; empty without KEM's ``task_gate``.
      pair_gates (T, T): the learned factor of what a task (row) reads of another's slots; empty without ``pair_gate``.
      reads (L, T): share of slot l's retrieved attention that falls on tokens of task t; rows sum to 1.
      writes (T, L): mean attention of task t's tokens to slot l; rows sum to 1.
      flow (T, T): mean over images and heads of writes times reads, the composed map from token to token summed by
        task: what share of task t's update comes from tokens of task s; rows sum to 1.
      ablations: {"zeroed", "swapped"} -> {"metrics": {task: {metric: value}}, "losses": {task: loss}}, as `evaluate`
        gives them, with R^ = 0 in every round, and with R^ taken from another image: the one before in the batch, for
        the first the last (an image that is alone in its batch keeps its own).
    """
    if not has_kem(model):
        return None
    step = make_step(model, tasks, mesh)
    with jax.set_mesh(mesh):
        total = add_all(step(variables, global_batch(batch, mesh)) for batch in batches)
    if total is None:
        raise InputError("diagnose: there were no batches; the split is empty.")
    return {
        "tasks": [task.name for task in tasks],
        **_means(total["module"]),
        "task_gates": _task_gates(variables["params"]["interaction"], tasks) if model.interaction.task_gate else {},
        "pair_gates": _pair_gates(variables["params"]["interaction"], tasks) if model.interaction.pair_gate else [],
        "ablations": {name: _values(total["ablations"][name], tasks) for name in ABLATIONS},  # jit sorts keys
    }


def _task_gates(params: Mapping[str, Any], tasks: Sequence[Task]) -> dict[str, float]:
    # A single number is on every device.
    return {task.name: float(jax.device_get(params[f"task_gate_{task.name}"])[0]) for task in tasks}


def _pair_gates(params: Mapping[str, Any], tasks: Sequence[Task]) -> list[list[float]]:
    names = [task.name for task in tasks]
    return [[float(jax.device_get(params[pair_gate_name(reader, source)])[0]) for source in names] for reader in names]


def make_step(model: nn.Module, tasks: Sequence[Task], mesh: Mesh) -> Callable[[Any, Batch], dict[str, Any]]:
    """Jits ``step(variables, batch) -> sums``: of the module itself, and of the metrics under ablation."""
    eval_step = make_eval_step(model, tasks)

    def step(variables: Any, batch: Batch) -> dict[str, Any]:
        features: Features = {}
        with intervene(features):
            _, sown = apply_and_look(model, variables, batch["image"])
        noise = NOISE * jax.random.normal(jax.random.key(0), batch["image"].shape)
        _, perturbed = apply_and_look(model, variables, batch["image"] + noise)
        rows, valid = jnp.arange(batch["image"].shape[0]), real_rows(batch)
        real = jnp.sum(valid, dtype=jnp.int32)
        another = jnp.where(valid, (rows - 1) % jnp.maximum(real, 1), rows)
        changes: Sequence[Intervention] = (jnp.zeros_like, lambda readout: readout[another])
        found = {}
        for name, change in zip(ABLATIONS, changes, strict=True):
            with intervene(features, change):
                found[name] = eval_step(variables, batch)
        layout = token_layout(features)
        module = _module_sums(sown, layout, [layout.names.index(task.name) for task in tasks], valid)
        module |= _selection_sums(sown, perturbed, valid)
        return {"module": module, "ablations": found}

    return jax.jit(step, out_shardings=replicated(mesh))


def _module_sums(
    sown: Mapping[str, Array], layout: TokenLayout, order: Sequence[int], valid: Bool[Array, " batch"]
) -> dict[str, Array]:
    """Sums over the valid images of what `diagnose` describes; tasks in the given order of the layout's."""
    weights, write = sown["retrieve_weights"], sown["write_weights"]  # round batch head slot kept; ... token slot
    index = sown.get("retrieve_index", jnp.arange(weights.shape[-1]))
    ends = np.cumsum(layout.lengths)
    spans = [(ends[i] - layout.lengths[i], ends[i]) for i in order]
    inside = [(index >= start) & (index < end) for start, end in spans]
    reads = jnp.stack([jnp.sum(jnp.where(mask, weights, 0), axis=-1) for mask in inside], axis=-1)
    writes = jnp.stack([jnp.mean(write[..., start:end, :], axis=-2) for start, end in spans], axis=-2)
    flow = jnp.einsum("rbhtl,rbhls->rbhts", writes, reads)

    by_image = {
        "reads": jnp.mean(reads, axis=(0, 2)),
        "writes": jnp.mean(writes, axis=(0, 2)),
        "flow": jnp.mean(flow, axis=(0, 2)),
        "update_ratio": jnp.mean(sown["update_ratio"], axis=0),
    }
    kept, slots = weights.shape[-1], write.shape[-1]
    if kept > 1:
        entropy = jnp.sum(entr(weights), axis=-1) / math.log(kept)
        by_image["retrieve_entropy"] = jnp.mean(entropy, axis=(0, 2, 3))
    if slots > 1:
        entropy = jnp.sum(entr(write), axis=-1) / math.log(slots)
        by_image["write_entropy"] = jnp.mean(entropy, axis=(0, 2, 3))
    if slots > 1 and "retrieve_index" in sown:
        by_image["slot_diversity"] = 1 - jnp.mean(_mean_overlap(index), axis=(0, 2))

    readout = sown["readout"].astype(jnp.float32)
    length = jnp.linalg.norm(readout, axis=-1, keepdims=True)
    unit = jnp.where(valid[:, None, None] & (length > 0), readout / jnp.where(length > 0, length, 1), 0)
    return {
        **{name: _sum_valid(value, valid) for name, value in by_image.items()},
        "images": jnp.sum(valid, dtype=jnp.int32),
        "unit_readout": jnp.sum(unit, axis=1),
        "unit_readout_squared": jnp.sum(jnp.square(unit), axis=(1, 3)),
    }


def _sum_valid(values: Float[Array, " batch *rest"], valid: Bool[Array, " batch"]) -> Array:
    # `where`, not a product: what a padded row holds, NaN included, must not enter.
    return jnp.sum(jnp.where(valid.reshape(-1, *(1,) * (values.ndim - 1)), values, 0), axis=0)


def _mean_overlap(index: Int[Array, "*batch slots kept"]) -> Float[Array, "*batch"]:
    """Jaccard overlap of the slots' token sets, averaged over pairs of different slots."""
    overlap = jaccard(index[..., :, None, :], index[..., None, :, :])
    first, second = np.triu_indices(index.shape[-2], k=1)
    return jnp.mean(overlap[..., first, second], axis=-1)


def _selection_sums(
    sown: Mapping[str, Array], perturbed: Mapping[str, Array], valid: Bool[Array, " batch"]
) -> dict[str, Array]:
    """Sums over the valid images, and over pairs of them, of how the kept tokens overlap; rounds averaged."""
    if "retrieve_index" not in sown:
        return {}
    stable = jax.vmap(selection_overlap)(sown["retrieve_index"], perturbed["retrieve_index"])
    between, pairs = jax.vmap(lambda index: selection_between_images(index, valid))(sown["retrieve_index"])
    return {
        "selection_stability": _sum_valid(jnp.mean(stable, axis=0), valid),
        "selection_between_images": jnp.mean(between),
        "pairs_in_batches": pairs[0],
    }


def _means(sums: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The numbers of `diagnose` from the sums over all images, as plain floats and lists."""
    images = int(sums["images"])
    scalars = ("slot_diversity", "retrieve_entropy", "write_entropy", "selection_stability", "update_ratio")
    numbers: dict[str, Any] = {name: float(sums[name] / images) if name in sums else None for name in scalars}
    pairs = images * (images - 1)
    between = np.sum(np.square(sums["unit_readout"]), axis=-1) - sums["unit_readout_squared"]
    numbers["readout_cosine"] = float(np.mean(between)) / pairs if pairs else None
    together = int(sums.get("pairs_in_batches", 0))
    numbers["selection_between_images"] = float(sums["selection_between_images"]) / together if together else None
    matrices = {name: (sums[name] / images).tolist() for name in ("reads", "writes", "flow")}
    return {"images": images, **numbers, **matrices}


def _values(sums: Mapping[str, Any], tasks: Sequence[Task]) -> dict[str, Any]:
    return {
        "metrics": {task.name: task.metric_values(sums[task.name]["metrics"]) for task in tasks},
        "losses": {task.name: float(sums[task.name]["loss"] / max(sums[task.name]["count"], 1)) for task in tasks},
    }
