"""What a configuration must be before anything is read, rendered, compiled or written: each key, and keys together."""

from collections.abc import Sequence

from ml_collections import ConfigDict

from sgw_jax.backbones.dinov2 import SIZES as DINOV2S
from sgw_jax.backbones.dinov3 import SIZES as DINOV3S
from sgw_jax.backbones.vit import SIZES as VITS
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.experiment.data_sets import DATA_SETS
from sgw_jax.experiment.keys import check_keys
from sgw_jax.multi_objective import SCALARIZERS
from sgw_jax.sharding import read_rules
from sgw_jax.tasks.base import Task


def check_config(config: ConfigDict) -> None:
    """Raises for the first key out of its range (keys.py), then for keys that do not go together.

    Raises:
      InputError: names the keys, their values and what is allowed.
    """
    check_keys(config)
    DATA_SETS[config.data.source].check(config)
    read_rules(config.mesh.get("rules"))  # no key in checkpoints of earlier releases
    _check_steps(config)
    _check_depths(config)
    _check_objective(config)
    _check_interaction(config)
    _check_backbone(config)


def check_tasks(config: ConfigDict, tasks: Sequence[Task]) -> None:
    """Raises where the tasks, a user's own among them, do not go with the configuration."""
    names = [task.name for task in tasks]
    if tasks and not any(task.weight for task in tasks):
        raise InputError(f"config.task_weights are 0 for all of the tasks {names}; at least one must be positive.")
    ratio = config.augment.cat_max_ratio
    if ratio is not None and not any(task.balances_crops for task in tasks):
        raise InputError(
            f"config.augment.cat_max_ratio is {ratio}, but none of the tasks {names} has classes to balance crops by; "
            "set it to None."
        )


def _check_steps(config: ConfigDict) -> None:
    if config.eval_every % config.checkpoint_every:
        raise InputError(
            f"config.eval_every is {config.eval_every}; it must be a multiple of config.checkpoint_every = "
            f"{config.checkpoint_every}, because the best checkpoint is chosen by evaluation."
        )
    within = {"schedule.warmup_steps": config.schedule.warmup_steps, "profile_after": config.profile_after}
    for key, value in within.items():
        if value is not None and value >= config.steps:
            raise InputError(f"config.{key} is {value}; it must be less than config.steps = {config.steps}.")


def _check_depths(config: ConfigDict) -> None:
    depth = config.get("metric_options", {}).get("depth", {})
    least, most = depth.get("min_depth"), depth.get("max_depth")
    if least is not None and most is not None and least >= most:
        raise InputError(f"config.metric_options.depth.min_depth is {least}; it must be less than max_depth = {most}.")


def _check_objective(config: ConfigDict) -> None:
    """A scalariser takes one gradient of all tasks, so that there are no weights of gradients to treat."""
    if config.objective not in SCALARIZERS:
        return
    for key, needed in (("gradients", "parameters"), ("weights_ema", None), ("weights_every", 1)):
        if config[key] != needed:
            raise InputError(
                f"config.{key} is {config[key]!r}, but config.objective {config.objective!r} takes one gradient of all "
                f"tasks: it must be {needed!r}."
            )


def _check_interaction(config: ConfigDict) -> None:
    """Heads divide the widths that they split, and a simplex has room for its vertices."""
    name, channels = f"config.interactions.{config.interaction}", config.channels
    options = config.interactions.get(config.interaction, {})
    _check_divides(f"{name}.num_heads", options.get("num_heads"), "config.channels", channels)
    _check_divides(f"{name}.num_heads", options.get("num_heads"), f"{name}.slot_dim", options.get("slot_dim"))
    vertices = options.get("etf_vertices")
    if vertices is not None and vertices > channels + 1:
        raise InputError(
            f"{name}.etf_vertices is {vertices}; it must be at most config.channels + 1 = {channels + 1}, as a simplex "
            "of so many vertices needs a dimension less."
        )
    if options.get("projection", "etf") != "etf" and vertices is None:
        raise InputError(
            f"{name}.projection is {options.projection!r}, but etf_vertices is None; it must be the number of vertices "
            "whose rank the projection is to have."
        )


def _check_backbone(config: ConfigDict) -> None:
    """What the sizes of a ViT must be; the others say themselves what does not fit."""
    name, options = f"config.backbones.{config.backbone}", config.backbones.get(config.backbone, {})
    sizes = {"vit": VITS, "dinov2": DINOV2S, "dinov3": DINOV3S}
    if config.backbone not in sizes:
        return
    size = sizes[config.backbone][options.size]
    if options.depth is not None and options.depth % 4:
        raise InputError(f"{name}.depth is {options.depth}; it must be a multiple of 4: four layers are tapped.")
    width, heads = options.width or size.width, options.num_heads or size.num_heads
    _check_divides(f"{name}.num_heads", heads, f"{name}.width", width)
    if config.backbone == "dinov3" and width % (4 * heads):
        raise InputError(f"{name}: the width of a head, {width} / {heads}, must be a multiple of 4 (rotary positions).")
    patch = options.get("patch_size")
    if options.get("patch_embed") == "conv" and (patch < 2 or patch.bit_count() > 1):
        raise InputError(f"{name}.patch_size is {patch}; with patch_embed 'conv' it must be a power of two from 2 on.")


def _check_divides(name: str, parts: int | None, whole_name: str, whole: int | None) -> None:
    if parts is not None and whole is not None and whole % parts:
        raise InputError(f"{name} is {parts}; it must divide {whole_name} = {whole}.")
