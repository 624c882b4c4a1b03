"""The loop's settings, and numbers that cannot be: refused before anything divides by them."""

import dataclasses

from ml_collections import ConfigDict

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.experiment.experiment import Settings, flatten


def build_settings(config: ConfigDict) -> Settings:
    """The loop's own numbers, checked."""
    if config.eval_every % config.checkpoint_every:
        raise InputError(
            f"config.eval_every ({config.eval_every}) must be a multiple of config.checkpoint_every "
            f"({config.checkpoint_every}), because the best checkpoint is chosen by evaluation."
        )
    positive = ("steps", "batch_size", "accumulate", "log_every", "checkpoint_every", "eval_every", "keep")
    for key in (*positive, "profile_steps"):
        if config[key] < 1:
            raise InputError(f"config.{key} is {config[key]}; it must be at least 1.")
    if not 0 <= config.seed < 2**32:
        raise InputError(f"config.seed is {config.seed}; it must be in [0, 2^32).")
    return Settings(**{field.name: config[field.name] for field in dataclasses.fields(Settings)})


def check_positive(config: ConfigDict) -> None:
    """Raises for a size of the network that divides others and is not positive."""
    backbone, interaction = f"backbones.{config.backbone}", f"interactions.{config.interaction}"
    sizes = ("channels", "stride", "input_scale", f"{backbone}.width", f"{backbone}.num_heads", f"{backbone}.mlp_ratio")
    flat = flatten(config.to_dict())
    for key in (*sizes, f"{interaction}.num_heads", f"{interaction}.mlp_width"):
        if flat.get(key) is not None and not flat[key] > 0:
            raise InputError(f"config.{key} is {flat[key]}; it must be positive.")
