"""sgw-jax predict: a run's checkpoint on image files."""

import argparse
from collections.abc import Sequence

from rich.console import Console

from sgw_jax.commands.session import refuse
from sgw_jax.prediction.image_files import predict_files


def run(arguments: argparse.Namespace, rest: Sequence[str], console: Console) -> int:
    refuse(rest, "predict takes its configuration from the checkpoint")
    which = arguments.step or arguments.checkpoint
    predict_files(arguments.workdir, arguments.inputs, arguments.output, console, which, arguments.skip_bad)
    return 0
