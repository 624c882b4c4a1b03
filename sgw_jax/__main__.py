"""The command: sgw-jax check | train | evaluate | predict | export | demo | score | plan | prepare | launch.

Also python -m sgw_jax. What a command needs is imported when it is chosen: `launch` runs on the standard library, and
`prepare` without JAX.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from sgw_jax import __version__
from sgw_jax.data_pipelines.errors import MissingPackageError, extra_named
from sgw_jax.data_pipelines.paths import user_path

COMMANDS = {
    "check": "Look at the data of a configuration, as every training does first. Needs no network.",
    "train": "Train, or go on where --workdir stands; then evaluate and write report.html.",
    "evaluate": "Evaluate a run's checkpoint on a split.",
    "predict": "Predict on files of images, panels (PNG) and arrays (npz or PNG), and of videos (mp4).",
    "export": "Write a run's checkpoint for others: a folder to share, of the hub's form.",
    "demo": "A page in the browser: a photograph in, every task's map beside it. Needs the extra [demo].",
    "score": "Score anybody's predictions of a split, by a configuration's protocol. Needs no network.",
    "plan": "What a configuration costs by module: parameters, MACs, FLOPs, memory. Needs no data.",
    "prepare": "Write an archive of a data set as sharded files.",
    "launch": "Start a run on many machines: Cloud TPU VMs, GKE, Slurm; or as several processes on this one.",
}
ELSEWHERE = {"prepare": "sgw_jax.data_pipelines.prepare", "launch": "sgw_jax.launch.__main__"}  # parse what follows

EXAMPLES = """\
examples:
  python -m sgw_jax check --config=scenes --config.data.source=folder --config.data.root=DIR --html=data.html
  python -m sgw_jax train --config=configs/scenes.py --workdir=runs/scenes    (the same again: resumes)
  python -m sgw_jax train --config=scenes --workdir=runs/tuned --init_from=runs/scenes
  python -m sgw_jax evaluate --workdir=runs/scenes --split=validation
  python -m sgw_jax predict --workdir=runs/scenes --output=pictures photo.jpg folder/
  python -m sgw_jax predict --model=scenes-model --output=pictures --arrays=png --list=files.txt
  python -m sgw_jax predict --workdir=runs/scenes --output=videos --video=depth movie.mp4
  python -m sgw_jax export --workdir=runs/scenes --output=scenes-model --license=apache-2.0
  python -m sgw_jax demo --workdir=runs/scenes --port=7860
  python -m sgw_jax score --predictions=theirs --config=nyud --config.data.root=DIR --config.protocol=published
  python -m sgw_jax plan --config=nyud:swin_l,interaction=skem --topology=v5e:4x4 --config.mesh.name=fsdp
"""

CONFIGURATION = """\
configuration:
  --config=scenes                      a shipped configuration by name, or a file: --config=configs/scenes.py
  --config=scenes:interaction=none,tasks=semseg+depth    arguments of the file's get_config, after a colon
  --config.steps=200 --config.optimizer.learning_rate=3e-4    any key of configs/base.py

"""

# What a command takes beside its options.
EPILOGS = {
    "evaluate": """\
configuration:
  it comes from the checkpoint; of its keys may be set what changes no parameter, as for data that has moved:
  --config.data.root=DIR --config.data.size=480,640 --config.boundary.max_dist=0.0075 --config.mesh.name=fsdp

""",
    "predict": "The configuration comes from the checkpoint.\n\n",
    "export": "The configuration comes from the checkpoint.\n\n",
    "demo": "The configuration comes from the checkpoint.\n\n",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parses and runs the command; returns its exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    elsewhere = bool(argv) and argv[0] in ELSEWHERE
    arguments, rest = (None, []) if elsewhere else _parser().parse_known_args(argv)
    try:
        with extra_named(f"sgw-jax {argv[0]}"):
            module = importlib.import_module(ELSEWHERE[argv[0]] if elsewhere else "sgw_jax.commands.session")
    except MissingPackageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return module.main(argv[1:]) if elsewhere else module.run(arguments, rest)


def _parser() -> argparse.ArgumentParser:
    shape: dict[str, Any] = {
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "allow_abbrev": False,  # or --conf would be taken for --config
    }
    description = "Multi-task dense vision in JAX."
    parser = argparse.ArgumentParser("sgw-jax", description=description, epilog=CONFIGURATION + EXAMPLES, **shape)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(COMMANDS))

    def command(name: str, workdir: bool = True, checkpoint: bool = True) -> argparse.ArgumentParser:
        about = EPILOGS.get(name, CONFIGURATION) + _examples(name)
        sub = commands.add_parser(name, help=COMMANDS[name], description=COMMANDS[name], epilog=about, **shape)
        if workdir:
            sub.add_argument("--workdir", required=True, type=_directory, help="directory of the run")
        if checkpoint:
            help = "best by validation, or last (default: %(default)s)"
            sub.add_argument("--checkpoint", default="best", choices=("best", "last"), help=help)
            sub.add_argument("--step", type=_whole, help="the checkpoint of this step instead")
        help = (
            "of rendered scenes and compiled programs, the latter unless JAX_COMPILATION_CACHE_DIR names another place "
            "(default: $XDG_CACHE_HOME/sgw_jax, else ~/.cache/sgw_jax)"
        )
        sub.add_argument("--cache_dir", type=user_path, help=help)
        sub.add_argument("--traceback", action="store_true", help="show where in the code an error came up")
        help = "of several processes: end all if one is silent for so long (default: %(default)s)"
        sub.add_argument("--heartbeat_seconds", type=_whole, default=100, help=help)
        return sub

    sub = command("check", workdir=False, checkpoint=False)
    sub.add_argument("--config", required=True, help="configuration: a name or a file, see below")
    sub.add_argument("--json", help="file to write the numbers and findings to")
    sub.add_argument("--html", help="file to write a page with examples to")
    sub = command("train", checkpoint=False)
    sub.add_argument("--config", required=True, help="configuration: a name or a file, see below")
    help = "whose parameters are the start: workdir of another run, a model's folder, or a model of the hub, org/name"
    sub.add_argument("--init_from", type=_directory, help=help)
    sub.add_argument("--step", type=_whole, help="go on from this checkpoint instead of the last; set later ones aside")
    help = "go on where files of the data changed since the run began; data_changes.json keeps a note"
    sub.add_argument("--accept_changed_data", action="store_true", help=help)
    sub = command("evaluate")
    sub.add_argument("--split", default="test", help="train, validation or test (default: %(default)s)")
    sub.add_argument("--mesh", type=_mesh, help="in place of the run's, for another number of devices")
    sub = command("predict", workdir=False)
    _predict_options(sub)
    sub = command("export")
    sub.add_argument("--output", required=True, type=user_path, help="directory or file that is not there yet")
    help = (
        "folder: tensors, configuration and a card, as the hub has them; stablehlo: a file that JAX alone runs; "
        "onnx: one that onnxruntime runs; space: a page to try it, as the hub runs one"
    )
    sub.add_argument("--format", default="folder", help=f"{help} (default: %(default)s)")
    help = "of the model, for the card: the hub's identifier, such as apache-2.0 or cc-by-nc-4.0"
    sub.add_argument("--license", help=help)
    help = "leave out examples.png, which shows images of the data set"
    sub.add_argument("--no_pictures", dest="pictures", action="store_false", default=None, help=help)
    help = "stablehlo: that it is to run on, of cpu, cuda, rocm and tpu, joined by commas (default: cpu,cuda,tpu)"
    sub.add_argument("--platforms", type=lambda names: tuple(names.split(",")), help=help)
    help = "stablehlo, onnx: where the parameters are (default: inside)"
    sub.add_argument("--parameters", choices=("inside", "beside"), help=help)
    help = "onnx: type of the computation and of the parameters (default: float32)"
    sub.add_argument("--precision", choices=("float32", "float16"), help=help)
    help = "stablehlo: leave out the program for images of other sizes"
    sub.add_argument("--no_any_size", dest="any_size", action="store_false", default=None, help=help)
    help = "space: a model of the hub, org/name, that the page loads (default: it has this one inside)"
    sub.add_argument("--model", help=help)
    sub = command("demo", workdir=False)
    network = sub.add_mutually_exclusive_group(required=True)
    network.add_argument("--workdir", type=_directory, help="directory of a run")
    help = "instead: a model's folder, a model of the hub, org/name, or a StableHLO file"
    network.add_argument("--model", type=user_path, help=help)
    help = "address to listen at; 0.0.0.0: others reach the page, too (default: %(default)s)"
    sub.add_argument("--host", default="127.0.0.1", help=help)
    sub.add_argument("--port", type=_port, default=7860, help="of the address (default: %(default)s)")
    sub = command("score", workdir=False, checkpoint=False)
    help = "DIR/TASK/NAME.{png,npy,npz}, or DIR/NAME.npz as predict writes; formats: data_pipelines/predictions.py"
    sub.add_argument("--predictions", required=True, type=_directory, help=help)
    sub.add_argument("--config", required=True, help="configuration: a name or a file, see below")
    sub.add_argument("--split", default="test", help="train, validation or test (default: %(default)s)")
    sub.add_argument("--json", type=user_path, help="file to write the numbers to")
    sub = command("plan", workdir=False, checkpoint=False)
    sub.add_argument("--config", required=True, help="configuration: a name or a file, see below")
    sub.add_argument("--json", type=user_path, help="file to write the numbers to")
    help = "also compile the step: for a TPU slice that need not be here (v5e:4x4; needs .[train,tpu]), or `here`"
    sub.add_argument("--topology", help=help)
    for name in ELSEWHERE:
        commands.add_parser(name, help=COMMANDS[name])
    return parser


def _predict_options(sub: argparse.ArgumentParser) -> None:
    network = sub.add_mutually_exclusive_group(required=True)
    network.add_argument("--workdir", type=_directory, help="directory of the run")
    help = "instead: a model's folder, a model of the hub, org/name, or a StableHLO file"
    network.add_argument("--model", type=user_path, help=help)
    help = "directory for the results; what is there is kept, and the same command goes on with what is missing"
    sub.add_argument("--output", required=True, type=user_path, help=help)
    help = "of the image as the network sees it: fit, into the training size; native, in tiles; or the longer side in "
    help += "pixels, in tiles (default: %(default)s)"
    sub.add_argument("--resolution", default="fit", type=_resolution, help=help)
    help = "share of a tile's side that neighbours have in common (default: %(default)s)"
    sub.add_argument("--overlap", default=0.25, type=float, help=help)
    sub.add_argument("--flip", action="store_true", help="average with the predictions of the mirror image")
    sub.add_argument("--confidence", action="store_true", help="also maps of how sure the network is of each task")
    help = "npz: all maps of an image in a file; png: a 16-bit, indexed or 8-bit picture of each; none"
    sub.add_argument("--arrays", default="npz", help=f"{help} (default: %(default)s)")
    help = "leave out the pictures of image and maps"
    sub.add_argument("--no_panels", dest="panels", action="store_false", help=help)
    help = "files, or array_record: shards with a record for each image (default: %(default)s)"
    sub.add_argument("--format", default="files", help=help)
    help = "of the images and videos, I/N: one of N shares, from 0/N on, for machines that know nothing of each other"
    sub.add_argument("--share", default="0/1", help=help)
    help = "of a video, what the result shows: panels, or one map by its name (default: panels)"
    sub.add_argument("--video", metavar="panels|TASK", help=help)
    help = "of a video, take this share, above 0 and at most 1, of each frame's first slots from the frame before"
    sub.add_argument("--carry_slots", "--carry-slots", type=_portion, metavar="SHARE", help=help)
    help = "leave out images that cannot be read, list them at the end on standard error, and end with exit code 0"
    sub.add_argument("--skip_bad", "--skip-bad", action="store_true", help=help)
    sub.add_argument("--list", type=user_path, help="file with more inputs, a path on each line")
    sub.add_argument("inputs", nargs="*", type=user_path, help="files of images or videos, or directories of them")


def _resolution(text: str) -> str | int:
    return int(text) if text.isdecimal() else text  # what it may be, prediction's options say


def _examples(command: str) -> str:
    """Those of one command."""
    heading, *lines = EXAMPLES.splitlines()
    return "\n".join([heading, *(line for line in lines if f"sgw_jax {command} " in line), ""])


def _directory(text: str) -> str:
    if "://" in text:  # a Path would make a local directory "gs:" of it
        raise argparse.ArgumentTypeError(
            f"{text} is no directory: mount the bucket on every machine (Cloud Storage FUSE) and give its directory"
        )
    path = user_path(text)
    if os.path.exists(path) and not os.path.isdir(path):
        raise argparse.ArgumentTypeError(f"{path} is a file; give a directory")
    return path


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number, at least 1")
    return int(text)


def _portion(text: str) -> float:
    try:
        portion = float(text)
    except ValueError:
        portion = 0.0
    if not 0 < portion <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0 and at most 1")
    return portion


def _port(text: str) -> int:
    if (number := _whole(text)) > 65535:
        raise argparse.ArgumentTypeError(f"{number} is no port; allowed is 1 to 65535")
    return number


def _mesh(name: str) -> str:
    from sgw_jax.sharding import MESHES

    if name not in MESHES:
        raise argparse.ArgumentTypeError(f"{name!r} found; allowed is {', '.join(MESHES)}")
    return name


if __name__ == "__main__":
    sys.exit(main())
