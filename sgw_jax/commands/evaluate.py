"""sgw-jax evaluate: a run's checkpoint on a split."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sgw_jax.commands import sources
from sgw_jax.commands.session import refuse
from sgw_jax.data_pipelines.errors import files_named
from sgw_jax.experiment.build import build
from sgw_jax.experiment.config_files import UsageError
from sgw_jax.report.results import finish
from sgw_jax.run.saved_run import open_run
from sgw_jax.sharding import make_mesh, mesh_sizes


def run(arguments: argparse.Namespace, rest: Sequence[str], console: Console) -> int:
    refuse(rest, "evaluate takes its configuration from the checkpoint")
    with open_run(arguments.workdir, arguments.checkpoint) as run:
        mesh = make_mesh(mesh_sizes(arguments.mesh)) if arguments.mesh else None
        experiment = build(run.config, arguments.cache_dir, run.tasks, mesh)
    if arguments.split not in experiment.data.sources:
        raise UsageError(f"--split={arguments.split}: the data has the splits {sorted(experiment.data.sources)}.")
    with files_named(f"--cache_dir={arguments.cache_dir}"):
        sources.prepare(experiment.data, console)
        sources.say_what_is_shrunk(experiment.data, console)
    finish(experiment, Path(arguments.workdir), arguments.split, arguments.checkpoint, {}, console)
    return 0
