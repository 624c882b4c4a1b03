"""Data that changed since a run began: which files, and going on with them when that is asked for."""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sgw_jax.data_pipelines.atomic import write_atomically
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.json_files import file_bytes
from sgw_jax.experiment.data_sets import SPLITS
from sgw_jax.experiment.experiment import Data, differences

FILES = "data_files.json.gz"  # split -> file -> bytes, as the run last knew them
CHANGES = "data_changes.json"  # what was accepted, and when
SHOWN = 10  # files of a split in a message

Sizes = dict[str, dict[str, int]]


def of_data(key: str) -> bool:
    """Whether a key of a run's identity is of the data themselves, not of the configuration."""
    return key.startswith(tuple(f"data.{split}." for split in SPLITS))


def changed_data(there: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A line for each key of the data that differs between two identities."""
    parts = [{key: value for key, value in identity.items() if of_data(key)} for identity in (there, now)]
    return list(differences(*parts))


def changed_files(workdir: Path, data: Data) -> list[str]:
    """A line for each file that came, went or has another size; empty where the run kept no list of them."""
    try:
        before: Sizes = json.loads(gzip.decompress(file_bytes(workdir / FILES)))
        if not all(isinstance(size, int) for sizes in before.values() for size in sizes.values()):
            raise ValueError("no sizes")
    except (OSError, EOFError, ValueError, AttributeError, zlib.error):
        return []  # a run of an earlier release, or of data without files; or a damaged list, which is a help alone
    now = _sizes(data)
    return [line for split in sorted({*before, *now}) for line in _of_split(split, before, now)]


def _of_split(split: str, before: Sizes, now: Sizes) -> Iterator[str]:
    if split not in before or split not in now:
        yield f"{split}: the split is {'new' if split in now else 'gone'}"
        return
    old, new = before[split], now[split]
    lines = [
        f"{split}: {file} is {new[file]:,} bytes, was {old[file]:,}"
        for file in old
        if new.get(file, old[file]) != old[file]
    ]
    lines += [f"{split}: {file} is gone" for file in old if file not in new]
    lines += [f"{split}: {file} is new" for file in new if file not in old]
    if not lines and old.keys() == new.keys():
        lines = [f"{split}: the same files in another order"] if list(old) != list(new) else []
    yield from lines[:SHOWN]
    if len(lines) > SHOWN:
        yield f"{split}: and {len(lines) - SHOWN:,} more"


def keep_files(workdir: Path, data: Data) -> None:
    """Writes the list of the data's files with their sizes."""
    if sizes := _sizes(data):
        write_atomically(workdir / FILES, gzip.compress(json.dumps(sizes).encode(), mtime=0))


def record_change(workdir: Path, lines: list[str]) -> None:
    """Notes in the run what changed, and when it was gone on with."""
    path = workdir / CHANGES
    try:
        records = [*json.loads(file_bytes(path))] if path.exists() else []
    except (OSError, TypeError, ValueError) as error:
        raise InputError(
            f"{path}, the note of what was accepted before, is damaged ({error}); move it away."
        ) from error
    records.append({"accepted": datetime.now(UTC).isoformat(timespec="seconds"), "changed": lines})
    write_atomically(path, json.dumps(records, indent=1))


def _sizes(data: Data) -> Sizes:
    return {split: source.listing() for split, source in data.sources.items() if hasattr(source, "listing")}
