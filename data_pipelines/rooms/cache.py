"""A split rendered once to disk: one memory-mapped .npy per field, which appears under its name whole or not at all.

Rendering goes to a hidden sibling directory, which is synced and then renamed. A lock (released by the kernel however
its holder ends) lets one process of a machine render while the others wait; between machines that share the directory
whoever renames first wins, and the other discards its own, equal copy.
"""

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from sgw_jax.data_pipelines.atomic import alone, publish
from sgw_jax.data_pipelines.consoles import messages
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.json_files import json_object
from sgw_jax.data_pipelines.progress import Progress
from sgw_jax.data_pipelines.rooms.record import STORED, Collection, render_stored

META = "meta.json"
FEWEST_PER_WORKER = 16  # scenes: below that a process costs more to start than it renders
QUIET_BELOW = 100  # scenes: a moment's work shows no progress unless asked to


def prepare(collection: Collection, cache_dir: Path, workers: int | None, progress: bool | None) -> None:
    """Renders a split into `cache_dir` unless it is there. Safe against concurrent callers and against being killed."""
    directory = collection.directory(cache_dir)
    if directory.exists():
        return
    cache_dir.mkdir(parents=True, exist_ok=True)
    loud = collection.length >= QUIET_BELOW if progress is None else progress
    prefix = f".{directory.name}.{socket.gethostname()}."

    def waiting() -> None:
        if loud:
            print(f"waiting for another process that is preparing {directory}", file=sys.stderr, flush=True)

    with alone(directory.parent / f".{directory.name}.lock", waiting):
        if directory.exists():
            return
        for leftover in cache_dir.iterdir():  # we hold the lock, so whoever wrote these on this machine is gone
            if leftover.name.startswith(prefix):
                shutil.rmtree(leftover, ignore_errors=True)
        partial = cache_dir / f"{prefix}{os.getpid()}"
        partial.mkdir()
        try:
            _render_into(partial, collection, workers, loud)
            _publish(partial, directory)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def open_arrays(collection: Collection, cache_dir: Path) -> dict[str, np.ndarray]:
    """The prepared fields as read-only memory maps.

    Raises:
      ValueError: a file is missing, unreadable, or not as it was written; names the file and what to do.
    """
    directory = collection.directory(cache_dir)
    try:
        content = (directory / META).read_bytes()
    except OSError as error:
        raise _damaged(directory / META, str(error)) from error
    meta = json_object(content, directory / META, _remedy(directory))
    if meta.get("fingerprint") != collection.fingerprint():
        raise _damaged(directory / META, f"it describes {meta.get('fingerprint')}, not {collection.fingerprint()}")
    return {name: _open_field(directory / f"{name}.npy", collection, name, meta.get("bytes")) for name in STORED}


def _open_field(path: Path, collection: Collection, name: str, sizes: Any) -> np.ndarray:
    if not path.exists():
        raise _damaged(path, "it is missing")
    written = sizes.get(name) if isinstance(sizes, dict) else None
    if path.stat().st_size != written:
        raise _damaged(path, f"it has {path.stat().st_size} bytes where {written} were written")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if array.shape != collection.shape(name) or array.dtype != STORED[name][0]:
        raise _damaged(path, f"it holds {array.dtype} {array.shape} where {collection.shape(name)} was expected")
    return np.asarray(array)


def _damaged(path: Path, finding: str) -> InputError:
    return InputError(f"The scene cache is damaged at {path}: {finding}. {_remedy(path.parent)}")


def _remedy(directory: Path) -> str:
    return f"Delete the directory {directory} and prepare again."


def _render_into(directory: Path, collection: Collection, workers: int | None, loud: bool) -> None:
    """Fills `directory` with the fields and their description."""
    for name, (dtype, _) in STORED.items():
        path = directory / f"{name}.npy"
        np.lib.format.open_memmap(path, "w+", dtype, collection.shape(name)).flush()
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here; in a memory map it would be a bus error
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(usable, collection.length // FEWEST_PER_WORKER) if workers is None else min(workers, collection.length)
    console = messages() if loud else None
    with Progress(f"rendering {collection.split} scenes", collection.length, console) as progress:
        if count <= 1:
            render_share(directory, collection, 0, 1, progress.advance)
        else:
            _render_in_processes(directory, collection, count, progress.advance)
    sizes = {name: (directory / f"{name}.npy").stat().st_size for name in STORED}
    (directory / META).write_text(json.dumps({"fingerprint": collection.fingerprint(), "bytes": sizes}, indent=1))


def render_share(
    directory: Path, collection: Collection, worker: int, workers: int, done: Callable[[], object]
) -> None:
    """Renders every `workers`-th scene from `worker` on into the arrays of `directory`; calls `done` after each."""
    arrays = {name: np.lib.format.open_memmap(directory / f"{name}.npy", "r+") for name in STORED}
    for index in range(worker, collection.length, workers):
        for name, value in render_stored(collection.seed, collection.split, index, collection.size).items():
            arrays[name][index] = value
        done()
    for array in arrays.values():
        array.flush()


def _render_in_processes(directory: Path, collection: Collection, count: int, report: Callable[[int], None]) -> None:
    """Fresh interpreters rather than multiprocessing: they never import the caller's __main__, nor inherit its threads.

    All write one byte per finished scene into one pipe, which ends when the last of them ends. Should this process be
    killed, their next byte finds no reader and ends them too.
    """
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),  # whatever we could import, they can
        "PYTHONSAFEPATH": "1",
        **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
    }
    described = json.dumps([str(directory), collection.split, collection.length, collection.size, collection.seed])
    command = [sys.executable, "-m", "sgw_jax.data_pipelines.rooms.worker", described]
    reader, writer = os.pipe()
    processes: list[subprocess.Popen] = []
    with open(reader, "rb", buffering=0) as finished, tempfile.TemporaryFile() as complaints:
        try:
            with open(writer, "wb") as pipe:
                for worker in range(count):
                    share = [*command, str(worker), str(count)]
                    processes.append(subprocess.Popen(share, stdout=pipe, stderr=complaints, env=environment))
            while scenes := finished.read(4096):
                report(len(scenes))
                if any(process.poll() for process in processes):
                    break
            else:
                for process in processes:
                    process.wait()
        finally:
            for process in processes:
                process.terminate()
                process.wait()
        codes = [process.returncode for process in processes]
        if any(codes):
            complaints.seek(0)
            text = complaints.read().decode(errors="replace").strip()
            raise RuntimeError(f"Rendering into {directory} failed; the workers ended with {codes}:\n{text[-4000:]}")


def _publish(partial: Path, directory: Path) -> None:
    try:
        publish(partial, directory)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise  # otherwise another machine was first; its copy is equal to ours
