"""The frame of the paper: the fixed simplex ETF, the projections beside it, and how far features have collapsed."""

from sgw_jax.etf.projections import etf_projection
from sgw_jax.etf.simplex import SimplexETF, direction, orthonormal_frame, project, simplex_etf

__all__ = ["SimplexETF", "direction", "etf_projection", "orthonormal_frame", "project", "simplex_etf"]
