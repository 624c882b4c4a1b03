"""What fine-tuning costs: all of a pretrained backbone, its upper blocks, LoRA of its matrices, or none of it.

    python benchmarks/speed/finetuning.py

The training step of DINOv2-S with two tasks and KEM, AdamW, images of 224 x 224, compiled and not run. FLOPs: twice
the multiply-accumulates of the step's trace, in which a scan counts as often as it turns. Memory: the compiler's for
the whole step, arguments and temporaries, with the state donated; state: parameters and moments alone. Writes
benchmarks/results/finetuning_cpu.json.
"""

import math
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, where this runs as a script

from benchmarks.measure import Results
from sgw_jax.backbones.dinov2 import dinov2
from sgw_jax.backbones.freezing import Freezing
from sgw_jax.interactions import KEM
from sgw_jax.layers.lora import LoRA
from sgw_jax.model import MultiTaskModel
from sgw_jax.optimizers import make_optimizer
from sgw_jax.plan.cost import multiply_accumulates
from sgw_jax.plan.network import target_shapes
from sgw_jax.tasks import Depth, SemSeg
from sgw_jax.train_step import init_state, make_train_step

TASKS, SIZE, ROWS, DEPTH, RANK = (SemSeg(num_classes=40), Depth()), (224, 224), 8, 12, 8

# What is fine-tuned: (blocks through which no gradient goes, which parameters learn, LoRA).
WAYS: dict[str, tuple[int, Freezing | None, LoRA | None]] = {
    "all of it": (0, None, None),
    "the upper 4 of 12 blocks": (8, Freezing(8), None),
    f"LoRA of rank {RANK}": (0, Freezing(0, pretrained=True), LoRA(RANK, 16.0)),
    f"LoRA of rank {RANK}, the upper 4 blocks": (8, Freezing(8, pretrained=True), LoRA(RANK, 16.0)),
    "none of it": (DEPTH, Freezing(0, pretrained=True), None),
}


def measure(frozen: int, freezing: Freezing | None, lora: LoRA | None) -> dict[str, float]:
    """Of one way: parameters that learn and all of them, FLOPs of a step, bytes of the step and of the state."""
    backbone = dinov2("small", image_size=SIZE, frozen_layers=frozen)
    model = MultiTaskModel(TASKS, backbone, KEM(16, top_k=32), channels=64, lora=lora)
    optimizer = make_optimizer(1e-4, weight_decay=1e-4, clip_norm=10.0)
    batch = {**target_shapes(TASKS, SIZE, ROWS), "image": jax.ShapeDtypeStruct((ROWS, *SIZE, 3), jnp.float32)}
    state = jax.eval_shape(lambda x: init_state(model, optimizer, x, trained=freezing), batch["image"])
    step = make_train_step(model, TASKS, optimizer, trained=freezing)
    memory = jax.jit(step, donate_argnums=0).lower(state, batch).compile().memory_analysis()
    learns = state.params if freezing is None else jax.eval_shape(freezing, state.params)
    leaves = memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "trained_parameters": count(learns),
        "parameters": count(state.params),
        "flops": 2 * sum(multiply_accumulates(step, state, batch).values()),
        "memory_bytes": memory.argument_size_in_bytes + memory.temp_size_in_bytes + leaves,
        "state_bytes": 4 * (count(state.params) + count(state.opt_state)),
    }


def count(tree: Any) -> int:
    """Entries of a tree."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: each way beside fine-tuning all of it."""
    lines = [
        "| fine-tuned | parameters that learn | GFLOPs a step | memory, MiB | state, MiB |",
        "|---|---|---|---|---|",
    ]
    whole = rows[0]
    for row in rows:
        cells = [row["way"], f"{row['trained_parameters'] / 1e6:.2f} M of {row['parameters'] / 1e6:.2f} M"]
        for key, unit in (("flops", 1e9), ("memory_bytes", 2**20), ("state_bytes", 2**20)):
            cells.append(f"{row[key] / unit:,.0f} ({row[key] / whole[key]:.2f})")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Measures and writes."""
    rows: list[dict[str, Any]] = []
    for way, options in WAYS.items():
        rows.append({"way": way, **measure(*options)})
        Console().print(rows[-1])
    Results("finetuning_cpu").write({"rows": rows})
    print("\n".join(table(rows)))


if __name__ == "__main__":
    main()
