"""Exported networks beside JAX, in one run: time to export, size of the files, and milliseconds an image.

    python benchmarks/speed/export.py [--models scenes dinov2_s] [--seconds=30] [--workdir=runs/scenes]

Needs the extras [export] and [onnx]. "scenes" is the default configuration's network, of random parameters or of a run
(--workdir); "dinov2_s" a DINOv2-S on 224 x 224 with the same tasks and KEM. The function is the same everywhere: uint8
images in, decoded maps out, of batches of 1 and 8; the ways take turns, medians are reported, ratios above 1 mean that
the file is faster than the network's code under jit. onnxruntime runs on the CPU with as many threads as cores. The
error of float16 is that which the export measures. Writes benchmarks/results/export_DEVICE.json.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax.traverse_util import flatten_dict
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, where this runs as a script

from benchmarks.measure import DASH, Results, in_turn, medians
from sgw_jax.data_pipelines.transforms import normalised_levels
from sgw_jax.experiment.build import build_model, build_tasks
from sgw_jax.experiment.config_files import read_config
from sgw_jax.export.onnx.file import export_onnx
from sgw_jax.export.stablehlo import export_stablehlo, load_stablehlo
from sgw_jax.host import keep_freed_memory
from sgw_jax.prediction.predictor import Predictor

MODELS: dict[str, tuple[str, ...]] = {
    "scenes": (),
    "dinov2_s": ("backbone=dinov2", "data.size=224,224", "channels=64"),
}
BATCHES = (1, 8)
WAYS = {
    "jax": "JAX",
    "stablehlo": "StableHLO in JAX",
    "onnx": "ONNX in onnxruntime",
    "onnx_float16": "ONNX, float16",
}


def network(name: str, workdir: Path | None) -> Any:
    """A predictor of the name's configuration, or of a run."""
    if workdir is not None and name == "scenes":
        return Predictor.from_workdir(workdir)
    config = read_config("scenes", [f"--config.{option}" for option in MODELS[name]])
    tasks = build_tasks(config)
    model, size = build_model(config, tasks), tuple(config.data.size)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, *size, 3)))
    return Predictor(model, variables, tasks, size)


def code(found: Any) -> Callable[[np.ndarray], Any]:
    """The network's own code under jit."""
    levels = jnp.asarray(normalised_levels())

    @jax.jit
    def predict(variables: Any, images: jax.Array) -> dict[str, jax.Array]:
        raw = found.module.apply(variables, levels[images.astype(jnp.int32), np.arange(3)])
        return {task.name: task.decode(raw[task.name]) for task in found.tasks}

    return lambda images: predict(found.variables, images)


def session(path: Path) -> Callable[[np.ndarray], Any]:
    """An ONNX file in onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or it takes cores while JAX runs
    made = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: made.run(None, {"images": images})


def measure(name: str, workdir: Path | None, seconds: float, folder: Path) -> dict[str, Any]:
    """A network's row."""
    found = network(name, workdir)
    given = (found.module, found.variables, found.tasks, found.size)
    arrays = {key: np.asarray(leaf) for key, leaf in flatten_dict(dict(found.variables), sep="/").items()}
    row: dict[str, Any] = {
        "label": name,
        "trained": workdir is not None and name == "scenes",
        "size": list(found.size),
        "parameters": sum(array.size for array in arrays.values()),
        "bytes": {"jax": len(safetensors.numpy.save(arrays))},
        "export_seconds": {},
    }
    paths = {way: folder / f"{name}.{way}" for way in WAYS if way != "jax"}
    for way, path in paths.items():
        started = time.monotonic()
        if way == "stablehlo":
            export_stablehlo(*given, path)
        else:
            about = export_onnx(*given, path, precision="float16" if way == "onnx_float16" else "float32")
            row[f"{way}_errors"] = {task: errors["text"] for task, errors in about["checked"].items()}
        row["export_seconds"][way], row["bytes"][way] = time.monotonic() - started, path.stat().st_size
    runs: dict[str, Callable[[np.ndarray], Any]] = {"jax": code(found), "stablehlo": load_stablehlo(paths["stablehlo"])}
    runs |= {way: session(paths[way]) for way in ("onnx", "onnx_float16")}
    row["seconds"] = {}
    for batch in BATCHES:
        images = np.random.default_rng(batch).integers(0, 256, (batch, *found.size, 3), dtype=np.uint8)
        calls = {way: lambda run=run, images=images: run(images) for way, run in runs.items()}
        times = medians(in_turn(calls, seconds / len(BATCHES)))
        row["seconds"][str(batch)] = {way: times[way] / batch for way in runs}
    return row


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: a line for each way of a network."""
    head = ["network", "as", "file", "export", *(f"ms/image, batch {batch} | ratio" for batch in BATCHES)]
    lines = ["| " + " | ".join(head) + " |", "|---" * (4 + 2 * len(BATCHES)) + "|"]
    for row in rows:
        for way, title in WAYS.items():
            cells = [row["label"], title, f"{row['bytes'][way] / 1e6:.1f} MB"]
            cells.append(f"{row['export_seconds'][way]:.0f} s" if way in row["export_seconds"] else DASH)
            for batch in BATCHES:
                times = row["seconds"][str(batch)]
                ratio = DASH if way == "jax" else f"{times['jax'] / times[way]:.2f}"
                cells += [f"{1e3 * times[way]:.3g}", ratio]
            lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--workdir", type=Path, help="a run of the scenes configuration, in place of random parameters")
    parser.add_argument("--seconds", type=float, default=30.0, help="of a network")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    import onnxruntime

    results = Results(f"export_{jax.default_backend()}", arguments.output, onnxruntime=onnxruntime.__version__)
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.models:
            rows = results.add([measure(name, arguments.workdir, arguments.seconds, Path(folder))], "label")
    Console().print("\n".join(table(rows)), soft_wrap=True)


if __name__ == "__main__":
    main()
