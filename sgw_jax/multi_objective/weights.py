"""Weights from a Gramian, as pure functions: ``weights.upgrad(G, preference=, mask=)`` -> (tasks,)."""

from sgw_jax.multi_objective._aligned_mtl import aligned_mtl_weights as aligned_mtl
from sgw_jax.multi_objective._balancing import db_mtl_weights as db_mtl
from sgw_jax.multi_objective._balancing import equal_weights as equal
from sgw_jax.multi_objective._cagrad import cagrad_weights as cagrad
from sgw_jax.multi_objective._config import config_weights as config_
from sgw_jax.multi_objective._dualproj import dualproj_weights as dualproj
from sgw_jax.multi_objective._imtl_g import imtl_g_weights as imtl_g
from sgw_jax.multi_objective._mgda import mgda_weights as mgda
from sgw_jax.multi_objective._nash_mtl import fairgrad_weights as fairgrad
from sgw_jax.multi_objective._nash_mtl import nash_mtl_weights as nash_mtl
from sgw_jax.multi_objective._pcgrad import gradvac_weights as gradvac
from sgw_jax.multi_objective._pcgrad import pcgrad_weights as pcgrad
from sgw_jax.multi_objective._upgrad import upgrad_weights as upgrad

__all__ = [
    "aligned_mtl",
    "cagrad",
    "config_",
    "db_mtl",
    "dualproj",
    "equal",
    "fairgrad",
    "gradvac",
    "imtl_g",
    "mgda",
    "nash_mtl",
    "pcgrad",
    "upgrad",
]
