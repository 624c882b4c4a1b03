"""What the benchmarks have in common: calls timed side by side, and where they ran."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax


def in_turn(calls: Mapping[Any, Callable[[], Any]], seconds: float, rounds: int = 5) -> dict[Any, list[float]]:
    """Seconds of the calls, which take turns so that all see the same machine.

    Every call runs once unmeasured right before the one that is measured: what the call before it left in the caches,
    or took of the host's memory, does not count against it. What a call returns is waited for.

    Args:
      seconds: how long to go on, warming up included. rounds: at least so many measurements of each.
    """
    times: dict[Hashable, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    started = time.monotonic()
    while time.monotonic() - started < seconds or min(map(len, times.values())) < rounds:
        for name, call in calls.items():
            jax.block_until_ready(call())
            begun = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - begun)
    return times


def medians(times: Mapping[Any, list[float]]) -> dict[Any, float]:
    """The median of each call's times."""
    return {name: statistics.median(found) for name, found in times.items()}


def environment(**more: Any) -> dict[str, Any]:
    """Device, cores and versions, and what else a result depends on."""
    return {
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        "python": platform.python_version(),
        **more,
    }
