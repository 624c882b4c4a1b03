"""The command: python -m sgw_jax train | evaluate | predict | plan (also installed as sgw-jax)."""

import argparse
import json
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging
from rich.console import Console
from rich.markup import escape

from sgw_jax.data_pipelines.errors import UserError, files_named
from sgw_jax.experiment.build import build, build_model, build_tasks
from sgw_jax.experiment.config_files import UsageError, read_config
from sgw_jax.experiment.experiment import Experiment
from sgw_jax.host import enough_threads, keep_freed_memory
from sgw_jax.plan.network import plan, print_plan
from sgw_jax.plan.pod import pod_plan, print_pod_plan, topology_devices
from sgw_jax.prediction.image_files import predict_files
from sgw_jax.report.results import finish
from sgw_jax.run.logs import write_atomically
from sgw_jax.run.saved_run import open_run
from sgw_jax.run.workdir import DiskFullError, wait_for_all
from sgw_jax.sharding import MESHES, make_mesh, mesh_sizes
from sgw_jax.train import check_start, train

EPILOG = """\
configuration:
  --config=scenes                      a shipped configuration by name, or a file: --config=configs/scenes.py
  --config=scenes:interaction=none,tasks=semseg+depth    arguments of the file's get_config, after a colon
  --config.steps=200 --config.optimizer.learning_rate=3e-4    any key of configs/base.py

examples:
  python -m sgw_jax train --config=configs/scenes.py --workdir=runs/scenes    (the same again: resumes)
  python -m sgw_jax train --config=scenes --workdir=runs/tuned --init_from=runs/scenes
  python -m sgw_jax evaluate --workdir=runs/scenes --split=validation
  python -m sgw_jax predict --workdir=runs/scenes --output=pictures photo.jpg folder/
  python -m sgw_jax plan --config=nyud:swin_l,interaction=skem --topology=v5e:4x4 --config.mesh.name=fsdp
"""

# Slurm's srun and Open MPI's mpirun set these in every process that they start.
SEVERAL_PROCESSES = {"SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE"}

# What JAX says when a collective operation or the coordination service misses a process.
LOST = re.compile("gloo|nccl|coordination|heartbeat|unavailable|deadline|connection|socket", re.IGNORECASE)
AGAIN = "Start the same command again in all processes: it goes on from the last checkpoint."


def main(argv: Sequence[str] | None = None) -> int:
    """Parses, joins the cluster, runs the command."""
    arguments, rest = _parser().parse_known_args(argv)
    keep_freed_memory()
    enough_threads()
    logging.set_verbosity(logging.ERROR)  # Orbax reports every routine save as a warning
    _join_cluster(arguments.heartbeat_seconds)
    console = Console(quiet=jax.process_index() != 0, highlight=False)  # only the first process speaks
    jax.config.update("jax_compilation_cache_dir", str(Path(arguments.cache_dir) / "xla"))
    try:
        return arguments.run(arguments, rest, console)
    except KeyboardInterrupt:
        console.print("Interrupted. The same command goes on from the last checkpoint, if there is one.")
        return _leave(128 + signal.SIGINT)
    except UserError as error:
        if arguments.traceback:
            traceback.print_exc()
        Console(stderr=True, highlight=False).print(f"[red]error:[/red] {escape(str(error))}", soft_wrap=True)
        return _leave(1, at_once=isinstance(error, DiskFullError))  # writers would try once more, and fail loudly
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or not LOST.search(str(error)) or arguments.traceback:
            traceback.print_exc()
        else:
            reason = str(error).partition("\n")[0]
            text = f"Another process of this run has ended or cannot be reached ({reason}). {AGAIN}"
            Console(stderr=True, highlight=False).print(f"[red]error:[/red] {escape(text)}", soft_wrap=True)
        return _leave(1)
    except Exception:  # a defect
        traceback.print_exc()
        return _leave(1)


def _leave(code: int, at_once: bool = False) -> int:
    """The exit code of a failure; one of several processes ends at once, for the ordinary exit would wait minutes for
    the others, which in turn wait for this one in some collective operation."""
    if at_once or jax.process_count() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _parser() -> argparse.ArgumentParser:
    shape: dict[str, Any] = {
        "epilog": EPILOG,
        "formatter_class": argparse.RawDescriptionHelpFormatter,
        "allow_abbrev": False,  # or --conf would be taken for --config
    }
    parser = argparse.ArgumentParser("sgw-jax", description="Multi-task dense vision in JAX.", **shape)
    commands = parser.add_subparsers(required=True, metavar="train | evaluate | predict | plan")

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sgw_jax"

    def command(
        name: str, run: Callable, text: str, workdir: bool = True, checkpoint: bool = True
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(name, help=text, description=text, **shape)
        sub.set_defaults(run=run)
        if workdir:
            sub.add_argument("--workdir", required=True, type=_directory, help="directory of the run")
        if checkpoint:
            help = "best by validation, or last (default: %(default)s)"
            sub.add_argument("--checkpoint", default="best", choices=("best", "last"), help=help)
        help = "of rendered scenes and compiled programs (default: %(default)s)"
        sub.add_argument("--cache_dir", default=str(cache), help=help)
        sub.add_argument("--traceback", action="store_true", help="show where in the code an error came up")
        help = "of several processes: end all if one is silent for so long (default: %(default)s)"
        sub.add_argument("--heartbeat_seconds", type=_seconds, default=100, help=help)
        return sub

    text = "Train, or go on where --workdir stands; then evaluate and write report.html."
    sub = command("train", _train, text, checkpoint=False)
    sub.add_argument("--config", required=True, help="configuration: a name or a file, see below")
    sub.add_argument("--init_from", help="workdir of another run whose parameters are the start")
    sub = command("evaluate", _evaluate, "Evaluate a run's checkpoint on a split.")
    sub.add_argument("--split", default="test", help="train, validation or test (default: %(default)s)")
    sub.add_argument("--mesh", choices=MESHES, help="in place of the run's, for another number of devices")
    sub = command("predict", _predict, "Predict on image files: panels (PNG) and arrays (npz).")
    sub.add_argument("--output", required=True, help="directory for the results")
    sub.add_argument("inputs", nargs="+", help="image files or directories")
    text = "What a configuration costs by module: parameters, MACs, FLOPs, memory. Needs no data."
    sub = command("plan", _plan, text, workdir=False, checkpoint=False)
    sub.add_argument("--config", required=True, help="configuration: a name or a file, see below")
    sub.add_argument("--json", help="file to write the numbers to")
    help = "also compile the training step: for a TPU slice that need not be here (v5e:4x4; needs .[tpu]), or `here`"
    sub.add_argument("--topology", help=help)
    return parser


def _directory(text: str) -> str:
    if "://" in text:  # a Path would make a local directory "gs:" of it
        raise argparse.ArgumentTypeError(
            f"{text} is no directory: mount the bucket on every machine (Cloud Storage FUSE) and give its directory"
        )
    return text


def _seconds(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of seconds, at least 1")
    return int(text)


def _join_cluster(heartbeat_seconds: int) -> None:
    """Several processes are one program. launch/ sets SGW_*; on TPU pods and under Slurm or MPI JAX finds the rest."""
    patience: dict[str, Any] = {"heartbeat_timeout_seconds": heartbeat_seconds}
    if address := os.environ.get("SGW_COORDINATOR"):
        processes, process = int(os.environ["SGW_PROCESSES"]), int(os.environ["SGW_PROCESS"])
        jax.distributed.initialize(address, processes, process, **patience)
    elif "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or SEVERAL_PROCESSES & set(os.environ):
        jax.distributed.initialize(**patience)


def _train(arguments: argparse.Namespace, overrides: Sequence[str], console: Console) -> int:
    started = time.monotonic()
    experiment = build(read_config(arguments.config, overrides), arguments.cache_dir)
    check_start(experiment, arguments.workdir, arguments.init_from)
    with files_named(f"--cache_dir={arguments.cache_dir}"):
        prepare(experiment, console)
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


def _evaluate(arguments: argparse.Namespace, rest: Sequence[str], console: Console) -> int:
    _refuse(rest, "evaluate takes its configuration from the checkpoint")
    with open_run(arguments.workdir, arguments.checkpoint) as run:
        mesh = make_mesh(mesh_sizes(arguments.mesh)) if arguments.mesh else None
        experiment = build(run.config, arguments.cache_dir, run.tasks, mesh)
    if arguments.split not in experiment.data.sources:
        raise UsageError(f"--split={arguments.split}: the data has the splits {sorted(experiment.data.sources)}.")
    with files_named(f"--cache_dir={arguments.cache_dir}"):
        prepare(experiment, console)
    finish(experiment, Path(arguments.workdir), arguments.split, arguments.checkpoint, {}, console)
    return 0


def _predict(arguments: argparse.Namespace, rest: Sequence[str], console: Console) -> int:
    _refuse(rest, "predict takes its configuration from the checkpoint")
    predict_files(arguments.workdir, arguments.inputs, arguments.output, console, which=arguments.checkpoint)
    return 0


def _plan(arguments: argparse.Namespace, overrides: Sequence[str], console: Console) -> int:
    config = read_config(arguments.config, overrides)
    found = plan(build_model(config, build_tasks(config)), tuple(config.data.size))
    print_plan(found, console)
    numbers = found.to_dict()
    if arguments.topology:
        devices = jax.devices() if arguments.topology == "here" else topology_devices(arguments.topology)
        step = pod_plan(build(config, None, mesh=make_mesh(mesh_sizes(**config.mesh), devices)))
        print_pod_plan(step, console)
        numbers["step"] = step.to_dict()
    if arguments.json:
        with files_named(f"--json={arguments.json}"):
            write_atomically(Path(arguments.json), json.dumps(numbers, indent=1))
    return 0


def _refuse(rest: Sequence[str], why: str) -> None:
    if rest:
        raise UsageError(f"Unknown arguments {list(rest)}; {why}.")


def prepare(experiment: Experiment, console: Console) -> None:
    """Lets sources say what they found and render what they need: first on the first process, so that a shared disk
    gets it once."""
    for sentence in {source.describe() for source in experiment.data.sources.values() if hasattr(source, "describe")}:
        console.print(sentence, soft_wrap=True)

    def render() -> None:
        for source in experiment.data.sources.values():
            if hasattr(source, "prepare"):
                source.prepare()

    if jax.process_index() == 0:
        render()
    wait_for_all("data prepared")
    if jax.process_index() != 0:
        render()


if __name__ == "__main__":
    sys.exit(main())
