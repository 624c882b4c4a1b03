"""Models of the hub by model_type: config.json -> (module, usual normalisation, tensors -> parameters)."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

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
    _refuse(where, config, {"num_channels": 3, "qkv_bias": True, "use_swiglu_ffn": False})
    dinov2 = config["model_type"] == "dinov2"
    width = _number(where, config, "hidden_size")
    patch, depth = _number(where, config, "patch_size"), _number(where, config, "num_hidden_layers")
    size, heads = _number(where, config, "image_size"), _number(where, config, "num_attention_heads")
    if width % heads:
        raise PretrainedError(f"{where}: hidden_size {width} does not divide into num_attention_heads = {heads}.")
    module = ViT(
        patch_size=patch,
        width=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=_positive(where, config, "mlp_ratio", 4)
        if dinov2
        else _number(where, config, "intermediate_size") / width,
        image_size=(size, size),
        class_token=True,
        layer_scale=1.0 if dinov2 else None,
        approximate_gelu=_approximate(where, config),
        epsilon=_positive(where, config, "layer_norm_eps", 1e-6 if dinov2 else 1e-12),
        tapped=None if depth % 4 == 0 else tuple(range(1, depth + 1)),
        output="taps",
    )
    return module, IMAGENET if dinov2 else HALF, lambda take: _vit_params(take, module)


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
            "mlp": {
                "hidden": take.dense(at + first, width, hidden),
                "output": take.dense(at + second, hidden, width),
            },
        }
        if dinov2:
            made |= {f"scale{i}": take(f"{at}layer_scale{i}.lambda1", (width,)) for i in (1, 2)}
        return made

    rows, columns = (size // module.patch_size for size in module.image_size)
    positions = take("embeddings.position_embeddings", (1, 1 + rows * columns, width))
    return {
        "patch_embed": {"projection": take.patches(PATCHES, module.patch_size, width)},
        "class_token": take("embeddings.cls_token", (1, 1, width)) + positions[:, :1],
        "position_embedding": positions[:, 1:].reshape(1, rows, columns, width),
        "blocks": stacked([block(index) for index in range(module.depth)]),
        "norm": take.norm("layernorm", width),
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


def check_sizes(where: str, module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises where a size that config.json gives is not that of the file's tensors.

    What is made afterwards is then no larger than the file, whatever config.json says.

    Args:
      where: config.json, for messages.
      shapes: of the file's tensors, by their bare names.
    """
    depths, sizes = _swin_sizes(module) if isinstance(module, Swin) else _vit_sizes(module)
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


def _vit_sizes(module: Any) -> tuple[Depths, Sizes]:
    width, patch = module.width, module.patch_size
    rows, columns = (size // patch for size in module.image_size)
    first, key = ("intermediate.dense", "intermediate_size") if module.layer_scale is None else ("mlp.fc1", "mlp_ratio")
    return {"num_hidden_layers": (r"encoder\.layer\.(\d+)\.", module.depth)}, {
        "embeddings.cls_token": ("hidden_size", (1, 1, width)),
        f"{PATCHES}.weight": ("patch_size", (width, 3, patch, patch)),
        "embeddings.position_embeddings": ("image_size", (1, 1 + rows * columns, width)),
        f"encoder.layer.0.{first}.weight": (key, (hidden_width(width, module.mlp_ratio), width)),
    }


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
