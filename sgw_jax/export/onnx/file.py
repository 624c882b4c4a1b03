"""A network as ONNX: one file that onnxruntime and others run, for any number of images of the training size.

The program is that of the StableHLO file: uint8 images in, decoded maps out, an output for each task. What the file
says of itself is in its metadata, under the key `metadata.json`.

The converter is ours [our decision]. jax2onnx 0.17.1, the one library for it, demands an older Orbax than training
needs; it replaces functions of `jax.numpy` while it traces, on which our networks fail; and of a trace that was made
beforehand it needed minutes for a network of ten thousand parameters. What a network's forward pass is made of are some
fifty primitives, the same from release to release of JAX; `lowering` says how each becomes operators.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, UInt8
from rich.console import Console

import sgw_jax
from sgw_jax.data_pipelines import atomic
from sgw_jax.data_pipelines.errors import InputError, extra_named, files_named
from sgw_jax.data_pipelines.transforms import IMAGE_MEAN, IMAGE_STD
from sgw_jax.export.maps import about_map
from sgw_jax.export.trained import Trained, check_program
from sgw_jax.model import MultiTaskModel
from sgw_jax.tasks.base import Task

__all__ = ["export_onnx"]

FORMAT, VERSION = "sgw_jax onnx", 1
METADATA = "metadata.json"
IMAGES = "images"
IR = 8  # the form of the file that came with opset 18: what reads the operators reads the file
PRECISIONS = {"float32": jnp.float32, "float16": jnp.float16}
MOST_INSIDE = 2**31 - 2**20  # bytes of parameters: a file of Protocol Buffers ends at 2 GiB
WRONG = 1e-2  # a difference in float32 that no rounding explains, of a map's largest value


def save_onnx(
    trained: Trained,
    output: Path | str,
    *,
    precision: Literal["float32", "float16"] = "float32",
    parameters: Literal["inside", "beside"] = "inside",
    console: Console | None = None,
) -> None:
    """`export_onnx` as one of the formats; ``console`` is told what the file takes and how near it is."""
    check_program(trained, output)
    about = export_onnx(
        trained.module,
        trained.variables,
        trained.tasks,
        trained.size,
        output,
        precision=precision,
        parameters=parameters,
        step=trained.step,
    )
    if console is not None:
        near = ", ".join(f"{name} {found['text']}" for name, found in about["checked"].items())
        for line in (f"{about['images']}; opset {about['opset']}", f"onnxruntime beside JAX in float32: {near}"):
            console.print(line, soft_wrap=True, markup=False)


def export_onnx(
    model: MultiTaskModel,
    variables: Mapping[str, Any],
    tasks: Sequence[Task],
    size: tuple[int, int],
    path: Path | str,
    *,
    precision: Literal["float32", "float16"] = "float32",
    parameters: Literal["inside", "beside"] = "inside",
    step: int | None = None,
) -> dict[str, Any]:
    """Writes a network as ONNX, and runs the file in onnxruntime before it gets its name.

    Args:
      model: the network; its own type of computation does not count.
      variables: its collections.
      tasks: what it predicts.
      size: (height, width) that it was trained at, in pixels: those of the images that the file takes.
      path: of the file; one that is there is replaced, at once.
      precision: of the computation and of the parameters. With "float16" the file has half the size, while scores,
        softmax, means of layer norms and the maps stay float32, as in training with a narrow type.
      parameters: "inside" the file, or "beside" it, in `path` + ".data" (ONNX's external data).
      step: of the run, where there is one.

    Returns:
      The metadata that the file holds, and as "checked" by task how far its maps are from those of JAX in float32.

    Raises:
      ImportError: onnx or onnxruntime is not installed.
      ValueError: unknown options; a network that computes what ONNX has no operators for.
      OSError: the file cannot be written.
    """
    if precision not in PRECISIONS:
        raise InputError(f"export: precision is {precision!r}; it must be one of {list(PRECISIONS)}.")
    if parameters not in ("inside", "beside"):
        raise InputError(f"export: parameters is {parameters!r}; it must be 'inside' or 'beside' (the file).")
    with extra_named("export to ONNX", "onnx"):
        import onnx
        import onnxruntime  # noqa: F401  what is written is run

        from sgw_jax.export.onnx.lowering import OPSET
        from sgw_jax.export.onnx.program import Program

    path = Path(path)
    arrays = {name: np.asarray(leaf) for name, leaf in flatten_dict(dict(variables), sep="/").items()}
    program = Program(_predict(in_dtype(model, PRECISIONS[precision]), tasks), arrays, (*size, 3), IMAGES)
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "made_by": {"sgw_jax": sgw_jax.__version__, "jax": jax.__version__, "onnx": onnx.__version__},
        "opset": OPSET,
        "precision": precision,
        "step": step,
        "images": f"uint8 RGB (batch, height, width, 3): any number, {size[0]} x {size[1]}",
        "size": [int(size[0]), int(size[1])],
        "mean": list(IMAGE_MEAN),
        "std": list(IMAGE_STD),
        "tasks": [about_map(task, program.outputs[task.name]) for task in tasks],
    }
    outputs = {task.name: program.outputs[task.name] for task in tasks}
    made = program.graph.model(program.images, outputs, OPSET, IR, "sgw_jax", sgw_jax.__version__)
    onnx.helper.set_model_props(made, {METADATA: json.dumps(metadata, ensure_ascii=False)})
    with _written(path, made, beside=parameters == "beside") as temporary:
        checked = _checked(temporary, jax.jit(_predict(in_dtype(model, jnp.float32), tasks)), arrays, tasks, size)
        _check(checked, precision)
    return {**metadata, "checked": checked}


def in_dtype(module: nn.Module, dtype: Any) -> nn.Module:
    """The module, and those in its attributes, with this type of computation; parameters are as they were.

    >>> import jax.numpy as jnp
    >>> from sgw_jax import KEM
    >>> from sgw_jax.export.onnx.file import in_dtype
    >>> in_dtype(KEM(num_slots=2), jnp.float16).dtype.__name__
    'float16'
    """
    fields = {
        name: getattr(module, name) for name in type(module).__dataclass_fields__ if name not in ("parent", "name")
    }
    changed: dict[str, Any] = {
        name: in_dtype(value, dtype) for name, value in fields.items() if isinstance(value, nn.Module)
    }
    if "dtype" in fields:
        changed["dtype"] = dtype
    return module.clone(**changed)


def _predict(model: nn.Module, tasks: Sequence[Task]) -> Any:
    mean, deviation = (np.asarray(values, np.float32) for values in (IMAGE_MEAN, IMAGE_STD))

    def predict(parameters: Mapping[str, Any], images: UInt8[Array, "batch height width 3"]) -> dict[str, Array]:
        # Reckoned, where the StableHLO program looks it up: two operators that every runtime joins with what follows.
        pixels = images.astype(jnp.float32) * (1 / (255 * deviation)) - mean / deviation
        raw: Any = model.apply(unflatten_dict(dict(parameters), sep="/"), pixels)
        return {task.name: task.decode(raw[task.name].astype(jnp.float32)) for task in tasks}

    return predict


@contextlib.contextmanager
def _written(path: Path, model: Any, beside: bool) -> Iterator[Path]:
    """The model in a file that gets its name if the block ends without an error."""
    import onnx

    data = path.with_name(f"{path.name}.data")
    parameters = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    if parameters > MOST_INSIDE and not beside:
        raise InputError(
            f"export: the parameters are {parameters / 2**30:.1f} GiB, and an ONNX file ends at 2 GiB; write them "
            "beside it (--parameters=beside), or in half the size (--precision=float16)."
        )
    with files_named(f"{path} cannot be written"), atomic.replacing(path) as temporary:
        if not beside:
            temporary.write_bytes(model.SerializeToString())
            yield temporary
            return
        data.unlink(missing_ok=True)  # onnx writes behind what is there
        try:
            onnx.save_model(model, temporary, save_as_external_data=True, location=data.name, size_threshold=1024)
            yield temporary
        except BaseException:
            data.unlink(missing_ok=True)
            raise


def _checked(
    path: Path, predict: Any, parameters: Mapping[str, np.ndarray], tasks: Sequence[Task], size: tuple[int, int]
) -> dict[str, dict[str, Any]]:
    """How far the file's maps are from JAX's in float32, of one image and of a batch of two.

    Returns:
      by task "difference", what 99 in 100 pixels are within (of labels the share that differs; else of the largest
      value), "largest", that of all pixels in the map's unit, and "text", which says it.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors: it warns of what it does not compute beforehand
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    pairs: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {task.name: [] for task in tasks}
    for images in (_images(1, size), _images(2, size)):
        found = session.run([task.name for task in tasks], {IMAGES: images})
        with jax.default_matmul_precision("highest"):
            wanted = jax.device_get(predict(dict(parameters), images))
        for task, values in zip(tasks, found, strict=True):
            pairs[task.name].append((np.asarray(values), wanted[task.name]))
    return {task.name: _difference(task, pairs[task.name]) for task in tasks}


def _difference(task: Task, pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> dict[str, Any]:
    if task.target["kind"] == "labels":
        share = float(np.mean(np.concatenate([(found != wanted).ravel() for found, wanted in pairs])))
        return {"difference": share, "largest": share, "text": f"{100 * share:.2g} % of labels differ"}
    apart = np.concatenate([np.abs(found - wanted).ravel() for found, wanted in pairs])
    scale = max(1.0, *(float(np.abs(wanted).max()) for _, wanted in pairs))
    largest, unit = float(apart.max()), getattr(task, "unit", "")
    text = f"within {largest:.1e}{f' {unit}' if unit else ''}"
    return {"difference": float(np.quantile(apart, 0.99)) / scale, "largest": largest, "text": text}


def _check(checked: Mapping[str, Mapping[str, Any]], precision: str) -> None:
    """Raises where the file computes something else than the network."""
    for name, found in checked.items():
        if not math.isfinite(found["difference"]):
            narrow = (
                "numbers beyond 65,504 are none in float16; leave the precision out" if precision == "float16" else ""
            )
            raise InputError(
                f"export: {name} is not a number in onnxruntime or in JAX, of an image of smooth noise: "
                f"{narrow or 'look at the parameters'}."
            )
        if precision == "float32" and found["difference"] > WRONG:
            raise InputError(
                f"export: onnxruntime's {name} is not JAX's ({found['text']}): one of the two computes this network "
                "wrongly here. Please report it; --format=stablehlo takes every network."
            )


def _images(count: int, size: tuple[int, int]) -> UInt8[np.ndarray, "count height width 3"]:
    """Smooth noise, the same every time: colours that change over some pixels, as a photograph's do."""
    rng, shape = np.random.default_rng(count), (count, *(max(2, length // 8) for length in size), 3)
    coarse = jnp.asarray(rng.uniform(0, 255, shape).astype(np.float32))
    return np.asarray(jax.image.resize(coarse, (count, *size, 3), "bilinear")).round().astype(np.uint8)
