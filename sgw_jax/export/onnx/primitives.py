"""All primitives that a network's forward pass is made of: importing this registers them."""

from sgw_jax.export.onnx import elementwise, products, selection, shapes  # noqa: F401
from sgw_jax.export.onnx.lowering import ELEMENTWISE, PRIMITIVES

__all__ = ["ELEMENTWISE", "PRIMITIVES"]
