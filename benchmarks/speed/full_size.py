"""The full-size systems: cost of every one by `plan`, and their training and evaluation steps compiled.

    python benchmarks/speed/full_size.py                    every system: parameters, MACs, memory from the trace
    python benchmarks/speed/full_size.py --compile          also compiles both steps for this machine, one image each

Writes benchmarks/results/full_size.json after each system and skips what is there already, so that it can be stopped
at any time; prints the table of docs/cost.md. Nothing is executed: shapes only.
"""

import argparse
import gc
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, where this runs as a script

from benchmarks.measure import DASH, Results
from sgw_jax.configs.base import SYSTEMS
from sgw_jax.experiment.build import build_model, build_tasks
from sgw_jax.experiment.config_files import read_config
from sgw_jax.optimizers import make_optimizer
from sgw_jax.plan.network import plan, target_shapes
from sgw_jax.train_step import init_state, make_eval_step, make_train_step

CONFIGS = ("nyud", "pascal_context", "cityscapes")
INTERACTIONS = ("none", "cross_attention", "shared_workspace", "kem", "skem")

# As their authors and others report them for NYUD-v2 (docs of InvPT, MQTransformer and DeMT): what they call FLOPs are
# multiply-accumulates.
PUBLISHED = (
    ("InvPT ViT-L", 402.1, 555.57),
    ("MQTransformer Swin-L", 204.3, 365.25),
    ("DeMT Swin-L", 201.64, None),
    ("DeMT Swin-B", 90.9, 153.65),
    ("DeMT Swin-T", 32.07, 100.70),
)


def compiled_memory(config) -> dict[str, dict[str, float]]:
    """Of both steps on one image: seconds of compilation, bytes of arguments and of temporaries."""
    tasks = build_tasks(config)
    model = build_model(config, tasks)
    optimizer = make_optimizer(1e-4)
    image = jnp.zeros((1, *config.data.size, 3))
    state = jax.eval_shape(lambda: init_state(model, optimizer, image))
    batch = {"image": jax.ShapeDtypeStruct(image.shape, jnp.float32), **target_shapes(tasks, tuple(config.data.size))}
    steps = {
        "train": (jax.jit(make_train_step(model, tasks, optimizer), donate_argnums=0), state),
        "evaluate": (jax.jit(make_eval_step(model, tasks)), state.variables),
    }
    found = {}
    for name, (step, first) in steps.items():
        started = time.monotonic()
        memory = step.lower(first, batch).compile().memory_analysis()
        found[name] = {
            "compile_seconds": time.monotonic() - started,
            "argument_bytes": memory.argument_size_in_bytes,
            "temporary_bytes": memory.temp_size_in_bytes,
        }
    return found


def table(results: dict) -> str:
    """Markdown: one row per system of NYUD, beside the published ones."""
    lines = [
        "| NYUD, 448 x 576, 4 tasks | parameters M | MACs G | FLOPs G | interaction, of MACs | kept GiB |",
        "|---|---|---|---|---|---|",
    ]
    for name, found in results["systems"].items():
        if not name.startswith("nyud:"):
            continue
        cost = found["plan"]
        macs = cost["macs_total"] / 1e9
        lines.append(
            f"| {name.removeprefix('nyud:').replace(',interaction=', ', ')} | {cost['parameters_total'] / 1e6:.1f} "
            f"| {macs:.1f} | {2 * macs:.1f} | {cost['interaction_share']:.1%} | {cost['kept_bytes'] / 2**30:.2f} |"
        )
    for name, parameters, published in PUBLISHED:
        both = f"{published} | {2 * published}" if published else f"{DASH} | {DASH}"
        lines.append(f"| published: {name} | {parameters} | {both} | {DASH} | {DASH} |")
    return "\n".join(lines)


def compiled(results: dict) -> list[str]:
    """The systems whose steps were compiled."""
    return [name for name, found in results["systems"].items() if "compiled" in found]


def memory_table(results: dict) -> str:
    """Markdown: what the compiler reserves for the training step of one image, and what each interaction adds to it."""
    lines = [f"| NYUD system | temporaries of the step, none | {' | '.join(f'{x} adds' for x in INTERACTIONS[1:])} |"]
    lines.append("|---" * (len(INTERACTIONS) + 1) + "|")
    for system in SYSTEMS:
        if f"nyud:{system},interaction=none" not in compiled(results):
            continue
        reserved = [
            results["systems"][f"nyud:{system},interaction={name}"]["compiled"]["train"]["temporary_bytes"] / 2**30
            for name in INTERACTIONS
        ]
        added = [f"{more - reserved[0]:+.2f}" for more in reserved[1:]]
        lines.append(f"| {system} | {reserved[0]:.2f} GiB | {' | '.join(added)} |")
    return "\n".join(lines)


def main() -> None:
    """Goes through the systems."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", nargs="+", default=CONFIGS, choices=CONFIGS)
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS), choices=list(SYSTEMS))
    parser.add_argument("--interactions", nargs="+", default=INTERACTIONS, choices=INTERACTIONS)
    parser.add_argument("--compile", action="store_true", help="compile both steps too")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results, console = Results("full_size", arguments.output), Console()
    systems = results.known().get("systems", {})  # none before the first
    for config in arguments.configs:
        for system in arguments.systems:
            for interaction in arguments.interactions:
                name = f"{config}:{system},interaction={interaction}"
                found = systems.setdefault(name, {})
                read = read_config(name)
                if "plan" not in found:
                    found["plan"] = plan(build_model(read, build_tasks(read)), tuple(read.data.size)).to_dict()
                if arguments.compile and "compiled" not in found:
                    found["compiled"] = compiled_memory(read)
                    seconds = sum(step["compile_seconds"] for step in found["compiled"].values())
                    console.print(f"{name}: compiled in {seconds:.0f} s")
                    jax.clear_caches()
                    gc.collect()
                results.update(systems=systems)
    console.print(table(results.load()), soft_wrap=True)


if __name__ == "__main__":
    main()
