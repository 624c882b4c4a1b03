"""How much of what a task reads is noise, as tasks are added: dense cross-attention, SharedWorkspace, KEM and sKEM.

    python benchmarks/claims/noise.py [--quick]

Every token wants the value of one of G topics; s tokens of each topic carry it, the others random values. Scores of
relevant tokens are m above those of the rest, and all have Gaussian noise of standard deviation sigma.

planted  The real modules with weights set so that exactly these scores arise, and whose values carry a marker of the
         topic: the update itself then says how much of it came from where, for KEM through both its steps (the
         composed map A_write A_retrieve). SNR: squared mean over variance of the value read.
norms    As planted, and tokens' norms are log-normal of spread tau: scores grow with the norm unless it is divided out.

Closed forms beside it (sigma = 0): dense (n - s) / (n - s + s e^m), top-k (k - s) / (k - s + s e^m). Writes
benchmarks/results/noise.json and docs/noise.png. What modules learn instead of being told: noise_trained.py.
"""

import argparse
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, where this runs as a script

from benchmarks.measure import Results
from sgw_jax.interactions import KEM, CrossTaskAttention
from sgw_jax.layers.topk_attention import topk_attention

matplotlib.use("Agg")

TOPICS, RELEVANT, TOKENS, CHANNELS, BATCH = 4, 8, 128, 32, 4
WANTED, SCORE, MARK, VALUE, PADDING = 0, 4, 8, 12, 13  # first channel of each part of a token
TASKS = (2, 4, 8, 16, 32)
ROOT = Path(__file__).resolve().parents[2]


def examples(
    tasks: int, margin: float, sigma: float, spread: float, seed: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens (batch, tasks x TOKENS, CHANNELS) of equal norm, or of log-normal norms; wanted topic; relevance."""
    rng = np.random.default_rng(seed)
    count = tasks * TOKENS
    relevant = np.zeros((BATCH, count, TOPICS), bool)
    for row in range(BATCH):
        chosen = rng.permutation(count)[: TOPICS * RELEVANT].reshape(TOPICS, RELEVANT)
        for topic in range(TOPICS):
            relevant[row, chosen[topic], topic] = True
    wanted = rng.integers(0, TOPICS, (BATCH, count))
    tokens = np.zeros((BATCH, count, CHANNELS))
    tokens[..., WANTED : WANTED + TOPICS] = np.eye(TOPICS)[wanted]
    tokens[..., SCORE : SCORE + TOPICS] = margin * relevant + sigma * rng.normal(size=relevant.shape)
    tokens[..., MARK : MARK + TOPICS] = relevant
    tokens[..., VALUE] = np.where(relevant.any(-1), 1, rng.normal(size=(BATCH, count)))
    filling = rng.normal(size=(BATCH, count, CHANNELS - PADDING))
    missing = 4 * CHANNELS * max(1, margin) - np.sum(tokens**2, axis=-1, keepdims=True)
    tokens[..., PADDING:] = filling / np.linalg.norm(filling, axis=-1, keepdims=True) * np.sqrt(np.maximum(missing, 0))
    norms = np.exp(spread * rng.normal(size=(BATCH, count, 1)) - spread**2 / 2)
    return (tokens * norms).astype(np.float32), wanted, relevant


def routes(width: int, *pairs: tuple[int, int, float]) -> np.ndarray:
    """A matrix (CHANNELS, width) that carries one part of a token to one part of its image, TOPICS wide, times a
    factor."""
    matrix = np.zeros((CHANNELS, width), np.float32)
    for source, target, factor in pairs:
        matrix[source : source + TOPICS, target : target + TOPICS] = factor * np.eye(TOPICS)
    return matrix


def planted(name: str, top_k: int | None, slots: int, scale: float) -> tuple[nn.Module, Any]:
    """A module and its variables; ``scale``: the norm that sKEM divides out, over the square root of the channels."""
    root = math.sqrt(CHANNELS)
    read = np.zeros((CHANNELS, CHANNELS), np.float32)
    read[MARK:PADDING, MARK:PADDING] = np.eye(PADDING - MARK)
    if name == "dense":
        kernels = {
            "query": routes(CHANNELS, (WANTED, 0, root)),
            "key": routes(CHANNELS, (SCORE, 0, 1)),
            "value": read,
            "output": np.eye(CHANNELS, dtype=np.float32),
        }
        return CrossTaskAttention(query_chunk=512), {"params": {k: {"kernel": v} for k, v in kernels.items()}}
    vertices = CHANNELS + 1 if name == "skem" else None
    module = KEM(slots, top_k=top_k, etf_vertices=vertices)
    variables = jax.device_get(module.init(jax.random.key(0), {"a": jnp.zeros((1, 2, 2, CHANNELS))}))
    lift = np.eye(CHANNELS, dtype=np.float32)
    if vertices:  # z = sqrt(C) M^T f / |f| and M M^T = K / (K - 1): this takes z back to f, all norms made equal
        (frame,) = jax.tree.leaves(variables["constants"])
        lift = scale * (vertices - 1) / vertices * np.asarray(frame).T
    initial = np.zeros((slots, CHANNELS), np.float32)
    initial[np.arange(slots), np.arange(slots) % TOPICS] = root
    sharp = 20.0  # of the choice of a slot, whose key is the share of its topic in what it retrieved
    retrieve = {"query": np.eye(CHANNELS), "key": lift @ routes(CHANNELS, (SCORE, 0, 1)), "value": lift @ read}
    write = {
        "query": lift @ routes(CHANNELS, (WANTED, 0, sharp * root)),
        "key": routes(CHANNELS, (MARK, 0, 1)),
        "value": read,
    }
    params = {"slots": initial} | {
        part: {key: {"kernel": np.asarray(value, np.float32)} for key, value in kernels.items()}
        for part, kernels in (("retrieve", retrieve), ("write", write))
    }
    return module, {**variables, "params": params}


def measure(
    name: str, tasks: int, margin: float, top_k: int | None, slots: int, sigma: float, spread: float
) -> dict[str, Any]:
    """Share of noise in what is read, SNR of the value, and the share of relevant tokens that the slots keep."""
    tokens, wanted, relevant = examples(tasks, margin, sigma, spread, seed=tasks)
    features = {f"task{t:02d}": x for t, x in enumerate(np.split(tokens, tasks, axis=1))}
    found: dict[str, Any] = {"module": name, "tasks": tasks, "margin": margin, "top_k": top_k, "slots": slots}
    found |= {"sigma": sigma, "spread": spread}
    if name == "workspace":  # its retrieval alone: what follows is not linear in the values
        query = np.zeros((BATCH, TOPICS, 1, CHANNELS), np.float32)
        query[:, np.arange(TOPICS), 0, np.arange(TOPICS)] = 1
        key = (tokens @ routes(CHANNELS, (SCORE, 0, 1)))[:, :, None]
        mark = tokens[:, :, None, MARK:PADDING]
        read, weights, _ = topk_attention(query, key, mark, top_k, scale=1.0, normalise_over="all")
        kept = np.asarray(weights).sum(-1)[:, 0]
        share = np.diagonal(np.asarray(read)[:, :, 0, :TOPICS], axis1=1, axis2=2) / kept
        return found | {"noise": float(1 - share.mean()), "kept_mass": float(kept.mean())}
    module, variables = planted(name, top_k, slots, scale=math.sqrt(4 * max(1, margin)))
    output, state = jax.jit(lambda v, f: module.apply(v, f, mutable=["intermediates"]))(variables, features)
    update = np.concatenate([np.asarray(x) for x in output.values()], axis=1) - tokens
    share = np.take_along_axis(update[..., MARK : MARK + TOPICS], wanted[..., None], axis=-1)
    value = update[..., VALUE]
    # Tokens that want the same topic read the same: one reading a topic and image.
    readings = np.array([[value[b][wanted[b] == g].mean() for g in range(TOPICS)] for b in range(BATCH)])
    found |= {"noise": float(1 - share.mean()), "snr": float(readings.mean() ** 2 / max(readings.var(), 1e-12))}
    if "intermediates" in state and top_k is not None:
        (index,) = state["intermediates"]["retrieve_index"]
        index = np.asarray(index)[:, 0, :TOPICS]  # (batch, slots, k); slot g reads topic g
        kept = [[relevant[b, index[b, g], g].sum() / RELEVANT for g in range(TOPICS)] for b in range(BATCH)]
        found["relevant_kept"] = float(np.mean(kept))
    return found


def closed_form(tasks: int, margin: float, top_k: int | None) -> float:
    """Share of noise without noise in the scores."""
    count = tasks * TOKENS if top_k is None else min(top_k, tasks * TOKENS)
    return (count - RELEVANT) / (count - RELEVANT + RELEVANT * math.exp(margin)) if count > RELEVANT else 0.0


def run(quick: bool) -> dict[str, list[dict[str, Any]]]:
    """Every measurement of planted modules."""
    tasks = TASKS[:3] if quick else TASKS
    rows = []
    for count, margin in itertools.product(tasks, (2.0, 4.0, 6.0)):
        for sigma in (0.0, 1.0):
            cases = [("dense", None, TOPICS), ("kem", None, TOPICS), ("workspace", 32, TOPICS), ("skem", 32, TOPICS)]
            cases += [("kem", top_k, TOPICS) for top_k in (8, 32, 128)] + [("kem", 32, 4 * TOPICS)]
            for name, top_k, slots in cases:
                row = measure(name, count, margin, top_k, slots, sigma, 0.0)
                rows.append(row | {"closed_form": closed_form(count, margin, top_k) if sigma == 0 else None})
    norms = [
        measure(name, tasks[-1], 4.0, 32, TOPICS, 1.0, spread)
        for name, spread in itertools.product(("dense", "kem", "skem"), (0.0, 0.25, 0.5, 1.0))
    ]
    return {"planted": rows, "norms": norms}


def tables(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Markdown: what docs/claims.md shows."""
    counts = sorted({row["tasks"] for row in found["planted"]})
    labels = {("dense", None, TOPICS): "dense", ("kem", None, TOPICS): "KEM, no selection"}
    labels |= {("workspace", 32, TOPICS): "SharedWorkspace, k = 32 (retrieval)", ("skem", 32, TOPICS): "sKEM, k = 32"}
    labels |= {("kem", k, TOPICS): f"KEM, k = {k}" for k in (8, 32, 128)} | {("kem", 32, 16): "KEM, k = 32, 16 slots"}
    lines = ["| margin | module | " + " | ".join(f"{n} tasks" for n in counts) + " |", "|" + "---|" * (2 + len(counts))]
    for margin, (key, label) in itertools.product((2.0, 4.0, 6.0), labels.items()):
        cells = []
        for count in counts:
            (row,) = [
                row
                for row in found["planted"]
                if (row["module"], row["top_k"], row["slots"]) == key
                and (row["tasks"], row["margin"], row["sigma"]) == (count, margin, 1.0)
            ]
            selects = row["top_k"] is not None and row["module"] != "workspace"  # whose selection is not looked at
            kept = f", {row['relevant_kept']:.0%} kept" if selects and row["relevant_kept"] < 0.995 else ""
            cells.append(f"{row['noise']:.2f}{kept}")
        lines.append(f"| {margin:g} | {label} | " + " | ".join(cells) + " |")
    spreads = sorted({row["spread"] for row in found["norms"]})
    lines += ["", "| spread of norms | " + " | ".join(map(str, spreads)) + " |", "|" + "---|" * (1 + len(spreads))]
    for name in ("dense", "kem", "skem"):
        by_spread = {row["spread"]: row for row in found["norms"] if row["module"] == name}
        cells = [f"SNR {by_spread[s]['snr']:.1f}" for s in spreads]
        if name != "dense":
            cells = [
                f"{cell}, {by_spread[s]['relevant_kept']:.0%} kept" for cell, s in zip(cells, spreads, strict=True)
            ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def draw_figure(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Noise over the number of tasks, by margin."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), sharey=True)
    shown = {
        "dense": ("dense", None),
        "KEM, no selection": ("kem", None),
        "KEM, k = 32": ("kem", 32),
        "sKEM, k = 32": ("skem", 32),
    }
    for axis, margin in zip(axes, (2.0, 4.0, 6.0), strict=True):
        for label, (name, top_k) in shown.items():
            rows = [r for r in found["planted"] if (r["module"], r["top_k"], r["slots"]) == (name, top_k, TOPICS)]
            rows = [r for r in rows if (r["margin"], r["sigma"]) == (margin, 1.0)]
            axis.plot([r["tasks"] for r in rows], [r["noise"] for r in rows], marker="o", label=label)
        axis.set(title=f"margin {margin:g}", xlabel="tasks", xscale="log", ylim=(0, 1.02))
        axis.set_xticks([r["tasks"] for r in rows], [str(r["tasks"]) for r in rows], minor=False)
        axis.minorticks_off()
    axes[0].set_ylabel("share of noise in what is read")
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measures, prints tables, draws."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few cases, written nowhere")
    arguments = parser.parse_args()
    found = run(arguments.quick)
    if not arguments.quick:
        Results("noise", topics=TOPICS, relevant=RELEVANT, tokens=TOKENS).write(found)
        draw_figure(found, ROOT / "docs" / "noise.png")
    Console().print("\n".join(tables(found)), soft_wrap=True)


if __name__ == "__main__":
    main()
