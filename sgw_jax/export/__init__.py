"""Trained networks as files for others: a format is a function of a network and the path that it writes."""

from collections.abc import Callable
from typing import Any

from sgw_jax.export.folder import save_folder
from sgw_jax.export.onnx.file import save_onnx
from sgw_jax.export.space import save_space
from sgw_jax.export.stablehlo import save_stablehlo

__all__ = ["FORMATS"]

# `sgw-jax export --format=NAME`: called with the network (`Trained`), the path, and those of the command's options that
# were given and that it has parameters for.
FORMATS: dict[str, Callable[..., Any]] = {
    "folder": save_folder,
    "space": save_space,
    "stablehlo": save_stablehlo,
    "onnx": save_onnx,
}
