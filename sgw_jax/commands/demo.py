"""sgw-jax demo: a page in the browser that shows what a network predicts."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sgw_jax.commands.session import leave, refuse
from sgw_jax.data_pipelines import consoles
from sgw_jax.demo.server import check_address, check_packages, serve
from sgw_jax.experiment.config_files import UsageError
from sgw_jax.prediction.source import Source


def run(arguments: argparse.Namespace, rest: Sequence[str], console: Console) -> int:
    refuse(rest, "demo takes its configuration from the checkpoint")
    check_address(arguments.host, arguments.port)  # before a network is loaded
    check_packages()
    if arguments.model and (arguments.step or arguments.checkpoint != "best"):
        raise UsageError("--checkpoint and --step choose among a run's checkpoints: they go with --workdir.")
    source = Source(arguments.workdir, arguments.model, arguments.step or arguments.checkpoint)
    predictor = source.load()

    def ready(address: str) -> None:
        consoles.results(console).print(f"{source}, step {predictor.step}: {address}", soft_wrap=True)
        console.print("Ctrl-C ends it.")

    name = str(source)
    title = Path(name).resolve().name if Path(name).exists() else name
    console.print("The page is being made ready.")
    serve(predictor, title, arguments.host, arguments.port, ready)
    console.print("Ended; what visitors sent is deleted.")
    return leave(0, at_once=True)  # a prediction may be under way, whose thread would be torn down within it
