"""A network that was written as StableHLO: read, checked against this process, and called."""

import hashlib
import json
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from jax import export
from jaxtyping import Array, Float, UInt8

from sgw_jax.data_pipelines.errors import InputError, MissingFileError, UserError, files_named
from sgw_jax.export.stablehlo.format import (
    FORMAT,
    METADATA,
    PREDICT,
    PREDICT_ANY_SIZE,
    RAW,
    STRIDE,
    VERSION,
    Dimensions,
    Parameters,
    check_flatbuffers,
)
from sgw_jax.tasks import TASKS, task_from_dict
from sgw_jax.tasks.base import Task


class StableHLO:
    """A network that was read from a file: its programs, parameters and tasks.

    Attributes:
      metadata: what the file says of itself.
      tasks: what it predicts.
      size: (height, width) that it was trained at.
      step: of the run that it is of, if known.
      parameters: by name.

    Call:
      images: uint8 (batch, height, width, 3), of the sizes that the program takes.

    Returns:
      Decoded maps by task, (batch, height, width) or, of vectors, (batch, height, width, 3).

    Raises:
      ValueError: images of another type, shape or size.
    """

    def __init__(
        self, metadata: dict[str, Any], tasks: tuple[Task, ...], parameters: Parameters, programs: Mapping[str, bytes]
    ):
        self.metadata, self.tasks, self.step = metadata, tasks, metadata["step"]
        self.parameters = parameters
        self.dimensions = Dimensions(**metadata["dimensions"])._replace(size=tuple(metadata["dimensions"]["size"]))
        self.size = self.dimensions.size
        self.coarsest_stride = metadata.get("stride", STRIDE)
        self._programs = {name: export.deserialize(bytearray(content)) for name, content in programs.items()}
        self._predict = jax.jit(self._predicted)

    def __call__(self, images: UInt8[Array, "batch height width 3"]) -> dict[str, Array]:
        shape, dtype = jnp.shape(images), getattr(images, "dtype", type(images).__name__)
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not shape[0]:
            raise InputError(
                f"StableHLO: the images are {dtype} {shape}; they must be uint8 (batch, height, width, 3), RGB."
            )
        if not self.dimensions.takes(shape[1:3]):
            raise InputError(
                f"StableHLO: the images are {shape[1]} x {shape[2]} (height x width); this program takes "
                f"{self.dimensions}. Resize them, or use `Predictor.from_stablehlo`, which takes images of any size."
            )
        return self._predict(self.parameters, images)

    def _predicted(self, parameters: Parameters, images: Array) -> dict[str, Array]:
        return self._programs[PREDICT if images.shape[1:3] == self.size else PREDICT_ANY_SIZE].call(parameters, images)

    def apply(self, variables: Parameters, images: Float[Array, "batch height width 3"]) -> dict[str, Array]:
        """Raw predictions of normalised images, as `MultiTaskModel.apply` gives them."""
        return self._programs[RAW].call(variables, images)


def load_stablehlo(path: Path | str, kinds: Mapping[str, type[Task]] = TASKS) -> StableHLO:
    """Reads what `export_stablehlo` wrote.

    Args:
      path: of the file.
      kinds: task classes by name where the network has a user's own, {**TASKS, "Mine": Mine}.

    Returns:
      The network, for the platform of this process.

    Raises:
      ImportError: flatbuffers is not installed.
      FileNotFoundError: there is no such file, or none of its parameters beside it.
      ValueError: a file that is truncated, damaged or no such one, or has no program for this platform or this JAX.
    """
    check_flatbuffers(f"{path}: a StableHLO file")
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"{path} is no file; give one that sgw-jax export --format=stablehlo wrote.")
    try:
        with files_named(f"{path} cannot be read"), zipfile.ZipFile(path) as archive:
            metadata = _checked(path, archive)
            names = (PREDICT, RAW, *([PREDICT_ANY_SIZE] if metadata["dimensions"]["multiple"] else []))
            programs = {name: archive.read(name) for name in names}
            inside = {
                name.removesuffix(".npy"): _array(archive, name) for name in archive.namelist() if name.endswith(".npy")
            }
    except UserError:
        raise
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError) as error:
        raise InputError(
            f"{path} is truncated, damaged or no StableHLO file of sgw_jax ({error}); copy or export it again."
        ) from error
    about = metadata["parameters"]
    found = _beside(path, about) if "file" in about else inside
    _check_parameters(path, about["arrays"], found)
    tasks = tuple(task_from_dict(task["fields"], kinds) for task in metadata["tasks"])
    return StableHLO(metadata, tasks, found, programs)


def _checked(path: Path, archive: zipfile.ZipFile) -> dict[str, Any]:
    """The metadata, once it is known that this process can run the file."""
    try:
        metadata = json.loads(archive.read(METADATA))
        known = metadata["format"] == FORMAT
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path} is an archive, but none that sgw-jax export --format=stablehlo wrote.") from error
    if not known or metadata["version"] > VERSION:
        raise InputError(
            f"{path} is of the format {metadata['format']!r}, version {metadata['version']}; this package reads "
            f"{FORMAT!r} up to version {VERSION}. Update sgw_jax, or export the network again."
        )
    least, most = (
        export.minimum_supported_calling_convention_version,
        export.maximum_supported_calling_convention_version,
    )
    if not least <= metadata["calling_convention"] <= most:
        raise InputError(
            f"{path} was made by JAX {metadata['made_by']['jax']} (calling convention "
            f"{metadata['calling_convention']}); this JAX, {jax.__version__}, runs {least} to {most}. Install a JAX as "
            "new as that, or export the network again."
        )
    here = export.default_export_platform()
    if here not in metadata["platforms"]:
        raise InputError(
            f"{path} has programs for {', '.join(metadata['platforms'])}; this process runs on {here}. Export it with "
            f"{here} among the platforms, or set JAX_PLATFORMS to one that it has."
        )
    return metadata


def _array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(name) as member:
        return np.lib.format.read_array(member, allow_pickle=False)


def _beside(path: Path, about: Mapping[str, Any]) -> Parameters:
    file = path.with_name(Path(about["file"]).name)
    if not file.is_file():
        raise MissingFileError(f"{path} has its parameters in {file.name}, which is not beside it; copy both files.")
    with files_named(f"{file} cannot be read"):
        content = file.read_bytes()
    if hashlib.sha256(content).hexdigest() != about["sha256"]:
        raise InputError(f"{file} is damaged or of another export than {path.name}; copy or export both again.")
    return safetensors.numpy.load(content)


def _check_parameters(path: Path, wanted: Mapping[str, Any], found: Parameters) -> None:
    given = {name: [str(array.dtype), *array.shape] for name, array in found.items()}
    if given != wanted:
        names = [name for name in {**wanted, **given} if given.get(name) != wanted.get(name)]
        raise InputError(
            f"{path}: {len(names)} parameters are missing, unknown or of another type or shape, {names[0]} among them; "
            "export the network again."
        )
