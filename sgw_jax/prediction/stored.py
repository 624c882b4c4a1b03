"""Predictions read back, from files and from shards."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from sgw_jax.data_pipelines.errors import InputError, files_named
from sgw_jax.data_pipelines.json_files import file_bytes
from sgw_jax.prediction.arrays import read_npz, read_picture
from sgw_jax.prediction.manifest import NAME, Manifest
from sgw_jax.prediction.outputs import NPZ, Part, part_of

__all__ = ["read_predictions"]


def read_predictions(output: Path | str) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The maps of every image that `sgw-jax predict` has finished, one image after another.

    Args:
      output: the directory that it wrote to.

    Returns:
      (name, maps by name) of each: labels uint8, all else float16 or float32 in the units of `Predictor`, rounded as
      the format of the arrays says (`arrays`). Label maps have their classes' names beside them, "<task>_classes".

    Raises:
      ValueError: there are no predictions, no arrays among them, or a damaged file.

    >>> from sgw_jax.prediction.stored import read_predictions
    >>> for name, maps in read_predictions("pictures"):  # doctest: +SKIP
    ...     print(name, maps["depth"].mean())
    """
    output = Path(output)
    manifest = Manifest.read(output)
    if manifest is None:
        raise InputError(f"{output} holds no {NAME}; give a directory that sgw-jax predict wrote to.")
    arrays = manifest.settings["arrays"]
    if arrays == "none":
        raise InputError(f"{output} holds no arrays: they were left out by --arrays=none.")
    kinds = {name: about["kind"] for name, about in manifest.maps.items()}
    parts = [NPZ] if arrays == "npz" else [part_of(name, kind) for name, kind in kinds.items()]
    names = {
        f"{name}_classes": np.array(about["classes"], np.str_)
        for name, about in manifest.maps.items()
        if "classes" in about
    }
    found = (
        _records(output, parts) if manifest.settings["format"] == "array_record" else _files(output, manifest, parts)
    )
    for name, content in found:
        maps = dict(names)
        for part, held in content.items():
            try:
                if part.suffix == ".npz":
                    maps |= read_npz(held)
                else:
                    maps[part.folder] = read_picture(held, kinds[part.folder])
            except Exception as error:  # PIL, NumPy and zlib raise a dozen kinds for damaged files
                raise InputError(
                    f"{output / part.file(name)}: cannot be decoded ({type(error).__name__}: {error})"
                ) from error
        yield name, maps


def _files(output: Path, manifest: Manifest, parts: list[Part]) -> Iterator[tuple[str, dict[Part, bytes]]]:
    for name in manifest.images:
        paths = {part: output / part.file(name) for part in parts}
        if all(path.exists() for path in paths.values()):
            with files_named(f"{name} of {output} cannot be read"):
                yield name, {part: file_bytes(path) for part, path in paths.items()}


def _records(output: Path, parts: list[Part]) -> Iterator[tuple[str, dict[Part, bytes]]]:
    from sgw_jax.prediction.shards import key, records  # here: what it imports takes seconds

    for content in records(output):
        yield content["name"].decode(), {part: content[key(part)] for part in parts}
