"""Flags of XLA for networks so small that compiling them takes longer than they run: it is asked for little."""

import os
from importlib.metadata import version

# Numbers differ from those of optimised programs by roundings, as they do between machines.
QUICK = "--xla_backend_optimization_level=0"  # of LLVM; a third less
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # later ones refuse the flag, with all tests
    QUICK += " --xla_cpu_use_fusion_emitters=false"  # the plain loops of before; half of what remains


def flags(platforms: str) -> str:
    """Those that are given, to see the tests under programs as people have; else these, on CPUs."""
    return os.environ.get("XLA_FLAGS", "") or (QUICK if platforms == "cpu" else "")
