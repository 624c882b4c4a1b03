"""Picks the launcher: sgw-jax launch local | tpu-vm | gke | slurm ...; in a checkout alone: python launch ..."""

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

LAUNCHERS = {"local": "local_cluster", "tpu-vm": "tpu_vm", "gke": "gke", "slurm": "slurm"}


def main(argv: Sequence[str] | None = None) -> int:
    """Gives the arguments to the launcher that the first of them names; returns its exit code."""
    argv = sys.argv[1:] if argv is None else argv
    usage = f"sgw-jax launch {' | '.join(LAUNCHERS)} [options] -- train --config=... --workdir=..."
    parser = argparse.ArgumentParser("sgw-jax launch", usage, "Starts a run of several processes.", allow_abbrev=False)
    help = "processes on this machine, Cloud TPU VMs, GKE, Slurm; each has its own --help"
    parser.add_argument("launcher", choices=LAUNCHERS, help=help)
    name = LAUNCHERS[parser.parse_args(argv[:1]).launcher]
    return importlib.import_module(f"sgw_jax.launch.{name}").main(argv[1:])


if __name__ == "__main__":
    if not __package__:  # run as a folder, which Python has put in front: the checkout takes its place
        sys.path[0] = str(Path(__file__).resolve().parents[1])
    sys.exit(main())
