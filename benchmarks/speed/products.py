"""In which precision the full-size training steps multiply: MACs by the operands' dtypes, counted from the trace.

    python benchmarks/speed/products.py [--systems nyud:swin_l,interaction=skem ...] [--label=now]

A float32 operand makes a matrix product of a bfloat16 network run at a GPU's float32 rate, several times slower; so all
but the resize of the predictions should be bfloat16. Nothing is computed. Adds to benchmarks/results/products.json
under the label, so that a change can be seen beside what was there before it.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, where this runs as a script

from benchmarks.measure import Results
from sgw_jax.experiment.build import build_model, build_tasks
from sgw_jax.experiment.config_files import read_config
from sgw_jax.optimizers import make_optimizer
from sgw_jax.plan.cost import multiply_accumulates, operations
from sgw_jax.plan.network import target_shapes
from sgw_jax.train_step import init_state, make_train_step

SYSTEMS = ["nyud:swin_l,interaction=skem", "nyud:vit_l,interaction=kem"]


def by_dtype(name: str) -> dict[str, int]:
    """{"bfloat16 x bfloat16": MACs} of the training step of one image."""
    config = read_config(name, ())
    tasks, size = build_tasks(config), tuple(config.data.size)
    model, optimizer = build_model(config, tasks), make_optimizer(1e-4)
    state = jax.eval_shape(lambda: init_state(model, optimizer, jnp.zeros((1, *size, 3))))
    batch = {"image": jax.ShapeDtypeStruct((1, *size, 3), jnp.float32), **target_shapes(tasks, size)}
    counts: Counter[str] = Counter()
    for _, times, equation in operations(jax.make_jaxpr(make_train_step(model, tasks, optimizer))(state, batch).jaxpr):
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            shapes = [jax.ShapeDtypeStruct(operand.aval.shape, operand.aval.dtype) for operand in equation.invars]
            macs = multiply_accumulates(lambda *args, e=equation: e.primitive.bind(*args, **e.params), *shapes)
            kinds = sorted(str(shape.dtype) for shape in shapes)
            counts[" x ".join(kinds)] += (times or 0) * sum(macs.values())
    return dict(counts)


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: shares of the MACs."""
    kinds = sorted({kind for row in rows for kind in row["macs"]})
    lines = ["| training step | | " + " | ".join(kinds) + " |", "|---|---|" + "---|" * len(kinds)]
    for row in sorted(rows, key=lambda row: row["system"]):
        total = sum(row["macs"].values())
        cells = [f"{row['macs'].get(kind, 0) / total:.1%}" for kind in kinds]  # a kind without products is not counted
        lines.append(f"| {row['system']} | {row['label']} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Counts and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=SYSTEMS)
    parser.add_argument("--label", default="now")
    arguments = parser.parse_args()
    rows = [{"system": name, "label": arguments.label, "macs": by_dtype(name)} for name in arguments.systems]
    Console().print("\n".join(table(Results("products").add(rows, "system", "label"))), soft_wrap=True)


if __name__ == "__main__":
    main()
