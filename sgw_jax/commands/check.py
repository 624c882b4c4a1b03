"""sgw-jax check: a look at the data of a configuration, without a network."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sgw_jax.commands import sources
from sgw_jax.data_pipelines.atomic import write_atomically
from sgw_jax.data_pipelines.consoles import results
from sgw_jax.data_pipelines.errors import files_named
from sgw_jax.experiment.build import build_protocol
from sgw_jax.experiment.config_files import read_config
from sgw_jax.experiment.inspection import Look, raise_errors
from sgw_jax.report.data_page import data_json, data_page
from sgw_jax.report.data_tables import print_inspection, print_warnings


def run(arguments: argparse.Namespace, overrides: Sequence[str], console: Console) -> int:
    config = read_config(arguments.config, overrides)
    protocol = build_protocol(config, arguments.cache_dir)
    look = sources.look(Look(config, protocol.tasks, protocol.data, arguments.cache_dir), console, again=True)
    if look is None:
        console.print("There is nothing to look at: data that are rendered here, or config.data.check is off.")
        return 0
    print_inspection(look, results(console))
    print_warnings(look, console)
    for path, make in ((arguments.json, data_json), (arguments.html, data_page)):
        if path:
            with files_named(path):
                write_atomically(Path(path), make(look))
    raise_errors(look.found.findings)
    return 0
