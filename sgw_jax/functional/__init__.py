"""The mathematics as pure functions of arrays: parameters are plain dicts, by the names of the linen modules.

For hosts that are no linen modules (plain JAX, Haiku, Equinox); `interactions` and `nnx` are thin layers over it.
"""

from sgw_jax.functional.cross_attention import cross_task_attention
from sgw_jax.functional.knowledge_extraction import Extraction, knowledge_extraction
from sgw_jax.functional.shared_workspace import shared_workspace, workspace_interaction
from sgw_jax.functional.steps import broadcast, exchange, retrieve, retrieve_each, write

__all__ = [
    "Extraction",
    "broadcast",
    "cross_task_attention",
    "exchange",
    "knowledge_extraction",
    "retrieve",
    "retrieve_each",
    "shared_workspace",
    "workspace_interaction",
    "write",
]
