"""Multi-objective optimisation: from several losses to one update. Usable without the rest of this library.

`AGGREGATORS` combine a Jacobian (`task_gradients`) as Optax aggregators; `weights` are their pure functions of the
Gramian; `SCALARIZERS` make one number of the losses. docs/objectives.md says which to take.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

from sgw_jax.multi_objective import scalarize
from sgw_jax.multi_objective._aligned_mtl import aligned_mtl_weights
from sgw_jax.multi_objective._balancing import db_mtl_weights, equal_weights, gradnorm
from sgw_jax.multi_objective._cagrad import cagrad_weights
from sgw_jax.multi_objective._config import config_weights
from sgw_jax.multi_objective._dualproj import dualproj_weights
from sgw_jax.multi_objective._imtl_g import imtl_g_weights
from sgw_jax.multi_objective._mgda import mgda_weights
from sgw_jax.multi_objective._nash_mtl import fairgrad_weights, nash_mtl_weights
from sgw_jax.multi_objective._pcgrad import gradvac, gradvac_weights, pcgrad, pcgrad_weights
from sgw_jax.multi_objective._upgrad import upgrad_weights
from sgw_jax.multi_objective._weighting import (
    Method,
    WeightedAggregator,
    Weighting,
    from_weighting,
    method,
    weighted_sum_of,
)
from sgw_jax.multi_objective._wrappers import ema_weights, every_k
from sgw_jax.multi_objective.gradients import RepresentationGradients, representation_gradients, task_gradients
from sgw_jax.multi_objective.gramian import conflict_rate, cosines, gramian
from sgw_jax.multi_objective.scalarize import SCALARIZERS, Scalarizer, weighted_sum

# The family: `AGGREGATORS`, the aggregators of this module and the functions of `weights` are made of it.
METHODS: dict[str, Method] = {
    "equal": method(equal_weights),
    "upgrad": method(upgrad_weights),
    "dualproj": method(dualproj_weights),
    "nash_mtl": method(nash_mtl_weights),
    "fairgrad": method(fairgrad_weights),
    "cagrad": method(cagrad_weights),
    "mgda": method(mgda_weights),
    "imtl_g": method(imtl_g_weights),
    "aligned_mtl": method(aligned_mtl_weights),
    "pcgrad": Method(pcgrad_weights, pcgrad),
    "gradvac": Method(gradvac_weights, gradvac),
    "config": method(config_weights),
    "db_mtl": method(db_mtl_weights),
    "gradnorm": Method(None, gradnorm),
}
AGGREGATORS: dict[str, Callable[..., WeightedAggregator]] = {name: found.aggregator for name, found in METHODS.items()}


def public_name(name: str) -> str:
    """Of a member in Python: ConFIG is ``config_``, as ``config`` is what variables are called."""
    return "config_" if name == "config" else name


globals().update({public_name(name): found for name, found in AGGREGATORS.items()})
if TYPE_CHECKING:

    def __getattr__(name: str) -> Callable[..., WeightedAggregator]: ...


from sgw_jax.multi_objective import weights  # noqa: E402  (made of METHODS)

__all__ = [
    "AGGREGATORS",
    "METHODS",
    "SCALARIZERS",
    "Method",
    "RepresentationGradients",
    "Scalarizer",
    "WeightedAggregator",
    "Weighting",
    "conflict_rate",
    "cosines",
    "ema_weights",
    "every_k",
    "from_weighting",
    "gramian",
    "method",
    "representation_gradients",
    "scalarize",
    "task_gradients",
    "weighted_sum",
    "weighted_sum_of",
    "weights",
    *map(public_name, METHODS),
]
