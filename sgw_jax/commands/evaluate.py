"""sgw-jax evaluate: a run's checkpoint on a split."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sgw_jax.commands import sources
from sgw_jax.data_pipelines.errors import MissingFileError, files_named
from sgw_jax.data_pipelines.paths import user_path
from sgw_jax.experiment.build import build
from sgw_jax.experiment.config_files import UsageError, data_roots, with_overrides
from sgw_jax.experiment.experiment import EVALUATION_KEYS
from sgw_jax.report.results import finish
from sgw_jax.run.saved_run import open_run
from sgw_jax.sharding import make_mesh, mesh_sizes


def run(arguments: argparse.Namespace, overrides: Sequence[str], console: Console) -> int:
    which = arguments.step or arguments.checkpoint
    with open_run(arguments.workdir, which) as run:
        config = with_overrides(run.config, overrides, EVALUATION_KEYS)
        for key, root in data_roots(config).items():
            if not Path(user_path(root)).exists():
                raise MissingFileError(
                    f"config.{key}: {root} does not exist here; where the data lies is said by --config.{key}=DIR."
                )
        mesh = make_mesh(mesh_sizes(arguments.mesh)) if arguments.mesh else None
        experiment = build(config, arguments.cache_dir, run.tasks, mesh, tuple(run.config.data.size))
    if arguments.split not in experiment.data.sources:
        raise UsageError(f"--split={arguments.split}: the data has the splits {sorted(experiment.data.sources)}.")
    with files_named(f"--cache_dir={arguments.cache_dir}"):
        sources.prepare(experiment.data, console)
        sources.say_what_is_shrunk(experiment.data, console)
    finish(experiment, Path(arguments.workdir), arguments.split, which, {}, console)
    return 0
