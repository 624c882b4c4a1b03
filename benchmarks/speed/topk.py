"""Ways to keep the k best of n tokens for every slot, side by side: time of the forward and of both passes.

    python benchmarks/speed/topk.py [--tokens 1024 4096 16384 65536] [--seconds 5]

gather     lax.top_k, then the k values are gathered: what the library does
threshold  every token whose score reaches the k-th, then a product with all values
scattered  lax.top_k, the k weights scattered into a row of zeros, then a product with all values
approx     lax.approx_max_k at recall 0.95, then gathered (a TPU's own instruction; elsewhere a sort)
softmax    no selection: all tokens

The roofline beside it is the scores' time: one product of slots and keys, and scores and values read once, at the rates
that a product and a copy of the same size reach here. Writes benchmarks/results/topk_DEVICE.json.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, where this runs as a script

from benchmarks.measure import Results, in_turn, medians
from sgw_jax.layers.topk_attention import apply_weights, attention_scores, topk_attention

BATCH, SLOTS, WIDTH, TOP_K = 2, 32, 192, 32


def threshold(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Keeps all that ties with the k-th, too: not the same function where scores tie."""
    scores = attention_scores(query, key)
    kth = jax.lax.top_k(scores, TOP_K)[0][..., -1:]
    weights = jax.nn.softmax(jnp.where(scores >= kth, scores, -jnp.inf), axis=-1)
    return apply_weights(weights, value)


def scattered(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """One row of weights, zero where a token was not kept."""
    best, index = jax.lax.top_k(attention_scores(query, key), TOP_K)
    kept = jax.nn.softmax(best, axis=-1)
    zeros = jnp.zeros((*index.shape[:-1], key.shape[1]), kept.dtype)
    return apply_weights(jnp.put_along_axis(zeros, index, kept, axis=-1, inplace=False), value)


PASSES = ("forward", "both")
WAYS: dict[str, Callable] = {
    "gather": lambda q, k, v: topk_attention(q, k, v, TOP_K)[0],
    "threshold": threshold,
    "scattered": scattered,
    "approx": lambda q, k, v: topk_attention(q, k, v, TOP_K, recall=0.95)[0],
    "softmax": lambda q, k, v: topk_attention(q, k, v, None)[0],
}


def measure(tokens: int, dtype: Any, seconds: float) -> list[dict[str, Any]]:
    """All ways in turn, so that they see the same machine; medians in ms."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((BATCH, SLOTS, 1, WIDTH), (BATCH, tokens, 1, WIDTH), (BATCH, tokens, 1, WIDTH))
    args = [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]
    calls = {}
    for name, way in {"roofline": None, **WAYS}.items():
        slope = jax.grad(lambda *a, way=way: jnp.sum(way(*a).astype(jnp.float32) ** 2), argnums=(0, 1, 2))
        pair = (jax.jit(way), jax.jit(slope)) if way else (_scores, _scores_twice)
        calls |= {(name, passes): (lambda c=call: c(*args)) for passes, call in zip(PASSES, pair, strict=True)}
    found = medians(in_turn(calls, seconds))
    label = jnp.dtype(dtype).name
    return [
        {
            "tokens": tokens,
            "dtype": label,
            "way": name,
            **{f"{p}_ms": 1e3 * found[name, p] for p in PASSES},
        }
        for name in ("roofline", *WAYS)
    ]


@jax.jit
def _scores(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, jax.Array]:
    return attention_scores(query, key), value + 1


@jax.jit
def _scores_twice(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[jax.Array, ...]:
    scores = attention_scores(query, key)
    by_key = jnp.einsum("bhln,blhd->bnhd", scores.astype(query.dtype), query)
    by_query = jnp.einsum("bhln,bnhd->blhd", scores.astype(query.dtype), key)
    return scores, by_key, by_query, value + 1


def main() -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096, 16384, 65536])
    parser.add_argument("--seconds", type=float, default=5.0, help="per row")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    device = jax.devices()[0]
    sizes = {"batch": BATCH, "slots": SLOTS, "width": WIDTH, "top_k": TOP_K}
    results = Results(f"topk_{device.platform}", arguments.output, **sizes)
    rows = []
    for dtype in (jnp.float32, jnp.bfloat16):
        for tokens in arguments.tokens:
            rows += measure(tokens, dtype, arguments.seconds)
            results.write({"rows": rows})
    lines = ["| dtype | tokens | way | forward ms | over roofline | both passes ms | over roofline |", "|" + "---|" * 7]
    base = {(r["dtype"], r["tokens"]): r for r in rows if r["way"] == "roofline"}
    for row in rows:
        least = base[row["dtype"], row["tokens"]]
        cells = [row["dtype"], row["tokens"], row["way"]]
        for key in ("forward_ms", "both_ms"):
            cells += [f"{row[key]:.2f}", f"{row[key] / least[key]:.2f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    Console().print("\n".join(lines), soft_wrap=True)


if __name__ == "__main__":
    main()
