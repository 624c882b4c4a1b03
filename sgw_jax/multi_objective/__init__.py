"""Multi-objective optimisation: from several losses to one update. Usable without the rest of this library.

`AGGREGATORS` combine a Jacobian (`task_gradients`) as Optax aggregators; `weights` are their pure functions of the
Gramian; `SCALARIZERS` make one number of the losses. docs/objectives.md says which to take.
"""

from collections.abc import Callable

from sgw_jax.multi_objective import scalarize, weights
from sgw_jax.multi_objective._aligned_mtl import aligned_mtl
from sgw_jax.multi_objective._balancing import db_mtl, equal, gradnorm
from sgw_jax.multi_objective._cagrad import cagrad
from sgw_jax.multi_objective._config import config_
from sgw_jax.multi_objective._dualproj import dualproj
from sgw_jax.multi_objective._imtl_g import imtl_g
from sgw_jax.multi_objective._mgda import mgda
from sgw_jax.multi_objective._nash_mtl import fairgrad, nash_mtl
from sgw_jax.multi_objective._pcgrad import gradvac, pcgrad
from sgw_jax.multi_objective._upgrad import upgrad
from sgw_jax.multi_objective._weighting import WeightedAggregator, Weighting, from_weighting, weighted_sum_of
from sgw_jax.multi_objective._wrappers import ema_weights, every_k
from sgw_jax.multi_objective.gradients import RepresentationGradients, representation_gradients, task_gradients
from sgw_jax.multi_objective.gramian import conflict_rate, cosines, gramian
from sgw_jax.multi_objective.scalarize import SCALARIZERS, Scalarizer, weighted_sum

AGGREGATORS: dict[str, Callable[..., WeightedAggregator]] = {
    "equal": equal,
    "upgrad": upgrad,
    "dualproj": dualproj,
    "nash_mtl": nash_mtl,
    "fairgrad": fairgrad,
    "cagrad": cagrad,
    "mgda": mgda,
    "imtl_g": imtl_g,
    "aligned_mtl": aligned_mtl,
    "pcgrad": pcgrad,
    "gradvac": gradvac,
    "config": config_,
    "db_mtl": db_mtl,
    "gradnorm": gradnorm,
}

__all__ = [
    "AGGREGATORS",
    "SCALARIZERS",
    "RepresentationGradients",
    "Scalarizer",
    "WeightedAggregator",
    "Weighting",
    "aligned_mtl",
    "cagrad",
    "config_",
    "conflict_rate",
    "cosines",
    "db_mtl",
    "dualproj",
    "ema_weights",
    "equal",
    "every_k",
    "fairgrad",
    "from_weighting",
    "gradnorm",
    "gradvac",
    "gramian",
    "imtl_g",
    "mgda",
    "nash_mtl",
    "pcgrad",
    "representation_gradients",
    "scalarize",
    "task_gradients",
    "upgrad",
    "weighted_sum",
    "weighted_sum_of",
    "weights",
]
