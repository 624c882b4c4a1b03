"""A network as StableHLO: one file that JAX alone runs."""

from sgw_jax.export.stablehlo.format import PLATFORMS
from sgw_jax.export.stablehlo.read import StableHLO, load_stablehlo
from sgw_jax.export.stablehlo.write import export_stablehlo, save_stablehlo

__all__ = ["PLATFORMS", "StableHLO", "export_stablehlo", "load_stablehlo", "save_stablehlo"]
