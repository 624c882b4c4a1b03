"""The tasks of a configuration."""

from ml_collections import ConfigDict

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.experiment.choice import choose
from sgw_jax.experiment.data_sets import DATA_SETS
from sgw_jax.tasks import TASKS
from sgw_jax.tasks.base import Task


def build_tasks(config: ConfigDict) -> tuple[Task, ...]:
    """The tasks that the configuration names, with what it and its data say of them."""
    names = tuple(config.tasks)
    if not names or len(set(names)) != len(names):
        raise InputError(f"config.tasks is {names}; give at least one task, each once.")
    described = choose(DATA_SETS, config.data.source, "config.data.source").task_options(config.data)
    return tuple(_task(config, name, **described.get(name, {})) for name in names)


def _task(config: ConfigDict, name: str, **options) -> Task:
    kind = choose(TASKS, name, "config.tasks")
    own = {key: config[key] for key in kind.configured}
    weight = choose(config.task_weights, name, "config.task_weights")
    measured = config.get("metric_options", {}).get(name, {})  # no key in checkpoints of earlier releases
    asked = {key: value for key, value in measured.items() if value is not None}
    return kind(protocol=config.protocol, weight=weight, **{**own, **options, **asked})
