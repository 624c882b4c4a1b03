"""What a warm start takes: the parameters of another run or of a folder, or a pretrained backbone's."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array
from rich.console import Console

from sgw_jax.backbones.pretrained import Pretrained, fit, read_pretrained
from sgw_jax.data_pipelines.transforms import IMAGE_MEAN, IMAGE_STD
from sgw_jax.differentiate import flat, unflat
from sgw_jax.experiment.experiment import Experiment
from sgw_jax.layers.parameter_names import BACKBONE, PARAMS, evaluated, in_backbone, is_added
from sgw_jax.run.averages import evaluated_parameters
from sgw_jax.run.checkpoints import Checkpoints
from sgw_jax.run.workdir import WorkdirError
from sgw_jax.sharding import path_name
from sgw_jax.train_step import TrainState


class Start(Protocol):
    """Parameters that training can begin from: a run's, or a model's folder (export/start.py)."""

    title: str  # how a message calls it

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The parameters' shapes by their paths."""

    def parameters(self, wanted: Mapping[str, Any]) -> dict[str, Array]:
        """These of them; wanted: shapes, dtypes and shardings by path."""


class RunStart:
    """The evaluated parameters of a run's checkpoint."""

    def __init__(self, source: Path, checkpoints: Checkpoints, step: int):
        self._checkpoints, self._step = checkpoints, step
        self._found = checkpoints.shapes(step)
        self.title = f"{source}, step {step} ({evaluated(self._found)})"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters' shapes by their paths."""
        prefix = f"{PARAMS}/"
        return {name.removeprefix(prefix): shape for name, shape in self._found.items() if name.startswith(prefix)}

    def parameters(self, wanted: Mapping[str, Any]) -> dict[str, Array]:
        """These of them, averages where the checkpoint has them."""
        return evaluated_parameters(self._checkpoints, self._step, wanted)


@contextlib.contextmanager
def run_start(source: Path) -> Iterator[RunStart]:
    """The best step of the run to start from (without scores: its last)."""
    with Checkpoints(source / "checkpoints", read_only=True) as checkpoints:
        step = checkpoints.best_step or checkpoints.latest_step
        if step is None:
            raise WorkdirError(f"--init_from: {source} holds no complete checkpoint.")
        yield RunStart(source, checkpoints, step)


def warm_from(state: TrainState, start: Start, console: Console) -> TrainState:
    """Parameters from elsewhere where name and shape agree; everything else starts fresh, and is listed."""
    leaves, there = flat(state.params), start.shapes()
    names = list(leaves)
    fits = {
        name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
        for name, leaf in leaves.items()
        if there.get(name) == leaf.shape
    }
    if not fits:
        raise WorkdirError(f"--init_from: no parameter of {start.title} has name and shape of one here.")
    params = unflat(start.parameters(fits), state.params)
    lines = [f"Initialised {len(fits)} of {len(names)} parameters from {start.title}."]
    lines += grouped("fresh", [name for name in names if name not in there], "absent there")
    other = [name for name in names if name in there and name not in fits]
    lines += grouped("fresh", other, "of another shape there", {name: f"{name} {there[name]}" for name in other})
    lines += grouped("unused", [name for name in there if name not in names], "absent here")
    for line in lines:
        console.print(line, soft_wrap=True, markup=False)
    return state.replace(params=params, ema=_averages(state.ema, params))


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
    return state.replace(params=params, ema=_averages(state.ema, params))


def _averages(ema: Any, params: Any) -> Any:
    """Averages that start at these parameters, of those that have one: of a partly frozen stack the last rows."""
    if ema is None:
        return None
    rows = {name: leaf.shape[:1] for name, leaf in flat(ema).items()}

    def copied(whole: dict[str, Any]) -> dict[str, Any]:
        return {name: jnp.copy(whole[name][-count[0] :] if count else whole[name]) for name, count in rows.items()}

    places = {name: leaf.sharding for name, leaf in flat(ema).items()}
    return unflat(jax.jit(copied, out_shardings=places)({name: flat(params)[name] for name in rows}), ema)


def pretrained_parameters(experiment: Experiment, params: Any) -> tuple[Pretrained, dict[str, Any]]:
    """What the file holds, and the backbone's parameters of it by name; ``params`` may be shapes alone.

    Raises:
      PretrainedError: see `read_pretrained` and `fit`.
    """
    found = read_pretrained(experiment.backbone_weights)
    return found, fit(found, experiment.model.backbone, params[BACKBONE], IMAGE_MEAN, IMAGE_STD)
