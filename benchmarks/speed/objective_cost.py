"""What task gradients cost: time and peak memory of a training step under each objective, beside the plain sum.

    python benchmarks/speed/objective_cost.py [--config=scenes] [--tasks 2 4 6] [--objectives upgrad nash_mtl ...]
    python benchmarks/speed/objective_cost.py --objectives all  every method; compiling two steps of each takes a while
    python benchmarks/speed/objective_cost.py --weights         the T x T work of every method
    python benchmarks/speed/objective_cost.py --aggregation     the T x T work and the aggregation alone, beside
                                                                TorchJD [parity]

Methods differ in a step by their T x T work alone: a scalariser's step is that of the plain sum, all others' that of
upgrad by the same gradients. So a few methods' steps and the weights of all say what each costs; with "all", two
methods stand for the representation's steps.
One process times all steps of a number of tasks in turn, so that they see the same machine; peak memory is the
compiler's (temporaries). The share s of the FLOPs after the pyramid is `plan`'s; the formula beside the measurement
is 1 + (T - 1)(2/3) s for the representation and (1 + 2 T) / 3 for parameters. Writes
benchmarks/results/objectives_DEVICE.json.
"""

import argparse
import dataclasses
import functools
import os
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, where this runs as a script

from benchmarks.measure import Results, in_turn, medians, merged
from sgw_jax.experiment.build import build_model, build_tasks
from sgw_jax.experiment.config_files import read_config
from sgw_jax.host import keep_freed_memory
from sgw_jax.multi_objective import AGGREGATORS, SCALARIZERS, Scalarizer, WeightedAggregator
from sgw_jax.optimizers import make_optimizer
from sgw_jax.plan.network import plan, target_shapes
from sgw_jax.tasks.base import Task
from sgw_jax.train_step import init_state, make_train_step

DEFAULT = ("uncertainty", "upgrad", "nash_mtl", "cagrad", "mgda", "aligned_mtl", "pcgrad")

REPRESENTATION = ("upgrad", "nash_mtl")


def first_tasks(config: Any, count: int) -> tuple[Task, ...]:
    """The first ``count`` of the six tasks, then the same again under other names."""
    tasks = build_tasks(config)
    again = [dataclasses.replace(task, name=f"{task.name}_again") for task in tasks]
    return (*tasks, *again)[:count]


def make(objective: str, tasks: int) -> Scalarizer | WeightedAggregator:
    """By name; an epoch is 100 steps."""
    options = {"steps_per_epoch": 100} if objective == "dwa" else {}
    return {**AGGREGATORS, **SCALARIZERS}[objective](tasks, **options)


def compiled_step(config: Any, count: int, objective: str, gradients: str) -> tuple[Any, Any, dict[str, Any]]:
    """(compiled step, its state, batch) of random numbers."""
    tasks = first_tasks(config, count)
    model = build_model(config, tasks)
    made = make(objective, len(tasks))
    optimizer = make_optimizer(1e-4)
    size, rows = tuple(config.data.size), config.batch_size
    rng = np.random.default_rng(0)
    batch = {"image": rng.normal(size=(rows, *size, 3)).astype(np.float32)}
    for name, shape in target_shapes(tasks, size, rows).items():
        whole = shape.dtype == jnp.int32
        batch[name] = rng.integers(0, 3, shape.shape).astype(np.int32) if whole else rng.uniform(0.1, 1, shape.shape)
        batch[name] = np.asarray(batch[name], shape.dtype)
    state = jax.jit(lambda: init_state(model, optimizer, jnp.zeros(batch["image"].shape), objective=made))()
    step = jax.jit(make_train_step(model, tasks, optimizer, objective=made, gradients=gradients))
    return step.lower(state, batch).compile(), state, batch


def steps(arguments: argparse.Namespace, overrides: list[str], count: int) -> list[dict[str, Any]]:
    """Every objective at a number of tasks."""
    rows = []
    config = read_config(arguments.config, overrides)
    found = plan(build_model(config, first_tasks(config, count)), tuple(config.data.size))
    after = sum(value for part, value in found.macs.items() if part not in ("backbone", "preliminary heads"))
    share = after / sum(found.macs.values())
    cases = {("equal", "parameters"): compiled_step(config, count, "equal", "parameters")}
    chosen = [*SCALARIZERS, *AGGREGATORS] if arguments.objectives == ["all"] else arguments.objectives
    for objective in dict.fromkeys(chosen):
        both = objective not in SCALARIZERS and (arguments.objectives != ["all"] or objective in REPRESENTATION)
        kinds = ("parameters", "representation") if both else ("parameters",)
        cases |= {(objective, kind): compiled_step(config, count, objective, kind) for kind in kinds}
    calls = {f"{name}/{kind}": (lambda c=case: c[0](c[1], c[2])) for (name, kind), case in cases.items()}
    seconds = medians(in_turn(calls, arguments.seconds, rounds=7))
    base = cases["equal", "parameters"][0].memory_analysis().temp_size_in_bytes
    for (name, kind), case in cases.items():
        memory = case[0].memory_analysis().temp_size_in_bytes
        scalar = name in SCALARIZERS
        formula = 1 + (count - 1) * 2 / 3 * share if kind == "representation" else (1 + 2 * count) / 3
        rows.append(
            {
                "tasks": count,
                "objective": name,
                "gradients": "scalar" if scalar else kind,
                "seconds": seconds[f"{name}/{kind}"],
                "time_ratio": seconds[f"{name}/{kind}"] / seconds["equal/parameters"],
                "formula": 1.0 if scalar else formula,
                "temporary_MiB": memory / 2**20,
                "memory_ratio": memory / base,
                "share_after_pyramid": share,
            }
        )
    Console().print(f"{count} tasks: {len(cases)} steps measured")
    jax.clear_caches()
    return rows


def weights_alone(seconds: float, counts: list[int]) -> list[dict[str, Any]]:
    """What every method does with losses and a Gramian, in seconds."""
    rows = []
    for count in counts:
        rng = np.random.default_rng(0)
        jacobian = rng.normal(size=(count, 64)).astype(np.float32)
        matrix, losses = jnp.asarray(jacobian @ jacobian.T), jnp.asarray(rng.uniform(0.5, 2, count), jnp.float32)
        calls = {}
        for name in AGGREGATORS:
            one = AGGREGATORS[name](count)
            call = jax.jit(lambda g, x, s, one=one: one.weigh(g, s, losses=x))
            calls[name, "aggregator"] = functools.partial(call, matrix, losses, one.init(None))
        for name in SCALARIZERS:
            scalar = make(name, count)
            slope = jax.jit(jax.value_and_grad(scalar.apply, has_aux=True))
            calls[name, "scalariser"] = functools.partial(slope, losses, scalar.init())
        found = medians(in_turn(calls, seconds))
        rows += [
            {"tasks": count, "objective": name, "kind": kind, "seconds": found[name, kind]} for name, kind in calls
        ]
        jax.clear_caches()
    return rows


def aggregation(seconds: float) -> list[dict[str, Any]]:
    """The aggregation of a random Jacobian of a million parameters, and the weights alone, beside TorchJD."""
    import torch
    import torchjd.aggregation as theirs

    members = {
        "upgrad": theirs.UPGrad(),
        "dualproj": theirs.DualProj(),
        "mgda": theirs.MGDA(),
        "cagrad": theirs.CAGrad(c=0.5),
        "imtl_g": theirs.IMTLG(),
        "aligned_mtl": theirs.AlignedMTL(),
        "config": theirs.ConFIG(),
        "pcgrad": theirs.PCGrad(),
    }
    torch.set_num_threads(os.cpu_count() or 1)
    rows = []
    for count in (2, 4, 8):
        jacobian = np.random.default_rng(0).normal(size=(count, 2**20)).astype(np.float32)
        tensor, array = torch.from_numpy(jacobian), jnp.asarray(jacobian)
        matrix = jnp.asarray(jacobian @ jacobian.T)
        for name, other in members.items():
            ours = AGGREGATORS[name](count)
            state = ours.init(None)
            update = jax.jit(lambda j, s, ours=ours: ours.update({"w": j}, s)[0])
            alone = jax.jit(lambda g, s, ours=ours: ours.weighting.apply(g, s.inner)[0])
            calls = {
                "ours": lambda f=update, j=array, s=state: f(j, s),
                "weights": lambda f=alone, g=matrix, s=state: f(g, s),
                "torchjd": lambda f=other, j=tensor: f(j) is None,
            }
            rows.append({"tasks": count, "objective": name, **medians(in_turn(calls, seconds))})
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: steps over those with equal weights."""
    lines = ["| T | objective | gradients | s | time | formula | memory |", "|---|---|---|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: row["tasks"]):
        cells = [row["tasks"], row["objective"], row["gradients"], f"{row['share_after_pyramid']:.0%}"]
        ratios = [f"{row[key]:.2f}" for key in ("time_ratio", "formula", "memory_ratio")]
        lines.append("| " + " | ".join([*map(str, cells), *ratios]) + " |")
    return lines


def aggregation_table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: milliseconds beside TorchJD's."""
    lines = ["| T | method | ours ms | of it weights ms | TorchJD ms | ratio |", "|---|---|---|---|---|---|"]
    for row in rows:
        ours, alone, torchjd = (1e3 * row[key] for key in ("ours", "weights", "torchjd"))
        cells = [row["tasks"], row["objective"], f"{ours:.2f}", f"{alone:.3f}", f"{torchjd:.2f}"]
        lines.append("| " + " | ".join([*map(str, cells), f"{torchjd / ours:.1f}"]) + " |")
    return lines


def weights_table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown: microseconds of the T x T work of each method."""
    counts = sorted({row["tasks"] for row in rows})
    lines = [
        "| method | kind | " + " | ".join(f"{n} tasks, us" for n in counts) + " |",
        "|---|---" + "|---" * len(counts) + "|",
    ]
    for name, kind in dict.fromkeys((row["objective"], row["kind"]) for row in rows):
        found = {r["tasks"]: r["seconds"] for r in rows if (r["objective"], r["kind"]) == (name, kind)}
        lines.append(f"| {name} | {kind} | " + " | ".join(f"{1e6 * found[n]:.0f}" for n in counts) + " |")
    return lines


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="scenes")
    parser.add_argument("--tasks", type=int, nargs="+", default=[2, 4, 5, 8])
    parser.add_argument("--objectives", nargs="+", default=list(DEFAULT))
    parser.add_argument("--seconds", type=float, default=20.0, help="per number of tasks")
    parser.add_argument("--weights", action="store_true")
    parser.add_argument("--aggregation", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments, overrides = parser.parse_known_args()
    results = Results(f"objectives_{jax.default_backend()}", arguments.output)
    keep_freed_memory()
    if arguments.aggregation:
        lines = aggregation_table(results.update(aggregation=aggregation(arguments.seconds / 10))["aggregation"])
    elif arguments.weights:
        lines = weights_table(results.update(weights=weights_alone(arguments.seconds, arguments.tasks))["weights"])
    else:
        label = " ".join([arguments.config, *overrides])
        known = results.known().get("steps", {})  # none before the first
        rows = known.get(label, [])
        for count in arguments.tasks:  # written after each, as compiling eight tasks takes minutes
            rows = merged(rows, steps(arguments, overrides, count), "tasks")
            results.update(steps={**known, label: rows})
        lines = table(rows)
    Console().print("\n".join(lines), soft_wrap=True)


if __name__ == "__main__":
    main()
