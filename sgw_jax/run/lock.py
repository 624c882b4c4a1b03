"""One training at a time in a working directory."""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from rich.console import Console

from sgw_jax.data_pipelines.atomic import NO_LOCKS
from sgw_jax.data_pipelines.errors import UserError
from sgw_jax.run.workdir import WorkdirError
from sgw_jax.sharding import from_all_processes

LOCK = "train.lock"
PATIENCE = 0.5  # seconds, for others that only look whether it is free


def check_free(workdir: Path) -> None:
    """Raises at once where another training holds the directory; writes nothing.

    Raises:
      WorkdirError: it names process and host.
    """
    if (workdir / LOCK).exists():
        descriptor = os.open(workdir / LOCK, os.O_RDWR)
        try:
            _acquire(descriptor, workdir, fcntl.LOCK_SH)  # several may look at once
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def held(workdir: Path, console: Console) -> Iterator[None]:
    """Holds the directory for this training, of one or several processes: the first has the lock, all know the outcome.

    It is the kernel's lock of a file, which ends with the process however that ends: what `kill -9` leaves is no lock.
    Where a disk is shared by machines it depends on the disk whether they see each other's; so the file says who wrote
    it last, and where that was another host that left no word of its end, a sentence asks to see to it.

    Raises:
      WorkdirError: another training holds it; it names process and host.
    """
    descriptor, problem = None, None
    if jax.process_index() == 0:
        try:
            descriptor = _take(workdir, console)
        except (UserError, OSError) as error:  # the others wait to hear of it
            problem = error
    if jax.process_count() > 1 and from_all_processes(np.asarray(problem is not None, np.uint32))[0] and not problem:
        problem = WorkdirError(f"{workdir} cannot be trained in; process 0 says why.")
    if problem:
        raise problem
    try:
        yield
    finally:
        if descriptor is not None:
            os.ftruncate(descriptor, 0)  # the end was seen
            os.close(descriptor)


def _take(workdir: Path, console: Console) -> int:
    workdir.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(workdir / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if not _acquire(descriptor, workdir):
            console.print(
                f"The disk of {workdir} keeps no locks: see that no second training writes there.", soft_wrap=True
            )
        last, here = _holder(descriptor), socket.gethostname()
        if last.get("host", here) != here:
            console.print(
                f"The last training in {workdir} (process {last.get('process')} on {last['host']}) left no word of its "
                "end. If it is still running there, stop one of the two.",
                soft_wrap=True,
                markup=False,
            )
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        written = json.dumps({"process": os.getpid(), "host": here, "since": now}).encode()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, written, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _acquire(descriptor: int, workdir: Path, kind: int = fcntl.LOCK_EX) -> bool:
    """Locks the file until it is closed; False where the disk has no locks."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                by = _holder(descriptor)
                who = f"process {by['process']} on {by['host']}, since {by['since']}" if by else "another process"
                raise WorkdirError(
                    f"{workdir} is being trained in already, by {who}. Wait for it or stop it, or give another "
                    "--workdir; evaluate and predict may be used meanwhile."
                ) from error
            time.sleep(0.05)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return False


def _holder(descriptor: int) -> dict[str, Any]:
    """Who wrote the file last; empty after an orderly end."""
    try:
        found = json.loads(os.pread(descriptor, 4096, 0))
        return found if {"process", "host", "since"} <= found.keys() else {}
    except (ValueError, AttributeError):
        return {}
