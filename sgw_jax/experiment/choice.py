"""What a member of a family takes of what it is offered."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any


def taken(make: Callable[..., Any], offered: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the offered arguments that a member of a family has a parameter for, by its name."""
    return {name: value for name, value in offered.items() if name in inspect.signature(make).parameters}
