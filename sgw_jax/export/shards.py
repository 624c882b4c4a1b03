"""Tensors written as safetensors: one file, or several with an index, as the hub has them."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy

from sgw_jax.backbones.files import DTYPES, INDEX, ONE_FILE
from sgw_jax.data_pipelines.errors import InputError

SHARD = 5 * 10**9  # bytes of tensors in a file, at most, unless one alone has more; the hub's own number


def write_tensors(folder: Path, tensors: Mapping[str, Any], limit: int = SHARD) -> str:
    """Writes model.safetensors, or shards of at most ``limit`` bytes of tensors and model.safetensors.index.json.

    Only one shard's tensors are in the host's memory at a time.

    Returns:
      The SHA-256 of the files, one behind the other, as `read_tensors` has it.

    Raises:
      InputError: a tensor of a type that the format's readers here do not know.
    """
    known = {np.dtype(kind) for kind in DTYPES.values()}
    if unknown := sorted(name for name, tensor in tensors.items() if np.dtype(tensor.dtype) not in known):
        raise InputError(f"{unknown[0]} is of type {tensors[unknown[0]].dtype}; it must be one of {list(DTYPES)}.")
    groups = list(shards({name: tensor.nbytes for name, tensor in tensors.items()}, limit))
    count = len(groups)
    files = [ONE_FILE] if count == 1 else [f"model-{n + 1:05d}-of-{count:05d}.safetensors" for n in range(count)]
    checksum = hashlib.sha256()
    for file, group in zip(files, groups, strict=True):
        # C order: safetensors writes an array's memory as it lies.
        arrays = {name: np.asarray(jax.device_get(tensors[name]), order="C") for name in group}
        safetensors.numpy.save_file(arrays, folder / file)
        with (folder / file).open("rb") as written:
            while part := written.read(2**24):
                checksum.update(part)
    if count > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        listed = {name: file for file, group in zip(files, groups, strict=True) for name in group}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(listed.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return checksum.hexdigest()


def shards(sizes: Mapping[str, int], limit: int) -> Iterator[list[str]]:
    """The names in their order, in groups of at most ``limit`` bytes; what alone has more is a group of its own."""
    group: list[str] = []
    held = 0
    for name, size in sizes.items():
        if group and held + size > limit:
            yield group
            group, held = [], 0
        group.append(name)
        held += size
    yield group
