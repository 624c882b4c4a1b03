"""The training loop: restore, step, log one step late, evaluate, checkpoint."""

import contextlib
import dataclasses
import signal
from pathlib import Path

import jax
from rich.console import Console

from sgw_jax.data_pipelines.errors import InputError, files_named
from sgw_jax.evaluation.evaluate import Evaluation
from sgw_jax.experiment.experiment import Experiment
from sgw_jax.export.start import starting_point
from sgw_jax.run.backbone_cache import check_backbone_cache, with_backbone_cache
from sgw_jax.run.bfloat16 import check_bfloat16
from sgw_jax.run.checkpoints import Checkpoints
from sgw_jax.run.finite import check_finite
from sgw_jax.run.late_log import LateLog
from sgw_jax.run.lock import check_free, held
from sgw_jax.run.logs import MetricsWriter, read_metrics
from sgw_jax.run.progress import TrainProgress
from sgw_jax.run.state import abstract_state, first_state, restored_state
from sgw_jax.run.step_profile import StepProfile
from sgw_jax.run.steps import compiled_steps, evaluate_split
from sgw_jax.run.stop_signal import StopSignal
from sgw_jax.run.warm_start import pretrained_parameters
from sgw_jax.run.workdir import (
    check_step,
    check_workdir,
    claim_workdir,
    disk_full_named,
    has_checkpoint,
    set_aside_after,
)
from sgw_jax.sharding import global_batch
from sgw_jax.train_step import TrainState


@dataclasses.dataclass(frozen=True)
class Trained:
    """What training leaves: the last state and its step, the signal that interrupted it if one did, and its speed."""

    state: TrainState
    step: int
    stopped_by: signal.Signals | None
    images_per_second: float  # 0 if no step was made


def train(
    experiment: Experiment,
    workdir: Path | str,
    console: Console,
    init_from: Path | str | None = None,
    step: int | None = None,
    accept_changed_data: bool = False,
) -> Trained:
    """Trains from where the working directory stands to the last step; the same call resumes exactly.

    The position in the data, the randomness and the schedule depend on the step alone, and a checkpoint holds the
    whole state; so a run killed at any moment and started again on the same mesh gives the same numbers bit by bit.
    A checkpoint is saved before it is evaluated: a failing evaluation loses nothing, and a start from a checkpoint
    whose evaluation is missing makes up for it first.

    Args:
      init_from: what brings the parameters of the start (ignored when resuming): another run's working directory, whose
        best checkpoint it is; a model's folder; a model of the hub, "org/name".
      step: of the checkpoint to go on from; later ones are set aside. None: the last.
      accept_changed_data: go on where the data are no more those that the run began with; the run keeps a note of it.

    Raises:
      WorkdirError: the directory holds a run of another configuration or data set (it names the differences), or
        another process trains there.
      InputError: this CPU's programs in bfloat16, which the network computes in, are wrong.
      NonFiniteError: names step and task; the last good checkpoint stays.
      DiskFullError: names the directory; the last complete checkpoint stays.
    """
    workdir, settings, mesh = Path(workdir), experiment.settings, experiment.mesh
    check_bfloat16(getattr(experiment.model, "dtype", None))
    with contextlib.ExitStack() as stack:
        stack.enter_context(disk_full_named(workdir))
        with files_named(f"--workdir={workdir}"):
            check_workdir(workdir, experiment, accept_changed_data)  # a directory of others gets no lock
            stack.enter_context(held(workdir, console))
            if step is not None:
                set_aside_after(workdir, step, console)
            changes = claim_workdir(workdir, experiment, accept_changed_data)
        if changes:
            console.print("Going on with changed data:", *changes, sep="\n  ", soft_wrap=True, markup=False)
        checkpoints = stack.enter_context(Checkpoints(workdir / "checkpoints", keep=settings.keep))
        done = start = checkpoints.latest_step or 0
        if start:
            console.print(f"Resuming {workdir.absolute()} at step {start}.", soft_wrap=True, markup=False)
            state = restored_state(experiment, checkpoints, start)
        else:
            with starting_point(init_from) as begun:
                state = first_state(experiment, begun, console)
        experiment = with_backbone_cache(experiment, state.params, console)
        missed = bool(start) and _evaluates(experiment, start) and not checkpoints.is_scored(start)
        with files_named(f"--workdir={workdir}"):
            metrics_writer = MetricsWriter(workdir, resume_step=start, evaluate_again=missed)
            writer = stack.enter_context(contextlib.closing(metrics_writer))
        stack.enter_context(jax.set_mesh(mesh))
        stop = stack.enter_context(StopSignal())
        progress = stack.enter_context(TrainProgress(console, settings.steps, start, settings.batch_size))
        batches = stack.enter_context(experiment.data.train(start, settings.steps))
        profile = stack.enter_context(StepProfile(workdir / "profile", settings.profile_after, settings.profile_steps))
        log = LateLog(experiment, writer, progress)

        train_step, eval_step = compiled_steps(experiment, state)

        def validate() -> None:
            progress.pause()
            found = evaluate_split(experiment, eval_step, state, "validation")
            writer.write(done, "validation", found.flat())
            progress.note(f"step {done}: validation {summary(experiment, found)}")
            with files_named(f"--workdir={workdir}"):
                writer.flush()  # before the score: it promises that the line is on disk
                checkpoints.record(done, -found.loss)

        if missed:
            validate()
        profile.after(start, state)
        for batch in batches:
            first = progress.compiling("the training step") if done == start else contextlib.nullcontext()
            with first, jax.profiler.StepTraceAnnotation("train_step", step_num=done + 1):
                state, metrics = train_step(state, global_batch(batch, mesh))
            done += 1
            log.push(done, metrics)
            profile.after(done, state)
            if jax.process_count() > 1 and checkpoints.reached_preemption(done):
                stop.request(signal.SIGTERM)
            last = done == settings.steps
            if not (stop.number or last or done % settings.checkpoint_every == 0):
                continue
            log.flush()
            check_finite(state, done)  # no bad state is ever saved
            with files_named(f"--workdir={workdir}"):
                writer.flush()  # before the save: a checkpoint promises that the lines up to its step are on disk
                checkpoints.save(done, state, experiment.metadata())
            if _evaluates(experiment, done):
                validate()
            progress.pause()
            if stop.number:  # perhaps only since the evaluation
                break
    return Trained(state, done, stop.number, progress.images_per_second)


def _evaluates(experiment: Experiment, step: int) -> bool:
    """Whether the checkpoint of the step is evaluated."""
    settings = experiment.settings
    return "validation" in experiment.data.sources and (step == settings.steps or step % settings.eval_every == 0)


def summary(experiment: Experiment, found: Evaluation) -> str:
    """The headline metrics in one line."""
    return "  ".join(
        f"{task.name} {task.metric} {found.metrics[task.name][task.metric]:.3f}" for task in experiment.tasks
    )


def check_start(
    experiment: Experiment,
    workdir: Path | str,
    init_from: Path | str | None = None,
    step: int | None = None,
    accept_changed_data: bool = False,
) -> None:
    """Raises all that `train` would refuse at its beginning, without having rendered, compiled or written anything."""
    state = abstract_state(experiment)
    check_backbone_cache(experiment, state.params)
    with files_named(f"--workdir={workdir}"):
        check_workdir(Path(workdir), experiment, accept_changed_data)
        check_free(Path(workdir))
        read_metrics(Path(workdir) / "metrics.jsonl")
        if step is not None:
            check_step(Path(workdir), step)
    if init_from is not None:
        if experiment.backbone_weights:
            raise InputError("--init_from brings a backbone of its own: give it or config.backbone_weights, not both.")
        with starting_point(init_from):
            pass
    elif experiment.backbone_weights and not has_checkpoint(Path(workdir)):
        pretrained_parameters(experiment, state.params)
