"""The control of a comparison: KEM's parameters and compute, but nothing passes between tasks."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from sgw_jax.functional.tokens import by_name, check_features
from sgw_jax.interactions.knowledge_extraction import KEM
from sgw_jax.layers.placement import Placement


class WithinTasks(nn.Module):
    """Applies one KEM, with the same weights and slots, to every task alone [our decision].

    What it gains over no interaction, attention and parameters bring; what KEM gains over it, the exchange does.
    ``top_k`` tokens are kept of each task, so the slots of T tasks retrieve T times as many tokens as KEM's.

    Call: mapping task -> (batch, *space, C); returns the same mapping, shapes and key order.
    """

    kem: KEM

    mixes_tasks = False

    def __call__(
        self,
        features: Mapping[str, Float[Array, "batch *space channels"]] | Sequence[Array] | None = None,
        **named: Float[Array, "batch *space channels"],
    ) -> Any:
        features, as_given = by_name(features, named, "WithinTasks")
        check_features(features, "WithinTasks")
        return as_given({name: self.kem({name: value})[name] for name, value in features.items()})


def within_tasks(placement: Placement | None = None, **options) -> WithinTasks:
    """`WithinTasks` with a KEM of these options."""
    return WithinTasks(KEM(placement=placement, **options))
