"""KEM's maps applied to every token, as the paper writes it, or to the slots' side: the same result, side by side.

    python benchmarks/speed/kem_products.py [--seconds=20]

Forward pass and that with the backward pass, of one image's tokens of four tasks, top-k 32. The outputs of both orders
are compared first (1e-4 of the largest value, float32). Writes benchmarks/results/kem_products_DEVICE.json.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, where this runs as a script

from benchmarks.measure import Results, in_turn, medians
from sgw_jax.host import keep_freed_memory
from sgw_jax.interactions import KEM
from sgw_jax.plan.cost import multiply_accumulates

TASKS = 4
SIZES: dict[str, tuple[int, int, dict[str, Any]]] = {  # tokens of a task, channels, options
    "KEM": (4096, 64, {"num_slots": 16}),
    "KEM, 4 heads": (4096, 64, {"num_slots": 16, "num_heads": 4}),
    "KEM of the full-size systems": (112 * 144, 192, {"num_slots": 32}),
    "sKEM of the full-size systems": (112 * 144, 192, {"num_slots": 32, "etf_vertices": 128}),
}


ORDERS = ("tokens", "slots")


def measure(label: str, dtype: str, seconds: float) -> list[dict[str, Any]]:
    """A row for either order and pass."""
    tokens, channels, options = SIZES[label]
    rng = np.random.default_rng(0)
    features = {f"task{i}": jnp.asarray(rng.normal(size=(1, tokens, channels)), dtype) for i in range(TASKS)}
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    outputs = {}
    for order in ORDERS:
        module = KEM(top_k=32, products=order, dtype=jnp.dtype(dtype), **options)
        variables = jax.jit(module.init)(jax.random.key(0), features)

        def forward(params: Any, x: Any, module: KEM = module, variables: Any = variables) -> Any:
            return module.apply({**variables, "params": params}, x)

        def both(params: Any, x: Any, forward: Callable = forward) -> Any:
            def loss(*inputs: Any) -> jax.Array:
                return sum(jnp.sum(jnp.square(found.astype(jnp.float32))) for found in forward(*inputs).values())

            return jax.grad(loss, (0, 1))(params, x)

        for passes, function in (("forward", forward), ("forward + backward", both)):
            program = jax.jit(function).lower(variables["params"], features).compile()
            calls[order, passes] = lambda run=program, params=variables["params"]: run(params, features)
            rows[order, passes] = {
                "label": label,
                "dtype": dtype,
                "order": order,
                "passes": passes,
                "macs": sum(multiply_accumulates(function, variables["params"], features).values()),
                "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
            }
        outputs[order] = calls[order, "forward"]()
    if not all(rows["slots", passes]["macs"] < rows["tokens", passes]["macs"] for _, passes in rows):
        raise ValueError(f"{label}: KEM does not choose the slots' side; there is nothing to compare.")
    if dtype == "float32":
        for key, expected in outputs["tokens"].items():
            np.testing.assert_allclose(outputs["slots"][key], expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    found = medians(in_turn(calls, seconds))
    return [row | {"seconds": found[key]} for key, row in rows.items()]


def table(found: dict[str, Any]) -> list[str]:
    """Markdown: the maps over tokens, over slots, and the ratio of their times."""
    lines = ["| | tokens | | ms, maps over tokens | over slots | ratio | MACs | | temporaries | |", "|---" * 10 + "|"]
    pairs: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in found["rows"]:
        pairs.setdefault((row["label"], row["dtype"], row["passes"]), {})[row["order"]] = row
    for (label, dtype, passes), pair in pairs.items():
        one, two = (pair[order] for order in ORDERS)
        cells = [label, f"{TASKS * SIZES[label][0]:,}", f"{dtype}, {passes}"]
        cells += [f"{1e3 * row['seconds']:.3g}" for row in (one, two)] + [f"{one['seconds'] / two['seconds']:.1f}"]
        cells += [f"{row['macs'] / 1e9:.2f} G" for row in (one, two)]
        cells += [f"{row['temporary_bytes'] / 2**20:.0f} MiB" for row in (one, two)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of a size and dtype")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    keep_freed_memory()
    results = Results(f"kem_products_{jax.default_backend()}", arguments.output)
    rows = [row for d in ("float32", "bfloat16") for label in SIZES for row in measure(label, d, arguments.seconds)]
    Console().print("\n".join(table(results.update(rows=rows))), soft_wrap=True)


if __name__ == "__main__":
    main()
