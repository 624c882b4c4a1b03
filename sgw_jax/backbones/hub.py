"""Models of the hub by model_type: config.json -> (module, usual normalisation, tensors -> parameters)."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from sgw_jax.backbones.convnext import EPSILON as CONVNEXT_EPSILON
from sgw_jax.backbones.convnext import WINDOW, ConvNeXt
from sgw_jax.backbones.dinov3 import EPSILON as DINOV3_EPSILON
from sgw_jax.backbones.dinov3 import THETA
from sgw_jax.backbones.swin import EPSILON as SWIN_EPSILON
from sgw_jax.backbones.swin import Swin
from sgw_jax.backbones.tensors import PretrainedError, Tensors, stacked
from sgw_jax.backbones.vit import ViT, hidden_width
from sgw_jax.data_pipelines.errors import InputError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of the channels, of 0..1
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
PATCHES = "embeddings.patch_embeddings.projection"
LARGEST = 2**20  # of any number of config.json, far beyond every model
Depths = dict[str, tuple[str, int]]  # key of config.json -> (pattern of its layers' names, their number)
Sizes = dict[str, tuple[str, tuple[int, ...]]]  # tensor -> (key of config.json that its shape tells of, shape)


def vit_family(where: str, config: Mapping[str, Any], names: set[str]) -> tuple[nn.Module, Any, Callable]:
    _refuse(where, config, {"num_channels": 3, "qkv_bias": True})
    dinov2 = config["model_type"] != "vit"
    if dinov2:
        ratio, gated = _positive(where, config, "mlp_ratio", 4), _switch(where, config, "use_swiglu_ffn")
        if gated:  # two thirds of the plain MLP's hidden units, in multiples of 8
            width = _number(where, config, "hidden_size")
            ratio = (int(int(width * ratio) * 2 / 3) + 7) // 8 * 8 / width
        special: dict[str, Any] = {"mlp_ratio": ratio, "gated": gated, "layer_scale": 1.0}
    else:
        special = {"mlp_ratio": _number(where, config, "intermediate_size") / _number(where, config, "hidden_size")}
    if config["model_type"] == "dinov2_with_registers":
        special |= {"registers": _number(where, config, "num_register_tokens"), "antialias": True}
    size = _number(where, config, "image_size")
    module = ViT(
        **_common(where, config),
        **special,
        image_size=(size, size),
        approximate_gelu=_approximate(where, config),
        epsilon=_positive(where, config, "layer_norm_eps", 1e-6 if dinov2 else 1e-12),
    )
    return module, IMAGENET if dinov2 else HALF, lambda take: _vit_params(take, module)


def _common(where: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What all ViTs have in common."""
    width, heads = _number(where, config, "hidden_size"), _number(where, config, "num_attention_heads")
    if width % heads:
        raise PretrainedError(f"{where}: hidden_size {width} does not divide into num_attention_heads = {heads}.")
    depth = _number(where, config, "num_hidden_layers")
    return {
        "patch_size": _number(where, config, "patch_size"),
        "width": width,
        "depth": depth,
        "num_heads": heads,
        "class_token": True,
        "tapped": None if depth % 4 == 0 else tuple(range(1, depth + 1)),
        "output": "taps",
    }


def _vit_params(take: "Tensors", module: ViT) -> dict[str, Any]:
    width, hidden = module.width, hidden_width(module.width, module.mlp_ratio)
    dinov2 = module.layer_scale is not None
    norm1, norm2 = ("norm1", "norm2") if dinov2 else ("layernorm_before", "layernorm_after")
    first, second = ("mlp.fc1", "mlp.fc2") if dinov2 else ("intermediate.dense", "output.dense")

    def block(index: int) -> dict[str, Any]:
        at = f"encoder.layer.{index}."
        made = {
            "norm1": take.norm(at + norm1, width),
            "norm2": take.norm(at + norm2, width),
            "attention": {
                "query_key_value": take.joined(at + "attention.attention.", width),
                "output": take.dense(at + "attention.output.dense", width, width),
            },
            "mlp": _gated_mlp(take, f"{at}mlp.", width, hidden)
            if module.gated
            else {
                "hidden": take.dense(at + first, width, hidden),
                "output": take.dense(at + second, hidden, width),
            },
        }
        if dinov2:
            made |= {f"scale{i}": take(f"{at}layer_scale{i}.lambda1", (width,)) for i in (1, 2)}
        return made

    rows, columns = (size // module.patch_size for size in module.image_size)
    positions = take("embeddings.position_embeddings", (1, 1 + rows * columns, width))
    params = {
        "patch_embed": {"projection": take.patches(PATCHES, module.patch_size, width)},
        "class_token": take("embeddings.cls_token", (1, 1, width)) + positions[:, :1],
        "position_embedding": positions[:, 1:].reshape(1, rows, columns, width),
        "blocks": stacked([block(index) for index in range(module.depth)]),
        "norm": take.norm("layernorm", width),
    }
    if module.registers:
        params["register_tokens"] = take("embeddings.register_tokens", (1, module.registers, width))
    return params


def _gated_mlp(take: "Tensors", at: str, width: int, hidden: int) -> dict[str, Any]:
    """DINOv2's, with the gate's matrix above the other's."""
    both = take.dense(f"{at}weights_in", width, 2 * hidden)
    parts = {key: np.split(value, 2, -1) for key, value in both.items()}
    gate, plain = ({key: halves[i] for key, halves in parts.items()} for i in (0, 1))
    return {"gate": gate, "hidden": plain, "output": take.dense(f"{at}weights_out", hidden, width)}


def dinov3_family(where: str, config: Mapping[str, Any], names: set[str]) -> tuple[nn.Module, Any, Callable]:
    _refuse(where, config, {"num_channels": 3, "key_bias": False, "proj_bias": True, "mlp_bias": True})
    biased = _switch(where, config, "query_bias", True)
    _refuse(where, config, {"value_bias": biased})
    gated = _switch(where, config, "use_gated_mlp")
    if gated:
        _refuse(where, config, {"hidden_act": "silu"})
    common = _common(where, config)
    if common["width"] // common["num_heads"] % 4:
        raise PretrainedError(f"{where}: the width of a head, hidden_size / num_attention_heads, must divide by 4.")
    module = ViT(
        **common,
        mlp_ratio=_number(where, config, "intermediate_size") / common["width"],
        layer_scale=1.0,
        approximate_gelu=not gated and _approximate(where, config),
        epsilon=_positive(where, config, "layer_norm_eps", DINOV3_EPSILON),
        rope_theta=_positive(where, config, "rope_theta", THETA),
        registers=_number(where, config, "num_register_tokens"),
        gated=gated,
        qkv_bias="query_value" if biased else "none",
    )
    return module, IMAGENET, lambda take: _dinov3_params(take, module)


def _dinov3_params(take: "Tensors", module: ViT) -> dict[str, Any]:
    width, hidden = module.width, hidden_width(module.width, module.mlp_ratio)
    mlp = {"hidden": "up_proj", **({"gate": "gate_proj"} if module.gated else {})}

    def block(index: int) -> dict[str, Any]:
        at = f"layer.{index}."
        kernels = [take(f"{at}attention.{name}_proj.weight", (width, width)).T for name in "qkv"]
        attention: dict[str, Any] = {
            "query_key_value": {"kernel": np.concatenate(kernels, -1)},
            "output": take.dense(f"{at}attention.o_proj", width, width),
        }
        if module.qkv_bias == "query_value":
            biases = [take(f"{at}attention.{name}_proj.bias", (width,)) for name in "qv"]
            attention["query_value_bias"] = np.stack(biases)
        return {
            **{f"norm{i}": take.norm(f"{at}norm{i}", width) for i in (1, 2)},
            **{f"scale{i}": take(f"{at}layer_scale{i}.lambda1", (width,)) for i in (1, 2)},
            "attention": attention,
            "mlp": {
                **{ours: take.dense(f"{at}mlp.{theirs}", width, hidden) for ours, theirs in mlp.items()},
                "output": take.dense(f"{at}mlp.down_proj", hidden, width),
            },
        }

    return {
        "patch_embed": {"projection": take.patches("embeddings.patch_embeddings", module.patch_size, width)},
        "class_token": take("embeddings.cls_token", (1, 1, width)),
        "register_tokens": take("embeddings.register_tokens", (1, module.registers, width)),
        "blocks": stacked([block(index) for index in range(module.depth)]),
        "norm": take.norm("norm", width),
    }


def swin_family(where: str, config: Mapping[str, Any], names: set[str]) -> tuple[nn.Module, Any, Callable]:
    needed = {"num_channels": 3, "qkv_bias": True, "use_absolute_embeddings": False, "patch_size": 4}
    _refuse(where, config, {**needed, "layer_norm_eps": SWIN_EPSILON})
    if _approximate(where, config):
        raise PretrainedError(f"{where}: hidden_act is {config['hidden_act']!r}; a Swin must have 'gelu'.")
    module = Swin(
        width=_number(where, config, "embed_dim"),
        depths=_stages(where, config, "depths"),
        num_heads=_stages(where, config, "num_heads"),
        window_size=_number(where, config, "window_size"),
        mlp_ratio=_positive(where, config, "mlp_ratio", 4.0),
        output_norms=any(name.startswith("hidden_states_norms.") for name in names),
    )
    try:
        module.check()
    except InputError as error:
        raise PretrainedError(f"{where}: {error}") from error
    return module, IMAGENET, lambda take: _swin_params(take, module)


def _swin_params(take: "Tensors", module: Swin) -> dict[str, Any]:
    offsets = (2 * module.window_size - 1) ** 2

    def block(stage: int, index: int) -> dict[str, Any]:
        at, width = f"encoder.layers.{stage}.blocks.{index}.", module.width << stage
        hidden = int(width * module.mlp_ratio)
        table = take(at + "attention.self.relative_position_bias_table", (offsets, module.num_heads[stage]))
        return {
            "norm1": take.norm(at + "layernorm_before", width),
            "norm2": take.norm(at + "layernorm_after", width),
            "attention": {
                "query_key_value": take.joined(at + "attention.self.", width),
                "output": take.dense(at + "attention.output.dense", width, width),
                "relative_position_bias_table": table,
            },
            "mlp": {
                "hidden": take.dense(at + "intermediate.dense", width, hidden),
                "output": take.dense(at + "output.dense", hidden, width),
            },
        }

    params = {
        "patch_embed": {"projection": take.patches(PATCHES, 4, module.width)},
        "patch_norm": take.norm("embeddings.norm", module.width),
    }
    for stage, depth in enumerate(module.depths):
        width = module.width << stage
        pairs = range(0, depth, 2)
        params[f"stage{stage + 1}"] = stacked(
            [{"regular": block(stage, first), "shifted": block(stage, first + 1)} for first in pairs]
        )
        if stage + 1 < len(module.depths):
            at = f"encoder.layers.{stage}.downsample."
            kernel = take(at + "reduction.weight", (2 * width, 4 * width)).T
            params[f"merge{stage + 1}"] = {"norm": take.norm(at + "norm", 4 * width), "reduction": {"kernel": kernel}}
        if module.output_norms:
            params[f"norm_stage{stage + 1}"] = take.norm(f"hidden_states_norms.stage{stage + 1}", width)
    # The classifier's final norm, which is no part of the maps.
    take.ignore("layernorm.weight", "layernorm.bias")
    return params


def convnext_family(where: str, config: Mapping[str, Any], names: set[str]) -> tuple[nn.Module, Any, Callable]:
    _refuse(where, config, {"num_channels": 3, "hidden_act": "gelu", "layer_norm_eps": CONVNEXT_EPSILON})
    widths, depths = _stages(where, config, "hidden_sizes"), _stages(where, config, "depths")
    if len(depths) != 4 or widths != tuple(widths[0] << stage for stage in range(4)):
        raise PretrainedError(
            f"{where}: hidden_sizes {list(widths)} and depths {list(depths)} must be of four stages, each twice as "
            "wide as the one before."
        )
    module = ConvNeXt(widths[0], depths, output="taps", final_norm="layer_norm.weight" in names)
    return module, IMAGENET, lambda take: _convnext_params(take, module)


def _convnext_params(take: "Tensors", module: ConvNeXt) -> dict[str, Any]:
    def block(stage: int, index: int) -> dict[str, Any]:
        at, width = f"stages.{stage}.layers.{index}.", module.width << stage
        kernel = take(f"{at}depthwise_conv.weight", (width, 1, WINDOW, WINDOW)).transpose(2, 3, 1, 0)
        return {
            "depthwise": {"kernel": kernel, "bias": take(f"{at}depthwise_conv.bias", (width,))},
            "norm": take.norm(f"{at}layer_norm", width),
            "mlp": {
                "hidden": take.dense(f"{at}pointwise_conv1", width, 4 * width),
                "output": take.dense(f"{at}pointwise_conv2", 4 * width, width),
            },
            "scale": take(f"{at}gamma", (width,)),
        }

    params = {
        "patch_embed": {"projection": take.patches("stages.0.downsample_layers.0", 4, module.width)},
        "patch_norm": take.norm("stages.0.downsample_layers.1", module.width),
    }
    for stage, depth in enumerate(module.depths):
        width, at = module.width << stage, f"stages.{stage}.downsample_layers."
        if stage:
            projection = take.patches(f"{at}1", 2, width, width // 2)
            params[f"downsample{stage}"] = {"norm": take.norm(f"{at}0", width // 2), "projection": projection}
        params[f"stage{stage + 1}"] = stacked([block(stage, index) for index in range(depth)])
    if module.final_norm:
        params["norm"] = take.norm("layer_norm", module.width << 3)
    return params


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


FAMILIES: dict[str, Callable[..., tuple[nn.Module, Any, Callable]]] = {
    "swin": swin_family,
    "vit": vit_family,
    "dinov2": vit_family,
    "dinov2_with_registers": vit_family,
    "dinov3_vit": dinov3_family,
    "dinov3_convnext": convnext_family,
}


def _number(where: str, config: Mapping[str, Any], key: str) -> int:
    value: Any = config.get(key)
    if isinstance(value, list) and value and all(item == value[0] for item in value):
        value = value[0]
    if not _whole(value):
        raise PretrainedError(f"{where}: {key} is {value!r}; it must be a positive whole number, at most {LARGEST}.")
    return value


def _stages(where: str, config: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = config.get(key)
    if not isinstance(value, list) or not all(map(_whole, value)):
        raise PretrainedError(
            f"{where}: {key} is {value!r}; it must be a list of positive whole numbers, at most {LARGEST}."
        )
    return tuple(value)


def _positive(where: str, config: Mapping[str, Any], key: str, default: float) -> float:
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= LARGEST:
        raise PretrainedError(f"{where}: {key} is {value!r}; it must be a positive number, at most {LARGEST}.")
    return value


def _switch(where: str, config: Mapping[str, Any], key: str, default: bool = False) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise PretrainedError(f"{where}: {key} is {value!r}; it must be true or false.")
    return value


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST


def _refuse(where: str, config: Mapping[str, Any], needed: Mapping[str, Any]) -> None:
    for key, value in needed.items():
        if config.get(key, value) != value:
            raise PretrainedError(f"{where}: {key} is {config[key]!r}; only {value!r} is supported.")


def _approximate(where: str, config: Mapping[str, Any]) -> bool:
    kinds = {"gelu": False, "gelu_new": True, "gelu_pytorch_tanh": True}
    name = config.get("hidden_act", "gelu")
    if name not in list(kinds):  # in a file it may be anything, and not hashable
        raise PretrainedError(f"{where}: hidden_act is {name!r}; it must be one of {list(kinds)}.")
    return kinds[name]
