"""The mesh, where parameters and batches lie on it, and nothing else: no other file knows the mesh's axes."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from sgw_jax.data_pipelines.errors import InputError

# The batch is split over `data` and `fsdp`, parameters over `fsdp`, image rows (and tokens) over `context`.
AXES = ("data", "fsdp", "context")
BATCH = ("data", "fsdp")
CONTEXT = "context"

# Sizes of the axes by name, -1 for what is left; an axis that is not named has size 1. A mesh more is a line here.
MESHES: dict[str, dict[str, int]] = {
    "data": {"data": -1},  # every device holds the whole network
    "fsdp": {"fsdp": -1},  # every device holds its share of the parameters
    "data_fsdp4": {"data": -1, "fsdp": 4},  # a share within four devices (a TPU host), copies beyond
    "data_fsdp8": {"data": -1, "fsdp": 8},  # within eight (a GPU host)
    "data_fsdp16": {"data": -1, "fsdp": 16},
    "fsdp_context2": {"fsdp": -1, "context": 2},  # an image over two devices: large images, few of them
    "fsdp_context4": {"fsdp": -1, "context": 4},
    "data_fsdp4_context4": {"data": -1, "fsdp": 4, "context": 4},
}

MAX_REPEATED = 0.02  # share of the parameters' bytes that may be repeated on every device of an `fsdp` mesh

# Path pattern -> spec, first match wins; what no rule names falls to the FSDP fallback. Rules are for the exceptions.
Rules = Sequence[tuple[str, P]]


def mesh_sizes(name: str = "data", rules: Any = None, **sizes: int | None) -> dict[str, int]:
    """The sizes of one of `MESHES`, those given here in their place (None: as named); `read_rules` reads the rules."""
    del rules
    if name not in MESHES:
        raise InputError(f"mesh: {name!r} is not known; it must be one of {list(MESHES)}.")
    return MESHES[name] | {axis: size for axis, size in sizes.items() if size is not None}


def read_rules(pairs: Sequence[Any] | None) -> Rules:
    """Rules from plain data: pairs of a pattern and, for each axis of the leaf, None, an axis or several.

    Such as ``(("backbone/.*mlp/hidden/kernel", (None, None, "fsdp")), ("interaction/", ()))``.

    Raises:
      ValueError: what is no such pair, a pattern that is no regular expression, an unknown axis, an axis named twice.
    """
    if not isinstance(pairs, list | tuple | None):
        raise InputError(f"mesh: rules are {pairs!r}; give a tuple of pairs (pattern, axes), or None.")
    return tuple(_rule(pair) for pair in pairs or ())


def _rule(pair: Any) -> tuple[str, P]:
    if not isinstance(pair, list | tuple) or [isinstance(part, str) for part in pair] != [True, False]:
        raise InputError(
            f"mesh: the rule {pair!r} is no pair (pattern, axes), as ('head_.*kernel', (None, 'fsdp')) is."
        )
    pattern, entries = pair
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(f"mesh: the pattern {pattern!r} of a rule is no regular expression: {error}.") from error
    if not isinstance(entries, list | tuple):
        raise InputError(f"mesh: the axes of the rule {pattern!r} are {entries!r}; give a tuple, () to split none.")
    spec = [tuple(entry) if isinstance(entry, list | tuple) else entry for entry in entries]
    named = [axis for entry in spec if entry is not None for axis in (entry if isinstance(entry, tuple) else (entry,))]
    if any(axis not in AXES for axis in named) or len(set(named)) < len(named):
        raise InputError(
            f"mesh: the rule {pattern!r} names the axes {named}; they must be of {list(AXES)}, each at most once."
        )
    return pattern, P(*spec)


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Builds the mesh with the axes `AXES` over all devices (of every process).

    Args:
      sizes: axis -> size; one may be -1 and takes what is left. A missing axis has size 1.
      devices: all devices by default.

    Raises:
      ValueError: unknown axis, more than one -1, or sizes that do not multiply to the number of devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise InputError(f"mesh: unknown axis {unknown}; the axes are {list(AXES)}.")
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    if shape.count(-1) > 1 or any(size == 0 or size < -1 for size in shape):
        raise InputError(f"mesh: sizes {dict(sizes)} must be positive, with at most one -1.")
    if -1 in shape:
        fixed = math.prod(size for size in shape if size != -1)
        if len(devices) % fixed:
            raise InputError(
                f"mesh: {len(devices)} devices do not divide by {fixed} (sizes {dict(sizes)}); the fixed sizes must "
                f"multiply to one of {_divisors(len(devices))}."
            )
        shape[shape.index(-1)] = len(devices) // fixed
    if math.prod(shape) != len(devices):
        raise InputError(
            f"mesh: sizes {dict(zip(AXES, shape, strict=True))} need {math.prod(shape)} devices, but there are "
            f"{len(devices)}. Set one size to -1 to take what is there."
        )
    # Auto axes: linen's own operations do not annotate shardings, so the compiler must propagate them.
    return jax.make_mesh(tuple(shape), AXES, devices=devices, axis_types=(AxisType.Auto,) * len(AXES))


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def state_sharding(shapes: Any, mesh: Mesh, rules: Rules = (), min_size: int | None = None) -> Any:
    """A NamedSharding for every leaf of a train state (parameters, optimiser moments, EMA alike).

    The first rule whose pattern matches the leaf's path (``params/backbone/blocks/mlp/hidden/kernel``) decides.
    Otherwise FSDP: the largest axis that the ``fsdp`` size divides is split, ties towards the last axis. Leaves with
    fewer than ``min_size`` elements, and those no axis of which divides, are repeated on every device; by default
    biases and the like, as many of the smallest as make up a hundredth of the whole.

    Raises:
      ValueError: a rule that does not fit the leaf it matches, or that matches none.
    """
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(shapes)]
    for pattern, _ in rules:
        if not any(re.search(pattern, name) for name in names):
            some = ", ".join(names[:3])
            raise InputError(f"sharding: no leaf's path matches the rule {pattern!r}; they are like {some}.")
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)]
    smallest = _small(sizes) if min_size is None else min_size

    def place(path: Any, leaf: Any) -> NamedSharding:
        name = path_name(path)
        for pattern, spec in rules:
            if re.search(pattern, name):
                _check_divides(name, leaf.shape, spec, mesh)
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, _fsdp_spec(leaf.shape, mesh.shape["fsdp"], smallest))

    return jax.tree_util.tree_map_with_path(place, shapes)


def _small(sizes: Sequence[int]) -> int:
    """Leaves of fewer elements are repeated: together at most a hundredth of all, and none of 2^14 (64 KiB) or more."""
    total, repeated = sum(sizes), 0
    for size in sorted(sizes):
        repeated += size
        if repeated > total / 100:
            return min(size, 2**14)
    return 2**14


def check_split(shapes: Any, shardings: Any, mesh: Mesh) -> None:
    """Raises a ValueError if more than `MAX_REPEATED` of the parameters' bytes lie on every device of an fsdp mesh."""
    if mesh.shape["fsdp"] == 1:
        return
    leaves = [(path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)]
    total = sum(_nbytes(leaf) for _, leaf in leaves)
    whole = [pair for pair, place in zip(leaves, jax.tree.leaves(shardings), strict=True) if place.is_fully_replicated]
    repeated = sum(_nbytes(leaf) for _, leaf in whole)
    if repeated <= MAX_REPEATED * total:
        return
    smallest = _small([math.prod(leaf.shape) for _, leaf in leaves])
    fitting = [
        size
        for size in _divisors(mesh.size)
        if size == 1
        or sum(_nbytes(x) for _, x in leaves if not _fsdp_spec(x.shape, size, smallest)) <= MAX_REPEATED * total
    ]
    largest = sorted(whole, key=lambda pair: -_nbytes(pair[1]))[:5]
    named = ", ".join(f"{name} {tuple(leaf.shape)}" for name, leaf in largest)
    raise InputError(
        f"mesh: with fsdp = {mesh.shape['fsdp']}, {repeated / total:.1%} of the parameters' bytes would lie on every "
        f"device (at most {MAX_REPEATED:.0%} may), because no axis divides; the largest: {named}. Sizes of fsdp that "
        f"do divide: {fitting}."
    )


def _nbytes(leaf: Any) -> int:
    return math.prod(leaf.shape) * leaf.dtype.itemsize


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
        raise InputError(f"sharding: {name} has shape {shape}, which has fewer axes than the rule {spec}.")
    for length, entry in zip(shape, spec, strict=False):  # a spec may be shorter: the axes it leaves out are not split
        axes = (entry,) if isinstance(entry, str) else entry or ()
        unknown = sorted(set(axes) - set(mesh.axis_names))
        if unknown:
            raise InputError(f"sharding: the rule {spec} for {name} names {unknown}; the axes are {list(AXES)}.")
        parts = math.prod(mesh.shape[axis] for axis in axes)
        if length % parts:
            raise InputError(
                f"sharding: {name} has shape {shape}, which the rule {spec} cannot split into {parts} parts."
            )


def replicated(mesh: Mesh) -> NamedSharding:
    """Repeated on every device."""
    return NamedSharding(mesh, P())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Rows of the batch over `BATCH`, each whole on the devices of its context."""
    return NamedSharding(mesh, P(BATCH))


def check_batch(batch_size: int, mesh: Mesh, accumulate: int = 1) -> None:
    """Raises a ValueError unless every part of the mesh gets the same number of rows of every micro-batch."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (parts * accumulate):
        raise InputError(
            f"batch_size {batch_size} must divide by {parts} devices (data x fsdp) x {accumulate} accumulated "
            f"micro-batches = {parts * accumulate}."
        )


def check_rows(height: int, strides: Sequence[int], mesh: Mesh) -> None:
    """Raises a ValueError unless the rows of the task features, at every stride, divide by the mesh's context."""
    context = mesh.shape[CONTEXT]
    rows = {stride: -(-height // stride) for stride in strides}
    if any(count % context for count in rows.values()):
        fitting = [size for size in _divisors(mesh.size) if all(count % size == 0 for count in rows.values())]
        raise InputError(
            f"mesh: context = {context} does not divide the rows of the task features, {rows} by stride, at an image "
            f"height of {height}. Sizes of context that do: {fitting}."
        )


def own_rows(mesh: Mesh) -> tuple[int, int]:
    """(block, blocks): which of how many equal blocks of the batch's rows this process reads.

    Processes that hold the same rows, because an axis of context spans them, read the same block.

    Raises:
      ValueError: a mesh on which processes share some rows and not others.
    """
    held: dict[int, list[int]] = {}
    for row, devices in enumerate(mesh.devices.reshape(-1, mesh.shape[CONTEXT])):
        for process in sorted({device.process_index for device in devices}):
            held.setdefault(process, []).append(row)
    blocks = sorted({tuple(block) for block in held.values()})
    rows = [row for block in blocks for row in block]
    if len(set(rows)) < len(rows) or len({len(block) for block in blocks}) > 1:
        raise InputError(
            f"mesh: the {mesh.shape[CONTEXT]} devices of a context lie on processes that share other rows of the batch "
            "with others; choose a size of context that divides the devices of a process, or is a multiple of them."
        )
    return blocks.index(tuple(held[jax.process_index()])), len(blocks)


def global_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, Array]:
    """Global arrays from this process's rows of the batch."""
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, value) for name, value in batch.items()}


def constrain_activations(activations: Array) -> Array:
    """Pins an activation (batch, rows or tokens, ...) to the mesh: the batch's axes, and rows or tokens over `context`.

    Without it the compiler is free to propagate the parameters' FSDP sharding into activations (measured: a ViT-L
    then needs 272 GB per device instead of 2). A no-op outside a mesh with our axes, inside shard_map and pmap, and for
    a batch that does not divide (one image). Rows that do not divide are padded by the partitioner.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not _ours(mesh) or activations.shape[0] % (mesh.shape["data"] * mesh.shape["fsdp"]):
        return activations
    split = mesh.shape[CONTEXT] > 1 and activations.ndim > 2 and activations.shape[1] >= mesh.shape[CONTEXT]
    return jax.lax.with_sharding_constraint(activations, P(BATCH, CONTEXT) if split else P(BATCH))


def _ours(mesh: AbstractMesh) -> bool:
    kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return all(kinds.get(axis) == AxisType.Auto for axis in AXES)


def constrain_rows(jacobian: Any) -> Any:
    """Pins a Jacobian's leaves (tasks, *parameter) to their parameters' FSDP placement, the axis of tasks unsplit.

    Without it the rows are free to be gathered (measured by others: three times the temporaries). A no-op where
    `constrain_activations` is one.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not _ours(mesh):
        return jacobian
    smallest = _small([math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(jacobian)])

    def pin(leaf: Array) -> Array:
        spec = _fsdp_spec(leaf.shape[1:], mesh.shape["fsdp"], smallest)
        return jax.lax.with_sharding_constraint(leaf, P(None, *spec))

    return jax.tree.map(pin, jacobian)


def from_all_processes(values: np.ndarray) -> np.ndarray:
    """The arrays of all processes, of one shape and dtype (at most 32 bits), stacked in the processes' order.

    Every process must call it: it returns when all of them have.
    """
    first: dict[int, jax.Device] = {}
    for device in jax.devices():
        first.setdefault(device.process_index, device)
    mesh = Mesh(np.array([first[index] for index in sorted(first)]), ("process",))
    own = jax.device_put(np.asarray(values)[None], first[jax.process_index()])
    shape = (len(first), *np.shape(values))
    whole = jax.make_array_from_single_device_arrays(shape, NamedSharding(mesh, P("process")), [own])
    with jax.set_mesh(mesh):  # whatever mesh the caller has set
        everywhere = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, P()))(whole)
    return np.asarray(everywhere.addressable_data(0))


def over_processes(sums: Any, block: int | None = None) -> Any:
    """The sums of all processes added, leaf by leaf, in int64 and float64; the same on every process.

    Every process must call it.

    Args:
      sums: any pytree of numbers and arrays of 64 bits, of one structure everywhere.
      block: what the sums are of, `own_rows`: of processes that read the same block of the rows one counts. None: every
        process's are of its own.

    Returns:
      The pytree of the totals.
    """
    if jax.process_count() == 1:
        return sums
    leaves, structure = jax.tree.flatten(sums)
    arrays = [np.ascontiguousarray(leaf) for leaf in leaves]
    packed = np.concatenate([array.reshape(-1).view(np.int32) for array in arrays])  # the 32 bits that are sent
    blocks = from_all_processes(np.asarray(jax.process_index() if block is None else block, np.int32)).tolist()
    rows = from_all_processes(packed)[[blocks.index(number) for number in sorted(set(blocks))]]
    ends = np.cumsum([2 * array.size for array in arrays])[:-1]
    parts = np.split(rows, ends, axis=1)
    totals = [
        np.ascontiguousarray(part).view(array.dtype).reshape(-1, *leaf_shape).sum(axis=0)
        for part, array, leaf_shape in zip(parts, arrays, map(np.shape, leaves), strict=True)
    ]
    return jax.tree.unflatten(structure, totals)
