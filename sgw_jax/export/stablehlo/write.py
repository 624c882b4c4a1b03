"""A network written as StableHLO, for any platforms, with any number of images.

Programs take their parameters as an argument [our decision]: so they share them, no file meets the 2 GiB that a
serialised program may have, and no compiler folds them as constants. What is for one size, that of training, makes the
same bits as the network's code. A program for any size is one of its own, because it cannot [our decision]: in which
order a map's rows and columns are interpolated depends on its sides, where they are known.
"""

import contextlib
import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export
from jaxtyping import Array, Float, UInt8
from rich.console import Console

import sgw_jax
from sgw_jax.data_pipelines import atomic
from sgw_jax.data_pipelines.errors import InputError, files_named
from sgw_jax.data_pipelines.transforms import IMAGE_MEAN, IMAGE_STD, normalised_levels
from sgw_jax.export.maps import about_map
from sgw_jax.export.stablehlo.format import (
    EPOCH,
    FORMAT,
    METADATA,
    PLATFORMS,
    PREDICT,
    PREDICT_ANY_SIZE,
    RAW,
    VERSION,
    Dimensions,
    Parameters,
    check_flatbuffers,
)
from sgw_jax.export.trained import Trained, check_program
from sgw_jax.model import MultiTaskModel
from sgw_jax.tasks.base import Task


def save_stablehlo(
    trained: Trained,
    output: Path | str,
    *,
    platforms: Sequence[str] = PLATFORMS,
    parameters: Literal["inside", "beside"] = "inside",
    any_size: bool | None = None,
    console: Console | None = None,
) -> None:
    """`export_stablehlo` as one of the formats; ``console`` is told what images the file takes."""
    check_program(trained, output)
    about = export_stablehlo(
        trained.module,
        trained.variables,
        trained.tasks,
        trained.size,
        output,
        platforms=platforms,
        parameters=parameters,
        any_size=any_size,
        step=trained.step,
    )
    if console is not None:
        console.print(about["images"], soft_wrap=True, markup=False)


def export_stablehlo(
    model: MultiTaskModel,
    variables: Mapping[str, Any],
    tasks: Sequence[Task],
    size: tuple[int, int],
    path: Path | str,
    *,
    platforms: Sequence[str] = PLATFORMS,
    parameters: Literal["inside", "beside"] = "inside",
    any_size: bool | None = None,
    step: int | None = None,
) -> dict[str, Any]:
    """Writes a network to one file that needs JAX alone (docs/deploy.md has the lines that load it).

    Args:
      model: the network.
      variables: its collections.
      tasks: what it predicts.
      size: (height, width) that it was trained at, in pixels.
      path: of the file; one that is there is replaced, at once.
      platforms: that it is to run on: "cpu", "cuda", "rocm", "tpu". None of them need be here.
      parameters: "inside" the file, or "beside" it, in `path` + ".safetensors".
      any_size: whether there is also a program for images of any height and width, multiples of the coarsest stride;
        None: if the network can.
      step: of the run, where there is one.

    Returns:
      The metadata that the file holds; "images" says in a line what it takes.

    Raises:
      ImportError: flatbuffers is not installed.
      ValueError: unknown platforms, ``any_size`` of a network that cannot.
      OSError: the file cannot be written.
    """
    check_flatbuffers("export to StableHLO")
    unknown = [name for name in platforms if name not in (*PLATFORMS, "rocm")]
    if unknown or not platforms or isinstance(platforms, str):
        raise InputError(f"export: platforms are {platforms!r}; give some of {[*PLATFORMS, 'rocm']}, as a list.")
    if parameters not in ("inside", "beside"):
        raise InputError(f"export: parameters is {parameters!r}; it must be 'inside' or 'beside' (the file).")
    path, dimensions = Path(path), _dimensions(model, size, any_size)
    arrays = {name: np.asarray(leaf) for name, leaf in flatten_dict(dict(variables), sep="/").items()}
    foreign = {str(array.dtype) for array in arrays.values() if array.dtype.kind not in "fiub"}
    if foreign and parameters == "inside":
        raise InputError(f"export: npz has no {', '.join(foreign)}; write the parameters beside the file.")
    programs = _programs(model, tasks, arrays, dimensions, platforms)
    metadata = _metadata(tasks, dimensions, programs, arrays, step, model.coarsest_stride)

    beside = path.with_name(f"{path.name}.safetensors")
    with files_named(f"{path} cannot be written"):
        if parameters == "beside":
            content = safetensors.numpy.save(arrays)
            metadata["parameters"] |= {"file": beside.name, "sha256": hashlib.sha256(content).hexdigest()}
            atomic.write_atomically(beside, content)
        with atomic.replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            _add(archive, METADATA, json.dumps(metadata, indent=2, ensure_ascii=False).encode())
            for name, program in programs.items():
                _add(archive, name, bytes(program.serialize()))
            for name, array in arrays.items() if parameters == "inside" else ():
                with archive.open(zipfile.ZipInfo(f"{name}.npy", EPOCH), "w", force_zip64=True) as member:
                    np.lib.format.write_array(member, array, allow_pickle=False)
    return metadata


def _dimensions(model: MultiTaskModel, size: tuple[int, int], any_size: bool | None) -> Dimensions:
    height, width = int(size[0]), int(size[1])
    reason = getattr(model, "fixed_size", "")
    if any_size and reason:
        raise InputError(f"export: the network cannot take images of any size: {reason}; leave any_size out.")
    if reason or any_size is False:
        return Dimensions((height, width), reason=reason or "as was asked for")
    multiple = model.coarsest_stride
    # Not below what training saw: so that as many tokens as top_k keeps are always there.
    least = max(1, min(height, width) // multiple) * multiple
    return Dimensions((height, width), multiple, least)


def _programs(
    model: MultiTaskModel,
    tasks: Sequence[Task],
    arrays: Mapping[str, np.ndarray],
    dimensions: Dimensions,
    platforms: Sequence[str],
) -> dict[str, export.Exported]:
    levels, channel = normalised_levels(), np.arange(3)

    def raw(parameters: Parameters, images: Float[Array, "batch height width 3"]) -> dict[str, Array]:
        predictions: Any = model.apply(unflatten_dict(parameters, sep="/"), images)
        return {task.name: predictions[task.name] for task in tasks}

    def predict(parameters: Parameters, images: UInt8[Array, "batch height width 3"]) -> dict[str, Array]:
        # By table, as the loader normalises: what is reckoned in the program may differ in the last bit.
        predictions = raw(parameters, jnp.asarray(levels)[images.astype(jnp.int32), channel])
        return {task.name: task.decode(predictions[task.name]) for task in tasks}

    weights = {name: jax.ShapeDtypeStruct(array.shape, array.dtype) for name, array in arrays.items()}

    def program(function: Callable[..., dict[str, Array]], shape: tuple[Any, ...], dtype: Any) -> export.Exported:
        with _without_source_lines():
            made = export.export(jax.jit(function), platforms=list(platforms))
            return made(weights, jax.ShapeDtypeStruct(shape, dtype))

    found = {
        PREDICT: program(predict, dimensions.shape(), jnp.uint8),
        RAW: program(raw, dimensions.shape(), jnp.float32),
    }
    if (shape := dimensions.any_shape()) is not None:
        try:
            found[PREDICT_ANY_SIZE] = program(predict, shape, jnp.uint8)
        except jax.errors.InconclusiveDimensionOperation as error:
            raise InputError(
                "export: the network's code asks for the size of an image, which a program for any size leaves open "
                f"({str(error).splitlines()[0]}); export it with any_size=False."
            ) from error
    return found


@contextlib.contextmanager
def _without_source_lines() -> Iterator[None]:
    """Programs made inside do not hold from which lines of which files they come: no paths of this machine are
    published, and the same network makes the same bytes."""
    flag = "jax_traceback_in_locations_limit"
    before = getattr(jax.config, flag)
    jax.config.update(flag, 0)
    try:
        yield
    finally:
        jax.config.update(flag, before)


def _metadata(
    tasks: Sequence[Task],
    dimensions: Dimensions,
    programs: Mapping[str, export.Exported],
    arrays: Mapping[str, np.ndarray],
    step: int | None,
    stride: int,
) -> dict[str, Any]:
    predict = programs[PREDICT]
    outputs = dict(zip(sorted(task.name for task in tasks), predict.out_avals, strict=True))  # as JAX orders a dict
    return {
        "format": FORMAT,
        "version": VERSION,
        "made_by": {"sgw_jax": sgw_jax.__version__, "jax": jax.__version__},
        "calling_convention": predict.calling_convention_version,
        "platforms": list(predict.platforms),
        "step": step,
        "images": f"uint8 RGB (batch, height, width, 3): any number, {dimensions}",
        "dimensions": dimensions._asdict(),
        "stride": stride,
        "mean": list(IMAGE_MEAN),
        "std": list(IMAGE_STD),
        "tasks": [about_map(task, outputs[task.name]) for task in tasks],
        "parameters": {"arrays": {name: [str(array.dtype), *array.shape] for name, array in arrays.items()}},
    }


def _add(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    archive.writestr(zipfile.ZipInfo(name, EPOCH), content, zipfile.ZIP_DEFLATED)
