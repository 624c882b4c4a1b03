"""Paths as people write them: ~ and $NAME, and where caches go."""

import argparse
import os
import re
import stat
import tempfile
from pathlib import Path

from sgw_jax.data_pipelines.errors import InputError

NOT_REGULAR = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}  # else a device
VARIABLE = re.compile(r"\$(\w+|\{[^}]*\})")


class PathError(InputError, argparse.ArgumentTypeError):
    """A path that cannot be meant; as an argument's it ends the command with its usage."""


def user_path(text: str) -> str:
    """The path with ~, ~user, $NAME and ${NAME} in their values, as a shell has them; a type for argparse too.

    Shells leave ~ alone in `--workdir=~/run`, and configuration files have none. A path with $ that exists as it is
    written is left as it is.

    Raises:
      PathError: empty, no such user or home, a variable that is not set.
    """
    if not text.strip():
        raise PathError(f"{text!r} is no path; give one")
    path = os.path.expanduser(text)
    if text.startswith("~") and path == text:
        whose = text.partition("/")[0]
        raise PathError(
            f"{text}: the home directory {whose} is not known here; write ./{whose} for a file of that name"
        )
    if os.path.lexists(path):
        return path
    for name in VARIABLE.findall(path):
        if name.strip("{}") not in os.environ:
            raise PathError(f"{text}: the variable ${name} is not set")
    return os.path.expandvars(path)


def irregular(path: Path) -> str | None:
    """What is there, if it is something else than a regular file: opening a pipe would wait for a writer for ever.

    Raises:
      OSError: there is nothing.
    """
    mode = path.stat().st_mode
    return None if stat.S_ISREG(mode) else NOT_REGULAR.get(stat.S_IFMT(mode), "a device")


def obstacle(path: Path) -> str | None:
    """What keeps a directory from being made or written to, if anything."""
    place = path.absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return f"{place} is no directory"
    return None if os.access(place, os.W_OK | os.X_OK) else f"{place} cannot be written to"


def default_cache() -> tuple[Path, str]:
    """Where rendered scenes and compiled programs are kept, and why not in the usual place, or "".

    The usual one is $XDG_CACHE_HOME/sgw_jax, else ~/.cache/sgw_jax; where neither can be (containers and batch systems
    run as users without a home) a directory of this user's own among the temporary files.

    Raises:
      PathError: that one belongs to another user.
    """
    given = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    usual = Path(given) / "sgw_jax"
    why = obstacle(usual) if usual.is_absolute() else "no home directory is known"
    if why is None:
        return usual, ""
    own = Path(tempfile.gettempdir()) / f"sgw_jax-{os.getuid()}"
    own.mkdir(mode=0o700, exist_ok=True)
    if own.stat().st_uid != os.getuid():  # compiled programs are run
        raise PathError(f"No cache: {why}, and {own} is another user's; give --cache_dir=DIR.")
    return own, why
