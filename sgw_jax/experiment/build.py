"""From a configuration to objects; no other folder of the package reads one."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jax.sharding import Mesh
from ml_collections import ConfigDict

from sgw_jax.experiment.checks import check_config, check_tasks
from sgw_jax.experiment.config_files import with_whole_paths
from sgw_jax.experiment.data import build_data
from sgw_jax.experiment.experiment import Boundary, Experiment, Protocol, Settings
from sgw_jax.experiment.network import build_freezing, build_model
from sgw_jax.experiment.objective import build_objective
from sgw_jax.experiment.tasks import build_tasks
from sgw_jax.optimizers import learning_rate_schedule, make_optimizer
from sgw_jax.sharding import check_batch, check_rows, make_mesh, mesh_sizes, own_rows, read_rules
from sgw_jax.tasks.base import Task


def build(
    config: ConfigDict,
    cache_dir: Path | str | None,
    tasks: Sequence[Task] | None = None,
    mesh: Mesh | None = None,
    trained_size: tuple[int, int] | None = None,
) -> Experiment:
    """Builds all objects, checking the whole configuration before anything is rendered, compiled or written.

    Args:
      config: as of `read_config`.
      cache_dir: where rendered scenes are kept; None leaves the data out (`plan` needs none).
      tasks: task instances in place of those the configuration names, for a user's own.
      mesh: in place of the one the configuration names, over all devices.
      trained_size: of a saved run, if `config.data.size` is another (height, width) than it was trained at; what of the
        network depends on the size, a table of positions, is then that run's, interpolated.

    Returns:
      The `Experiment`: tasks, model, optimiser, mesh, data and the loop's numbers.

    Raises:
      ValueError: a value that is not allowed, or that does not go with another; the message names the key.

    >>> from sgw_jax import build, read_config
    >>> experiment = build(read_config("scenes:tasks=depth+normals"), cache_dir=None)
    >>> [task.name for task in experiment.tasks], experiment.settings.steps
    (['depth', 'normals'], 1000)
    """
    check_config(config)
    config = with_whole_paths(config)
    tasks = tuple(tasks) if tasks is not None else build_tasks(config)
    check_tasks(config, tasks)
    mesh = make_mesh(mesh_sizes(**config.mesh)) if mesh is None else mesh
    check_batch(config.batch_size, mesh, config.accumulate)
    check_rows(round(config.data.size[0] * config.input_scale), (config.stride, *config.scales), mesh)
    schedule = learning_rate_schedule(
        config.optimizer.learning_rate, config.steps, config.schedule.warmup_steps, config.schedule.name
    )
    options = {key: value for key, value in config.optimizer.items() if key not in ("learning_rate", "frozen_layers")}
    model = build_model(config, tasks, trained_size)
    optimizer = make_optimizer(schedule, **options)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    data = build_data(config, tasks, cache_dir, own_rows(mesh), parts)  # the first that looks at files
    return Experiment(
        config=config,
        tasks=tasks,
        model=model,
        size=tuple(config.data.size),
        mesh=mesh,
        rules=read_rules(config.mesh.get("rules")),  # no key in checkpoints of earlier releases
        data=data,
        settings=Settings(**{field.name: config[field.name] for field in dataclasses.fields(Settings)}),
        boundary=Boundary(**config.boundary),
        optimizer=optimizer,
        trained=build_freezing(config),
        schedule=schedule,
        objective=build_objective(config, len(tasks), data),
        gradients=config.gradients,
        backbone_weights=config.backbone_weights,
        backbone_cache=config.get("backbone_cache", ""),  # no key in checkpoints of earlier releases
    )


def build_protocol(config: ConfigDict, cache_dir: Path | str | None) -> Protocol:
    """What a configuration says of evaluation alone: no network, no mesh, and the data as `build` has them."""
    tasks = build_tasks(config)
    config = with_whole_paths(config)
    return Protocol(config.protocol, tasks, build_data(config, tasks, cache_dir), Boundary(**config.boundary))
