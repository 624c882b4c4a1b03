"""Files of a pretrained model's folder: JSON, and the tensors of one or many safetensors files."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from etils import epath

from sgw_jax.backbones.tensors import PretrainedError
from sgw_jax.data_pipelines.json_files import json_object

LARGEST_HEADER = 100_000_000  # bytes that safetensors itself allows
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
    except (OSError, ImportError) as error:
        raise _unreadable(path, error) from error


def read_json(path: epath.Path) -> dict[str, Any]:
    """The JSON object that the file holds.

    Raises:
      PretrainedError: it cannot be read, is truncated, or holds something else.
    """
    return json_object(read_bytes(path), path, "Fetch it again.", PretrainedError)


def tensor_files(folder: epath.Path) -> list[epath.Path]:
    """The folder's safetensors files: ``model.safetensors``, or the shards that ``model.safetensors.index.json`` lists.

    Raises:
      PretrainedError: neither is there; the index is truncated or names no files; a shard is missing or damaged, or
        holds other tensors than the index says.
    """
    if (folder / ONE_FILE).exists():
        return [folder / ONE_FILE]
    if (folder / INDEX).exists():
        return _shards(folder)
    found = [name for name in ("pytorch_model.bin", "tf_model.h5") if (folder / name).exists()]
    hint = f" {found[0]} is not read: convert it (save_pretrained writes safetensors)." if found else ""
    raise PretrainedError(f"{folder / ONE_FILE} does not exist.{hint}")


def read_shapes(files: Sequence[epath.Path]) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors, of which the files' first bytes tell.

    Raises:
      PretrainedError: a file that cannot be read, or is damaged.
    """
    return {name: shape for file in files for name, shape in _header(file).items()}


def read_tensors(files: Sequence[epath.Path]) -> tuple[dict[str, np.ndarray], str]:
    """All tensors, and the SHA-256 of the files, one behind the other.

    Raises:
      PretrainedError: a file that cannot be read, or is damaged.
    """
    tensors: dict[str, np.ndarray] = {}
    checksum = hashlib.sha256()
    for file in files:
        content = read_bytes(file)
        checksum.update(content)
        tensors |= _safetensors(file, content)
    return tensors, checksum.hexdigest()


def _shards(folder: epath.Path) -> list[epath.Path]:
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
    for name in files:
        own = _header(folder / name).keys()
        said = {tensor for tensor, file in listed.items() if file == name}
        if own != said:
            raise PretrainedError(
                f"{index} and {name} disagree: {_some(said - own) or 'nothing'} is in the index alone, "
                f"{_some(own - said) or 'nothing'} in the file alone; fetch both again."
            )
    return [folder / name for name in files]


def _is_shard(name: Any) -> bool:
    """Whether it names a file of the same folder: an index of unknown origin must not reach outside."""
    return isinstance(name, str) and name.endswith(".safetensors") and "/" not in name and "\\" not in name


def _some(names: Any) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:10]) + (" ..." if len(ordered) > 10 else "")


def _unreadable(path: epath.Path, error: Exception) -> PretrainedError:
    """A bucket may need a package that is not installed."""
    return PretrainedError(f"{path} cannot be read ({getattr(error, 'strerror', None) or error}).")


def _header(file: epath.Path) -> dict[str, tuple[int, ...]]:
    try:
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            entries = json.loads(opened.read(size) if size <= LARGEST_HEADER else b"")
        return {name: tuple(map(int, entry["shape"])) for name, entry in entries.items() if name != "__metadata__"}
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
        raise PretrainedError(f"{file} is truncated or no safetensors file; fetch it again.") from error
    except (OSError, ImportError) as error:
        raise _unreadable(file, error) from error


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
