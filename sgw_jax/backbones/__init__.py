"""Backbones: image -> {stride: feature map}; each entry makes a module from a size and keyword arguments."""

from collections.abc import Callable

import flax.linen as nn

from sgw_jax.backbones.swin import swin
from sgw_jax.backbones.vit import vit

BACKBONES: dict[str, Callable[..., nn.Module]] = {"vit": vit, "swin": swin}
