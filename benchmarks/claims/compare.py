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
validation split: the same budget for all; --either kem,kem_plain keeps of these the one of the lowest such loss. With
--trunk the runs go on from another comparison's trunk, whose tasks may be more; with --trunk_steps=0 there is none, and
every run starts from random parameters. With --labelled depth=0.05 a share of the training images alone has labels
of a task; the trunk's have all of theirs. With --distractors=10 as many tasks of noise are trained beside the others,
which alone are scored. With --blind depth the features of that task tell where they lie and nothing of the image: what
it knows comes by exchange. Killed and run again, it goes on with the first run that is missing.
Started several times at once, the processes share the runs (on a GPU with XLA_PYTHON_CLIENT_PREALLOCATE=false).
"""

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.progress import Progress

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, where this runs as a script

from benchmarks.claims.comparison import markdown, page, single_task_models, summarise
from benchmarks.claims.few_labels import read_shares
from benchmarks.claims.runs import (
    RATE,
    Busy,
    Method,
    Runs,
    begin,
    claim,
    done,
    equal_mlp_width,
    measured_on,
    read_result,
    run,
    shared,
    with_option,
    without_repeats,
)
from benchmarks.measure import Results
from sgw_jax.data_pipelines.atomic import write_atomically
from sgw_jax.run.logs import without_nan

TASKS = ("semseg", "depth", "normals", "edges", "saliency", "human_parts")
UNWEIGHTED = {f"task_weights.{task}": "1" for task in TASKS}
BY_REPRESENTATION = {**UNWEIGHTED, "gradients": "representation"}
KEM_PLAIN = {"interactions.kem.task_gate": "false"}
SKEM_PLAIN = {"interactions.skem.task_gate": "false"}
# Gather from each task, exchange among the slots, read each task's slots through gates of their own.
BY_TASK = KEM_PLAIN | {"interactions.kem.balanced": "true"}
BY_PAIR = BY_TASK | {"interactions.kem.pair_gate": "true"}
EXCHANGE = {"interactions.kem.slot_exchange": "true"}
WITHIN_PLAIN = {"interactions.within_tasks.task_gate": "false"}

# What is compared: the interaction, and options over the configuration's; "widened" gets its MLP in `main`. The
# objectives have no interaction and start from weights of 1: "none" is the sum with the configuration's tuned weights.
METHODS: dict[str, Method] = {
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
    "kem_balanced": ("kem", {"interactions.kem.balanced": "true"}),
    "kem_exchange": ("kem", EXCHANGE),
    "kem_pairs": ("kem", BY_PAIR),
    "kem_pairs_exchange": ("kem", BY_PAIR | EXCHANGE),
    "skem_vertices8": ("skem", SKEM_PLAIN | {"interactions.skem.etf_vertices": "8"}),
    "skem_selection": ("skem", SKEM_PLAIN | {"interactions.skem.etf_for": "selection"}),
}
INTERACTIONS = ("none", "widened", "within_tasks", "cross_attention", "shared_workspace", "kem", "kem_sharp", "skem")


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what is missing, then writes compare.json and compare.html and prints the summary."""
    return shared(lambda: attempt(argv))


def attempt(argv: Sequence[str] | None = None) -> int:
    """`main`, but for waiting for other processes.

    Raises:
      Busy: they are making what is left.
    """
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
    parser.add_argument(
        "--either", action="append", default=[], metavar="A,B", help="of these the best by --tune alone"
    )
    parser.add_argument("--labelled", nargs="+", default=[], metavar="TASK=SHARE", help="of the training images")
    parser.add_argument("--distractors", type=int, default=0, help="tasks of noise beside the configuration's")
    parser.add_argument("--blind", default="", metavar="TASK", help="a task whose features are positions alone")
    parser.add_argument("--results", type=Path, help="where the numbers go too, for the page of results")
    parser.add_argument("--cache_dir", type=Path, default=Path.home() / ".cache" / "sgw_jax")
    arguments, overrides = parser.parse_known_args(argv)
    groups = [tuple(group.split(",")) for group in arguments.either]
    if unknown := {name for group in groups for name in group} - set(arguments.methods):
        parser.error(f"--either: {', '.join(sorted(unknown))}: none of --methods.")
    if groups and not arguments.tune:
        parser.error("--either: what chooses is the loss on the validation split; give --tune its learning rates.")
    if arguments.distractors and not arguments.no_singles:
        parser.error("--distractors: there are no single-task models to compare with; add --no_singles.")
    console = begin(arguments.cache_dir)

    runs = Runs(arguments.config, overrides, arguments.steps, arguments.out, arguments.cache_dir)
    tasks = runs.build(("none", {}), seed=0).tasks
    trunk = arguments.trunk or (arguments.out / "trunk" if arguments.trunk_steps else None)
    if trunk is None:
        pass
    elif arguments.trunk is None:
        experiment = runs.build(("none", {}), seed=1000, steps=arguments.trunk_steps)
        with claim(trunk):
            if not done(experiment, trunk, None):
                console.print(f"The trunk: {arguments.trunk_steps} steps without interaction.")
                run(experiment, trunk, None)
    elif not (trunk / "result.json").exists():
        raise SystemExit(f"--trunk: {trunk} is no trunk of a comparison: it has no result.json.")
    trunk_steps = 0 if trunk is None else read_result(trunk)["made_by"]["steps"]
    runs = dataclasses.replace(runs, trunk=trunk, labelled=read_shares(arguments.labelled))
    runs = dataclasses.replace(runs, distractors=arguments.distractors, blind=arguments.blind)
    cases: dict[str, Method] = {name: METHODS[name] for name in arguments.methods}
    if "widened" in cases:
        width = equal_mlp_width(runs.build(("kem", {}), seed=0))
        cases["widened"] = ("none", {"interactions.none.mlp_width": str(width)})
    if not arguments.no_singles:
        cases |= single_task_models(tasks)
    with Progress(console=console) as progress:
        bar = progress.add_task("runs", total=len(cases) * (arguments.seeds + len(arguments.tune)))

        def begun(what: str) -> None:
            progress.update(bar, description=what)

        rates = {}
        for name in cases if arguments.tune else ():
            rates[name] = runs.tune(name, cases[name], arguments.tune, begun)
            progress.advance(bar, len(arguments.tune))
        if not all(rates.values()):
            raise Busy
        cases = {
            name: with_option(case, RATE, rates[name]["chosen"]) if rates else case for name, case in cases.items()
        }
        losses = {name: min(rate["validation_loss"].values()) for name, rate in rates.items()}
        for group in groups:
            best = min(group, key=losses.__getitem__)
            cases = {name: method for name, method in cases.items() if name == best or name not in group}
        complete = True
        for seed in range(arguments.seeds):  # whole seeds, one after another
            for name, method in cases.items():
                complete &= runs.make(name, method, seed, begun)
                progress.advance(bar)
        if not complete:
            raise Busy

    found = runs.results(list(cases), arguments.seeds)
    summary = summarise(found, tasks) | {
        "config": arguments.config,
        "overrides": overrides,
        "steps": arguments.steps,
        "trunk_steps": trunk_steps,
        "labelled": dict(runs.labelled),
        "distractors": runs.distractors,
        "blind": runs.blind,
        "seeds": arguments.seeds,
        "rates": rates,
        "either": groups,
        "environment": measured_on(found),
    }
    for path in (arguments.out / "compare.json", arguments.results):
        if path is not None:
            Results("compare", path, **summary["environment"]).write(
                without_nan({**summary, "runs": without_repeats(found)})
            )
    write_atomically(arguments.out / "compare.html", page(summary), contended=True)
    console.print(markdown(summary), soft_wrap=True)
    console.print(f"\n{arguments.out / 'compare.html'}   {arguments.out / 'compare.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
