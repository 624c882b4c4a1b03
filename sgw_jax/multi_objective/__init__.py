"""How the losses of several tasks become one descent direction. Today: a weighted sum of losses."""

from sgw_jax.multi_objective.scalarize import Scalarizer, weighted_sum

__all__ = ["Scalarizer", "weighted_sum"]
