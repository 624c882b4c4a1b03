"""Files and directories that appear whole: whenever the process dies, what a path holds is the old or the new."""

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # disks without any say these


@contextlib.contextmanager
def replacing(path: Path, *, contended: bool = False) -> Iterator[Path]:
    """A path beside `path` to write to; the file there takes its place, on disk, if the block ends without an error.

    What a killed process left is written over by the next one.

    Args:
      contended: several processes may write this path at once: each has a file of its own, and the last one stays.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp" if contended else f"{path.name}.tmp")
    try:
        yield temporary
        sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_atomically(path: Path, content: str | bytes, *, contended: bool = False) -> None:
    """Writes text (UTF-8) or bytes by `replacing`."""
    with replacing(path, contended=contended) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """An empty directory beside `directory` to write files to; it takes its name, on disk, if the block ends without an
    error. The name must be free, or an empty directory's: nothing is ever replaced.

    A killed process leaves its hidden directory behind, and nothing under the name.
    """
    partial = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process that had this one's number
    partial.mkdir(parents=True)
    try:
        yield partial
        publish(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def publish(partial: Path, directory: Path) -> None:
    """Makes a complete directory of files durable, then visible under its name in one step."""
    for path in [*partial.iterdir(), partial]:
        sync(path)
    os.rename(partial, directory)
    sync(directory.parent)


@contextlib.contextmanager
def alone(path: Path, waiting: Callable[[], object], *, needed: bool = True) -> Iterator[None]:
    """Holds a file's lock, which the kernel releases however its holder ends; waits for another process that has it.

    Args:
      path: of the file, which stays, empty.
      waiting: called once, before a wait.
      needed: raise where the disk has no locks; else go on without.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if needed or error.errno not in NO_LOCKS:
                raise
        yield


def sync(path: Path) -> None:
    """Blocks until the file or directory is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
