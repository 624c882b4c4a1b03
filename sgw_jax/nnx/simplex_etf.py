"""The projection onto a fixed simplex ETF as an nnx module."""

from flax import nnx
from jaxtyping import Array, Float

from sgw_jax.etf import etf_projection, project


class SimplexETF(nnx.Module):
    """``z = sqrt(d) M^T f / ||f||``, as `sgw_jax.SimplexETF`; it holds nothing, the program makes M.

    Args:
      num_vertices: K, with 2 <= K <= d + 1.
      seed: of the frame.

    Call:
      features: (..., d).

    Returns:
      (..., K) in the dtype of the features.

    Raises:
      ValueError: (call) fewer than 2 vertices, or more than d + 1; features that are not floating-point.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.nnx import SimplexETF
    >>> SimplexETF(num_vertices=5)(jnp.ones((2, 8))).shape
    (2, 5)
    """

    def __init__(self, num_vertices: int, seed: int = 0):
        self.num_vertices, self.seed = num_vertices, seed

    def __call__(self, features: Float[Array, "*batch dim"]) -> Float[Array, "*batch vertices"]:
        return project(*etf_projection(self.num_vertices, seed=self.seed)(features))
