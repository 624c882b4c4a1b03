"""What a warm start takes: another run's parameters, or a pretrained backbone's."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from sgw_jax.backbones.pretrained import Pretrained, fit, read_pretrained
from sgw_jax.data_pipelines.transforms import IMAGE_MEAN, IMAGE_STD
from sgw_jax.experiment.experiment import Experiment
from sgw_jax.layers.parameter_names import BACKBONE, evaluated, in_backbone, is_added
from sgw_jax.run.checkpoints import Checkpoints
from sgw_jax.run.workdir import WorkdirError
from sgw_jax.sharding import path_name
from sgw_jax.train_step import TrainState


@contextlib.contextmanager
def warm_source(source: Path) -> Iterator[tuple[Checkpoints, int]]:
    """The checkpoints of the run to start from, and its best step (without scores: its last)."""
    with Checkpoints(source / "checkpoints", read_only=True) as checkpoints:
        step = checkpoints.best_step or checkpoints.latest_step
        if step is None:
            raise WorkdirError(f"--init_from: {source} holds no complete checkpoint.")
        yield checkpoints, step


def warm_from_run(state: TrainState, source: Path, console: Console) -> TrainState:
    """Parameters of another run where name and shape agree; everything else starts fresh, and is listed."""
    flat, structure = jax.tree_util.tree_flatten_with_path(state.params)
    names = [path_name(path) for path, _ in flat]
    with warm_source(source) as (checkpoints, step):
        found = checkpoints.shapes(step)
        collection = evaluated(found)
        fits = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, (_, leaf) in zip(names, flat, strict=True)
            if found.get(f"{collection}/{name}") == leaf.shape
        }
        if not fits:
            raise WorkdirError(f"--init_from: no parameter of {source} (step {step}) has name and shape of one here.")
        restored = checkpoints.restore_variables({collection: nested(fits)}, step)[collection]
    loaded = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(restored)}
    fresh = jax.tree.leaves(state.params)
    leaves = [loaded.get(name, leaf) for name, leaf in zip(names, fresh, strict=True)]
    params = jax.tree.unflatten(structure, leaves)
    there = {
        name.removeprefix(f"{collection}/"): shape for name, shape in found.items() if name.startswith(f"{collection}/")
    }
    lines = [f"Initialised {len(fits)} of {len(names)} parameters from {source}, step {step} ({collection})."]
    lines += grouped("fresh", [name for name in names if name not in there], "absent there")
    other = [name for name in names if name in there and name not in fits]
    lines += grouped("fresh", other, "of another shape there", {name: f"{name} {there[name]}" for name in other})
    lines += grouped("unused", [name for name in there if name not in names], "absent here")
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return state.replace(params=params, ema=ema)


def grouped(what: str, names: Sequence[str], why: str, shown: Mapping[str, str] | None = None) -> list[str]:
    """A line for each part of a network (the first word of the path) with the number of its names and the first."""
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(name.partition("/")[0], []).append(name)
    lines = []
    for part, inside in parts.items():
        first = (shown or {}).get(inside[0], inside[0])
        lines.append(
            f"  {what}: {part}, {len(inside)} {why}, such as {first}" if inside[1:] else f"  {what}: {first} ({why})"
        )
    return lines


def warm_from_backbone(state: TrainState, experiment: Experiment, console: Console) -> TrainState:
    """The state with the backbone's parameters from `Experiment.backbone_weights`, each where its sharding puts it."""
    found, values = pretrained_parameters(experiment, state.params)

    def place(path: Any, leaf: jax.Array) -> jax.Array:
        name = in_backbone(path_name(path))
        value = None if name is None else values.get(name)
        if value is None:
            return leaf
        # Every process has read the whole file; each device takes its part.
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: value[index].astype(leaf.dtype))

    params = jax.tree_util.tree_map_with_path(place, state.params)
    inside = (in_backbone(path_name(path)) for path, _ in jax.tree_util.tree_leaves_with_path(state.params))
    fresh = [name for name in inside if name is not None and is_added(name)]
    console.print(f"Backbone from {found.summary()}", soft_wrap=True, markup=False)
    for line in grouped("fresh", [name for name in fresh if name not in values], "absent there"):
        console.print(line, soft_wrap=True, markup=False)
    return state.replace(params=params, ema=None if state.ema is None else jax.tree.map(jnp.copy, params))


def pretrained_parameters(experiment: Experiment, params: Any) -> tuple[Pretrained, dict[str, Any]]:
    """What the file holds, and the backbone's parameters of it by name; ``params`` may be shapes alone.

    Raises:
      PretrainedError: see `read_pretrained` and `fit`.
    """
    found = read_pretrained(experiment.backbone_weights)
    return found, fit(found, experiment.model.backbone, params[BACKBONE], IMAGE_MEAN, IMAGE_STD)


def nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} as {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree
