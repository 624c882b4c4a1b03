"""Whether a hub model's config.json is of the tensors that lie beside it, by their shapes alone."""

import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn

from sgw_jax.backbones.convnext import ConvNeXt
from sgw_jax.backbones.swin import Swin
from sgw_jax.backbones.tensors import PretrainedError
from sgw_jax.backbones.vit import ViT, hidden_width

PATCHES = "embeddings.patch_embeddings.projection"
Depths = dict[str, tuple[str, int]]  # key of config.json -> (pattern of its layers' names, their number)
Sizes = dict[str, tuple[str, tuple[int, ...]]]  # tensor -> (key of config.json that its shape tells of, shape)


def check_sizes(where: str, module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises where a size that config.json gives is not that of the file's tensors.

    What is made afterwards is then no larger than the file, whatever config.json says.

    Args:
      where: config.json, for messages.
      shapes: of the file's tensors, by their bare names.
    """
    depths, sizes = _sizes(module)
    wrong = []
    for key, (blocks, depth) in depths.items():
        there = {found[1] for name in shapes if (found := re.match(blocks, name))}
        if len(there) != depth:
            wrong.append(f"{key} is {depth}, but the file has {len(there)} layers")
    for name, (key, shape) in sizes.items():
        if name not in shapes:
            wrong.append(f"{name} is missing")
        elif shapes[name] != shape:
            wrong.append(f"by {key} {name} is {shape}, but in the file it is {shapes[name]}")
    if wrong:
        raise PretrainedError(f"{where} is not of the model that lies beside it: {'; '.join(wrong)}. Fetch both again.")


def _sizes(module: Any) -> tuple[Depths, Sizes]:
    if isinstance(module, Swin):
        return _swin_sizes(module)
    if isinstance(module, ConvNeXt):
        return _convnext_sizes(module)
    return _vit_sizes(module) if module.rope_theta is None else _dinov3_sizes(module)


def _vit_sizes(module: ViT) -> tuple[Depths, Sizes]:
    width, patch, hidden = module.width, module.patch_size, hidden_width(module.width, module.mlp_ratio)
    rows, columns = (size // patch for size in module.image_size)
    first, key = ("intermediate.dense", "intermediate_size") if module.layer_scale is None else ("mlp.fc1", "mlp_ratio")
    if module.gated:
        first, hidden = "mlp.weights_in", 2 * hidden
    sizes: Sizes = {
        "embeddings.cls_token": ("hidden_size", (1, 1, width)),
        f"{PATCHES}.weight": ("patch_size", (width, 3, patch, patch)),
        "embeddings.position_embeddings": ("image_size", (1, 1 + rows * columns, width)),
        f"encoder.layer.0.{first}.weight": (key, (hidden, width)),
    }
    if module.registers:
        sizes["embeddings.register_tokens"] = ("num_register_tokens", (1, module.registers, width))
    return {"num_hidden_layers": (r"encoder\.layer\.(\d+)\.", module.depth)}, sizes


def _dinov3_sizes(module: ViT) -> tuple[Depths, Sizes]:
    width, patch, hidden = module.width, module.patch_size, hidden_width(module.width, module.mlp_ratio)
    return {"num_hidden_layers": (r"layer\.(\d+)\.", module.depth)}, {
        "embeddings.cls_token": ("hidden_size", (1, 1, width)),
        "embeddings.patch_embeddings.weight": ("patch_size", (width, 3, patch, patch)),
        "embeddings.register_tokens": ("num_register_tokens", (1, module.registers, width)),
        "layer.0.mlp.up_proj.weight": ("intermediate_size", (hidden, width)),
    }


def _convnext_sizes(module: ConvNeXt) -> tuple[Depths, Sizes]:
    depths = {
        f"depths[{stage}]": (rf"stages\.{stage}\.layers\.(\d+)\.", depth) for stage, depth in enumerate(module.depths)
    }
    return depths, {"stages.0.downsample_layers.0.weight": ("hidden_sizes", (module.width, 3, 4, 4))}


def _swin_sizes(module: Swin) -> tuple[Depths, Sizes]:
    depths: Depths = {}
    sizes: Sizes = {f"{PATCHES}.weight": ("embed_dim", (module.width, 3, 4, 4))}
    offsets = (2 * module.window_size - 1) ** 2
    for stage, depth in enumerate(module.depths):
        width, at = module.width << stage, f"encoder.layers.{stage}.blocks.0."
        depths[f"depths[{stage}]"] = (rf"encoder\.layers\.{stage}\.blocks\.(\d+)\.", depth)
        table = ("window_size and num_heads", (offsets, module.num_heads[stage]))
        sizes[f"{at}attention.self.relative_position_bias_table"] = table
        sizes[f"{at}intermediate.dense.weight"] = ("mlp_ratio", (int(width * module.mlp_ratio), width))
    return depths, sizes
