"""How tasks exchange knowledge: interchangeable modules from a mapping of features to the same mapping."""

from collections.abc import Callable

import flax.linen as nn

from sgw_jax.interactions.cross_attention import CrossTaskAttention
from sgw_jax.interactions.knowledge_extraction import KEM
from sgw_jax.interactions.none import NoInteraction
from sgw_jax.interactions.shared_workspace import WorkspaceInteraction
from sgw_jax.interactions.within_tasks import within_tasks

# sKEM is KEM with ``etf_vertices`` set; both names are kept because configs speak of both.
INTERACTIONS: dict[str, Callable[..., nn.Module]] = {
    "none": NoInteraction,
    "cross_attention": CrossTaskAttention,
    "kem": KEM,
    "skem": KEM,
    "shared_workspace": WorkspaceInteraction,
    "within_tasks": within_tasks,
}
