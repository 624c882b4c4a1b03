"""Weights from a Gramian, as pure functions: ``weights.upgrad(G, preference=, mask=)`` -> (tasks,)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sgw_jax.multi_objective import METHODS, public_name

_functions = {public_name(name): found.weights for name, found in METHODS.items() if found.weights is not None}
globals().update(_functions)
__all__ = sorted(_functions)

if TYPE_CHECKING:

    def __getattr__(name: str) -> Callable[..., Any]: ...
