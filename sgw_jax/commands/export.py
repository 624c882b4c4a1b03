"""sgw-jax export: a run's checkpoint as files for others."""

import argparse
import inspect
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console

from sgw_jax.commands.session import refuse
from sgw_jax.data_pipelines import consoles
from sgw_jax.experiment.config_files import UsageError
from sgw_jax.experiment.ranges import OneOf
from sgw_jax.export import FORMATS
from sgw_jax.prediction.predictor import Predictor

# Of the command line, by the name of the parameter that a format has for it.
OPTIONS = {
    "license": "--license",
    "pictures": "--no_pictures",
    "platforms": "--platforms",
    "parameters": "--parameters",
    "any_size": "--no_any_size",
    "precision": "--precision",
    "model": "--model",
}


def run(arguments: argparse.Namespace, rest: Sequence[str], console: Console) -> int:
    refuse(rest, "export takes its configuration from the checkpoint")
    OneOf(FORMATS).check("--format", arguments.format)
    write = FORMATS[arguments.format]
    known = inspect.signature(write).parameters
    given = {name: getattr(arguments, name) for name in OPTIONS if getattr(arguments, name) is not None}
    if foreign := [OPTIONS[name] for name in given if name not in known]:
        raise UsageError(f"{', '.join(foreign)}: the format {arguments.format!r} has no such option.")
    if "console" in known:
        given["console"] = console
    predictor = Predictor.from_workdir(arguments.workdir, arguments.step or arguments.checkpoint)
    if jax.process_index() == 0:
        write(predictor, Path(arguments.output), **given)
        consoles.results(console).print(f"Step {predictor.step}: {arguments.output}", soft_wrap=True)
    return 0
