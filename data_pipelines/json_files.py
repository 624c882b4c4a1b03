"""JSON that people and other programs can reach: read with an error that names the file."""

import errno
import json
from pathlib import Path
from typing import Any

from sgw_jax.data_pipelines.errors import InputError, UserError
from sgw_jax.data_pipelines.paths import irregular


def file_bytes(path: Path) -> bytes:
    """The bytes of a regular file; an OSError for all else: a pipe would wait for a writer for ever."""
    if found := irregular(path):
        raise OSError(errno.EINVAL, f"it is {found}, no regular file", str(path))
    return path.read_bytes()


def read_object(
    path: Path, remedy: str, kind: type[UserError] = InputError, keys: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The JSON object in a file; as `json_object`, and with an error of that kind for what cannot be read."""
    try:
        content = file_bytes(path)
    except OSError as error:
        raise kind(f"{path} cannot be read: {error.strerror or error}. {remedy}") from error
    return json_object(content, path, remedy, kind, keys)


def json_object(
    content: bytes, name: object, remedy: str, kind: type[UserError] = InputError, keys: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The JSON object that a file's content is.

    Args:
      name: how an error begins: the file, perhaps with the line.
      remedy: how it ends: what to do, as a sentence.
      kind: of the error.
      keys: what the object must have.

    Raises:
      UserError: of that kind: no JSON, in no encoding of Unicode, another value than an object, a key that is missing.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:  # a UnicodeDecodeError too
        raise kind(f"{name} is damaged: it is no JSON ({error}). {remedy}") from error
    if not isinstance(found, dict):
        raise kind(f"{name} is damaged: it holds a {type(found).__name__} where a JSON object belongs. {remedy}")
    if missing := [key for key in keys if key not in found]:
        raise kind(f"{name} is not what it should be: it has no {', '.join(missing)}. {remedy}")
    return found
