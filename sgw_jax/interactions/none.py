"""No interaction: tasks share the backbone alone."""

from collections.abc import Mapping

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sgw_jax.interactions.tokens import check_features


class NoInteraction(nn.Module):
    """The identity on the mapping of task features: the multi-task baseline."""

    dtype: jnp.dtype = jnp.float32

    def __call__(self, features: Mapping[str, Float[Array, "batch *space channels"]]) -> dict[str, Array]:
        check_features(features, "NoInteraction")  # what the others cannot mix is refused here too
        return dict(features)
