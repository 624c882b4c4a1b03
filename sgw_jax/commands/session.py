"""A command's process: joins the cluster, runs the command, and makes exit codes and sentences of what goes wrong."""

import argparse
import importlib
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from absl import logging
from rich.console import Console
from rich.markup import escape

from sgw_jax.data_pipelines.errors import UserError, extra_named
from sgw_jax.experiment.config_files import UsageError
from sgw_jax.host import enough_threads, keep_freed_memory
from sgw_jax.run.workdir import DiskFullError

# Slurm's srun and Open MPI's mpirun set these in every process that they start.
SEVERAL_PROCESSES = {"SLURM_STEP_NODELIST", "OMPI_COMM_WORLD_SIZE"}

# What JAX says when a collective operation or the coordination service misses a process.
LOST = re.compile("gloo|nccl|coordination|heartbeat|unavailable|deadline|connection|socket", re.IGNORECASE)
AGAIN = "Start the same command again in all processes: it goes on from the last checkpoint."


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Runs the command `arguments.command`; rest is what its arguments leave: overrides of the configuration."""
    keep_freed_memory()
    enough_threads()
    logging.set_verbosity(logging.ERROR)  # Orbax reports every routine save as a warning
    _join_cluster(arguments.heartbeat_seconds)
    console = Console(quiet=jax.process_index() != 0, highlight=False)  # only the first process speaks
    jax.config.update("jax_compilation_cache_dir", str(Path(arguments.cache_dir) / "xla"))
    try:
        with extra_named(f"sgw-jax {arguments.command}"):
            command = importlib.import_module(f"sgw_jax.commands.{arguments.command}")
        return command.run(arguments, rest, console)
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


def _join_cluster(heartbeat_seconds: int) -> None:
    """Several processes are one program. launch/ sets SGW_*; on TPU pods and under Slurm or MPI JAX finds the rest."""
    patience: dict[str, Any] = {"heartbeat_timeout_seconds": heartbeat_seconds}
    if address := os.environ.get("SGW_COORDINATOR"):
        processes, process = int(os.environ["SGW_PROCESSES"]), int(os.environ["SGW_PROCESS"])
        jax.distributed.initialize(address, processes, process, **patience)
    elif "," in os.environ.get("TPU_WORKER_HOSTNAMES", "") or SEVERAL_PROCESSES & set(os.environ):
        jax.distributed.initialize(**patience)


def refuse(rest: Sequence[str], why: str) -> None:
    """For commands that take no overrides."""
    if rest:
        raise UsageError(f"Unknown arguments {list(rest)}; {why}.")
