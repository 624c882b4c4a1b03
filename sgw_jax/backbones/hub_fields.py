"""The fields of a hub model's config.json, each checked as it is read; ``where`` names the file in errors."""

from collections.abc import Mapping
from typing import Any

from sgw_jax.backbones.tensors import PretrainedError

LARGEST = 2**20  # of any number, far beyond every model


def number(where: str, config: Mapping[str, Any], key: str) -> int:
    """A positive whole number, or a list of the same one."""
    value: Any = config.get(key)
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        value = value[0]
    if not _whole(value):
        raise PretrainedError(f"{where}: {key} is {value!r}; it must be a positive whole number, at most {LARGEST}.")
    return value


def stages(where: str, config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    """A list of positive whole numbers."""
    value = config.get(key)
    if not isinstance(value, list) or not all(map(_whole, value)):
        raise PretrainedError(
            f"{where}: {key} is {value!r}; it must be a list of positive whole numbers, at most {LARGEST}."
        )
    return tuple(value)


def positive(where: str, config: Mapping[str, Any], key: str, default: float) -> float:
    """A positive number."""
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST:
        raise PretrainedError(f"{where}: {key} is {value!r}; it must be a positive number, at most {LARGEST}.")
    return value


def switch(where: str, config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    """True or false."""
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise PretrainedError(f"{where}: {key} is {value!r}; it must be true or false.")
    return value


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST


def refuse(where: str, config: Mapping[str, Any], needed: Mapping[str, Any]) -> None:
    """Raises where a value is another than the one that is needed; a missing key is fine."""
    for key, value in needed.items():
        if config.get(key, value) != value:
            raise PretrainedError(f"{where}: {key} is {config[key]!r}; only {value!r} is supported.")


def approximate(where: str, config: Mapping[str, Any]) -> bool:
    """Whether the GELU is the tanh approximation."""
    kinds = {"gelu": False, "gelu_new": True, "gelu_pytorch_tanh": True}
    name = config.get("hidden_act", "gelu")
    if name not in list(kinds):  # in a file it may be anything, and not hashable
        raise PretrainedError(f"{where}: hidden_act is {name!r}; it must be one of {list(kinds)}.")
    return kinds[name]
