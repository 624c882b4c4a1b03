"""Backbones beside transformers on PyTorch, same weights and input, in one run: forward, forward and backward.

    python benchmarks/speed/backbone_speed.py [--models swin vit dinov2] [--size 224] [--batch 2] [--dtype float32]

Needs the extra [parity]. The models have the sizes of Swin-T, ViT-S and DINOv2-S with random weights, written in the
hub's layout and loaded by `load_pretrained`. Rounds alternate between the two libraries, so that both see the same
machine; the table has the median, images per second and the ratio of the medians (above 1: ours is faster). Peak
memory is that of a process of its own (--memory). Writes benchmarks/results/backbones_DEVICE.json.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, where this runs as a script

from benchmarks.measure import DASH, Results, in_turn, medians
from sgw_jax.backbones.pretrained import load_pretrained

STAGES = ["stage1", "stage2", "stage3", "stage4"]
SMALL = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6}
MODELS = {
    "swin": ("SwinBackbone", "SwinConfig", {"out_features": STAGES, "drop_path_rate": 0.0}),
    "vit": ("ViTModel", "ViTConfig", {**SMALL, "intermediate_size": 1536}),
    "dinov2": ("Dinov2Model", "Dinov2Config", {**SMALL, "image_size": 518}),
}
TASKS = ("forward", "forward + backward")


def their_model(name: str):
    """transformers' model in the attention that it is fastest with."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind, config, options = MODELS[name]
    return getattr(transformers, kind)(getattr(transformers, config)(**options)).eval()


def theirs(name: str, task: str, image: np.ndarray, dtype: str, compiled: bool) -> Callable[[], None]:
    """One call of PyTorch."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = their_model(name).to(device, getattr(torch, dtype))
    pixels = torch.from_numpy(image.transpose(0, 3, 1, 2).copy()).to(device, getattr(torch, dtype))
    options = {"interpolate_pos_encoding": True} if name == "vit" else {}
    run = torch.compile(model) if compiled else model

    def call() -> None:
        with torch.set_grad_enabled(task != "forward"):
            found = run(pixels, **options)
            maps = found.feature_maps if name == "swin" else [found.last_hidden_state]
            if task != "forward":
                model.zero_grad()
                sum(level.float().square().mean() for level in maps).backward()
        if device == "cuda":
            torch.cuda.synchronize()

    return call


def ours(name: str, task: str, image: np.ndarray, dtype: str) -> Callable[[], None]:
    """One call of this library."""
    with tempfile.TemporaryDirectory() as folder:
        their_model(name).save_pretrained(folder)
        module, variables = load_pretrained(folder)
    module = module.clone(dtype=jnp.dtype(dtype), **({} if name == "swin" else {"tapped": (module.depth,)}))
    variables, pixels = jax.device_put(variables), jax.device_put(image)

    def loss(variables, pixels):
        found = module.apply(variables, pixels).values()
        return sum(jnp.mean(jnp.square(level.astype(jnp.float32))) for level in found)

    run = jax.jit(module.apply if task == "forward" else jax.grad(loss))
    return lambda: jax.block_until_ready(run(variables, pixels))


def peak_memory(arguments: argparse.Namespace, model: str, task: str, library: str) -> float:
    """Resident MiB of a process of its own at the peak of a call, compilation and loading before it left out."""
    flags = [f"--models={model}", f"--size={arguments.size}", f"--batch={arguments.batch}"]
    flags += [f"--dtype={arguments.dtype}", f"--peak_of={library}", f"--task={task}"]
    done = subprocess.run([sys.executable, __file__, *flags], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def print_peak(arguments: argparse.Namespace, image: np.ndarray) -> None:
    """The child of `peak_memory`."""
    name = arguments.models[0]
    if arguments.peak_of == "ours":
        call = ours(name, arguments.task, image, arguments.dtype)
    else:
        call = theirs(name, arguments.task, image, arguments.dtype, False)
    call()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here (Linux)
    call()
    status = Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)


def table(rows: list[dict]) -> list[str]:
    """Markdown; a ratio above 1: ours is faster."""
    lines = [
        "| model | | ours images/s | torch eager | ratio | torch.compile | ratio | peak MiB ours, torch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        speed, ratio, peak = row["images_per_second"], row["ratio"], row.get("peak_MiB")  # on a CPU alone
        compiled = [f"{speed['compiled']:.2f}", f"{ratio['compiled']:.2f}"] if "compiled" in ratio else [DASH, DASH]
        cells = [row["model"], row["task"], f"{speed['ours']:.2f}", f"{speed['eager']:.2f}", f"{ratio['eager']:.2f}"]
        cells += [*compiled, f"{peak['ours']:.0f}, {peak['theirs']:.0f}" if peak else DASH]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--seconds", type=float, default=20.0, help="per model and task")
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument("--output", type=Path, help="JSON file")
    parser.add_argument("--peak_of", choices=("ours", "theirs"), help=argparse.SUPPRESS)
    parser.add_argument("--task", choices=TASKS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    shape = (arguments.batch, arguments.size, arguments.size, 3)
    image = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    if arguments.peak_of:
        print_peak(arguments, image)
        return

    import torch
    import transformers

    device = jax.devices()[0]
    torch.set_num_threads(os.cpu_count() or 1)
    rows = []
    for name in arguments.models:
        for task in TASKS:
            calls = {"ours": ours(name, task, image, arguments.dtype)}
            calls["eager"] = theirs(name, task, image, arguments.dtype, False)
            if arguments.compile:
                calls["compiled"] = theirs(name, task, image, arguments.dtype, True)
            times = in_turn(calls, arguments.seconds)
            median = medians(times)
            row = {"model": name, "task": task, "seconds": median, "rounds": len(times["ours"])}
            row["images_per_second"] = {key: arguments.batch / value for key, value in median.items()}
            row["ratio"] = {key: value / median["ours"] for key, value in median.items() if key != "ours"}
            if device.platform == "cpu":
                row["peak_MiB"] = {lib: peak_memory(arguments, name, task, lib) for lib in ("ours", "theirs")}
            rows.append(row)
    result = {
        "shape": shape,
        "dtype": arguments.dtype,
        "rows": rows,
    }
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    Results(f"backbones_{device.platform}", arguments.output, **versions).write(result)
    Console().print("\n".join(table(rows)), soft_wrap=True)


if __name__ == "__main__":
    main()
