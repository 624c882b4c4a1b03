"""KEM, SimplexETF, SharedWorkspace and CrossTaskAttention as flax.nnx modules, over the same functions as linen's.

Their parameters have the paths of the linen modules, so that one's values are the other's (`from_linen`, `to_linen`).
They hold parameters alone: no random state, no records and no frame, which the program makes from the attributes.
"""

from sgw_jax.nnx.conversion import from_linen, to_linen
from sgw_jax.nnx.cross_attention import CrossTaskAttention
from sgw_jax.nnx.knowledge_extraction import KEM
from sgw_jax.nnx.shared_workspace import SharedWorkspace
from sgw_jax.nnx.simplex_etf import SimplexETF

__all__ = ["KEM", "CrossTaskAttention", "SharedWorkspace", "SimplexETF", "from_linen", "to_linen"]
