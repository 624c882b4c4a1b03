"""Dense attention by chunks of queries: time where this runs, or what a TPU's compiler moves (no TPU is needed).

    python benchmarks/speed/chunked_attention.py [--tokens=1009] [--chunks 0 256 128] [--topology=v5e:2x2]

Sizes of a ViT-L on an image of 448 x 576: 16 heads of 64, 4 images, bfloat16; 0 is no chunk. With ``--topology`` the
program of one of the slice's chips is compiled and its main memory's traffic counted: scores that stay on the chip
cost nothing. Adds to benchmarks/results/attention.json.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, where this runs as a script

from benchmarks.measure import DASH, Results, in_turn, medians
from sgw_jax.host import keep_freed_memory
from sgw_jax.layers.attention import attention
from sgw_jax.plan.chips import chip_of
from sgw_jax.plan.hlo import traffic
from sgw_jax.plan.pod import topology_devices

BATCH, HEADS, DIM = 4, 16, 64


def programs(chunk: int, like: jax.ShapeDtypeStruct) -> dict[str, Any]:
    """The compiled forward pass, and that with the backward pass."""

    def attend(*inputs: jax.Array) -> jax.Array:
        return attention(*inputs, chunk=chunk or None)

    def loss(*inputs: jax.Array) -> jax.Array:
        return jnp.sum(attend(*inputs).astype(jnp.float32) ** 2)

    passes = {"forward": attend, "forward + backward": jax.grad(loss, (0, 1, 2))}
    return {name: jax.jit(function).lower(like, like, like).compile() for name, function in passes.items()}


def measured(chunks: list[int], tokens: int, seconds: float) -> list[dict[str, Any]]:
    """Seconds on this machine."""
    x = jax.random.normal(jax.random.key(0), (BATCH, tokens, HEADS, DIM), jnp.bfloat16)
    made = {(chunk, name): run for chunk in chunks for name, run in programs(chunk, x).items()}
    found = medians(in_turn({key: (lambda run=run: run(x, x, x)) for key, run in made.items()}, seconds))
    return [{"chunk": chunk, "passes": name, "seconds": value} for (chunk, name), value in found.items()]


def compiled(chunks: list[int], tokens: int, device: jax.Device) -> list[dict[str, Any]]:
    """Bytes of main memory that a TPU's program moves, and its temporaries."""
    place = jax.sharding.SingleDeviceSharding(device)
    like = jax.ShapeDtypeStruct((BATCH, tokens, HEADS, DIM), jnp.bfloat16, sharding=place)
    rows = []
    for chunk in chunks:
        for name, program in programs(chunk, like).items():
            moved, memory = traffic(program.as_text()).memory, program.memory_analysis().temp_size_in_bytes
            rows.append({"chunk": chunk, "passes": name, "bytes": moved, "temporaries": memory})
    return rows


def table(found: dict[str, Any]) -> list[str]:
    """Markdown: a row for each number of queries at a time."""
    lines = [
        "| where | queries at a time | forward | forward + backward | temporaries, both |",
        "|---|---|---|---|---|",
    ]
    for result in found.values():
        for chunk in dict.fromkeys(row["chunk"] for row in result["rows"]):
            rows = {row["passes"]: row for row in result["rows"] if row["chunk"] == chunk}
            one, two = rows["forward"], rows["forward + backward"]
            if "bytes" in one:
                cells = [f"{row['bytes'] / 1e9:.2f} GB" for row in (one, two)]
                cells.append(f"{two['temporaries'] / 2**20:.0f} MiB")
            else:
                cells = [f"{1e3 * row['seconds']:.0f} ms" for row in (one, two)] + [DASH]
            lines.append("| " + " | ".join([result["device"], str(chunk or "all"), *cells]) + " |")
    return lines


def main() -> None:
    """Measures or compiles, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1009)
    parser.add_argument("--chunks", type=int, nargs="+", default=[0, 512, 256, 128])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--topology")
    arguments = parser.parse_args()
    if arguments.topology:
        device = topology_devices(arguments.topology)[0]
        chip = chip_of(device.device_kind)
        rows, name = compiled(arguments.chunks, arguments.tokens, device), chip.name if chip else device.device_kind
    else:
        keep_freed_memory()
        rows, name = measured(arguments.chunks, arguments.tokens, arguments.seconds), jax.devices()[0].device_kind
    found = Results("attention").label(name, {"device": name, "tokens": arguments.tokens, "rows": rows})
    Console().print("\n".join(table(found)), soft_wrap=True)


if __name__ == "__main__":
    main()
