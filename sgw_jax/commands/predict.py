"""sgw-jax predict: a run's checkpoint, or another model, on files of images and videos."""

import argparse
from collections.abc import Sequence

from rich.console import Console

from sgw_jax.commands.session import refuse
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.experiment.config_files import UsageError
from sgw_jax.prediction.image_files import listed_paths
from sgw_jax.prediction.inputs import VIDEOS, apart
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
    images, files = apart(inputs)
    for option in ("video", "carry_slots"):
        if getattr(arguments, option) is not None and not files:
            raise InputError(f"--{option} is for videos (*{', *'.join(VIDEOS)}), and no input is or holds one.")
    if files and not images and form != Form():
        raise InputError("--arrays, --format and --no_panels are for images, and no input is or holds one.")
    if files:  # only they need the extra [video]
        from sgw_jax.prediction.video import PANELS, predict_videos, survey_all

        videos = survey_all(files, console, share, arguments.skip_bad)  # before hours of images
    if images or not files:
        predict_files(
            source,
            images,
            arguments.output,
            console,
            options=options,
            form=form,
            share=share,
            skip_bad=arguments.skip_bad,
        )
    if files:
        predict_videos(
            source.load(),
            videos,
            arguments.output,
            console,
            show=arguments.video or PANELS,
            carry_slots=arguments.carry_slots,
            options=options,
            inputs=inputs,
        )
    return 0
