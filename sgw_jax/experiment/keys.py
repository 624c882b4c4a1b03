"""What every key of configs/base.py may hold: one table, which `check_keys` enforces before anything else is done.

Names come from the families themselves. What depends on more than one key is in checks.py.
"""

from collections import ChainMap
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from sgw_jax.backbones import BACKBONES
from sgw_jax.backbones.convnext import SIZES as CONVNEXTS
from sgw_jax.backbones.dinov2 import SIZES as DINOV2S
from sgw_jax.backbones.dinov3 import SIZES as DINOV3S
from sgw_jax.backbones.swin import SIZES as SWINS
from sgw_jax.backbones.vit import SIZES as VITS
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.inspection.look import LEVELS
from sgw_jax.data_pipelines.transforms import FITS
from sgw_jax.differentiate import GRADIENTS
from sgw_jax.etf.projections import PROJECTIONS
from sgw_jax.experiment.data_sets import DATA_SETS, FORMATS
from sgw_jax.experiment.ranges import (
    COUNT,
    FLAG,
    NOT_NEGATIVE,
    POSITIVE,
    PROPER_SHARE,
    SHARE,
    TEXT,
    Either,
    Interval,
    Kind,
    Names,
    OneOf,
    Pair,
    Range,
    Several,
    optional,
    whole,
)
from sgw_jax.functional.shared_workspace import GATES
from sgw_jax.heads import UPSAMPLES
from sgw_jax.interactions import INTERACTIONS
from sgw_jax.layers.patch_embed import PATCH_EMBEDS
from sgw_jax.layers.remat import POLICIES
from sgw_jax.multi_objective import AGGREGATORS, SCALARIZERS
from sgw_jax.multi_objective._aligned_mtl import SCALES
from sgw_jax.multi_objective._mgda import NORMALISATIONS
from sgw_jax.optimizers import OPTIMIZERS, SCHEDULES
from sgw_jax.sharding import MESHES
from sgw_jax.tasks.base import PROTOCOLS
from sgw_jax.tasks.depth import CROPS
from sgw_jax.tasks.normals import AXES

Table = Mapping[str, Any]  # of Ranges, and of Tables for sections

SEED = whole(0, 2**32, "[)")
WIDTH = whole(1, 8192)  # of an array of the network
ROUNDS = whole(1, 64)  # each is traced by itself
CLASSES = whole(2, 255)  # 255 is the ignored label
WORKERS = whole(0, 1024)
ANY = "*"  # in a table: every other name of the section
ZOOM = Interval(0, 16, "(]")
DEVICES = optional(Either(COUNT, -1))

KEM = {
    "num_slots": WIDTH,
    "num_heads": WIDTH,
    "top_k": optional(COUNT),
    "slot_dim": optional(WIDTH),
    "etf_for": OneOf(("all", "selection")),
    "projection": OneOf(PROJECTIONS),
    "etf_vertices": optional(whole(2, 8193)),
    "pre_norm": FLAG,
    "task_embedding": FLAG,
    "task_gate": FLAG,
    "balanced": FLAG,
    "slot_exchange": FLAG,
    "pair_gate": FLAG,
    "rounds": ROUNDS,
    "recall": optional(SHARE),
    "temperature": POSITIVE,
}

VIT = {
    "width": optional(WIDTH),
    "depth": optional(whole(4, 1024)),
    "num_heads": optional(WIDTH),
    "drop_path": PROPER_SHARE,
    "remat": OneOf(POLICIES),
    "attention_chunk": optional(COUNT),
}

ALLOWED: Table = {
    "seed": SEED,
    "dtype": OneOf(("float32", "bfloat16")),
    "mesh": {
        "name": OneOf(MESHES),
        "data": DEVICES,
        "fsdp": DEVICES,
        "context": DEVICES,
        "rules": optional(Kind((tuple, list), "a tuple of pairs")),  # `read_rules` looks into it
    },
    "data": {
        "source": OneOf(DATA_SETS),
        "root": TEXT,
        "format": OneOf(FORMATS),
        "num_classes": CLASSES,
        "num_parts": CLASSES,
        "class_names": Names(or_none=True),
        "part_names": Names(or_none=True),
        "normals_axes": OneOf(AXES),
        "mixture": {
            ANY: {
                "source": OneOf(DATA_SETS),
                "root": TEXT,
                "format": OneOf(FORMATS),
                "weight": POSITIVE,
                "num_classes": CLASSES,
                "num_parts": CLASSES,
                "class_names": Names(or_none=True),
                "part_names": Names(or_none=True),
                "normals_axes": OneOf(AXES),
                "tasks": Names(),
                "maps": {ANY: Several(whole(0, 255))},
            }
        },
        "size": Pair(whole(1, 16384)),
        "fit": OneOf(FITS),
        "seed": SEED,
        "lengths": {"train": COUNT, "validation": whole(0), "test": whole(0)},
        "check": OneOf(LEVELS),
        "workers": WORKERS,
        "threads": whole(1, 1024),
    },
    "augment": {
        "scale": Pair(ZOOM, ascending=True),
        "scale_crop": Several(Interval(1, 16)),
        "cat_max_ratio": optional(SHARE),
        "flip": FLAG,
        "colour": FLAG,
    },
    "tasks": Names(),
    "protocol": OneOf(PROTOCOLS),
    "task_weights": dict.fromkeys(("semseg", "depth", "normals", "edges", "saliency", "human_parts"), NOT_NEGATIVE),
    "boundary": {
        "max_dist": optional(PROPER_SHARE),
        "outline_targets": FLAG,
        "suppress": FLAG,
        "workers": WORKERS,
    },
    "metric_options": {
        "depth": {
            "crop": optional(OneOf(CROPS)),
            "min_depth": optional(NOT_NEGATIVE),
            "max_depth": optional(POSITIVE),
            "clip": FLAG,
            "by_image": FLAG,
        },
        "semseg": {"boundary_iou": FLAG},
        "human_parts": {"boundary_iou": FLAG},
        "saliency": {"image_scores": FLAG},
    },
    "edge_weight": optional(Interval(0, 1, "()")),
    "dot_regression": NOT_NEGATIVE,
    "backbone": OneOf(BACKBONES),
    "backbone_weights": TEXT,
    "backbone_cache": TEXT,
    "backbones": {
        "vit": {
            **VIT,
            "size": OneOf(VITS),
            "mlp_ratio": Interval(1 / 16, 64),
            "patch_size": whole(1, 1024),
            "patch_embed": OneOf(PATCH_EMBEDS),
            "class_token": FLAG,
            "approximate_gelu": FLAG,
            "epsilon": POSITIVE,
        },
        "dinov2": {**VIT, "size": OneOf(DINOV2S), "registers": whole(0, 64)},
        "dinov3": {**VIT, "size": OneOf(DINOV3S)},
        "swin": {
            "size": OneOf(SWINS),
            "width": optional(WIDTH),
            "window_size": whole(1, 64),
            "always_partition": FLAG,
            "drop_path": PROPER_SHARE,
            "remat": OneOf(POLICIES),
            "window_chunk": optional(COUNT),
        },
        "convnext": {
            "size": OneOf(CONVNEXTS),
            "width": optional(WIDTH),
            "drop_path": PROPER_SHARE,
            "remat": OneOf(POLICIES),
        },
    },
    "lora": {"rank": optional(COUNT), "alpha": POSITIVE, "targets": Names()},
    "interaction": OneOf(INTERACTIONS),
    "interactions": {
        "none": {"mlp_width": optional(WIDTH)},
        "cross_attention": {"num_heads": WIDTH, "query_chunk": optional(COUNT), "pre_norm": FLAG},
        "kem": KEM,
        "skem": KEM,
        "shared_workspace": {
            "num_slots": WIDTH,
            "num_heads": WIDTH,
            "key_dim": optional(WIDTH),
            "top_k": optional(COUNT),
            "gate": optional(OneOf([gate for gate in GATES if gate])),
            "mlp_layers": ROUNDS,
            "rounds": ROUNDS,
        },
        "within_tasks": KEM,
    },
    "input_scale": Interval(0, 16, "(]"),
    "channels": WIDTH,
    "stride": whole(1, 1024),
    "scales": Several(whole(1, 1024)),
    "persist": FLAG,
    "upsample": OneOf(UPSAMPLES),
    "preliminary": FLAG,
    "objective": OneOf(ChainMap[str, Any](AGGREGATORS, SCALARIZERS)),
    "gradients": OneOf(GRADIENTS),
    "weights_ema": optional(PROPER_SHARE),
    "weights_every": COUNT,
    "objectives": {
        "uncertainty": {"learning_rate": POSITIVE},
        "uw_so": {"temperature": POSITIVE},
        "dwa": {"temperature": POSITIVE},
        "stch": {"mu": POSITIVE},
        "famo": {"learning_rate": POSITIVE},
        "nash_mtl": {"max_norm": optional(POSITIVE)},
        "fairgrad": {"alpha": POSITIVE},
        "cagrad": {"c": NOT_NEGATIVE, "rescale": FLAG},
        "mgda": {"normalisation": OneOf(NORMALISATIONS)},
        "aligned_mtl": {"scale": OneOf(SCALES)},
        "gradvac": {"beta": Interval(0, 1)},
        "gradnorm": {"alpha": NOT_NEGATIVE, "learning_rate": POSITIVE},
    },
    "steps": COUNT,
    "batch_size": COUNT,
    "accumulate": COUNT,
    "optimizer": {
        "name": OneOf(OPTIMIZERS),
        "learning_rate": POSITIVE,
        "weight_decay": NOT_NEGATIVE,
        "b1": PROPER_SHARE,
        "b2": PROPER_SHARE,
        "momentum": PROPER_SHARE,
        "muon_rms": POSITIVE,
        "clip_norm": optional(POSITIVE),
        "backbone_scale": NOT_NEGATIVE,
        "layer_decay": SHARE,
        "lora_scale": POSITIVE,
        "frozen_layers": whole(0),
    },
    "schedule": {"name": OneOf(SCHEDULES), "warmup_steps": whole(0)},
    "ema_decay": optional(PROPER_SHARE),
    "log_every": COUNT,
    "checkpoint_every": COUNT,
    "eval_every": COUNT,
    "keep": COUNT,
    "profile_after": optional(whole(0)),
    "profile_steps": COUNT,
}


def range_of(key: str) -> Range | None:
    """Of a key, such as "data.size"; None for a section, and for what is no key of configs/base.py."""
    found: Any = ALLOWED
    for part in key.split("."):
        found = found.get(part) if isinstance(found, Mapping) else None
    return found if isinstance(found, Range) else None


def check_keys(config: ConfigDict) -> None:
    """Raises for the first key whose value is not allowed.

    Keys that are not in the table are a user's own family member's; keys that are not in the configuration came after
    the run that it belongs to.

    Raises:
      InputError: names the key, its value and what is allowed.
    """
    _check(config.to_dict(), ALLOWED, "config")


def _check(values: Any, allowed: Table, name: str) -> None:
    if not isinstance(values, Mapping):
        raise InputError(f"{name} is {values!r}; it must be a section with the keys {sorted(allowed)}.")
    for key, value in values.items():
        match allowed.get(key, allowed.get(ANY)):
            case Range() as range:
                range.check(f"{name}.{key}", value)
            case Mapping() as section:
                _check(value, section, f"{name}.{key}")
