"""sgw-jax train: trains, or goes on; evaluates; writes the report."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sgw_jax.commands import sources
from sgw_jax.data_pipelines.errors import files_named
from sgw_jax.experiment.build import build
from sgw_jax.experiment.config_files import read_config
from sgw_jax.report.results import finish
from sgw_jax.train import check_start, train


def run(arguments: argparse.Namespace, overrides: Sequence[str], console: Console) -> int:
    started = time.monotonic()
    experiment = build(read_config(arguments.config, overrides), arguments.cache_dir)
    check_start(experiment, arguments.workdir, arguments.init_from)
    with files_named(f"--cache_dir={arguments.cache_dir}"):
        sources.prepare(experiment.data, console)
        sources.say_what_is_shrunk(experiment.data, console)
    trained = train(experiment, arguments.workdir, console, arguments.init_from)
    if trained.stopped_by:
        steps = f"{trained.step} of {experiment.settings.steps}"
        console.print(f"Stopped by {trained.stopped_by.name}; saved at step {steps}.")
        console.print("The same command goes on from there.")
        return 128 + trained.stopped_by
    split = next((split for split in ("test", "validation") if split in experiment.data.sources), None)
    if split is None:
        console.print("The data has no test and no validation split, so there is nothing to evaluate on.")
        return 0
    speed = {"images_per_second": trained.images_per_second, "seconds": time.monotonic() - started}
    if not trained.images_per_second:  # finished before: nothing was measured
        speed = {}
    finish(experiment, Path(arguments.workdir), split, "best", speed, console)
    return 0
