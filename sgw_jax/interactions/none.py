"""No interaction: tasks share the backbone alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sgw_jax.functional.tokens import by_name, check_features
from sgw_jax.layers.mlp import MLP


class NoInteraction(nn.Module):
    """The identity on the mapping of task features: the multi-task baseline.

    Attributes:
      mlp_width: adds ``MLP(LN(F))`` of this hidden width to every token, the same for all tasks: nothing passes between
        tokens or tasks, so that a comparison at equal parameters is fair. None adds nothing.
    """

    mlp_width: int | None = None
    dtype: jnp.dtype = jnp.float32

    mixes_tasks = False

    @nn.compact
    def __call__(
        self,
        features: Mapping[str, Float[Array, "batch *space channels"]] | Sequence[Array] | None = None,
        **named: Float[Array, "batch *space channels"],
    ) -> Any:
        features, as_given = by_name(features, named, "NoInteraction")
        check_features(features, "NoInteraction")  # what the others cannot mix is refused here too
        if self.mlp_width is None:
            return as_given(features)
        norm = nn.LayerNorm(dtype=self.dtype, name="norm")
        mlp = MLP(self.mlp_width, dtype=self.dtype, name="mlp")
        return as_given({name: value + mlp(norm(value)).astype(value.dtype) for name, value in features.items()})
