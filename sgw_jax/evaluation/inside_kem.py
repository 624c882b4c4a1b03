"""A look inside a model's KEM: what it is given and records, and predictions with its read-out changed."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sgw_jax.functional.tokens import TokenLayout, concatenate_tasks
from sgw_jax.interactions.knowledge_extraction import KEM

Features = dict[str, Array]
Intervention = Callable[[Float[Array, "batch slots slot_dim"]], Array]


def has_kem(model: nn.Module) -> bool:
    """Whether the model's own interaction is a KEM: one that exchanges between tasks, not one within each."""
    return isinstance(getattr(model, "interaction", None), KEM)


def intervene(features: Features, change: Intervention | None = None):
    """A context in which a model's KEM (of several scales, that at its stride) has ``change`` made to every R^ it
    retrieves.

    ``features`` is empty the first time and receives the KEM's input; after that the KEM gets this input, so that what
    comes before it in a second ``apply`` of the same trace is dead code: the backbone is computed once.
    """

    def intercept(method: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext) -> Any:
        # Another scale's has a name of its own, and a KEM within tasks lies deeper.
        ours = isinstance(context.module, KEM) and context.module.path == ("interaction",)
        if not ours or context.method_name != "__call__":
            return method(*args, **kwargs)
        if not features:
            # A balanced KEM's tokens lie by sorted names; and so does what it records.
            features.update(sorted(args[0].items()) if context.module.balanced else args[0])
        return method(features, *args[1:], **kwargs, change=change)

    return nn.intercept_methods(intercept)


def token_layout(features: Features) -> TokenLayout:
    """Where each task's tokens lie among those of all tasks."""
    return concatenate_tasks(features, "diagnostics")[1]


def apply_and_look(model: nn.Module, variables: Any, image: Array) -> tuple[dict[str, Array], dict[str, Array]]:
    """Predictions, and what the KEM sows, rounds stacked in front (empty for another interaction)."""
    fresh = {name: tree for name, tree in variables.items() if name != "intermediates"}  # `init` leaves its own there
    predictions, collections = model.apply(fresh, image, mutable=["intermediates"])
    sown = collections.get("intermediates", {}).get("interaction", {}) if has_kem(model) else {}
    return predictions, {name: jnp.stack(rounds) for name, rounds in sown.items()}
