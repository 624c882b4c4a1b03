"""Reading `--config=NAME_OR_FILE[:args]` and `--config.key=value`."""

import copy
import difflib
import importlib.resources
import importlib.util
import math
import os
import re
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict, FieldReference, FrozenConfigDict

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.paths import PathError, user_path
from sgw_jax.experiment.experiment import among
from sgw_jax.experiment.keys import range_of
from sgw_jax.experiment.ranges import Names

INTERNAL = ("__init__", "base")
# What ml_collections says of a value of another type than the key's.
CAST = re.compile(
    r"Could not override field '(?P<key>\w+)' \(reference\)\. (?P<value>.*) is of original type <class "
    r"'(?P<found>[\w.]+)'> and cannot be casted to type <class '(?P<needed>[\w.]+)'>",
    re.DOTALL,
)
ROOTS = ("data.root", "data.mixture.*.root")
PATHS = (*ROOTS, "backbone_weights", "backbone_cache")  # the keys that are


class UsageError(InputError):
    """The command line asks for something that is not there."""


def read_config(argument: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The configuration of a file, or of a shipped one by name, with ``--config.key=value`` applied, locked.

    Args:
      argument: NAME_OR_FILE[:args]; args go to the file's ``get_config``.
      overrides: "--config.key=value" each.

    Returns:
      The configuration, locked, with every key of configs/base.py.

    Raises:
      UsageError: no such file or name, a file that fails, a key that does not exist (names the nearest that does), a
        value of another type.

    >>> from sgw_jax import read_config
    >>> config = read_config("scenes:interaction=none", ["--config.steps=300"])
    >>> config.steps, config.interaction
    (300, 'none')
    """
    config = _load(argument)
    keys = _leaves(config)
    for key, text in map(_key_and_text, overrides):
        if key not in keys:
            raise UsageError(f"--config={argument} has no key {key!r}. {_hint(key, keys)}")
        section, name = _owner(config, key)
        section[name] = _parse(key, text, _holder(key, config))
    return config.lock()


def with_overrides(config: ConfigDict, overrides: Sequence[str], allowed: Sequence[str]) -> ConfigDict:
    """A checkpoint's configuration with ``--config.key=value`` applied, of the keys and sections that are allowed.

    Raises:
      UsageError: another key (it names those allowed), a value of another type.
    """
    base = base_config()  # knows the types, which JSON does not
    base.data.mixture.update(config.data.get("mixture", {}))  # whose free keys are text
    config = copy.deepcopy(config).unlock()
    for key, text in map(_key_and_text, overrides):
        if not among(key, allowed) or key not in _leaves(base):
            keys = ", ".join(other for other in _leaves(base) if among(other, allowed))
            raise UsageError(f"--config.{key}: the checkpoint says it; here may be set {keys}.")
        value = _parse(key, text, _holder(key, base))
        with config.ignore_type():
            config.update_from_flattened_dict({key: value})
    return config.lock()


def with_whole_paths(config: ConfigDict) -> ConfigDict:
    """The configuration with paths that lead to the same place from any directory: see `user_path`, and absolute.

    Raises:
      InputError: a path that cannot be meant; it names the key.
    """
    config = copy.deepcopy(config)
    for key in (key for key in _leaves(config) if among(key, PATHS)):
        section, name = _owner(config, key)
        if section.get(name):  # no key in checkpoints of earlier releases
            try:
                section[name] = os.path.abspath(user_path(section[name]))
            except PathError as error:
                raise InputError(f"config.{key}={error}.") from error
    return config


def without_paths(config: ConfigDict) -> ConfigDict:
    """The configuration with empty paths: where somebody's files lie is nobody else's business."""
    config = copy.deepcopy(config).unlock()
    for key in (key for key in _leaves(config) if among(key, PATHS)):
        section, name = _owner(config, key)
        section[name] = ""
    return config.lock()


def data_roots(config: ConfigDict) -> dict[str, str]:
    """Key -> directory, of the keys that say where the data lie; empty ones left out."""
    found = {key: _held(config, key) for key in _leaves(config) if among(key, ROOTS)}
    return {key: root for key, root in found.items() if root}


def _key_and_text(override: str) -> tuple[str, str]:
    key, separator, text = override.removeprefix("--config.").partition("=")
    if not override.startswith("--config.") or not separator:
        raise UsageError(f"Unknown argument {override!r}. Keys of the configuration are set as --config.key=value.")
    return key, text


def config_file(name: str) -> Path:
    """A file as it is, or the shipped configuration of that name."""
    try:
        path = Path(user_path(name))
    except PathError as error:
        raise UsageError(f"--config={error}.") from error
    if os.path.isfile(path):  # not Path.is_file, which raises for a name that is too long
        return path
    if os.path.lexists(path):
        raise UsageError(f"--config={name} is no file; give a Python file or a shipped configuration by name.")
    folder = Path(str(importlib.resources.files("sgw_jax.configs")))
    shipped = {file.stem: file for file in folder.glob("*.py") if file.stem not in INTERNAL}
    # `configs/scenes.py` works outside a checkout too.
    if path.stem in shipped and path.name in (path.stem, f"{path.stem}.py") and path.parent.name in ("", "configs"):
        return shipped[path.stem]
    near = difflib.get_close_matches(path.stem, shipped, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise UsageError(f"--config: there is no file {name!r}; the shipped configurations are {sorted(shipped)}.{hint}")


def _load(argument: str) -> ConfigDict:
    """What the file's get_config returns, with every key of configs/base.py."""
    name, colon, arg = (argument, "", "") if os.path.isfile(argument) else argument.partition(":")
    path = config_file(name)
    try:
        get_config = getattr(_execute(path), "get_config", None)
        if get_config is None:
            raise UsageError(f"--config={argument}: {path} defines no get_config().")
        config = get_config(arg) if colon else get_config()
    except (UsageError, KeyboardInterrupt):
        raise
    except BaseException as error:  # the file is a program: it may raise anything, SystemExit too
        line = _line(error, path)
        where = str(path) if line is None else f"{path}, line {line}"
        raise UsageError(f"--config={argument}: {where}: {type(error).__name__}: {_brief(error)}") from error
    if not isinstance(config, ConfigDict):
        raise UsageError(
            f"--config={argument}: get_config() of {path} returns {config!r:.100}; it must return the configuration, "
            "which base.get_config() begins."
        )
    if isinstance(config, FrozenConfigDict):
        config = config.as_configdict()
    missing = [key for key in _leaves(base_config()) if key not in _leaves(config)]
    if missing:
        some = ", ".join(missing[:10]) + (f" and {len(missing) - 10} more" if len(missing) > 10 else "")
        raise UsageError(f"--config={argument}: {path} lacks the keys {some}; start from base.get_config().")
    return config


def base_config() -> ConfigDict:
    """configs/base.py as it stands: every key with its default."""
    return importlib.import_module("sgw_jax.configs.base").get_config()


def _execute(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", os.path.abspath(path))
    if spec is None or spec.loader is None:
        raise UsageError(f"--config: {path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _line(error: BaseException, path: Path) -> int | None:
    """The last line of the file that the error passed, or the one that is no Python."""
    file = os.path.abspath(path)
    if isinstance(error, SyntaxError) and error.filename == file:
        return error.lineno
    return next((f.lineno for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename == file), None)


def _brief(error: BaseException) -> str:
    """The message in one line, without ml_collections' dump of the whole configuration."""
    if isinstance(error, SyntaxError):
        return error.msg
    if isinstance(error, SystemExit):
        return f"sys.exit({error.code!r}); a configuration returns what it is and does not end the command"
    if cast := CAST.match(str(error)):
        return f"{cast['key']} is {cast['value']}, of type {cast['found']}; it must be of type {cast['needed']}"
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    head, dump, rest = " ".join(text.split()).partition(" Other fields present:")
    meant = re.search(r'Did you mean "[^"]+"', rest)
    return f"{head} {meant[0]}?" if dump and meant else head


def _leaves(config: ConfigDict, prefix: str = "") -> list[str]:
    """All keys, dotted; those that hold None too."""
    keys: list[str] = []
    for key, value in config.items():
        keys += _leaves(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else [f"{prefix}{key}"]
    return keys


def _owner(config: ConfigDict, key: str) -> tuple[ConfigDict, str]:
    """The section that holds the key, and its name there."""
    *sections, name = key.split(".")
    for section in sections:
        config = config[section]
    return config, name


def _holder(key: str, config: ConfigDict) -> Any:
    """The key's value, or the reference to it that says that it may be None (`optional` in configs/base.py), which a
    configuration may have lost on the way."""
    base, held = base_config(), _held(config, key)
    known = _held(base, key) if key in _leaves(base) else held
    if isinstance(known, FieldReference) and not isinstance(held, FieldReference):
        known.set(held, type_safe=False)
        return known
    return held


def _held(config: ConfigDict, key: str) -> Any:
    section, name = _owner(config, key)
    return dict(section.items(preserve_field_references=True))[name]


def _hint(key: str, keys: Sequence[str]) -> str:
    """Which key was probably meant: one of the same name elsewhere, else the nearest in its section, else anywhere."""
    if inside := [other for other in keys if other.startswith(f"{key}.")]:
        return f"It is a section; its keys are {', '.join(inside)}."
    section, _, name = key.rpartition(".")
    siblings = [other for other in keys if section and other.rpartition(".")[0] == section]
    near = [other for other in keys if other.rpartition(".")[2] == name]
    near.sort(key=lambda other: -difflib.SequenceMatcher(None, key, other).ratio())  # of several the most alike
    names = [other.rpartition(".")[2] for other in siblings]
    near = near or [f"{section}.{other}" for other in difflib.get_close_matches(name, names)]
    near = near or ([] if siblings else difflib.get_close_matches(key, keys))
    meant = f"Did you mean --config.{near[0]}? " if near else ""
    return meant + (f"That section has {', '.join(siblings)}." if siblings else "configs/base.py has all keys.")


def _parse(key: str, text: str, old: Any) -> Any:
    """The text as a value of the old one's type; None where the key is optional (a reference, see configs/base.py)."""
    optional = isinstance(old, FieldReference)
    kind = old.get_type() if optional else type(old)
    if optional and text in ("None", "none"):
        return None
    try:
        if optional and kind is tuple:
            raise ValueError("what only a file can set, a tuple of pairs,")
        return _tuple(text, old, _item_type(key, old)) if kind is tuple else _scalar(text, kind)
    except ValueError as error:
        wanted = f"{error}{' or None' if optional else ''}"
        now = old.get() if optional else old
        raise UsageError(f"--config.{key}={text}: expected {wanted}; it is {now!r} now.") from error


def _item_type(key: str, old: tuple) -> type:
    """Of what the tuple holds; of one that holds nothing now the range of the key says it."""
    if old:
        return type(old[0])
    return str if isinstance(range_of(key), Names) else float


def _tuple(text: str, old: tuple, kind: type) -> tuple:
    """As many numbers as there were (any, if there were none), or any number of names; brackets and quotes are
    optional."""
    separators = ",+" if kind is str else ","
    parts = [part.strip(" '\"") for part in re.split(f"[{separators}]", text.strip("()[]"))]
    values = tuple(_scalar(part, kind) for part in parts if part)
    if not old and kind is not str:  # whole numbers where they are
        return tuple(int(value) if value == int(value) and "." not in text else value for value in values)
    if kind is not str and len(values) != len(old):
        raise ValueError(f"{len(old)} numbers with a comma between them")
    return values


def _scalar(text: str, kind: type) -> Any:
    """Raises a ValueError that says what was expected."""
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("true or false")
        return text.lower() == "true"
    try:
        value = kind(text)
    except ValueError as error:
        raise ValueError("a whole number" if kind is int else "a number") from error
    if kind is float and not math.isfinite(value):
        raise ValueError("a finite number")
    return value
