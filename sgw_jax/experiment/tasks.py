"""The tasks of a configuration."""

from ml_collections import ConfigDict

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.experiment.checks import check_config
from sgw_jax.experiment.data_sets import DATA_SETS
from sgw_jax.experiment.mixture import MIXTURE
from sgw_jax.experiment.ranges import OneOf
from sgw_jax.tasks import TASKS
from sgw_jax.tasks.base import Task, kind_of


def build_tasks(config: ConfigDict) -> tuple[Task, ...]:
    """The tasks that the configuration names, with what it and its data say of them."""
    check_config(config)
    described = DATA_SETS[config.data.source].task_options(config.data)
    return tuple(_task(config, name, **described.get(name, {})) for name in config.tasks)


def _task(config: ConfigDict, name: str, **options) -> Task:
    kind_name = kind_of(name) if config.data.source == MIXTURE else name
    OneOf(TASKS).check("config.tasks", kind_name)
    OneOf(config.task_weights).check("config.task_weights", kind_name)
    kind = TASKS[kind_name]
    own = {key: config[key] for key in kind.configured}
    weight = config.task_weights.get(name, config.task_weights[kind_name])
    options_of = config.get("metric_options", {})  # no key in checkpoints of earlier releases
    measured = options_of.get(name, options_of.get(kind_name, {}))
    asked = {key: value for key, value in measured.items() if value is not None}
    try:
        return kind(name=name, protocol=config.protocol, weight=weight, **{**own, **options, **asked})
    except InputError as error:  # each value is in its range: those of the data set and of metric_options do not agree
        raise InputError(f"config.metric_options.{name} beside config.data: {error}") from error
