"""sgw-jax predict: a run's checkpoint on files of images and videos."""

import argparse
from collections.abc import Sequence

from rich.console import Console

from sgw_jax.commands.session import refuse
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.prediction.image_files import predict_files
from sgw_jax.prediction.inputs import VIDEOS, apart
from sgw_jax.prediction.predictor import Predictor


def run(arguments: argparse.Namespace, rest: Sequence[str], console: Console) -> int:
    refuse(rest, "predict takes its configuration from the checkpoint")
    which = arguments.step or arguments.checkpoint
    images, files = apart(arguments.inputs)
    for option in ("video", "carry_slots"):
        if getattr(arguments, option) is not None and not files:
            raise InputError(f"--{option} is for videos (*{', *'.join(VIDEOS)}), and no input is or holds one.")
    if files:  # only they need the extra [video]
        from sgw_jax.prediction.video import PANELS, predict_videos, survey_all

        videos = survey_all(files, console, arguments.skip_bad)  # before hours of images
    if images or not files:
        predict_files(arguments.workdir, images, arguments.output, console, which, arguments.skip_bad)
    if files:
        options = {"show": arguments.video or PANELS, "carry_slots": arguments.carry_slots, "inputs": arguments.inputs}
        predict_videos(Predictor.from_workdir(arguments.workdir, which), videos, arguments.output, console, **options)
    return 0
