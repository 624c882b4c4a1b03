"""The working directory: which run it belongs to."""

import contextlib
import errno
import itertools
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from sgw_jax.data_pipelines.atomic import write_atomically
from sgw_jax.data_pipelines.errors import FileError, UserError
from sgw_jax.data_pipelines.json_files import read_object
from sgw_jax.data_pipelines.paths import obstacle
from sgw_jax.experiment.config_files import base_config
from sgw_jax.experiment.experiment import BEFORE_FIT, Experiment, differences, flatten
from sgw_jax.run.checkpoints import check_path
from sgw_jax.run.data_changes import CHANGES, changed_data, changed_files, keep_files, record_change
from sgw_jax.sharding import from_all_processes

IDENTITY = "run.json"

# What a run writes beside it.
WRITTEN = ("checkpoints", "metrics.jsonl", "tensorboard", "profile", "results*.json", "report*.html", "examples*.png")

ENDLESS = "constant"  # the one schedule by which a step's learning rate does not depend on the number of steps


class WorkdirError(UserError, RuntimeError):
    """The working directory belongs to another run."""


class DiskFullError(UserError, OSError):
    """Nothing more can be written to the working directory."""


@contextlib.contextmanager
def disk_full_named(directory: Path) -> Iterator[None]:
    """Turns whatever a full disk raises, in whichever thread and library, into one error that names the directory."""
    try:
        yield
    except DiskFullError:  # another directory's, named already
        raise
    except Exception as error:
        if not _is_disk_full(error):
            raise
        raise DiskFullError(
            f"The disk that holds {directory} is full. What was saved before is complete; free some space and start "
            "the same command again: it goes on from there."
        ) from error


def _is_disk_full(error: BaseException | None) -> bool:
    """Orbax and its storage layer pass the system's error on as text."""
    while error is not None:
        if getattr(error, "errno", None) == errno.ENOSPC or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def check_workdir(workdir: Path, experiment: Experiment, accept_changed_data: bool = False) -> list[str]:
    """Compares what this run is with what the directory holds, if anything; returns what changed in the data.

    Writes nothing. A run that left neither checkpoint nor results holds no directory: whoever comes next may have it.

    Args:
      accept_changed_data: data that changed are no error.

    Raises:
      FileError: no directory, or none that can be written to.
      WorkdirError: another configuration, seed, batch size, task or data set (it lists the keys that differ); more or
        fewer steps than can be; files of unknown origin that would be replaced.
    """
    check_path(workdir)
    if problem := obstacle(workdir):
        raise FileError(f"--workdir={workdir}: {problem}; give another.")
    there, steps = _record(workdir), saved_steps(workdir)
    if there is None:
        if found := sorted(path.name for name in WRITTEN for path in workdir.glob(name) if _holds(path)):
            raise WorkdirError(
                f"{workdir} has {', '.join(found)}, but no {IDENTITY} that says of which run; training would replace "
                "them. Move them away, or use another --workdir."
            )
        return []
    if not steps and not any(workdir.glob("results*.json")):
        return []
    now = json.loads(json.dumps(experiment.identity()))
    there = _completed(there, now)
    lines, changes = list(differences(there, {**now, "steps": there.get("steps")})), []
    in_data = changed_data(there, now)
    if in_data and len(lines) == len(in_data):
        changes = changed_files(workdir, experiment.data) or in_data
        if not accept_changed_data:
            raise WorkdirError(
                f"The data changed since the run in {workdir} began:\n  " + "\n  ".join(changes) + "\n"
                "Restore them, use another --workdir, or go on with the data as they are by --accept_changed_data; "
                f"{CHANGES} of the run will say so."
            )
    elif lines:
        raise WorkdirError(
            f"{workdir} holds a run that differs from this one:\n  " + "\n  ".join(lines) + "\n"
            "Use another --workdir, or the configuration of that run to go on with it (to fine-tune: --init_from)."
        )
    _check_length(workdir, there.get("steps"), now, max(steps, default=0))
    return changes


def _check_length(workdir: Path, before: Any, now: dict[str, Any], done: int) -> None:
    """Whether the run may become as long as is asked for now."""
    steps, schedule = now["steps"], now["schedule.name"]
    if before == steps:
        return
    if steps < done:
        raise WorkdirError(
            f"{workdir}: config.steps is {steps}, but the run is at step {done} already and does not become shorter; "
            f"ask for {done} steps or more."
        )
    if schedule != ENDLESS:
        raise WorkdirError(
            f"{workdir}: config.steps was {before} and is {steps} now. With the schedule {schedule!r} every step's "
            "learning rate depends on the number of steps, so that this would be another run from its first step on. "
            f"Go on with {before}; begin a new run from this one's parameters (--init_from={workdir}); or train with "
            f"config.schedule.name={ENDLESS}, by which a run can be prolonged."
        )


def _record(workdir: Path) -> dict[str, Any] | None:
    """What the run's record says, if there is one."""
    path = workdir / IDENTITY
    if not path.exists():
        return None
    return read_object(path, "Use another --workdir.", WorkdirError)


def _completed(there: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """A run's record with the keys that were none when it began: it did what their defaults say, or `BEFORE_FIT`."""
    before = {**flatten(base_config().to_dict()), "data.fit": BEFORE_FIT}
    return {**{key: before[key] for key in now if key in before}, **there}


def _holds(path: Path) -> bool:
    return not path.is_dir() or any(path.iterdir())


def saved_steps(workdir: Path) -> list[int]:
    """The steps of the complete checkpoints, in order, by their directories' names."""
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def has_checkpoint(workdir: Path) -> bool:
    """Whether the directory holds a checkpoint to go on from."""
    return bool(saved_steps(workdir))


def check_step(workdir: Path, step: int) -> None:
    """Raises a WorkdirError unless the directory holds a checkpoint of that step."""
    if step not in (steps := saved_steps(workdir)):
        raise WorkdirError(f"--step={step}: {workdir} has checkpoints of the steps {steps}.")


def set_aside_after(workdir: Path, step: int, console: Console) -> None:
    """Makes the checkpoint of that step the last: moves later ones to WORKDIR/set_aside, from where they can come back.

    Raises:
      WorkdirError: there is no such checkpoint.
    """
    check_step(workdir, step)
    steps = saved_steps(workdir)
    wait_for_all("steps seen")
    if jax.process_index() == 0:
        for later in [other for other in steps if other > step]:
            target = unused(workdir / "set_aside" / str(later))
            target.parent.mkdir(exist_ok=True)
            (workdir / "checkpoints" / str(later)).rename(target)
            console.print(f"The checkpoint of step {later} is now {target}.", soft_wrap=True, markup=False)
    wait_for_all("steps set aside")


def unused(path: Path) -> Path:
    """The path, with a number after its name if there is something already."""
    names = (path.with_name(f"{path.name}.{number}") for number in itertools.count(2))
    return path if not path.exists() else next(other for other in names if not other.exists())


def claim_workdir(workdir: Path, experiment: Experiment, accept_changed_data: bool = False) -> list[str]:
    """Writes what this run is into the directory, unless it is there and equal (see `check_workdir`); returns what
    changed in the data."""
    path = workdir / IDENTITY
    changes = check_workdir(workdir, experiment, accept_changed_data)
    identity = json.dumps(experiment.identity(), indent=1)
    wait_for_all("workdir checked")  # every process reads before the first one writes
    if jax.process_index() == 0 and _record(workdir) != json.loads(identity):
        workdir.mkdir(parents=True, exist_ok=True)
        if changes:
            record_change(workdir, changes)
        keep_files(workdir, experiment.data)
        write_atomically(path, identity)
    wait_for_all("workdir claimed")
    if not path.exists():
        raise WorkdirError(f"Process {jax.process_index()} does not see {path}: all processes must share --workdir.")
    return changes


def wait_for_all(what: str) -> None:
    """Returns once every process is here."""
    if jax.process_count() > 1:
        places = from_all_processes(np.asarray(zlib.crc32(what.encode()), np.uint32))
        if len(set(places.tolist())) > 1:
            raise RuntimeError(f"Process {jax.process_index()} is at {what!r}; another one is elsewhere.")
