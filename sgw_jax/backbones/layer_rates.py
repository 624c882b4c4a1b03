"""Learning rates of a pretrained backbone: one factor for all of it, and decay from layer to layer."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.sharding import path_name

PREFIX = "backbone/"

# What a model adds to a backbone: at its initial values even where the rest is pretrained.
ADDED = re.compile(r"^(pyramid|lateral|norm_stage)")


def scale_by_layer(scale: float, decay: float) -> optax.GradientTransformation:
    """Multiplies updates of the backbone by ``scale decay^(N + 1 - l)`` (Clark et al. 2020; Bao et al. 2022, BEiT).

    N is the backbone's number of blocks and l a parameter's layer: 0 for the patches, class token and position
    embedding, 1 to N for the blocks, N + 1 for the final norm; a Swin's merging belongs to the block before it. Scanned
    stacks, whose first axis is the layer, get a factor for each slice. Layers of `ADDED`, and everything outside the
    backbone, keep their updates.

    Raises:
      ValueError: scale < 0, or decay outside (0, 1].
    """
    if not scale >= 0:
        raise InputError(f"optimizer: backbone_scale is {scale}; it must not be negative.")
    if not 0 < decay <= 1:
        raise InputError(f"optimizer: layer_decay is {decay}; it must be in (0, 1].")

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        leaves = jax.tree_util.tree_leaves_with_path(updates)
        depths = stage_depths({path_name(path): leaf.shape for path, leaf in leaves})

        def rescale(path: Any, leaf: Array) -> Array:
            name = path_name(path)
            if not name.startswith(PREFIX) or ADDED.match(name.removeprefix(PREFIX)):
                return leaf
            layers = layers_of(name, depths)
            above = sum(depths.values()) + 1 - jnp.asarray(layers, jnp.float32)
            factors = scale * decay**above
            return leaf * factors.reshape(factors.shape + (1,) * (leaf.ndim - factors.ndim)).astype(leaf.dtype)

        return jax.tree_util.tree_map_with_path(rescale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def stage_depths(shapes: dict[str, tuple[int, ...]]) -> dict[int, int]:
    """Stage -> its number of blocks: {0: depth} of a ViT, {1: ..., 2: ..., 3: ..., 4: ...} of a Swin."""
    depths: dict[int, int] = {}
    for name, shape in shapes.items():
        if name.startswith(f"{PREFIX}blocks/"):
            depths[0] = shape[0]
        elif stage := re.match(rf"{PREFIX}stage(\d)/", name):
            depths[int(stage[1])] = 2 * shape[0]  # pairs
    return depths


def layers_of(name: str, depths: dict[int, int]) -> int | list[int]:
    """A parameter's layer; of a stack the layers along its first axis."""
    tail = name.removeprefix(PREFIX)
    before = {stage: sum(depth for other, depth in depths.items() if other < stage) for stage in depths}
    if tail.startswith("blocks/"):
        return list(range(1, depths[0] + 1))
    if stage := re.match(r"stage(\d)/(regular|shifted)/", tail):
        first = before[int(stage[1])] + (1 if stage[2] == "regular" else 2)
        return list(range(first, first + depths[int(stage[1])], 2))
    if merge := re.match(r"merge(\d)/", tail):
        return before[int(merge[1]) + 1]
    return sum(depths.values()) + 1 if tail.startswith("norm/") else 0
