"""Interactions, or objectives, side by side from one pretrained trunk, paired by seed: scores, delta_m, diagnostics.

    python benchmarks/claims/compare.py --config=scenes --out=runs/compare [--seeds=3] [--steps=200]
    python benchmarks/claims/compare.py --out=runs/compare --methods none equal uncertainty upgrad nash_mtl cagrad
    python benchmarks/claims/compare.py --out=runs/compare --tune 7e-4 1.5e-3 3e-3 --results=FILE
    python benchmarks/claims/compare.py --config=scenes:tasks=semseg+depth --out=runs/two --trunk=runs/compare/trunk

A trunk without interaction is trained once; every run then goes on from it for the same number of steps, with the same
data in the same order as the others of its seed. delta_m is taken against the single-task models of that seed, which
went on from the same trunk (--no_singles leaves them out). Scores are of the test split, by the average of the
parameters after the last step: nothing is chosen by looking at a split. With --tune every method, single-task models
too, first tries each of these learning rates with a seed of its own, and keeps the one of the lowest loss on the
validation split: the same budget for all. With --trunk the runs go on from another comparison's trunk, whose tasks may
be more; with --trunk_steps=0 there is none, and every run starts from random parameters. Killed and run again, it goes
on with the first run that is missing.
"""

import argparse
import io
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from rich.console import Console
from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, where this runs as a script

from benchmarks.claims.comparison import SINGLE, markdown, page, summarise
from benchmarks.measure import Results, environment
from sgw_jax.data_pipelines.atomic import write_atomically
from sgw_jax.evaluation.diagnostics import diagnose
from sgw_jax.experiment.build import build
from sgw_jax.experiment.config_files import read_config
from sgw_jax.experiment.experiment import Experiment
from sgw_jax.host import keep_freed_memory
from sgw_jax.report.results import count_parameters
from sgw_jax.run.logs import without_nan
from sgw_jax.run.steps import evaluate_split
from sgw_jax.sharding import replicated
from sgw_jax.train import train
from sgw_jax.train_step import make_eval_step

TASKS = ("semseg", "depth", "normals", "edges", "saliency", "human_parts")
UNWEIGHTED = {f"task_weights.{task}": "1" for task in TASKS}
BY_REPRESENTATION = {**UNWEIGHTED, "gradients": "representation"}
KEM_PLAIN = {"interactions.kem.task_gate": "false"}
SKEM_PLAIN = {"interactions.skem.task_gate": "false"}
WITHIN_PLAIN = {"interactions.within_tasks.task_gate": "false"}

# What is compared: the interaction, and options over the configuration's; "widened" gets its MLP in `main`. The
# objectives have no interaction and start from weights of 1: "none" is the sum with the configuration's tuned weights.
METHODS: dict[str, tuple[str, dict[str, str]]] = {
    "none": ("none", {}),
    "widened": ("none", {}),
    "within_tasks": ("within_tasks", {}),
    "within_plain": ("within_tasks", WITHIN_PLAIN),
    "cross_attention": ("cross_attention", {}),
    "shared_workspace": ("shared_workspace", {}),
    "kem": ("kem", {}),
    "kem_sharp": ("kem", {"interactions.kem.temperature": "0.25"}),
    "skem": ("skem", {}),
    "equal": ("none", UNWEIGHTED),
    "uncertainty": ("none", {**UNWEIGHTED, "objective": "uncertainty"}),
    "upgrad": ("none", {**BY_REPRESENTATION, "objective": "upgrad"}),
    "nash_mtl": ("none", {**BY_REPRESENTATION, "objective": "nash_mtl"}),
    "cagrad": ("none", {**BY_REPRESENTATION, "objective": "cagrad"}),
    # The paper's, without the configuration's gates; and one thing changed in them.
    "kem_plain": ("kem", KEM_PLAIN),
    "skem_plain": ("skem", SKEM_PLAIN),
    "kem_k8": ("kem", KEM_PLAIN | {"interactions.kem.top_k": "8"}),
    "kem_k128": ("kem", KEM_PLAIN | {"interactions.kem.top_k": "128"}),
    "kem_dense": ("kem", KEM_PLAIN | {"interactions.kem.top_k": "None"}),
    "kem_slots4": ("kem", KEM_PLAIN | {"interactions.kem.num_slots": "4"}),
    "kem_slots64": ("kem", KEM_PLAIN | {"interactions.kem.num_slots": "64"}),
    "kem_heads4": ("kem", KEM_PLAIN | {"interactions.kem.num_heads": "4"}),
    "kem_rounds2": ("kem", KEM_PLAIN | {"interactions.kem.rounds": "2"}),
    "kem_scales": ("kem", KEM_PLAIN | {"scales": "16,8", "persist": "true"}),
    "skem_vertices8": ("skem", SKEM_PLAIN | {"interactions.skem.etf_vertices": "8"}),
    "skem_selection": ("skem", SKEM_PLAIN | {"interactions.skem.etf_for": "selection"}),
}
INTERACTIONS = ("none", "widened", "within_tasks", "cross_attention", "shared_workspace", "kem", "kem_sharp", "skem")
TUNING_SEED = 500  # none of those that are compared


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what is missing, then writes compare.json and compare.html and prints the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="scenes")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200, help="of every run from the trunk")
    parser.add_argument("--trunk_steps", type=int, default=600, help="0: no trunk, from random parameters")
    parser.add_argument("--trunk", type=Path, help="a trained trunk to go on from; without it one is trained")
    parser.add_argument("--no_singles", action="store_true", help="no single-task models: gains over none alone")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(INTERACTIONS))
    parser.add_argument("--tune", nargs="+", default=[], help="learning rates to choose from on the validation split")
    parser.add_argument("--results", type=Path, help="where the numbers go too, for the page of results")
    parser.add_argument("--cache_dir", type=Path, default=Path.home() / ".cache" / "sgw_jax")
    arguments, overrides = parser.parse_known_args(argv)
    jax.config.update("jax_compilation_cache_dir", str(arguments.cache_dir / "xla"))
    logging.set_verbosity(logging.ERROR)  # Orbax reports every routine save as a warning
    keep_freed_memory()
    console = Console()

    tasks = build_run(arguments, overrides, "none", {}, seed=0).tasks
    trunk = arguments.trunk or (arguments.out / "trunk" if arguments.trunk_steps else None)
    if trunk is None:
        pass
    elif arguments.trunk is None:
        experiment = build_run(arguments, overrides, "none", {}, seed=1000, steps=arguments.trunk_steps)
        if not done(experiment, trunk, None):
            console.print(f"The trunk: {arguments.trunk_steps} steps without interaction.")
            run(experiment, trunk, None)
    elif not (trunk / "result.json").exists():
        raise SystemExit(f"--trunk: {trunk} is no trunk of a comparison: it has no result.json.")
    trunk_steps = 0 if trunk is None else read_result(trunk)["made_by"]["steps"]
    cases: dict[str, tuple[str, dict[str, str]]] = {name: METHODS[name] for name in arguments.methods}
    if "widened" in cases:
        width = equal_mlp_width(build_run(arguments, overrides, "kem", {}, seed=0))
        cases["widened"] = ("none", {"interactions.none.mlp_width": str(width)})
    if not arguments.no_singles:
        cases |= {SINGLE + task.name: ("none", {"tasks": task.name}) for task in tasks}
    with Progress(console=console) as progress:
        bar = progress.add_task("runs", total=len(cases) * (arguments.seeds + len(arguments.tune)))
        rates = {}
        for name, (interaction, options) in cases.items():
            losses = {}
            for rate in arguments.tune:
                progress.update(bar, description=f"{name}, learning rate {rate}")
                workdir, flag = arguments.out / "tuning" / name / rate, {"optimizer.learning_rate": rate}
                experiment = build_run(arguments, overrides, interaction, options | flag, TUNING_SEED, tuning=True)
                if not done(experiment, workdir, trunk):
                    run(experiment, workdir, trunk, "validation")
                losses[rate] = read_result(workdir)["loss"]
                progress.advance(bar)
            if losses:
                rates[name] = {"chosen": min(losses, key=losses.__getitem__), "validation_loss": losses}
                cases[name] = (interaction, options | {"optimizer.learning_rate": rates[name]["chosen"]})
        for seed in range(arguments.seeds):
            for name, (interaction, options) in cases.items():
                progress.update(bar, description=f"{name}, seed {seed}")
                workdir = arguments.out / name / f"seed{seed}"
                experiment = build_run(arguments, overrides, interaction, options, seed)
                if not done(experiment, workdir, trunk):
                    run(experiment, workdir, trunk)
                progress.advance(bar)

    found = {
        name: [read_result(arguments.out / name / f"seed{seed}") for seed in range(arguments.seeds)] for name in cases
    }
    summary = summarise(found, tasks) | {
        "config": arguments.config,
        "overrides": overrides,
        "steps": arguments.steps,
        "trunk_steps": trunk_steps,
        "seeds": arguments.seeds,
        "rates": rates,
        "environment": environment(),
    }
    once = ("made_by", "environment")  # the same for all
    runs = {name: [{k: v for k, v in r.items() if k not in once} for r in results] for name, results in found.items()}
    for path in (arguments.out / "compare.json", arguments.results):
        if path is not None:
            Results("compare", path).write(without_nan({**summary, "runs": runs}))
    write_atomically(arguments.out / "compare.html", page(summary))
    console.print(markdown(summary), soft_wrap=True)
    console.print(f"\n{arguments.out / 'compare.html'}   {arguments.out / 'compare.json'}")
    return 0


def build_run(
    arguments: argparse.Namespace,
    overrides: Sequence[str],
    interaction: str,
    options: Mapping[str, str],
    seed: int,
    steps: int | None = None,
    tuning: bool = False,
) -> Experiment:
    """The experiment of one run: the user's configuration, the method's options, no evaluation on the way, and only
    with ``tuning`` a validation split."""
    steps = steps or arguments.steps
    keys = {"interaction": interaction, "seed": seed, "steps": steps, "checkpoint_every": steps, "eval_every": steps}
    keys |= {"keep": 1, **({} if tuning else {"data.lengths.validation": 0}), **options}
    method = [f"--config.{key}={value}" for key, value in keys.items()]
    experiment = build(read_config(arguments.config, [*overrides, *method]), arguments.cache_dir)
    for source in experiment.data.each_source().values():
        prepare = getattr(source, "prepare", None)
        if prepare is not None:  # rendered once, read from then on
            prepare()
    return experiment


def equal_mlp_width(kem: Experiment) -> int:
    """The hidden width at which no interaction with an MLP has as many parameters as this KEM, to half a unit."""
    image = jax.ShapeDtypeStruct((1, *kem.size, 3), jnp.float32)
    params = jax.eval_shape(kem.model.init, jax.random.key(0), image)["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params["interaction"]))
    channels = kem.config.channels
    # Layer norm 2 c, kernels 2 c h, biases h + c.
    return round((count - 3 * channels) / (2 * channels + 1))


def made_by(experiment: Experiment, trunk: Path | None) -> dict[str, Any]:
    """What a result depends on: its configuration and its trunk's, wherever that lies."""
    return {**json.loads(experiment.config.to_json_best_effort()), "trunk": trunk and read_result(trunk)["made_by"]}


def read_result(workdir: Path) -> dict[str, Any]:
    """A complete run's result.json."""
    return Results("compare", workdir / "result.json").load()


def done(experiment: Experiment, workdir: Path, trunk: Path | None) -> bool:
    """Whether this run is complete already; exits if what is there was made by another configuration or trunk."""
    path = workdir / "result.json"
    if not path.exists():
        return False
    old, new = read_result(workdir).get("made_by", {}), made_by(experiment, trunk)
    other = [key for key in new if old.get(key) != new[key]]
    if other:
        raise SystemExit(
            f"{path} was made with another {', '.join(other)}: give another --out, or delete {workdir} to run it anew."
        )
    return True


def run(experiment: Experiment, workdir: Path, trunk: Path | None, split: str = "test") -> None:
    """Trains, evaluates on a split and writes result.json, the sign that the run is complete."""
    trained = train(experiment, workdir, Console(file=io.StringIO()), init_from=trunk)
    if trained.stopped_by is not None:
        raise SystemExit(f"Stopped by {trained.stopped_by.name}; the same command goes on.")
    model, tasks, variables = experiment.model, experiment.tasks, trained.state.variables
    with jax.set_mesh(experiment.mesh):
        eval_step = jax.jit(make_eval_step(model, tasks), out_shardings=replicated(experiment.mesh))
        found = evaluate_split(experiment, eval_step, variables, split)
    diagnostics = None
    if split == "test":
        with experiment.data.evaluation(split) as batches:
            diagnostics = diagnose(model, variables, batches, experiment.mesh, tasks)
    result = {
        "made_by": made_by(experiment, trunk),
        "metrics": found.metrics,
        "loss": found.loss,
        "losses": found.losses,
        "parameters": count_parameters(trained.state.params)["total"],
        "images_per_second": trained.images_per_second,
        "diagnostics": diagnostics,
    }
    Results("compare", workdir / "result.json").write(without_nan(result))


if __name__ == "__main__":
    sys.exit(main())
