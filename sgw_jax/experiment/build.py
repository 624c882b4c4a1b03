"""From a configuration to objects; no other file of the package reads one."""

import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sgw_jax.backbones import BACKBONES
from sgw_jax.data_pipelines.colour import ColourDistortion
from sgw_jax.data_pipelines.errors import InputError, files_named
from sgw_jax.data_pipelines.folder import Folder
from sgw_jax.data_pipelines.loader import Source
from sgw_jax.data_pipelines.scenes import PART_CLASSES, PART_COLOURS, SEMSEG_CLASSES, SEMSEG_COLOURS, Scenes
from sgw_jax.data_pipelines.transforms import Augmentation, Target
from sgw_jax.differentiate import GRADIENTS, Objective
from sgw_jax.experiment.data_sets import DATA_SETS
from sgw_jax.experiment.experiment import Boundary, Data, Experiment, Settings, flatten
from sgw_jax.interactions import INTERACTIONS
from sgw_jax.layers.placement import Placement
from sgw_jax.model import MultiTaskModel
from sgw_jax.multi_objective import AGGREGATORS, SCALARIZERS, ema_weights, every_k
from sgw_jax.optimizers import learning_rate_schedule, make_optimizer
from sgw_jax.sharding import BATCH, CONTEXT, check_batch, check_rows, make_mesh, mesh_sizes, own_rows
from sgw_jax.tasks import TASKS
from sgw_jax.tasks.base import Task

# Interactions that work shard by shard; the others are left to the partitioner.
PLACED = ("kem", "skem", "shared_workspace", "within_tasks")

SPLITS = ("train", "validation", "test")


def build(
    config: ConfigDict, cache_dir: Path | str | None, tasks: Sequence[Task] | None = None, mesh: Mesh | None = None
) -> Experiment:
    """Builds all objects, checking the whole configuration before anything is rendered, compiled or written.

    Args:
      cache_dir: where rendered scenes are kept; None leaves the data out (`plan` needs none).
      tasks: task instances in place of those the configuration names, for a user's own.
      mesh: in place of the one the configuration names, over all devices.
    """
    _check_positive(config)
    tasks = tuple(tasks) if tasks is not None else build_tasks(config)
    mesh = make_mesh(mesh_sizes(**config.mesh)) if mesh is None else mesh
    check_batch(config.batch_size, mesh, config.accumulate)
    check_rows(round(config.data.size[0] * config.input_scale), (config.stride, *config.scales), mesh)
    settings = _settings(config)
    schedule = learning_rate_schedule(
        config.optimizer.learning_rate, config.steps, config.schedule.warmup_steps, config.schedule.name
    )
    options = {key: value for key, value in config.optimizer.items() if key != "learning_rate"}
    data = build_data(config, tasks, cache_dir, own_rows(mesh))
    return Experiment(
        config=config,
        tasks=tasks,
        model=build_model(config, tasks),
        size=tuple(config.data.size),
        mesh=mesh,
        data=data,
        settings=settings,
        boundary=Boundary(**config.boundary),
        optimizer=make_optimizer(schedule, **options),
        schedule=schedule,
        objective=build_objective(config, len(tasks), data),
        gradients=config.gradients,
        backbone_weights=config.backbone_weights,
    )


def build_tasks(config: ConfigDict) -> tuple[Task, ...]:
    """The tasks that the configuration names, with the class names of its data."""
    options: dict[str, dict[str, Any]] = {
        "semseg": {"dot_regression": config.dot_regression},
        "edges": {"edge_weight": config.edge_weight},
    }
    for name, described in _task_options(config).items():
        options[name] = {**options.get(name, {}), **described}
    names = tuple(config.tasks)
    if not names or len(set(names)) != len(names):
        raise InputError(f"config.tasks is {names}; give at least one task, each once.")
    return tuple(
        choose(TASKS, name, "config.tasks")(
            protocol=config.protocol, weight=config.task_weights[name], **options.get(name, {})
        )
        for name in names
    )


def _task_options(config: ConfigDict) -> Mapping[str, Mapping[str, Any]]:
    """What the data says of its tasks, such as the classes."""
    if config.data.source in DATA_SETS:
        return DATA_SETS[config.data.source].tasks
    if config.data.source == "scenes":
        return {
            "semseg": {"num_classes": len(SEMSEG_CLASSES), "class_names": SEMSEG_CLASSES, "colours": SEMSEG_COLOURS},
            "human_parts": {"num_classes": len(PART_CLASSES), "class_names": PART_CLASSES, "colours": PART_COLOURS},
        }
    return {"semseg": {"num_classes": config.data.num_classes}, "human_parts": {"num_classes": config.data.num_parts}}


def build_model(config: ConfigDict, tasks: Sequence[Task]) -> MultiTaskModel:
    """The network for images of `config.data.size`."""
    _check_positive(config)
    dtypes = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}
    dtype = choose(dtypes, config.dtype, "config.dtype")
    make_backbone = choose(BACKBONES, config.backbone, "config.backbone")
    overrides = {key: value for key, value in config.backbones[config.backbone].items() if value is not None}
    interaction = choose(INTERACTIONS, config.interaction, "config.interaction")
    # Where the mesh has such axes, the slots' retrieval works shard by shard.
    placed = {"placement": Placement(BATCH, CONTEXT)} if config.interaction in PLACED else {}
    height, width = config.data.size
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


def build_objective(config: ConfigDict, tasks: int, data: Data) -> Objective:
    """How the losses become one update."""
    name = config.objective
    choose({**SCALARIZERS, **AGGREGATORS}, name, "config.objective")
    options = dict(config.objectives[name]) if name in config.objectives else {}
    choose(dict.fromkeys(GRADIENTS), config.gradients, "config.gradients")
    if name in SCALARIZERS:
        if config.gradients == "representation" or config.weights_ema is not None or config.weights_every != 1:
            raise InputError(
                f"config.objective {name!r} takes one gradient of all tasks: config.gradients must be 'parameters', "
                "config.weights_ema None and config.weights_every 1."
            )
        if name == "dwa":
            options["steps_per_epoch"] = max(1, len(data.sources.get("train", ())) // config.batch_size)
        return SCALARIZERS[name](tasks, **options)
    found = AGGREGATORS[name](tasks, **options)
    if config.weights_ema is not None:
        found = ema_weights(found, config.weights_ema, tasks)
    return found if config.weights_every == 1 else every_k(found, config.weights_every, tasks)


def build_data(
    config: ConfigDict, tasks: Sequence[Task], cache_dir: Path | str | None, block: tuple[int, int] = (0, 1)
) -> Data:
    """Sources, targets and augmentation; ``block``: which of how many blocks of the rows are read here."""
    targets = {task.name: Target(**task.target) for task in tasks}
    makers = {"scenes": _scenes, "folder": _folder, **dict.fromkeys(DATA_SETS, _data_set)}
    make = choose(makers, config.data.source, "config.data.source")
    with files_named(f"config.data.root={config.data.root}"):
        sources = {} if cache_dir is None else make(config, targets, cache_dir)
    augment = config.augment
    return Data(
        sources=sources,
        targets=targets,
        augmentation=Augmentation(
            size=tuple(config.data.size),
            scale=tuple(augment.scale),
            scale_crop=tuple(augment.scale_crop),
            cat_max_ratio=augment.cat_max_ratio,
            cat_max_target="semseg" if augment.cat_max_ratio else None,
            flip=augment.flip,
            colour=ColourDistortion() if augment.colour else None,
        ),
        batch_size=config.batch_size,
        seed=config.seed,
        block=block,
        workers=config.data.workers,
        threads=config.data.threads,
    )


def _scenes(config: ConfigDict, targets: Mapping[str, Target], cache_dir: Path | str) -> dict[str, Source]:
    data = config.data
    return {
        split: Scenes(split, data.lengths[split], size=tuple(data.size), seed=data.seed, cache_dir=cache_dir)
        for split in SPLITS
        if data.lengths[split]
    }


def _data_set(config: ConfigDict, targets: Mapping[str, Target], cache_dir: Path | str) -> dict[str, Source]:
    return DATA_SETS[config.data.source].sources(_root(config), config.data.format, tuple(targets), config.protocol)


def _root(config: ConfigDict) -> Path:
    if not config.data.root:
        raise InputError(
            f"config.data.source is {config.data.source!r}, but config.data.root is empty: give the data's directory "
            "(--config.data.root=DIR; docs/datasets.md says what it must hold)."
        )
    return Path(config.data.root)


def _folder(config: ConfigDict, targets: Mapping[str, Target], cache_dir: Path | str) -> dict[str, Source]:
    root = _root(config)
    found = [split for split in SPLITS if (root / "splits" / f"{split}.txt").is_file()]
    if "train" not in found:
        raise InputError(
            f"config.data.root: {root / 'splits' / 'train.txt'} does not exist; it lists the training images."
        )
    return {split: Folder(root, split, targets) for split in found}


def _settings(config: ConfigDict) -> Settings:
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


def _check_positive(config: ConfigDict) -> None:
    """Raises for a size of the network that divides others and is not positive."""
    backbone, interaction = f"backbones.{config.backbone}", f"interactions.{config.interaction}"
    sizes = ("channels", "stride", "input_scale", f"{backbone}.width", f"{backbone}.num_heads", f"{backbone}.mlp_ratio")
    flat = flatten(config.to_dict())
    for key in (*sizes, f"{interaction}.num_heads", f"{interaction}.mlp_width"):
        if flat.get(key) is not None and not flat[key] > 0:
            raise InputError(f"config.{key} is {flat[key]}; it must be positive.")


def choose(options: Mapping[str, Any], name: str, key: str) -> Any:
    """``options[name]``, or an error that names the key, what is allowed and what was probably meant."""
    if name not in options:
        near = difflib.get_close_matches(str(name), options, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"{key}: {name!r} is not known; it must be one of {sorted(options)}.{hint}")
    return options[name]
