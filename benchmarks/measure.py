"""What the benchmarks have in common: calls timed side by side, where they ran, and results that miss nothing."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from sgw_jax.data_pipelines.errors import InputError, MissingFileError

DASH = "–"  # of a table's cell: does not apply, or was not measured


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


class Record(dict[str, Any]):
    """A mapping out of a file of results; a key that it lacks is an error that names the file."""

    origin = "The results"

    def __missing__(self, key: str) -> Any:
        raise InputError(f"{self.origin}: there is no {key!r}, only {', '.join(self)}; measure it anew.")


def load(path: Path) -> Any:
    """A file of results, every mapping of it a `Record`."""
    if not path.exists():
        raise MissingFileError(f"{path} is not there; measure it.")

    def record(found: dict[str, Any]) -> Record:
        named = Record(found)
        named.origin = str(path)
        return named

    return json.loads(path.read_text(encoding="utf-8"), object_hook=record)


def needed(record: Mapping[str, Any], *keys: str) -> Any:
    """What lies under the keys, one inside the other; an error names file and keys where that is nothing."""
    found: Any = record
    for depth, key in enumerate(keys, 1):
        found = found.get(key)
        if found is None or found in ({}, []):
            origin, path = getattr(record, "origin", Record.origin), ".".join(keys[:depth])
            raise InputError(f"{origin}: {path} is missing or empty; measure it anew.")
    return found


def select(rows: Iterable[Mapping[str, Any]], **wanted: Any) -> list[Mapping[str, Any]]:
    """The rows with these values, at least one."""
    rows = list(rows)
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    if not found:
        origin = getattr(rows[0], "origin", Record.origin) if rows else Record.origin
        raise InputError(f"{origin}: no row has {', '.join(f'{k} = {v!r}' for k, v in wanted.items())}; measure it.")
    return found
