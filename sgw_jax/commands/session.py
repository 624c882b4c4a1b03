"""A command's process: joins the cluster, runs the command, and makes exit codes and sentences of what goes wrong."""

import argparse
import errno
import importlib
import os
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import logging
from rich.console import Console

from sgw_jax.commands import cluster
from sgw_jax.data_pipelines.consoles import messages, print_error
from sgw_jax.data_pipelines.errors import FileError, InputError, UserError, extra_named
from sgw_jax.data_pipelines.paths import default_cache, obstacle
from sgw_jax.experiment.config_files import UsageError
from sgw_jax.host import enough_threads, keep_freed_memory, sound_fusions
from sgw_jax.run.late_echoes import silence_echoes
from sgw_jax.run.workdir import DiskFullError

# What JAX says when a collective operation or the coordination service misses a process.
LOST = re.compile("gloo|nccl|coordination|heartbeat|unavailable|deadline|connection|socket", re.IGNORECASE)
FULL = re.compile("RESOURCE_EXHAUSTED|out of memory", re.IGNORECASE)
LESS = (
    "What helps: a smaller config.batch_size or a larger config.accumulate, config.backbones.NAME.remat=full, chunks "
    "(config.backbones.NAME.attention_chunk or window_chunk); `sgw-jax plan` says what a configuration needs."
)
AGAIN = "Start the same command again in all processes: it goes on from the last checkpoint."


def run(arguments: argparse.Namespace, rest: Sequence[str]) -> int:
    """Runs the command `arguments.command`; rest is what its arguments leave: overrides of the configuration."""
    keep_freed_memory()
    enough_threads()
    sound_fusions()
    # Orbax reports every routine save as a warning, and an error in each of its threads before it raises it here.
    logging.set_verbosity(logging.ERROR if arguments.traceback else logging.FATAL)
    if not arguments.traceback:
        _quieten_threads()
    try:
        cluster.join(arguments.heartbeat_seconds)
        check_devices()
        console = messages(quiet=jax.process_index() != 0)  # only the first process speaks
        arguments.cache_dir = _cache(arguments.cache_dir, console)
        with extra_named(f"sgw-jax {arguments.command}"):
            command = importlib.import_module(f"sgw_jax.commands.{arguments.command}")
        return command.run(arguments, rest, console)
    except KeyboardInterrupt:
        again = "Interrupted. The same command goes on from the last checkpoint, if there is one."
        messages(quiet=jax.process_index() != 0).print(again)
        # Threads may still be compiling: the ordinary exit would wait for them, and crash.
        return leave(128 + signal.SIGINT, at_once=True)
    except UserError as error:
        if arguments.traceback:
            traceback.print_exc()
        print_error(str(error))
        return leave(1, at_once=isinstance(error, DiskFullError))  # writers would try once more, and fail loudly
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if arguments.traceback:
            traceback.print_exc()
        elif isinstance(error, MemoryError) or FULL.search(str(error)):
            print_error(f"Out of memory ({_first_line(error)}). {LESS}")
        elif jax.process_count() == 1 or not LOST.search(str(error)):
            traceback.print_exc()
        else:
            print_error(f"Another process of this run has ended or cannot be reached ({_first_line(error)}). {AGAIN}")
        return leave(1)
    except Exception:  # a defect
        traceback.print_exc()
        return leave(1)


def check_devices() -> None:
    """Raises where JAX finds no device of the kind that it is told to use.

    Raises:
      InputError: names JAX_PLATFORMS and what JAX says.
    """
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter for a kind that JAX knows and is not installed
        missing = "what drives such a device is not installed"
        reason = missing if isinstance(error, AssertionError) else _first_line(error).partition(" (set JAX_")[0]
        raise InputError(
            f"JAX finds no device (JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}): {reason}. Unset JAX_PLATFORMS "
            "to take what is there, or set it to cpu."
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0].strip(" .") or type(error).__name__


def _cache(given: str | None, console: Console) -> str:
    """The directory of what is kept between runs, the usual one if none is given; JAX keeps compiled programs there,
    unless its environment variable names another place."""
    place, why = (Path(given), "") if given is not None else default_cache()
    if why:
        console.print(f"The cache is {place}, because {why}; --cache_dir=DIR gives another.", soft_wrap=True)
    if problem := obstacle(place):
        raise FileError(f"--cache_dir={place}: {problem}; give another.")
    if why or obstacle(Path(os.path.expanduser("~"))):
        os.environ.setdefault("MPLCONFIGDIR", str(place / "matplotlib"))  # which complains without a home
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache", UserWarning)  # at every program
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):  # JAX's own choice of place, such as a bucket that hosts share
        jax.config.update("jax_compilation_cache_dir", str(place / "xla"))
    return str(place)


def _quieten_threads() -> None:
    """Threads of Orbax, TensorStore and tensorboardX each print the trace of what a full disk or a damaged file does to
    them, a thousand lines in all; the main thread gets the same error and says it once."""
    silence_echoes()

    def of_thread(arguments: threading.ExceptHookArgs) -> None:
        if getattr(arguments.exc_value, "errno", None) != errno.ENOSPC:
            threading.__excepthook__(arguments)

    threading.excepthook = of_thread


def leave(code: int, at_once: bool = False) -> int:
    """The exit code of a failure; one of several processes ends at once, for the ordinary exit would wait minutes for
    the others, which in turn wait for this one in some collective operation."""
    if at_once or jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def refuse(rest: Sequence[str], why: str) -> None:
    """For commands that take no overrides."""
    if rest:
        raise UsageError(f"Unknown arguments {list(rest)}; {why}.")
