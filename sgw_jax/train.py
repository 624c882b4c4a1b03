"""The training loop: restore, step, log one step late, evaluate, checkpoint."""

import contextlib
import dataclasses
import json
import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from rich.console import Console

from sgw_jax.build import Experiment, differences
from sgw_jax.checkpoints import Checkpoints
from sgw_jax.evaluate import Evaluation, evaluate
from sgw_jax.sharding import global_batch, path_name, replicated, state_sharding
from sgw_jax.train_step import TrainState, init_state, make_eval_step, make_train_step
from sgw_jax.writers import MetricsWriter, TrainProgress, write_atomically

IDENTITY = "run.json"


class WorkdirError(RuntimeError):
    """The working directory belongs to another run."""


class NonFiniteError(RuntimeError):
    """A loss or the gradient became NaN or infinite."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training leaves: the last state, whether it was interrupted, and its speed."""

    state: TrainState
    step: int
    interrupted: bool
    images_per_second: float


def train(experiment: Experiment, workdir: Path | str, console: Console, init_from: Path | str | None = None) -> Trained:
    """Trains from where the working directory stands to the last step; the same call resumes exactly.

    The position in the data, the randomness and the schedule depend on the step alone, and a checkpoint holds the
    whole state; so a run killed at any moment and started again on the same mesh gives the same numbers bit by bit.

    Args:
      init_from: another run's working directory, whose best parameters are the start (ignored when resuming).

    Raises:
      WorkdirError: the directory holds a run of another configuration or data set; it names the differences.
      NonFiniteError: names step and task; the last good checkpoint stays.
    """
    workdir, settings, mesh = Path(workdir), experiment.settings, experiment.mesh
    claim_workdir(workdir, experiment)
    checkpoints = Checkpoints(workdir / "checkpoints", keep=settings.keep)
    state, shardings = initial_state(experiment)
    start = checkpoints.latest_step or 0
    if start:
        state = checkpoints.restore(abstract(state, shardings), start)
        console.print(f"Resuming {workdir} at step {start}.")
    elif init_from is not None:
        state = fine_tuning_start(state, shardings, Path(init_from), console)

    # `out_shardings` keeps the state where it is; donation lets the update reuse its memory.
    train_step = jax.jit(
        make_train_step(
            experiment.model,
            experiment.tasks,
            experiment.optimizer,
            scalarizer=experiment.scalarizer,
            accumulate=settings.accumulate,
            ema_decay=settings.ema_decay,
            seed=settings.seed,
        ),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )
    eval_step = jax.jit(make_eval_step(experiment.model, experiment.tasks), out_shardings=replicated(mesh))
    writer = MetricsWriter(workdir, resume_step=start)
    progress = TrainProgress(console, settings.steps, start, settings.batch_size)
    log = _LateLog(experiment, writer, progress)

    done, stopping = start, False
    with (
        contextlib.closing(checkpoints),
        contextlib.closing(writer),
        jax.set_mesh(mesh),
        StopSignal() as stop,
        progress,
        experiment.data.train(start, settings.steps) as batches,
    ):
        for batch in batches:
            state, metrics = train_step(state, global_batch(batch, mesh))
            done += 1
            log.push(done, metrics)
            stopping = stop.requested or (jax.process_count() > 1 and checkpoints.reached_preemption(done))
            if not (stopping or done % settings.checkpoint_every == 0 or done == settings.steps):
                continue
            log.flush()  # only steps whose losses are known to be finite are ever saved
            score = None
            evaluating = done % settings.eval_every == 0 or done == settings.steps
            if evaluating and "validation" in experiment.data.sources:
                progress.pause()
                found = evaluate_split(experiment, eval_step, state.variables, "validation")
                writer.write(done, "validation", found.flat())
                progress.note(f"step {done}: validation {summary(experiment, found)}")
                score = -found.loss
            writer.flush()
            checkpoints.save(done, state, experiment.metadata(), score)
            progress.pause()
            if stopping:
                break
    interrupted = stopping and done < settings.steps
    return Trained(state, done, interrupted, progress.images_per_second)


class _LateLog:
    """Fetches metrics one step late, so that the device always has the next step to work on; checks and writes them."""

    def __init__(self, experiment: Experiment, writer: MetricsWriter, progress: TrainProgress):
        self._experiment, self._writer, self._progress = experiment, writer, progress
        self._waiting: tuple[int, Any] | None = None

    def push(self, step: int, metrics: Mapping[str, Any]) -> None:
        previous, self._waiting = self._waiting, (step, metrics)
        self._take(previous)

    def flush(self) -> None:
        previous, self._waiting = self._waiting, None
        self._take(previous)

    def _take(self, waiting: tuple[int, Any] | None) -> None:
        if waiting is None:
            return
        step, values = waiting[0], {name: float(value) for name, value in jax.device_get(waiting[1]).items()}
        self._check_finite(step, values)
        self._progress.update(step, {name: value for name, value in values.items() if name.startswith("loss")})
        settings = self._experiment.settings
        if step % settings.log_every == 0 or step == settings.steps:
            rate = float(self._experiment.schedule(step - 1))
            self._writer.write(step, "train", {**values, "learning_rate": rate})

    def _check_finite(self, step: int, values: Mapping[str, float]) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if not bad:
            return
        tasks = [name.removeprefix("loss/") for name in bad if name.startswith("loss/")]
        what = f"the loss of {', '.join(tasks)}" if tasks else "the gradient's norm (all losses are finite)"
        raise NonFiniteError(
            f"Step {step}: {what} is not finite ({', '.join(f'{name} = {values[name]}' for name in bad)}). "
            "Training stops; the last checkpoint is untouched. Look at this task's labels near this step, lower "
            "config.optimizer.learning_rate, or set config.optimizer.clip_norm."
        )


def initial_state(experiment: Experiment) -> tuple[TrainState, TrainState]:
    """The state at step 0, born under jit where its sharding puts it, and the shardings."""
    image = jax.ShapeDtypeStruct((experiment.settings.batch_size, *experiment.size, 3), jnp.float32)

    def make() -> TrainState:
        return init_state(
            experiment.model,
            experiment.optimizer,
            jnp.zeros(image.shape, image.dtype),
            seed=experiment.settings.seed,
            ema=experiment.settings.ema_decay is not None,
            scalarizer=experiment.scalarizer,
        )

    with jax.set_mesh(experiment.mesh):
        shardings = state_sharding(jax.eval_shape(make), experiment.mesh)
        return jax.jit(make, out_shardings=shardings)(), shardings


def restored_state(experiment: Experiment, checkpoints: Checkpoints, step: int) -> TrainState:
    """The whole state of a checkpoint, on the experiment's mesh."""
    state, shardings = initial_state(experiment)
    return checkpoints.restore(abstract(state, shardings), step)


def abstract(state: TrainState, shardings: TrainState) -> TrainState:
    """Shapes, dtypes and shardings without the numbers."""
    return jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), state, shardings)


def fine_tuning_start(state: TrainState, shardings: TrainState, source: Path, console: Console) -> TrainState:
    """Parameters of another run where name and shape agree; everything else starts fresh, and is listed."""
    checkpoints = Checkpoints(source / "checkpoints", read_only=True)
    step = checkpoints.best_step or checkpoints.latest_step
    if step is None:
        raise WorkdirError(f"--init_from: {source} holds no complete checkpoint.")
    found = checkpoints.shapes(step)
    collection = "ema" if any(name.startswith("ema/") for name in found) else "params"
    wanted = abstract(state, shardings).params
    flat, structure = jax.tree_util.tree_flatten_with_path(wanted)
    names = [path_name(path) for path, _ in flat]
    fits = {
        name: leaf for name, (_, leaf) in zip(names, flat, strict=True)
        if found.get(f"{collection}/{name}") == tuple(leaf.shape)
    }  # fmt: skip
    if not fits:
        raise WorkdirError(f"--init_from: no parameter of {source} (step {step}) has the name and shape of one of this model.")
    restored = checkpoints.restore_variables({collection: nested(fits)}, step)[collection]
    loaded = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(restored)}
    fresh = jax.tree.leaves(state.params)
    leaves = [loaded.get(name, leaf) for name, leaf in zip(names, fresh, strict=True)]
    params = jax.tree.unflatten(structure, leaves)
    console.print(f"Initialised {len(fits)} of {len(names)} parameters from {source}, step {step} ({collection}).")
    for name in names:
        if name not in fits:
            there = found.get(f"{collection}/{name}")
            console.print(f"  fresh: {name} ({'absent there' if there is None else f'shape {there} there'})", soft_wrap=True)
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


def evaluate_split(experiment: Experiment, eval_step: Callable, variables: Any, split: str) -> Evaluation:
    """The metrics of one split."""
    with experiment.data.evaluation(split) as batches:
        return evaluate(eval_step, variables, batches, experiment.mesh, experiment.tasks)


def summary(experiment: Experiment, found: Evaluation) -> str:
    """The headline metrics in one line."""
    return "  ".join(
        f"{task.name} {task.metric} {found.metrics[task.name][task.metric]:.3f}" for task in experiment.tasks
    )


def claim_workdir(workdir: Path, experiment: Experiment) -> None:
    """Writes what this run is into the directory, or compares it with what is there.

    Raises:
      WorkdirError: another configuration, seed, batch size, task or data set; it lists the keys that differ.
    """
    path = workdir / IDENTITY
    identity = json.loads(json.dumps(experiment.identity()))
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        lines = list(differences(there, identity))
        if lines:
            raise WorkdirError(
                f"{workdir} holds a run that differs from this one:\n  " + "\n  ".join(lines) + "\n"
                "Use another --workdir, or the configuration of that run to go on with it (to fine-tune: --init_from)."
            )
    elif (workdir / "checkpoints").exists() and any((workdir / "checkpoints").iterdir()):
        raise WorkdirError(f"{workdir} has checkpoints but no {IDENTITY}; use another --workdir.")
    elif jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(identity, indent=1))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("workdir claimed")


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request to save and stop; a second Ctrl-C stops at once.

    With several processes the request must be agreed between them; there the cluster's preemption notice is used.
    """

    def __init__(self) -> None:
        self.requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
