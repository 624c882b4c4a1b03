"""Backbones: image -> {stride: feature map}; each entry makes a module from a size and keyword arguments."""

from collections.abc import Callable

import flax.linen as nn

from sgw_jax.backbones.swin import swin
from sgw_jax.backbones.vit import dinov2, vit

BACKBONES: dict[str, Callable[..., nn.Module]] = {"vit": vit, "dinov2": dinov2, "swin": swin}
