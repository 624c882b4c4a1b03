"""A network as StableHLO: one file that JAX alone runs, on any platform it was made for, with any number of images.

The file is a zip archive, and as NumPy reads it an npz:

    metadata.json         tasks, classes, colours, sizes, versions: all that a reader needs to know
    predict.jax_export    (parameters, uint8 images (batch, height, width, 3)) -> {task: decoded maps}
    predict_any_size.jax_export   the same for images of other sizes, where the network takes them
    raw.jax_export        (parameters, normalised float32 images) -> {task: raw predictions}, for `Predictor`
    params/NAME.npy ...   the parameters by name, unless they are beside the file, in FILE.safetensors

Programs take their parameters as an argument [our decision]: so they share them, no file meets the 2 GiB that a
serialised program may have, and no compiler folds them as constants. What is for one size, that of training, makes the
same bits as the network's code. A program for any size is one of its own, because it cannot [our decision]: in which
order a map's rows and columns are interpolated depends on its sides, where they are known.
"""

import contextlib
import hashlib
import json
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
from sgw_jax.data_pipelines.errors import InputError, MissingFileError, UserError, extra_named, files_named
from sgw_jax.data_pipelines.transforms import IMAGE_MEAN, IMAGE_STD, normalised_levels
from sgw_jax.export.maps import about_map
from sgw_jax.export.trained import Trained, check_program
from sgw_jax.model import MultiTaskModel
from sgw_jax.tasks import TASKS, task_from_dict
from sgw_jax.tasks.base import Task

__all__ = ["PLATFORMS", "StableHLO", "export_stablehlo", "load_stablehlo"]

PLATFORMS = ("cpu", "cuda", "tpu")
FORMAT, VERSION = "sgw_jax stablehlo", 1
METADATA, PREDICT, RAW = "metadata.json", "predict.jax_export", "raw.jax_export"
PREDICT_ANY_SIZE = "predict_any_size.jax_export"
STRIDE = 32  # the coarsest of all backbones here: for files that do not say theirs
EPOCH = (1980, 1, 1, 0, 0, 0)  # of every member: the same network makes the same bytes

Parameters = dict[str, Any]  # by path: {"params/backbone/...": array, "constants/...": array}


class Dimensions(NamedTuple):
    """What images the programs take, beside any number of them.

    Attributes:
      size: height and width, those of training.
      multiple: with the program for any size height and width may be multiples of it; None: there is no such program.
      least: then neither is less.
      reason: why there is none.
    """

    size: tuple[int, int]
    multiple: int | None = None
    least: int | None = None
    reason: str = ""

    def __str__(self) -> str:
        if self.multiple is None:
            return f"{self.size[0]} x {self.size[1]} alone ({self.reason})"
        return f"{self.size[0]} x {self.size[1]}, or multiples of {self.multiple} from {self.least} on"

    def shape(self) -> tuple[Any, ...]:
        """Of images of the one size, to trace with."""
        return (*export.symbolic_shape("batch"), *self.size, 3)

    def any_shape(self) -> tuple[Any, ...] | None:
        """Of images of any size, to trace with; None if there is no such program."""
        if self.multiple is None or self.least is None:
            return None
        least = self.least // self.multiple
        text = f"batch, {self.multiple}*height, {self.multiple}*width, 3"
        return tuple(export.symbolic_shape(text, constraints=[f"height >= {least}", f"width >= {least}"]))

    def takes(self, size: tuple[int, ...]) -> bool:
        """Whether images of this height and width can be given."""
        if self.multiple is None or self.least is None:
            return size == self.size
        return size == self.size or (min(size) >= self.least and not any(length % self.multiple for length in size))


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
    _check_flatbuffers("export to StableHLO")
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
    _check_flatbuffers(f"{path}: a StableHLO file")
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


# --- what is written


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


# --- what is read


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


def _check_flatbuffers(what: str) -> None:
    with extra_named(what, "export"):
        import flatbuffers  # noqa: F401  jax.export asks for it late, in words of its own
