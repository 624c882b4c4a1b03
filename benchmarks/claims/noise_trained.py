"""How well a module learns to read the few tokens that matter, and how much of the others it lets through.

    python benchmarks/claims/noise_trained.py [--quick] [--seeds=3]

The task of noise.py from random weights, trained: every token wants the value of one of G topics, which s tokens of
each topic carry; the values of all others are random. Written is the error on new examples over the target's variance
(1: nothing is learned), and the leak: the variance, over the target's, that redrawing the irrelevant values alone
brings into the output. Writes benchmarks/results/noise_trained.json; killed and run again, it goes on.
"""

import argparse
import itertools
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, where this runs as a script

from benchmarks.measure import Results, select
from sgw_jax.interactions import KEM, CrossTaskAttention
from sgw_jax.interactions.shared_workspace import WorkspaceInteraction

TOPICS, RELEVANT, CHANNELS, STEPS = 4, 8, 32, 300
TOKENS = 64  # of each task
MODULES = ("dense", "workspace", "kem", "skem")
TASKS = (2, 4, 8, 16)


class Reader(nn.Module):
    """A module between random embeddings of the tokens and a linear reading of what it added."""

    interaction: nn.Module

    @nn.compact
    def __call__(self, tokens: jax.Array, tasks: int) -> jax.Array:
        embedded = nn.Dense(CHANNELS, use_bias=False, name="embed")(tokens)
        features = {f"task{t:02d}": x for t, x in enumerate(jnp.split(embedded, tasks, axis=1))}
        output = jnp.concatenate(list(self.interaction(features).values()), axis=1)
        return nn.Dense(1, name="read")(output - embedded)[..., 0]


def draw(key: jax.Array, tasks: int, batch: int, values: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Tokens (batch, n, 3 TOPICS + 1) and targets: the wanted topic's value; ``values`` redraws the others."""
    count = tasks * TOKENS
    keys = jax.random.split(key, 4)
    order = jnp.argsort(jax.random.uniform(keys[0], (batch, count)), axis=1)
    topic = jnp.where(order < TOPICS * RELEVANT, order // RELEVANT, TOPICS)
    relevant = jax.nn.one_hot(topic, TOPICS)
    wanted = jax.nn.one_hot(jax.random.randint(keys[1], (batch, count), 0, TOPICS), TOPICS)
    truth = jax.random.normal(keys[2], (batch, TOPICS))
    other = jax.random.normal(keys[3] if values is None else values, (batch, count))
    value = jnp.where(topic < TOPICS, jnp.einsum("bnt,bt->bn", relevant, truth), other)
    tokens = jnp.concatenate([wanted, relevant, relevant * value[..., None], value[..., None]], axis=-1)
    return tokens, jnp.einsum("bnt,bt->bn", wanted, truth)


def trained(name: str, tasks: int, steps: int, seed: int) -> dict[str, Any]:
    """Error over the target's variance on new examples, and the share of the irrelevant values in the output."""
    modules = {
        "dense": CrossTaskAttention(query_chunk=None),
        "workspace": WorkspaceInteraction(16, top_k=16),
        "kem": KEM(16, top_k=16),
        "skem": KEM(16, top_k=16, etf_vertices=CHANNELS + 1),
    }
    model, key = Reader(modules[name]), jax.random.key(seed)
    variables = model.init(key, draw(key, tasks, 1)[0], tasks)
    constants = {k: v for k, v in variables.items() if k != "params"}
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

    def error(params: Any, key: jax.Array, values: jax.Array | None = None, batch: int = 8) -> tuple:
        tokens, target = draw(key, tasks, batch, values)
        found = model.apply({"params": params, **constants}, tokens, tasks)
        return jnp.mean((found - target) ** 2), found

    @jax.jit
    def step(params: Any, state: Any, key: jax.Array) -> tuple:
        slope = jax.grad(error, has_aux=True)(params, key)[0]
        updates, state = optimizer.update(slope, state)
        return optax.apply_updates(params, updates), state

    params, state = variables["params"], optimizer.init(variables["params"])
    for number in range(steps):
        params, state = step(params, state, jax.random.fold_in(key, number))
    test = jax.random.key(10_000 + seed)
    loss, found = jax.jit(error)(params, test)
    _, again = jax.jit(error)(params, test, jax.random.key(7))
    leak = float(jnp.mean((found - again) ** 2) / 2)  # the variance that redrawn values alone bring
    return {"module": name, "tasks": tasks, "seed": seed, "error": float(loss), "leak": leak}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: mean [lowest, highest] over the seeds."""
    counts = sorted({row["tasks"] for row in rows})
    lines = ["| trained | " + " | ".join(f"{n} tasks: error | leak" for n in counts) + " |"]
    lines.append("|" + "---|" * (1 + 2 * len(counts)))
    for name in MODULES:
        cells = []
        for count, key in itertools.product(counts, ("error", "leak")):
            values = [row[key] for row in select(rows, module=name, tasks=count)]
            cells.append(f"{np.mean(values):.3f} [{min(values):.3f}, {max(values):.3f}]")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Trains what is missing, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, 20 steps, written nowhere")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    results = Results("noise_trained", steps=STEPS)
    known = [] if arguments.quick else results.rows()
    done = {(row["seed"], row["tasks"], row["module"]) for row in known}
    for seed, count, name in itertools.product(range(1 if arguments.quick else arguments.seeds), TASKS, MODULES):
        if (seed, count, name) not in done:
            row = trained(name, count, 20 if arguments.quick else STEPS, seed)
            known = [*known, row] if arguments.quick else results.add([row], "seed", "tasks", "module")
    Console().print("\n".join(table(known)), soft_wrap=True)


if __name__ == "__main__":
    main()
