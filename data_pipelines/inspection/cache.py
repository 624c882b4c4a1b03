"""An inspection that was made is kept, by what was looked at, so that going on with a run does not repeat it."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sgw_jax.data_pipelines.atomic import replacing
from sgw_jax.data_pipelines.inspection.look import Inspection
from sgw_jax.data_pipelines.loader import Source

VERSION = 2  # of the rules: one more where another rule may find something in the same data


def state(sources: Mapping[str, Source], asked: Mapping[str, Any]) -> str:
    """A digest of what a look depends on: what is asked, and every file beside the data with its size and time.

    Args:
      asked: what the run wants of the data, as JSON.
    """
    digest = hashlib.sha256(json.dumps([VERSION, asked], sort_keys=True, default=str).encode())
    for split, source in sources.items():
        digest.update(json.dumps([split, source.fingerprint()], sort_keys=True, default=str).encode())
    for folder in sorted(_folders(sources.values())):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            found = entry.stat(follow_symlinks=True) if entry.is_file() else None
            size, time = (found.st_size, found.st_mtime_ns) if found else (None, None)
            digest.update(f"{entry.path}\0{size}\0{time}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _folders(sources: Iterable[Any]) -> set[Path]:
    """Where the files of the sources lie."""
    found: set[Path] = set()
    for source in sources:
        if hasattr(source, "files"):
            found.update(path.parent for item in range(len(source)) for path in source.files(item))
    return found


def kept(cache_dir: Path, key: str) -> Inspection | None:
    """What was found in the same data before, if it was looked at and is readable."""
    try:
        return Inspection.from_dict(json.loads((_path(cache_dir, key)).read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError):  # none, or of another release
        return None


def keep(cache_dir: Path, key: str, found: Inspection) -> None:
    """Keeps what was found."""
    path = _path(cache_dir, key)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, contended=True) as temporary:
        temporary.write_text(json.dumps(found.to_dict()), encoding="utf-8")


def _path(cache_dir: Path, key: str) -> Path:
    return cache_dir / "inspections" / f"{key[:32]}.json"
