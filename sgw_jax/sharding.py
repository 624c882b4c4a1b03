"""The mesh, where parameters and batches lie on it, and nothing else: no other file knows the mesh's axes."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

# The batch is split over both axes; parameters are split over `fsdp` and repeated over `data`.
AXES = ("data", "fsdp")

# Path pattern -> spec, first match wins; what no rule names falls to the FSDP fallback. Rules are for the exceptions.
Rules = Sequence[tuple[str, P]]


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh with axes ``data`` and ``fsdp`` over all devices (of every process).

    Args:
      sizes: axis -> size; one may be -1 and takes what is left. A missing axis has size 1.
      devices: all devices by default.

    Raises:
      ValueError: unknown axis, more than one -1, or sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise ValueError(f"mesh: unknown axis {unknown}; the axes are {list(AXES)}.")
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    if shape.count(-1) > 1 or any(size == 0 or size < -1 for size in shape):
        raise ValueError(f"mesh: sizes {dict(sizes)} must be positive, with at most one -1.")
    if -1 in shape:
        fixed = math.prod(size for size in shape if size != -1)
        if len(devices) % fixed:
            raise ValueError(f"mesh: {len(devices)} devices do not divide by {fixed} (sizes {dict(sizes)}).")
        shape[shape.index(-1)] = len(devices) // fixed
    if math.prod(shape) != len(devices):
        raise ValueError(
            f"mesh: sizes {dict(zip(AXES, shape, strict=True))} need {math.prod(shape)} devices, but there are "
            f"{len(devices)}. Set one size to -1 to take what is there."
        )
    # Auto axes: linen's own operations do not annotate shardings, so the compiler must propagate them.
    return jax.make_mesh(tuple(shape), AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))


def state_sharding(shapes: Any, mesh: Mesh, rules: Rules = (), min_size: int = 2**14) -> Any:
    """A NamedSharding for every leaf of a train state (parameters, optimiser moments, EMA alike).

    The first rule whose pattern matches the leaf's path (``params/backbone/blocks/mlp/hidden/kernel``) decides.
    Otherwise FSDP: the largest axis that the ``fsdp`` size divides is split, ties towards the last axis; leaves with
    fewer than ``min_size`` elements, and those no axis of which divides, are repeated on every device.

    Raises:
      ValueError: a rule that does not fit the leaf it matches.
    """

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = path_name(path)
        for pattern, spec in rules:
            if re.search(pattern, name):
                _check_divides(name, leaf.shape, spec, mesh)
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, _fsdp_spec(leaf.shape, mesh.shape["fsdp"], min_size))

    return jax.tree_util.tree_map_with_path(place, shapes)


def path_name(path: Any) -> str:
    """A pytree path as ``a/b/c``."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _fsdp_spec(shape: tuple[int, ...], size: int, min_size: int) -> P:
    divisible = [axis for axis, length in enumerate(shape) if length % size == 0]
    if size == 1 or math.prod(shape) < min_size or not divisible:
        return P()
    chosen = max(divisible, key=lambda axis: (shape[axis], axis))
    return P(*(None,) * chosen, "fsdp")


def _check_divides(name: str, shape: tuple[int, ...], spec: P, mesh: Mesh) -> None:
    if len(spec) > len(shape):
        raise ValueError(f"sharding: {name} has shape {shape}, which has fewer axes than the rule {spec}.")
    for length, entry in zip(shape, spec, strict=False):  # a spec may be shorter: the axes it leaves out are not split
        axes = (entry,) if isinstance(entry, str) else entry or ()
        unknown = sorted(set(axes) - set(mesh.axis_names))
        if unknown:
            raise ValueError(f"sharding: the rule {spec} for {name} names {unknown}; the axes are {list(AXES)}.")
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if length % parts:
            raise ValueError(
                f"sharding: {name} has shape {shape}, which the rule {spec} cannot split into {parts} parts."
            )


def replicated(mesh: Mesh) -> NamedSharding:
    """Repeated on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of the batch over both axes."""
    return NamedSharding(mesh, P(AXES))


def check_batch_size(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises a ValueError unless every device gets the same number of rows of every micro-batch."""
    if batch_size % (mesh.size * accumulate):
        raise ValueError(
            f"batch_size {batch_size} must divide by {mesh.size} devices x {accumulate} accumulated micro-batches = "
            f"{mesh.size * accumulate}."
        )


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """Global arrays from this process's rows of the batch."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def constrain_batch(activations: Array) -> Array:
    """Pins the first axis of an activation to the batch's sharding, where there is such a mesh.

    Without it the compiler is free to propagate the parameters' FSDP sharding into activations (measured: a ViT-L
    then needs 272 GB per device instead of 2). A no-op outside a mesh with our axes, inside shard_map and pmap.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    if not set(AXES) <= free or activations.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return activations
    return jax.lax.with_sharding_constraint(activations, P(AXES))


def constrain_rows(jacobian: Any, min_size: int = 2**14) -> Any:
    """Pins a Jacobian's leaves (tasks, *parameter) to their parameters' FSDP placement, the axis of tasks unsplit.

    Without it the rows are free to be gathered (measured by others: three times the temporaries). A no-op where
    `constrain_batch` is one.
    """
    mesh = jax.sharding.get_abstract_mesh()
    free = {name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Auto}
    if not set(AXES) <= free:
        return jacobian

    def pin(leaf: Array) -> Array:
        spec = _fsdp_spec(leaf.shape[1:], mesh.shape["fsdp"], min_size)
        return jax.lax.with_sharding_constraint(leaf, P(None, *spec))

    return jax.tree.map(pin, jacobian)
