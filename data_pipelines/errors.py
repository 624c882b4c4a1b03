"""Errors that a user can mend: a command shows their message alone. Anything else is a defect and shows its trace."""

import contextlib
from collections.abc import Iterator


class UserError(Exception):
    """Its message is written for the user: the thing, what was found, what is allowed and what to do."""


class InputError(UserError, ValueError):
    """A value, from the configuration, the command or a file, that is not allowed."""


class FileError(UserError, OSError):
    """A file or directory that the operating system does not let be read or written."""


class MissingFileError(FileError, FileNotFoundError):
    """A file or directory that is not there."""


class MissingPackageError(UserError, ImportError):
    """A package of an extra that is not installed."""


@contextlib.contextmanager
def extra_named(what: str, extra: str = "train") -> Iterator[None]:
    """Turns a package that an import inside does not find into a `MissingPackageError` that begins with ``what`` and
    names the extra that brings it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "sgw_jax":  # a defect
            raise
        text = f'{what} needs {error.name}, which is not installed: pip install "sgw_jax[{extra}]".'
        raise MissingPackageError(text, name=error.name) from error


@contextlib.contextmanager
def files_named(what: str) -> Iterator[None]:
    """Turns what the operating system refuses inside into a `FileError` that begins with ``what``."""
    try:
        yield
    except UserError:
        raise
    except OSError as error:
        place = f" ({error.filename})" if error.filename is not None else ""
        raise FileError(f"{what}: {error.strerror or error}{place}.") from error
