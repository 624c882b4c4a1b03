"""Stochastic depth: a residual branch is dropped for whole examples."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class DropPath(nn.Module):
    """Zeroes the branch of an example with probability ``rate`` and scales the others by 1 / (1 - rate).

    ``rate`` is an argument of the call, because it differs between the layers of a scanned stack. Randomness comes
    from the rng stream ``drop_path``; with ``train=False`` it is the identity. Source: Huang et al. 2016.
    """

    @nn.compact
    def __call__(self, branch: Float[Array, " batch *rest"], rate: Array | float, train: bool) -> Array:
        if not train or (isinstance(rate, float) and rate == 0.0):
            return branch
        keep = 1.0 - jnp.asarray(rate, jnp.float32)
        shape = (branch.shape[0],) + (1,) * (branch.ndim - 1)
        kept = jax.random.uniform(self.make_rng("drop_path"), shape) < keep
        return branch * (kept / keep).astype(branch.dtype)
