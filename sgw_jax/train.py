"""The training loop: restore, step, log one step late, evaluate, checkpoint."""

import contextlib
import dataclasses
import json
import math
import signal
import threading
from collections.abc import Callable, Mapping
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


ADVICE = (
    "Training stops; the last checkpoint is untouched. Look at the labels near this step, lower "
    "config.optimizer.learning_rate, or set config.optimizer.clip_norm."
)


class WorkdirError(RuntimeError):
    """The working directory belongs to another run."""


class NonFiniteError(RuntimeError):
    """A loss or the gradient became NaN or infinite."""


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training leaves: the last state and its step, the signal that interrupted it if one did, and its speed."""

    state: TrainState
    step: int
    stopped_by: signal.Signals | None
    images_per_second: float  # 0 if no step was made


def train(
    experiment: Experiment, workdir: Path | str, console: Console, init_from: Path | str | None = None
) -> Trained:
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
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(contextlib.closing(Checkpoints(workdir / "checkpoints", keep=settings.keep)))
        start = checkpoints.latest_step or 0
        state = starting_state(experiment, checkpoints, start, init_from, console)
        writer = stack.enter_context(contextlib.closing(MetricsWriter(workdir, resume_step=start)))
        stack.enter_context(jax.set_mesh(mesh))
        stop = stack.enter_context(StopSignal())
        progress = stack.enter_context(TrainProgress(console, settings.steps, start, settings.batch_size))
        batches = stack.enter_context(experiment.data.train(start, settings.steps))

        train_step, eval_step = compiled_steps(experiment, state)
        log = _LateLog(experiment, writer, progress)
        done = start
        for batch in batches:
            state, metrics = train_step(state, global_batch(batch, mesh))
            done += 1
            log.push(done, metrics)
            preempted = jax.process_count() > 1 and checkpoints.reached_preemption(done)
            if preempted:
                stop.request(signal.SIGTERM)
            last = done == settings.steps
            if not (stop.number or last or done % settings.checkpoint_every == 0):
                continue
            log.flush()
            check_finite(state, done)  # no bad state is ever saved
            score = None
            if (last or done % settings.eval_every == 0) and "validation" in experiment.data.sources:
                progress.pause()
                found = evaluate_split(experiment, eval_step, state.variables, "validation")
                check_finite_losses(found, done)
                writer.write(done, "validation", found.flat())
                progress.note(f"step {done}: validation {summary(experiment, found)}")
                score = -found.loss
            writer.flush()  # before the save: a checkpoint promises that the lines up to its step are on disk
            checkpoints.save(done, state, experiment.metadata(), score)
            progress.pause()
            if stop.number:  # perhaps only since the evaluation
                break
    return Trained(state, done, stop.number, progress.images_per_second)


def compiled_steps(experiment: Experiment, state: TrainState) -> tuple[Callable, Callable]:
    """The training step, which updates the state in place and leaves it where it lies, and the evaluation step."""
    settings, everywhere = experiment.settings, replicated(experiment.mesh)
    step = make_train_step(
        experiment.model,
        experiment.tasks,
        experiment.optimizer,
        scalarizer=experiment.scalarizer,
        accumulate=settings.accumulate,
        ema_decay=settings.ema_decay,
        seed=settings.seed,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return (
        jax.jit(step, out_shardings=(shardings, everywhere), donate_argnums=0),
        jax.jit(make_eval_step(experiment.model, experiment.tasks), out_shardings=everywhere),
    )


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
        if tasks:
            what = f"the loss of {', '.join(tasks)}"
        elif "loss" in bad:
            what = "the weighted sum of the losses (each of them is finite)"
        else:
            what = "the gradient's norm (all losses are finite)"
        raise NonFiniteError(
            f"Step {step}: {what} is not finite ({', '.join(f'{name} = {values[name]}' for name in bad)}). {ADVICE}"
        )


def check_finite(state: TrainState, step: int) -> None:
    """Raises a NonFiniteError unless all parameters, averages and optimiser moments are finite.

    Finite losses and gradients do not imply it: they were taken before the update.
    """
    checked = {"params": state.params, "ema": state.ema, "opt_state": state.opt_state}
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(checked)}
    mesh = next(iter(leaves.values())).sharding.mesh
    finite = jax.jit(_each_finite, out_shardings=replicated(mesh))(leaves)
    bad = [name for name, good in jax.device_get(finite).items() if not good]
    if bad:
        raise NonFiniteError(
            f"Step {step}: {len(bad)} arrays of the state are not finite after the update, such as {bad[0]}. {ADVICE}"
        )


def _each_finite(leaves: Mapping[str, Any]) -> dict[str, Any]:
    return {name: jnp.isfinite(leaf).all() for name, leaf in leaves.items()}


def check_finite_losses(found: Evaluation, step: int) -> None:
    """Raises a NonFiniteError that names the tasks; a score that is not a number could not rank checkpoints."""
    bad = {task: loss for task, loss in found.losses.items() if not math.isfinite(loss)}
    if bad or not math.isfinite(found.loss):
        raise NonFiniteError(
            f"Step {step}: the validation loss of {', '.join(bad) or 'the weighted sum'} is not finite. {ADVICE}"
        )


def starting_state(
    experiment: Experiment, checkpoints: Checkpoints, start: int, init_from: Path | str | None, console: Console
) -> TrainState:
    """The state at step ``start``: restored, or new, with another run's parameters if asked for."""
    if start:
        console.print(f"Resuming {checkpoints.directory.parent} at step {start}.", soft_wrap=True)
        return restored_state(experiment, checkpoints, start)
    state = initial_state(experiment)
    return state if init_from is None else fine_tuning_start(state, Path(init_from), console)


def initial_state(experiment: Experiment) -> TrainState:
    """The state at step 0, born under jit where its sharding puts it."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(experiment))
    with jax.set_mesh(experiment.mesh):
        return jax.jit(_init(experiment), out_shardings=shardings)()


def restored_state(experiment: Experiment, checkpoints: Checkpoints, step: int) -> TrainState:
    """The whole state of a checkpoint, on the experiment's mesh."""
    return checkpoints.restore(abstract_state(experiment), step)


def abstract_state(experiment: Experiment) -> TrainState:
    """Shapes, dtypes and shardings of the state without the numbers. Options that the model refuses show up here."""
    with jax.set_mesh(experiment.mesh):
        shapes = jax.eval_shape(_init(experiment))
        shardings = state_sharding(shapes, experiment.mesh)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, shardings
    )


def _init(experiment: Experiment) -> Callable[[], TrainState]:
    return lambda: init_state(
        experiment.model,
        experiment.optimizer,
        jnp.zeros((experiment.settings.batch_size, *experiment.size, 3), jnp.float32),
        seed=experiment.settings.seed,
        ema=experiment.settings.ema_decay is not None,
        scalarizer=experiment.scalarizer,
    )


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


def evaluate_split(experiment: Experiment, eval_step: Callable, variables: Any, split: str) -> Evaluation:
    """The metrics of one split."""
    with experiment.data.evaluation(split) as batches:
        return evaluate(eval_step, variables, batches, experiment.mesh, experiment.tasks)


def summary(experiment: Experiment, found: Evaluation) -> str:
    """The headline metrics in one line."""
    return "  ".join(
        f"{task.name} {task.metric} {found.metrics[task.name][task.metric]:.3f}" for task in experiment.tasks
    )


def check_start(experiment: Experiment, workdir: Path | str, init_from: Path | str | None = None) -> None:
    """Raises all that `train` would refuse at its beginning, without having rendered, compiled or written anything."""
    abstract_state(experiment)
    check_workdir(Path(workdir), experiment)
    if init_from is not None:
        fine_tuning_source(Path(init_from))


def check_workdir(workdir: Path, experiment: Experiment) -> None:
    """Compares what this run is with what the directory holds, if anything.

    Raises:
      WorkdirError: another configuration, seed, batch size, task or data set; it lists the keys that differ.
    """
    path = workdir / IDENTITY
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        lines = list(differences(there, json.loads(json.dumps(experiment.identity()))))
        if lines:
            raise WorkdirError(
                f"{workdir} holds a run that differs from this one:\n  " + "\n  ".join(lines) + "\n"
                "Use another --workdir, or the configuration of that run to go on with it (to fine-tune: --init_from)."
            )
    elif (workdir / "checkpoints").exists() and any((workdir / "checkpoints").iterdir()):
        raise WorkdirError(f"{workdir} has checkpoints but no {IDENTITY}; use another --workdir.")


def claim_workdir(workdir: Path, experiment: Experiment) -> None:
    """Writes what this run is into the directory, unless it is there and equal (see `check_workdir`)."""
    path = workdir / IDENTITY
    check_workdir(workdir, experiment)
    wait_for_all("workdir checked")  # every process reads before the first one writes
    if jax.process_index() == 0 and not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(experiment.identity(), indent=1))
    wait_for_all("workdir claimed")
    if not path.exists():
        raise WorkdirError(f"Process {jax.process_index()} does not see {path}: all processes must share --workdir.")


def wait_for_all(what: str) -> None:
    """Returns once every process is here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


class StopSignal:
    """Turns the first Ctrl-C or SIGTERM into a request to save and stop; a second Ctrl-C stops at once.

    Several processes must stop at the same step. They agree on it through the cluster's preemption notice, which
    SIGTERM to any one of them sets off (`Checkpoints.reached_preemption`); Ctrl-C is passed on as SIGTERM.
    """

    def __init__(self) -> None:
        self.number: signal.Signals | None = None  # what stops the run
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            handlers: dict[int, Any] = {signal.SIGINT: self._on_signal, signal.SIGTERM: self._on_signal}
            if jax.process_count() > 1:
                handlers = {signal.SIGINT: _terminate}
            self._previous = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        return self

    def request(self, number: signal.Signals) -> None:
        """Asks for a stop after the current step."""
        self.number = self.number or number

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.number and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.request(signal.Signals(number))

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.raise_signal(signal.SIGTERM)
