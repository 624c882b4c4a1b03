"""The working directory: which run it belongs to."""

import contextlib
import errno
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from sgw_jax.data_pipelines.atomic import write_atomically
from sgw_jax.data_pipelines.errors import UserError
from sgw_jax.experiment.experiment import Experiment, differences
from sgw_jax.run.data_changes import CHANGES, changed_data, changed_files, keep_files, record_change
from sgw_jax.sharding import from_all_processes

IDENTITY = "run.json"


class WorkdirError(UserError, RuntimeError):
    """The working directory belongs to another run."""


class DiskFullError(UserError, OSError):
    """Nothing more can be written to the working directory."""


@contextlib.contextmanager
def disk_full_named(workdir: Path) -> Iterator[None]:
    """Turns whatever a full disk raises, in whichever thread and library, into one error that names the directory."""
    try:
        yield
    except Exception as error:
        if not _is_disk_full(error):
            raise
        raise DiskFullError(
            f"The disk that holds {workdir} is full. What was saved before is complete; free some space and start the "
            "same command again: it goes on from the last checkpoint."
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

    Args:
      accept_changed_data: data that changed are no error.

    Raises:
      WorkdirError: another configuration, seed, batch size, task or data set; it lists the keys that differ.
    """
    path = workdir / IDENTITY
    if path.exists():
        try:
            there = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise WorkdirError(f"{path} is damaged ({error}); use another --workdir.") from error
        now = json.loads(json.dumps(experiment.identity()))
        lines, in_data = list(differences(there, now)), changed_data(there, now)
        if in_data and len(lines) == len(in_data):
            changes = changed_files(workdir, experiment.data) or in_data
            if accept_changed_data:
                return changes
            raise WorkdirError(
                f"The data changed since the run in {workdir} began:\n  " + "\n  ".join(changes) + "\n"
                "Restore them, use another --workdir, or go on with the data as they are by --accept_changed_data; "
                f"{CHANGES} of the run will say so."
            )
        if lines:
            raise WorkdirError(
                f"{workdir} holds a run that differs from this one:\n  " + "\n  ".join(lines) + "\n"
                "Use another --workdir, or the configuration of that run to go on with it (to fine-tune: --init_from)."
            )
    elif has_checkpoint(workdir):
        raise WorkdirError(f"{workdir} has checkpoints but no {IDENTITY}; use another --workdir.")
    return []


def has_checkpoint(workdir: Path) -> bool:
    """Whether the directory holds a checkpoint to go on from."""
    folder = workdir / "checkpoints"
    return folder.exists() and any(folder.iterdir())


def claim_workdir(workdir: Path, experiment: Experiment, accept_changed_data: bool = False) -> list[str]:
    """Writes what this run is into the directory, unless it is there and equal (see `check_workdir`); returns what
    changed in the data."""
    path = workdir / IDENTITY
    changes = check_workdir(workdir, experiment, accept_changed_data)
    wait_for_all("workdir checked")  # every process reads before the first one writes
    if jax.process_index() == 0 and (changes or not path.exists()):
        workdir.mkdir(parents=True, exist_ok=True)
        if changes:
            record_change(workdir, changes)
        keep_files(workdir, experiment.data)
        write_atomically(path, json.dumps(experiment.identity(), indent=1))
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
