"""Files of a pretrained model's folder: JSON, and the tensors of one or many safetensors files."""

import hashlib
import json
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from sgw_jax.backbones.tensors import PretrainedError

ONE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"

# safetensors' names of the types that are read.
DTYPES: dict[str, Any] = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "I64": np.int64,
    "I32": np.int32,
}


def read_bytes(path: epath.Path) -> bytes:
    """The file's content.

    Raises:
      PretrainedError: there is no such file, or it cannot be read.
    """
    try:
        return path.read_bytes()
    except (OSError, ImportError) as error:  # a bucket may need a package that is not installed
        raise PretrainedError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}).") from error


def read_json(path: epath.Path) -> dict[str, Any]:
    """The JSON object that the file holds.

    Raises:
      PretrainedError: it cannot be read, is truncated, or holds something else.
    """
    content = read_bytes(path)
    try:
        found = json.loads(content)
    except ValueError as error:
        raise PretrainedError(f"{path} is no JSON, or truncated ({error}).") from error
    if not isinstance(found, dict):
        raise PretrainedError(f"{path} holds a {type(found).__name__}; it must be a JSON object.")
    return found


def read_tensors(folder: epath.Path) -> tuple[dict[str, np.ndarray], str]:
    """The tensors of a folder and the SHA-256 of their files: of ``model.safetensors``, or of the shards that
    ``model.safetensors.index.json`` lists, in the order of their names, one behind the other.

    Raises:
      PretrainedError: neither is there; the index is truncated or names no files; a shard is missing or truncated, or
        holds other tensors than the index says.
    """
    if (folder / ONE_FILE).exists():
        content = read_bytes(folder / ONE_FILE)
        return _safetensors(folder / ONE_FILE, content), hashlib.sha256(content).hexdigest()
    if (folder / INDEX).exists():
        return _shards(folder)
    found = [name for name in ("pytorch_model.bin", "tf_model.h5") if (folder / name).exists()]
    hint = f" {found[0]} is not read: convert it (save_pretrained writes safetensors)." if found else ""
    raise PretrainedError(f"{folder / ONE_FILE} does not exist.{hint}")


def _shards(folder: epath.Path) -> tuple[dict[str, np.ndarray], str]:
    index = folder / INDEX
    listed = read_json(index).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(map(_is_shard, listed.values())):
        raise PretrainedError(
            f"{index}: weight_map must name a .safetensors file of the same folder for each tensor; fetch it again."
        )
    files = sorted(set(listed.values()))
    if missing := [name for name in files if not (folder / name).exists()]:
        raise PretrainedError(
            f"{index} lists {len(files)} files, of which {len(missing)} are missing: {_some(missing)}; fetch them."
        )
    tensors: dict[str, np.ndarray] = {}
    checksum = hashlib.sha256()
    for name in files:
        content = read_bytes(folder / name)
        checksum.update(content)
        own = _safetensors(folder / name, content)
        said = {tensor for tensor, file in listed.items() if file == name}
        if own.keys() != said:
            raise PretrainedError(
                f"{index} and {name} disagree: {_some(said - own.keys()) or 'nothing'} is in the index alone, "
                f"{_some(own.keys() - said) or 'nothing'} in the file alone; fetch both again."
            )
        tensors |= own
    return tensors, checksum.hexdigest()


def _is_shard(name: Any) -> bool:
    """Whether it names a file of the same folder: an index of unknown origin must not reach outside."""
    return isinstance(name, str) and name.endswith(".safetensors") and "/" not in name and "\\" not in name


def _some(names: Any) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:10]) + (" ..." if len(ordered) > 10 else "")


def _safetensors(file: epath.Path, content: bytes) -> dict[str, np.ndarray]:
    try:
        entries = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        raise PretrainedError(f"{file} is truncated or no safetensors file ({error}); fetch it again.") from error
    if unknown := {entry["dtype"] for _, entry in entries} - set(DTYPES):
        raise PretrainedError(f"{file} holds numbers of type {sorted(unknown)}; it must be of {list(DTYPES)}.")
    return {
        name: np.frombuffer(entry["data"], DTYPES[entry["dtype"]]).reshape(entry["shape"]) for name, entry in entries
    }
