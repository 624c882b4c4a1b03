"""The network of a configuration."""

from collections.abc import Sequence

import jax.numpy as jnp
from ml_collections import ConfigDict

from sgw_jax.backbones import BACKBONES
from sgw_jax.experiment.checks import check_positive
from sgw_jax.experiment.choice import choose, taken
from sgw_jax.interactions import INTERACTIONS
from sgw_jax.layers.placement import Placement
from sgw_jax.model import MultiTaskModel
from sgw_jax.sharding import BATCH, CONTEXT
from sgw_jax.tasks.base import Task

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def build_model(
    config: ConfigDict, tasks: Sequence[Task], trained_size: tuple[int, int] | None = None
) -> MultiTaskModel:
    """The network for images of `config.data.size`, or with the parameters of one that was trained at another size."""
    check_positive(config)
    dtype = choose(DTYPES, config.dtype, "config.dtype")
    make_backbone = choose(BACKBONES, config.backbone, "config.backbone")
    overrides = {key: value for key, value in config.backbones[config.backbone].items() if value is not None}
    interaction = choose(INTERACTIONS, config.interaction, "config.interaction")
    # An interaction with a `placement` works shard by shard where the mesh has such axes; the others are left to the
    # partitioner.
    placed = taken(interaction, {"placement": Placement(BATCH, CONTEXT)})
    height, width = config.data.size if trained_size is None else trained_size
    seen = round(height * config.input_scale), round(width * config.input_scale)
    return MultiTaskModel(
        tasks=tuple(tasks),
        backbone=make_backbone(image_size=seen, dtype=dtype, **overrides),
        interaction=interaction(dtype=dtype, **placed, **config.interactions[config.interaction]),
        channels=config.channels,
        input_scale=config.input_scale,
        stride=config.stride,
        scales=tuple(config.scales),
        persist=config.persist,
        upsample=config.upsample,
        preliminary=config.preliminary,
        dtype=dtype,
    )
