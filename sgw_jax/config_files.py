"""Reading `--config=NAME_OR_FILE[:args]` and `--config.key=value`."""

import difflib
import importlib.resources
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from ml_collections import ConfigDict, config_flags

INTERNAL = ("__init__", "base")


class UsageError(ValueError):
    """The command line asks for something that is not there."""


def read_config(argument: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The configuration of a file, or of a shipped one by name, with ``--config.key=value`` applied, locked.

    Raises:
      UsageError: no such file or name, a key that does not exist (names the nearest that does), a value that does not fit.
    """
    name, colon, arg = argument.partition(":")
    location = f"--config={config_file(name)}{colon}{arg}"
    keys = _leaves(_parse([location]))
    for override in overrides:
        key, separator, _ = override.removeprefix("--config.").partition("=")
        if not override.startswith("--config.") or not separator:
            raise UsageError(f"Unknown argument {override!r}. Keys of the configuration are set as --config.key=value.")
        if key not in keys:
            near = difflib.get_close_matches(key, keys, n=1, cutoff=0.4)
            hint = f" Did you mean --config.{near[0]}?" if near else ""
            raise UsageError(f"--config={argument} has no key {key!r}.{hint} configs/base.py has all keys.")
    return _parse([location, *overrides])


def _parse(arguments: Sequence[str]) -> ConfigDict:
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values)
    try:
        values(["sgw-jax", *arguments])
    except (flags.Error, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UsageError(f"{' '.join(arguments)}: {error}") from error
    return holder.value


def config_file(name: str) -> Path:
    """A file as it is, or the shipped configuration of that name."""
    path = Path(name)
    if path.is_file():
        return path
    folder = Path(str(importlib.resources.files("configs")))
    shipped = {file.stem: file for file in folder.glob("*.py") if file.stem not in INTERNAL}
    # `configs/scenes.py` works outside a checkout too.
    if path.stem in shipped and path.name in (path.stem, f"{path.stem}.py") and path.parent.name in ("", "configs"):
        return shipped[path.stem]
    near = difflib.get_close_matches(path.stem, shipped, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"--config: there is no file {name!r}; the shipped configurations are {sorted(shipped)}.{hint}")


def _leaves(config: ConfigDict, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for key in config:
        value = config.get_ref(key).get() if config.is_type_safe else config[key]
        keys += _leaves(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [f"{prefix}{key}"]
    return keys
