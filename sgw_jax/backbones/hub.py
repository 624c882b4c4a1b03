"""Models of the hub by model_type: config.json -> (module, usual normalisation, tensors -> parameters)."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import numpy as np

from sgw_jax.backbones.convnext import EPSILON as CONVNEXT_EPSILON
from sgw_jax.backbones.convnext import WINDOW, ConvNeXt
from sgw_jax.backbones.dinov3 import EPSILON as DINOV3_EPSILON
from sgw_jax.backbones.dinov3 import THETA
from sgw_jax.backbones.hub_fields import approximate, number, positive, refuse, stages, switch
from sgw_jax.backbones.hub_sizes import PATCHES
from sgw_jax.backbones.swin import EPSILON as SWIN_EPSILON
from sgw_jax.backbones.swin import Swin
from sgw_jax.backbones.tensors import PretrainedError, Tensors, stacked
from sgw_jax.backbones.vit import ViT, hidden_width
from sgw_jax.data_pipelines.errors import InputError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of the channels, of 0..1
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def vit_family(where: str, config: Mapping[str, Any], names: set[str]) -> tuple[nn.Module, Any, Callable]:
    refuse(where, config, {"num_channels": 3, "qkv_bias": True})
    dinov2 = config["model_type"] != "vit"
    if dinov2:
        ratio, gated = positive(where, config, "mlp_ratio", 4), switch(where, config, "use_swiglu_ffn")
        if gated:  # two thirds of the plain MLP's hidden units, in multiples of 8
            width = number(where, config, "hidden_size")
            ratio = (int(int(width * ratio) * 2 / 3) + 7) // 8 * 8 / width
        special: dict[str, Any] = {"mlp_ratio": ratio, "gated": gated, "layer_scale": 1.0}
    else:
        special = {"mlp_ratio": number(where, config, "intermediate_size") / number(where, config, "hidden_size")}
    if config["model_type"] == "dinov2_with_registers":
        special |= {"registers": number(where, config, "num_register_tokens"), "antialias": True}
    size = number(where, config, "image_size")
    module = ViT(
        **_common(where, config),
        **special,
        image_size=(size, size),
        approximate_gelu=approximate(where, config),
        epsilon=positive(where, config, "layer_norm_eps", 1e-6 if dinov2 else 1e-12),
    )
    return module, IMAGENET if dinov2 else HALF, lambda take: _vit_params(take, module)


def _common(where: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What all ViTs have in common."""
    width, heads = number(where, config, "hidden_size"), number(where, config, "num_attention_heads")
    if width % heads:
        raise PretrainedError(f"{where}: hidden_size {width} does not divide into num_attention_heads = {heads}.")
    depth = number(where, config, "num_hidden_layers")
    return {
        "patch_size": number(where, config, "patch_size"),
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
    refuse(where, config, {"num_channels": 3, "key_bias": False, "proj_bias": True, "mlp_bias": True})
    biased = switch(where, config, "query_bias", True)
    refuse(where, config, {"value_bias": biased})
    gated = switch(where, config, "use_gated_mlp")
    if gated:
        refuse(where, config, {"hidden_act": "silu"})
    common = _common(where, config)
    if common["width"] // common["num_heads"] % 4:
        raise PretrainedError(f"{where}: the width of a head, hidden_size / num_attention_heads, must divide by 4.")
    module = ViT(
        **common,
        mlp_ratio=number(where, config, "intermediate_size") / common["width"],
        layer_scale=1.0,
        approximate_gelu=not gated and approximate(where, config),
        epsilon=positive(where, config, "layer_norm_eps", DINOV3_EPSILON),
        rope_theta=positive(where, config, "rope_theta", THETA),
        registers=number(where, config, "num_register_tokens"),
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
    refuse(where, config, {**needed, "layer_norm_eps": SWIN_EPSILON})
    if approximate(where, config):
        raise PretrainedError(f"{where}: hidden_act is {config['hidden_act']!r}; a Swin must have 'gelu'.")
    module = Swin(
        width=number(where, config, "embed_dim"),
        depths=stages(where, config, "depths"),
        num_heads=stages(where, config, "num_heads"),
        window_size=number(where, config, "window_size"),
        mlp_ratio=positive(where, config, "mlp_ratio", 4.0),
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
    refuse(where, config, {"num_channels": 3, "hidden_act": "gelu", "layer_norm_eps": CONVNEXT_EPSILON})
    widths, depths = stages(where, config, "hidden_sizes"), stages(where, config, "depths")
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


FAMILIES: dict[str, Callable[..., tuple[nn.Module, Any, Callable]]] = {
    "swin": swin_family,
    "vit": vit_family,
    "dinov2": vit_family,
    "dinov2_with_registers": vit_family,
    "dinov3_vit": dinov3_family,
    "dinov3_convnext": convnext_family,
}
