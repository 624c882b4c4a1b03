"""Backbones: image -> {stride: feature map}; each entry makes a module from a size and keyword arguments."""

from collections.abc import Callable

import flax.linen as nn

from sgw_jax.backbones.convnext import convnext
from sgw_jax.backbones.dinov2 import dinov2
from sgw_jax.backbones.dinov3 import dinov3
from sgw_jax.backbones.swin import swin
from sgw_jax.backbones.vit import vit

BACKBONES: dict[str, Callable[..., nn.Module]] = {
    "vit": vit,
    "dinov2": dinov2,
    "dinov3": dinov3,
    "swin": swin,
    "convnext": convnext,
}
