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
from sgw_jax.experiment.experiment import BEFORE_FIT, Experiment, differences
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


def check_workdir(workdir: Path, experiment: Experiment) -> None:
    """Compares what this run is with what the directory holds, if anything.

    Raises:
      WorkdirError: another configuration, seed, batch size, task or data set; it lists the keys that differ.
    """
    path = workdir / IDENTITY
    if path.exists():
        try:
            there = {"data.fit": BEFORE_FIT, **json.loads(path.read_text(encoding="utf-8"))}
        except ValueError as error:
            raise WorkdirError(f"{path} is damaged ({error}); use another --workdir.") from error
        lines = list(differences(there, json.loads(json.dumps(experiment.identity()))))
        if lines:
            raise WorkdirError(
                f"{workdir} holds a run that differs from this one:\n  " + "\n  ".join(lines) + "\n"
                "Use another --workdir, or the configuration of that run to go on with it (to fine-tune: --init_from)."
            )
    elif has_checkpoint(workdir):
        raise WorkdirError(f"{workdir} has checkpoints but no {IDENTITY}; use another --workdir.")


def has_checkpoint(workdir: Path) -> bool:
    """Whether the directory holds a checkpoint to go on from."""
    folder = workdir / "checkpoints"
    return folder.exists() and any(folder.iterdir())


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
        places = from_all_processes(np.asarray(zlib.crc32(what.encode()), np.uint32))
        if len(set(places.tolist())) > 1:
            raise RuntimeError(f"Process {jax.process_index()} is at {what!r}; another one is elsewhere.")
