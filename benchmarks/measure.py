"""What the benchmarks have in common: calls timed side by side, where they ran, and the files of results."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from sgw_jax.data_pipelines.atomic import write_atomically
from sgw_jax.data_pipelines.errors import InputError, MissingFileError

DASH = "–"  # of a table's cell: does not apply, or was not measured
FOLDER = Path(__file__).resolve().parent / "results"

# The command that makes a file, by the words its name begins with.
MADE_BY = {
    name: f"python {command}"
    for name, command in {
        "attention": "benchmarks/speed/chunked_attention.py",
        "backbones": "benchmarks/speed/backbone_speed.py --compile",
        "compare": "benchmarks/claims/compare.py --results=FILE",
        "default": "benchmarks/claims/seeds.py --results=FILE",
        "device_step": "benchmarks/speed/device_step.py",
        "exchange": "benchmarks/claims/exchange.py",
        "export": "benchmarks/speed/export.py",
        "finetuning": "benchmarks/speed/finetuning.py",
        "flicker": "benchmarks/claims/flicker.py --workdir RUN ...",
        "full_size": "benchmarks/speed/full_size.py --compile",
        "interactions": "benchmarks/speed/interaction_cost.py",
        "kem_products": "benchmarks/speed/kem_products.py",
        "loading": "benchmarks/speed/loading_speed.py",
        "noise": "benchmarks/claims/noise.py",
        "noise_trained": "benchmarks/claims/noise_trained.py",
        "objectives": "benchmarks/speed/objective_cost.py",
        "objectives_scenes": "benchmarks/claims/compare.py --results=FILE",
        "products": "benchmarks/speed/products.py",
        "real": "benchmarks/claims/real.py --weights=DIR --results=FILE",
        "pytorch": "benchmarks/speed/pytorch.py",
        "scaling": "benchmarks/speed/scaling.py",
        "stability": "benchmarks/claims/stability.py",
        "topk": "benchmarks/speed/topk.py",
        "tpu_step": "-m sgw_jax plan --topology=v5e:2x2 --json=FILE",
        "where_time_goes": "benchmarks/speed/where_time_goes.py",
        "whole_images": "benchmarks/speed/whole_images.py --workdir=RUN",
    }.items()
}


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

    origin, remedy = "The results", "measure them anew"

    def __missing__(self, key: str) -> Any:
        raise InputError(f"{self.origin}: there is no {key!r}, only {', '.join(self)}; {self.remedy}.")


class Results:
    """A file of results: read whole, gone on with, and written with where it was measured, wholly or not at all.

    Args:
      name: of the file in benchmarks/results. path: another file instead. more: goes into its environment.
    """

    def __init__(self, name: str, path: Path | None = None, **more: Any) -> None:
        self.path, self._more = path or FOLDER / f"{name}.json", more
        (self.remedy,) = [f"`{MADE_BY[key]}` measures it" for key in _first_words(name) if key in MADE_BY][:1]

    def load(self) -> Any:
        """What is in the file, every mapping of it a `Record`."""
        if not self.path.exists():
            raise MissingFileError(f"{self.path} is not there; {self.remedy}.")

        def record(found: dict[str, Any]) -> Record:
            named = Record(found)
            named.origin, named.remedy = str(self.path), self.remedy
            return named

        return json.loads(self.path.read_text(encoding="utf-8"), object_hook=record)

    def known(self) -> dict[str, Any]:
        """What a run goes on from: the file's mapping, empty before the first."""
        return self.load() if self.path.exists() else {}

    def rows(self) -> list[dict[str, Any]]:
        """The rows that a run goes on from."""
        return self.load()["rows"] if self.path.exists() else []

    def add(self, rows: Iterable[Mapping[str, Any]], *key: str) -> list[dict[str, Any]]:
        """Writes all rows, these in place of those known that have one of their values of the key."""
        found = merged(self.rows(), rows, *key)
        self.update(rows=found)
        return found

    def update(self, **sections: Any) -> dict[str, Any]:
        """Writes these sections and those that were there beside them; returns them all."""
        found = self.known() | sections
        self.write(found)
        return found

    def label(self, label: str, record: Mapping[str, Any]) -> dict[str, Any]:
        """Writes a record, with an environment of its own, beside those of other labels; returns them all."""
        found = self.known() | {label: {**record, "environment": environment(**self._more)}}
        self._write(found)
        return found

    def write(self, found: Any) -> None:
        """All that is to be in the file; a mapping gets the environment."""
        if isinstance(found, Mapping):
            found = {**found, "environment": environment(**self._more)}
        self._write(found)

    def _write(self, found: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(found, indent=1), contended=True)  # several processes share some runs


def _first_words(name: str) -> list[str]:
    """The name, and what is left without its last word, its last two, ..."""
    words = name.split("_")
    return ["_".join(words[:count]) for count in range(len(words), 0, -1)]


def merged(known: Iterable[Mapping[str, Any]], rows: Iterable[Mapping[str, Any]], *key: str) -> list[dict[str, Any]]:
    """The known rows without those that have one of these rows' values of the key, then these."""
    rows = list(rows)
    new = {tuple(row[name] for name in key) for row in rows}
    return [row for row in known if tuple(row[name] for name in key) not in new] + rows


def needed(record: Mapping[str, Any], *keys: str) -> Any:
    """What lies under the keys, one inside the other; an error names file and keys where that is nothing."""
    found: Any = record
    for depth, key in enumerate(keys, 1):
        found = found.get(key)
        if found is None or found in ({}, []):
            named = record if isinstance(record, Record) else Record
            raise InputError(f"{named.origin}: {'.'.join(keys[:depth])} is missing or empty; {named.remedy}.")
    return found


def select(rows: Iterable[Mapping[str, Any]], **wanted: Any) -> list[Mapping[str, Any]]:
    """The rows with these values, at least one."""
    rows = list(rows)
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    if not found:
        named = rows[0] if rows and isinstance(rows[0], Record) else Record
        sought = ", ".join(f"{key} = {value!r}" for key, value in wanted.items())
        raise InputError(f"{named.origin}: no row has {sought}; {named.remedy}.")
    return found
