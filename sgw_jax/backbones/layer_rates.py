"""Learning rates of a pretrained backbone: one factor for all of it, decay from layer to layer, and LoRA's own."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.layers.parameter_names import in_backbone, is_added, is_lora, layers_of, stage_depths
from sgw_jax.sharding import path_name


def scale_by_layer(scale: float, decay: float) -> optax.GradientTransformation:
    """Multiplies updates of the backbone by ``scale decay^(N + 1 - l)`` (Clark et al. 2020; Bao et al. 2022, BEiT).

    N is the backbone's number of blocks and l a parameter's layer: 0 for the patches, class token, registers and
    position embedding, 1 to N for the blocks, N + 1 for the final norm; a Swin's merging belongs to the block before
    it, a ConvNeXt's downsampling to the one behind it, as in its authors' code. Scanned stacks, whose first axis is the
    layer, get a factor for each slice. What the library adds to the backbone (`is_added`), and everything outside it,
    keeps its updates.

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
        inside = ((in_backbone(path_name(path)), leaf.shape) for path, leaf in leaves)
        depths = stage_depths({path: shape for path, shape in inside if path is not None})

        def rescale(path: Any, leaf: Array) -> Array:
            name = in_backbone(path_name(path))
            if name is None or is_added(name):
                return leaf
            above = sum(depths.values()) + 1 - jnp.asarray(layers_of(name, depths), jnp.float32)
            factors = scale * decay**above
            return leaf * factors.reshape(factors.shape + (1,) * (leaf.ndim - factors.ndim)).astype(leaf.dtype)

        return jax.tree_util.tree_map_with_path(rescale, updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def scale_lora(scale: float) -> optax.GradientTransformation:
    """Multiplies updates of LoRA's factors, wherever they are, by ``scale`` (our decision: Hayou et al. 2024, LoRA+,
    scale B's alone).

    Raises:
      ValueError: a scale that is not positive.
    """
    if not 0 < scale < math.inf:
        raise InputError(f"optimizer: lora_scale is {scale}; it must be positive.")

    def rescale(path: Any, leaf: Array) -> Array:
        return leaf * jnp.asarray(scale, leaf.dtype) if is_lora(path_name(path)) else leaf

    return optax.stateless(lambda updates, params: jax.tree_util.tree_map_with_path(rescale, updates))
