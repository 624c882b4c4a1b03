"""The network of a configuration."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from sgw_jax.backbones import BACKBONES
from sgw_jax.backbones.freezing import Freezing
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.experiment.checks import check_config
from sgw_jax.experiment.choice import taken
from sgw_jax.interactions import INTERACTIONS
from sgw_jax.layers.lora import LoRA
from sgw_jax.layers.placement import Placement
from sgw_jax.model import MultiTaskModel
from sgw_jax.sharding import BATCH, CONTEXT
from sgw_jax.tasks.base import Task


def build_model(
    config: ConfigDict, tasks: Sequence[Task], trained_size: tuple[int, int] | None = None
) -> MultiTaskModel:
    """The network for images of `config.data.size`, or with the parameters of one that was trained at another size."""
    check_config(config)
    dtype = getattr(jnp, config.dtype)
    overrides = {key: value for key, value in config.backbones[config.backbone].items() if value is not None}
    interaction = INTERACTIONS[config.interaction]
    # An interaction with a `placement` works shard by shard where the mesh has such axes; the others are left to the
    # partitioner. Not strict: under somebody's own mesh a trained network is an ordinary one.
    placed = taken(interaction, {"placement": Placement(BATCH, CONTEXT, strict=False)})
    height, width = config.data.size if trained_size is None else trained_size
    seen = round(height * config.input_scale), round(width * config.input_scale)
    backbone = BACKBONES[config.backbone](image_size=seen, dtype=dtype, **overrides)
    _check_fits(config, backbone, seen)
    lora = build_lora(config)
    return MultiTaskModel(
        tasks=tuple(tasks),
        backbone=_frozen(config, backbone, lora),
        interaction=interaction(dtype=dtype, **placed, **config.interactions[config.interaction]),
        channels=config.channels,
        input_scale=config.input_scale,
        stride=config.stride,
        scales=tuple(config.scales),
        persist=config.persist,
        upsample=config.upsample,
        preliminary=config.preliminary,
        dtype=dtype,
        lora=lora,
    )


def _frozen(config: ConfigDict, backbone: Any, lora: LoRA | None) -> Any:
    """The backbone, told of how many of its lowest blocks no gradient is asked."""
    layers = config.optimizer.get("frozen_layers", 0)  # no key in checkpoints of earlier releases
    if config.optimizer.backbone_scale == 0 and lora is None:  # with LoRA gradients go down to the lowest factors
        layers = getattr(backbone, "num_layers", 0)
    if not layers:
        return backbone
    if not hasattr(backbone, "frozen_layers"):
        raise InputError(
            f"config.optimizer.frozen_layers is {layers}; it must be 0, as {config.backbone} has no such attribute."
        )
    return backbone.clone(frozen_layers=layers)


def build_lora(config: ConfigDict) -> LoRA | None:
    """The low-rank updates of the backbone; None without `config.lora.rank`."""
    options = config.get("lora")  # no key in checkpoints of earlier releases
    if options is None or options.rank is None:
        scale = config.optimizer.get("lora_scale", 1.0)
        if scale != 1:
            raise InputError(
                f"config.optimizer.lora_scale is {scale}, the rate of LoRA's factors, of which there are none: leave "
                "it at 1, or set config.lora.rank."
            )
        return None
    if config.optimizer.backbone_scale not in (0, 1) or config.optimizer.layer_decay != 1:
        raise InputError(
            f"config.lora freezes the pretrained layers, so that config.optimizer.backbone_scale "
            f"({config.optimizer.backbone_scale}) and layer_decay ({config.optimizer.layer_decay}) have nothing to "
            "scale; leave them at 1, or set config.lora.rank=None. The factors' rate is config.optimizer.lora_scale."
        )
    return LoRA(options.rank, options.alpha, tuple(options.targets))


def build_freezing(config: ConfigDict) -> Freezing | None:
    """Which parameters learn; None is all of them."""
    found = Freezing(
        config.optimizer.get("frozen_layers", 0),
        pretrained=config.optimizer.backbone_scale == 0 or build_lora(config) is not None,
    )
    return None if found == Freezing() else found


def _check_fits(config: ConfigDict, backbone: Any, seen: tuple[int, int]) -> None:
    """Raises where the image or the strides of the features do not go with what the backbone takes and gives."""
    if min(seen) < 1:
        size = " x ".join(map(str, config.data.size))
        raise InputError(
            f"config.data.size is {size}, by config.input_scale {config.input_scale} {seen[0]} x {seen[1]}; "
            f"{config.backbone} must see a pixel at least."
        )
    strides = getattr(backbone, "strides", None)  # a user's own need not say them
    if strides is not None and config.stride not in strides:
        raise InputError(f"config.stride is {config.stride}; it must be one of {config.backbone}'s, {list(strides)}.")
    coarser = [stride for stride in strides or config.scales if stride > config.stride]
    if len(set(config.scales)) < len(config.scales) or not set(config.scales) <= set(coarser):
        raise InputError(
            f"config.scales are {tuple(config.scales)}; they must be different strides above config.stride = "
            f"{config.stride}, of {coarser}."
        )
