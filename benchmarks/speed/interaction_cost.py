"""What each interaction costs as tokens grow: time, multiply-accumulates, memory, forward and with the backward pass.

    python benchmarks/speed/interaction_cost.py [--tokens 1024 4096 16384 65536 262144] [--dtypes float32 bfloat16]

Four tasks share the tokens; width 64, 16 slots, top-k 32. The claim under test: a workspace's cost is linear in the
tokens, dense attention's quadratic. Slopes are those of log time over log tokens, by least squares over the three
largest sizes measured, beside the slope of the multiply-accumulates, which are counted from the trace. Memory is what
the compiler reserves (temporaries), so that nothing has to run for it.

Dense attention is measured where a call is expected, from the size before, to stay under --limit seconds and the
compiler asks for less than 12 GB; beyond that its time is extrapolated by its own multiply-accumulates and marked so.
Each pair of a module and a size is written when it is measured (benchmarks/results/interactions_DEVICE.json); killed
and run again, the script goes on.
"""

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, where this runs as a script

from benchmarks.measure import DASH, Results, select
from sgw_jax.interactions import KEM, CrossTaskAttention
from sgw_jax.interactions.shared_workspace import WorkspaceInteraction
from sgw_jax.plan.cost import multiply_accumulates

TASKS, CHANNELS, SLOTS, TOP_K = 4, 64, 16, 32
MEMORY_LIMIT = 12e9  # bytes
PASSES = ("forward", "forward + backward")
MODULES: dict[str, Callable[[Any], nn.Module]] = {
    "cross_attention": lambda dtype: CrossTaskAttention(dtype=dtype),
    "shared_workspace": lambda dtype: WorkspaceInteraction(SLOTS, top_k=TOP_K, dtype=dtype),
    "kem": lambda dtype: KEM(SLOTS, top_k=TOP_K, dtype=dtype),
    "skem": lambda dtype: KEM(SLOTS, top_k=TOP_K, etf_vertices=CHANNELS, dtype=dtype),
}
KEY = ("module", "dtype", "passes", "tokens")


def measure(name: str, tokens: int, dtype: str, passes: str, expected: float, arguments: Any) -> dict[str, Any]:
    """One call's numbers; ``seconds`` is missing where ``expected`` or its memory is above the limits."""
    module = MODULES[name](jnp.dtype(dtype))
    shape = (1, tokens // TASKS, CHANNELS)
    features = {f"task{i}": jax.ShapeDtypeStruct(shape, dtype) for i in range(TASKS)}
    variables = jax.eval_shape(module.init, jax.random.key(0), features)

    def forward(variables: Any, features: Any) -> Any:
        return module.apply(variables, features)

    def both(variables: Any, features: Any) -> Any:
        def loss(params: Any, features: Any) -> jax.Array:
            found = module.apply({**variables, "params": params}, features)
            return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in found.values())

        return jax.grad(loss, argnums=(0, 1))(variables["params"], features)

    function = forward if passes == "forward" else both
    row: dict[str, Any] = {"module": name, "tokens": tokens, "dtype": dtype, "passes": passes}
    row["macs"] = sum(multiply_accumulates(function, variables, features).values())
    program = jax.jit(function).lower(variables, features).compile()
    row["temporary_bytes"] = program.memory_analysis().temp_size_in_bytes
    if expected > arguments.limit or row["temporary_bytes"] > MEMORY_LIMIT:
        return row
    rng = np.random.default_rng(0)
    given = {key: jnp.asarray(rng.normal(size=shape), dtype) for key in features}
    weights = jax.jit(module.init)(jax.random.key(0), given)
    times = [timed(program, weights, given)]  # the first call, counted only where it is the only one
    if times[0] < arguments.seconds:
        times = []
        started = time.monotonic()
        while len(times) < 3 or time.monotonic() - started < arguments.seconds:
            times.append(timed(program, weights, given))
    return row | {"seconds": statistics.median(times), "rounds": len(times)}


def timed(program: Callable, *args: Any) -> float:
    """Seconds of a call."""
    begun = time.perf_counter()
    jax.block_until_ready(program(*args))
    return time.perf_counter() - begun


def series(rows: list[dict[str, Any]], name: str, dtype: str, passes: str) -> list[dict[str, Any]]:
    """One module's rows by tokens; the times that were not measured extrapolated by the multiply-accumulates."""
    own = [dict(r) for r in rows if (r["module"], r["dtype"], r["passes"]) == (name, dtype, passes)]
    own.sort(key=lambda row: row["tokens"])
    known = [row for row in own if "seconds" in row]
    for row in own:
        if "seconds" not in row and known:
            row |= {"seconds": known[-1]["seconds"] * row["macs"] / known[-1]["macs"], "extrapolated": True}
    return own


def slope(rows: list[dict[str, Any]], key: str) -> float:
    """Least squares over the three largest sizes measured: d log(key) / d log(tokens)."""
    last = [row for row in rows if not row.get("extrapolated")][-3:]
    return float(np.polyfit(np.log([row["tokens"] for row in last]), np.log([row[key] for row in last]), 1)[0])


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: milliseconds (in brackets: extrapolated), slopes, and memory at the largest size."""
    counts = sorted({row["tokens"] for row in rows})
    heads = [f"{n // 1024}k" for n in counts]
    lines = ["| module | | " + " | ".join(f"{head} ms" for head in heads) + " | slope | of MACs | temporaries |"]
    lines.append("|---" * (len(heads) + 5) + "|")
    for dtype, passes, name in itertools.product(dict.fromkeys(row["dtype"] for row in rows), PASSES, MODULES):
        own = series(select(rows, module=name, dtype=dtype, passes=passes), name, dtype, passes)
        by_count = {row["tokens"]: row for row in own}
        cells = []
        for count in counts:
            row = by_count.get(count, {})  # not every module need have been called with as many tokens
            text = f"{1e3 * row['seconds']:.3g}" if "seconds" in row else DASH
            cells.append(f"({text})" if row.get("extrapolated") else text)
        memory = f"{own[-1]['temporary_bytes'] / 2**20:,.0f} MiB"
        cells += [f"{slope(own, 'seconds'):.2f}", f"{slope(own, 'macs'):.2f}", memory]
        lines.append(f"| {name} | {dtype}, {passes} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Measures what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384, 65536, 262144])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=("float32", "bfloat16"))
    parser.add_argument("--seconds", type=float, default=2.0, help="of repeated calls, per measurement")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds that one call may be expected to take")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = jax.devices()[0]
    sizes = {"tasks": TASKS, "channels": CHANNELS, "slots": SLOTS, "top_k": TOP_K, "batch": 1}
    results = Results(f"interactions_{device.platform}", arguments.output, **sizes)
    known = results.rows()
    done = {tuple(row[key] for key in KEY) for row in known}
    for dtype, passes, name in itertools.product(arguments.dtypes, PASSES, MODULES):
        for tokens in sorted(arguments.tokens):
            if (name, dtype, passes, tokens) in done:
                continue
            before = [row for row in series(known, name, dtype, passes) if row["tokens"] < tokens]
            # The chunked dense attention is quadratic, all others linear: the square bounds both.
            expected = before[-1]["seconds"] * (tokens / before[-1]["tokens"]) ** 2 if before else 0.0
            known = results.add([measure(name, tokens, dtype, passes, expected, arguments)], *KEY)
            jax.clear_caches()
    Console().print("\n".join(table(known)), soft_wrap=True)


if __name__ == "__main__":
    main()
