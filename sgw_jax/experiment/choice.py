"""Choosing of a family by name, and what a member of it takes."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from sgw_jax.data_pipelines.errors import InputError


def choose(options: Mapping[str, Any], name: str, key: str) -> Any:
    """``options[name]``, or an error that names the key, what is allowed and what was probably meant."""
    if name not in options:
        near = difflib.get_close_matches(str(name), options, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"{key}: {name!r} is not known; it must be one of {sorted(options)}.{hint}")
    return options[name]


def taken(make: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the offered arguments that a member of a family has a parameter for, by its name."""
    return {name: value for name, value in offered.items() if name in inspect.signature(make).parameters}
