"""The full-size systems' training step on the accelerator that is here: images a second, share of its peak, memory.

    python benchmarks/speed/device_step.py [--config=nyud:vit_l] [--interactions none cross_attention kem] [--batch=4]

Random parameters, constant targets, AdamW, the configuration's types; data, transfers and evaluation are left out. The
interactions' steps are compiled at once and take turns; the ratio beside each is its time over that of no interaction.
MFU: the FLOPs of the forward pass times three (what is computed twice to save memory counts once) over the chip's
published bf16 peak. Memory is what the compiler reserves, state and batch included. Adds to
benchmarks/results/device_step.json by device, configuration, interaction and batch.
"""

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, where this runs as a script

from benchmarks.measure import DASH, Results, in_turn, medians, select
from sgw_jax.experiment.build import build_model, build_tasks
from sgw_jax.experiment.config_files import read_config
from sgw_jax.optimizers import make_optimizer
from sgw_jax.plan.chips import chip_of
from sgw_jax.plan.network import plan, target_shapes
from sgw_jax.train_step import init_state, make_train_step

KEY = ("device", "config", "interaction", "batch")


def compiled_step(config: str, interaction: str, rows: int) -> tuple[Callable[[], Any], dict[str, float]]:
    """(a call that trains one step and goes on from the last, {"flops": of a step, "memory_bytes": reserved})."""
    read = read_config(f"{config},interaction={interaction}")
    tasks = build_tasks(read)
    model, optimizer, size = build_model(read, tasks), make_optimizer(1e-4), tuple(read.data.size)
    shapes = {**target_shapes(tasks, size, rows), "image": jax.ShapeDtypeStruct((rows, *size, 3), jnp.float32)}
    batch = {name: jnp.ones(shape.shape, shape.dtype) for name, shape in shapes.items()}
    held = [jax.jit(lambda: init_state(model, optimizer, jnp.zeros((1, *size, 3))))()]
    step = jax.jit(make_train_step(model, tasks, optimizer), donate_argnums=0).lower(held[0], batch).compile()
    memory = step.memory_analysis()
    reserved = memory.argument_size_in_bytes + memory.temp_size_in_bytes

    def call() -> Any:
        held[0], measured = step(held[0], batch)
        return measured

    return call, {"flops": 3 * 2 * rows * sum(plan(model, size).macs.values()), "memory_bytes": reserved}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: a row for each configuration and interaction."""
    lines = [
        "| device, system | batch | interaction | ms | over none | images/s | MFU | memory GiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        (none,) = select(rows, **{key: row[key] for key in KEY} | {"interaction": "none"})
        share = DASH if row["mfu"] is None else f"{row['mfu']:.0%}"
        cells = [f"{row['device']}, {row['config']}", str(row["batch"]), row["interaction"]]
        cells += [f"{1e3 * row['seconds']:.1f}", f"{row['seconds'] / none['seconds']:.2f}"]
        cells += [f"{row['batch'] / row['seconds']:.1f}", share, f"{row['memory_bytes'] / 2**30:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="nyud:vit_l")
    parser.add_argument("--interactions", nargs="+", default=["none", "cross_attention", "kem", "skem"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    if "none" not in arguments.interactions:
        parser.error("--interactions: the ratios are over none; name it too.")
    with ThreadPoolExecutor() as pool:  # compilation holds no lock of Python's
        names = [(arguments.config, name, arguments.batch) for name in arguments.interactions]
        built = dict(zip(arguments.interactions, pool.map(lambda one: compiled_step(*one), names), strict=True))
    seconds = medians(in_turn({name: call for name, (call, _) in built.items()}, arguments.seconds))
    device = jax.devices()[0].device_kind
    chip = chip_of(device)
    rows = [
        {
            "device": device,
            "config": arguments.config,
            "interaction": name,
            "batch": arguments.batch,
            "seconds": seconds[name],
            "mfu": None if chip is None else facts["flops"] / seconds[name] / chip.flops,
            **facts,
        }
        for name, (_, facts) in built.items()
    ]
    found = Results("device_step", arguments.output).add(rows, *KEY)
    Console().print("\n".join(table(found)), soft_wrap=True)


if __name__ == "__main__":
    main()
