"""Starting from another run's parameters."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from sgw_jax.checkpoints import Checkpoints
from sgw_jax.sharding import path_name
from sgw_jax.train_step import TrainState
from sgw_jax.workdir import WorkdirError


def fine_tuning_source(source: Path) -> tuple[Checkpoints, int]:
    """The checkpoints of the run to start from, and its best step (without scores: its last)."""
    checkpoints = Checkpoints(source / "checkpoints", read_only=True)
    step = checkpoints.best_step or checkpoints.latest_step
    if step is None:
        raise WorkdirError(f"--init_from: {source} holds no complete checkpoint.")
    return checkpoints, step


def fine_tuning_start(state: TrainState, source: Path, console: Console) -> TrainState:
    """Parameters of another run where name and shape agree; everything else starts fresh, and is listed."""
    checkpoints, step = fine_tuning_source(source)
    found = checkpoints.shapes(step)
    collection = "ema" if any(name.startswith("ema/") for name in found) else "params"
    flat, structure = jax.tree_util.tree_flatten_with_path(state.params)
    names = [path_name(path) for path, _ in flat]
    fits = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, (_, leaf) in zip(names, flat, strict=True)
        if found.get(f"{collection}/{name}") == leaf.shape
    }
    if not fits:
        raise WorkdirError(f"--init_from: no parameter of {source} (step {step}) has the name and shape of one here.")
    restored = checkpoints.restore_variables({collection: nested(fits)}, step)[collection]
    loaded = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(restored)}
    fresh = jax.tree.leaves(state.params)
    leaves = [loaded.get(name, leaf) for name, leaf in zip(names, fresh, strict=True)]
    params = jax.tree.unflatten(structure, leaves)
    console.print(f"Initialised {len(fits)} of {len(names)} parameters from {source}, step {step} ({collection}).")
    for name in names:
        if name not in fits:
            there = found.get(f"{collection}/{name}")
            why = "absent there" if there is None else f"shape {there} there"
            console.print(f"  fresh: {name} ({why})", soft_wrap=True)
    for name in found:
        if name.startswith(f"{collection}/") and name.removeprefix(f"{collection}/") not in names:
            console.print(f"  unused: {name.removeprefix(f'{collection}/')}", soft_wrap=True)
    ema = None if state.ema is None else jax.tree.map(jnp.copy, params)
    return state.replace(params=params, ema=ema)


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
