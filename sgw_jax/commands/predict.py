"""sgw-jax predict: a run's checkpoint, or another model, on image files."""

import argparse
from collections.abc import Sequence

from rich.console import Console

from sgw_jax.commands.session import refuse
from sgw_jax.experiment.config_files import UsageError
from sgw_jax.prediction.image_files import listed_paths
from sgw_jax.prediction.options import Options
from sgw_jax.prediction.outputs import Form
from sgw_jax.prediction.predict_files import predict_files
from sgw_jax.prediction.shares import Share
from sgw_jax.prediction.source import Source


def run(arguments: argparse.Namespace, rest: Sequence[str], console: Console) -> int:
    refuse(rest, "predict takes its configuration from the checkpoint")
    if arguments.model and (arguments.step or arguments.checkpoint != "best"):
        raise UsageError("--checkpoint and --step choose among a run's checkpoints: they go with --workdir.")
    source = Source(arguments.workdir, arguments.model, arguments.step or arguments.checkpoint)
    options = Options(arguments.resolution, arguments.overlap, arguments.flip, arguments.confidence)
    form = Form(arguments.arrays, arguments.format, arguments.panels)
    share = Share.parse(arguments.share)
    inputs = [*arguments.inputs, *(listed_paths(arguments.list) if arguments.list else [])]
    predict_files(
        source,
        inputs,
        arguments.output,
        console,
        options=options,
        form=form,
        share=share,
        skip_bad=arguments.skip_bad,
    )
    return 0
