"""sgw-jax train: trains, or goes on; evaluates; writes the report."""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sgw_jax.commands import sources
from sgw_jax.data_pipelines.atomic import write_atomically
from sgw_jax.data_pipelines.errors import files_named
from sgw_jax.experiment.build import build
from sgw_jax.experiment.config_files import read_config
from sgw_jax.experiment.inspection import Look, raise_errors
from sgw_jax.report.data_page import data_json, data_page
from sgw_jax.report.data_tables import print_inspection, print_warnings
from sgw_jax.report.results import finish
from sgw_jax.train import check_start, train


def run(arguments: argparse.Namespace, overrides: Sequence[str], console: Console) -> int:
    started = time.monotonic()
    experiment = build(read_config(arguments.config, overrides), arguments.cache_dir)
    step, changed = arguments.step, arguments.accept_changed_data
    check_start(experiment, arguments.workdir, arguments.init_from, step, changed)
    look = sources.look(Look(experiment.config, experiment.tasks, experiment.data, arguments.cache_dir), console)
    pages = {} if look is None else show(look, console)
    with files_named(f"--cache_dir={arguments.cache_dir}"):
        sources.prepare(experiment.data, console)
        sources.say_what_is_shrunk(experiment.data, console)
    trained = train(experiment, arguments.workdir, console, arguments.init_from, step, changed)
    with files_named(f"--workdir={arguments.workdir}"):
        for name, content in pages.items():  # not before: a run that cannot begin leaves nothing
            write_atomically(Path(arguments.workdir) / name, content)
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


def show(look: Look, console: Console) -> dict[str, str]:
    """Prints what was found, only the warnings if it was printed before, and raises the errors; returns the files that
    the run keeps of it, by name."""
    if not look.remembered:
        print_inspection(look, console, classes=False)
    print_warnings(look, console)
    raise_errors(look.found.findings)
    return {"data.json": data_json(look), "data.html": data_page(look)}
