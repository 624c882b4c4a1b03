"""Interactions side by side on real photographs, from real pretrained weights: is anything gained over single tasks?

    python benchmarks/claims/real.py --weights=DIR --photographs=../shared/data --out=runs/real [--results=FILE]
    python benchmarks/claims/real.py --weights=DIR --tuned=lora [--lora_scale=1]
    python benchmarks/claims/real.py --weights=DIR --data=people+mixed
    python benchmarks/claims/real.py --weights=DIR --pictures=DIR2

Weights are a hub folder of DINOv2 ViT-S/14, photographs a folder with people/ and mixed/ in the layout of
docs/your-data.md. Killed at any time and run again, it goes on with the first run that is missing.

Plan, made before the first run. A run is 240 steps of 8 images of 224 x 112, 2.7 passes over the 700 photographs of
people; frozen, from cached taps of the backbone, about two minutes on two cores; with LoRA of rank 8, in bfloat16,
about five by an estimate from 24 steps, where the cores have AMX and jax is 0.12 or newer.
Networks: one for each task; all tasks without interaction; a token-wise MLP of as many parameters as KEM;
cross-attention; the shared workspace; KEM and sKEM as in the paper and with task gates; a KEM within each task; and
Nash-MTL on the interaction that is best on validation. LoRA and people+mixed have fewer of them; people+mixed is all
six tasks, with the streets' classes as a seventh head, at 224 x 224, about five minutes a run.

- Tuning, the same for all: each of two learning rates once, with a seed of its own; the lower loss on validation wins.
  The best interaction is that of the largest delta_m over the single-task networks, on validation, in these runs.
- Then five seeds (LoRA and people+mixed: three), one after another over all networks, so that an interrupted comparison
  holds whole seeds. The test split is read once a run, after its last step, by the average of the parameters.
- Frozen: 14 networks x (2 + 5) runs x 2 minutes, 3 h 20 min; LoRA: 9 x (2 + 3) x 5 minutes, 3 h 45 min;
  people+mixed: 12 x (2 + 3) x 5 minutes, 5 h.
- It stops after the last seed, whatever has come out: no seeds are added, no network is tuned again. If time is short,
  the last seeds are left out for all networks, and the page says how many there are.
- Changed when frozen had been run, before the first run of LoRA and of people+mixed, for which there was an hour each:
  they have no tuning, as all 14 frozen networks had chosen the same of the two rates, which is theirs, and no Nash-MTL,
  so 8 and 11 networks.
- Changed when LoRA had two seeds, of which the test scores were seen: with the factors at the rate of the new heads the
  gradient's norm jumps tenfold in the first steps, with jax 0.10 and 0.12 on CPUs, and two networks of one task never
  recover, so that seeds compare accidents (--lora_scale=1). Their rate, 1 or a tenth of the rest's, is chosen by none's
  loss on validation with the tuning's seed, the same for all networks; then seeds from the first on.
- As it was made: people+mixed and LoRA have three seeds, both together one, at the rate of the heads LoRA has two. Of
  the first seeds of people+mixed, frozen, and of lora_scale=1 thirteen runs are of an H100, those of lora_scale=1 but
  for saliency and edges alone, and all networks of one task of people+mixed; their checkpoints did not come along. On
  two cores a run of LoRA or of people+mixed took 2 to 60 minutes, two side by side, as the machine was.

Of the first seed's networks there are also ODS and OIS of edges on the BSDS500 images of mixed/, and max-F of saliency
on its ECSSD images. Those of people alone were not trained for these: there edges are the borders of clothing. Nothing
is chosen by them. A network of one task sees the images with labels of it alone, and so more of them in people+mixed.
No photograph may enter the repository: --pictures draws the first seed's predictions elsewhere.
"""

import argparse
import dataclasses
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, where this runs as a script

from benchmarks.claims import elsewhere, seeds
from benchmarks.claims.compare import BY_REPRESENTATION, METHODS
from benchmarks.claims.comparison import SINGLE, markdown, single_task_models, summarise
from benchmarks.claims.photographs import MIXED, PEOPLE, view
from benchmarks.claims.runs import (
    RATE,
    Busy,
    Method,
    Runs,
    begin,
    equal_mlp_width,
    measured_on,
    shared,
    trained_network,
    with_option,
    without_repeats,
)
from benchmarks.measure import Results
from sgw_jax.data_pipelines.atomic import replacing
from sgw_jax.evaluation.examples import collect_examples
from sgw_jax.evaluation.metrics import delta_m
from sgw_jax.pictures.gallery import gallery
from sgw_jax.run.logs import without_nan
from sgw_jax.tasks.base import Task

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Path(__file__).with_name("photographs.py")
STEPS = 240
RATES = ("1e-3", "3e-3")
EXCHANGES = ("cross_attention", "shared_workspace", "kem_plain", "skem_plain", "kem", "skem", "within_plain")
FEWER = ("none", "cross_attention", "kem_plain", "kem")
UNTUNED = "3e-3"  # what every frozen network chose
LORA_SCALE, LORA_SCALES = "optimizer.lora_scale", ("1", "0.1")
SETTINGS = {  # data, what of the backbone learns: methods, seeds, learning rates
    ("people", "frozen"): (("none", "widened", *EXCHANGES), 5, RATES),
    ("people", "lora"): (FEWER, 3, (UNTUNED,)),
    ("people+mixed", "frozen"): (FEWER, 3, (UNTUNED,)),
    ("people+mixed", "lora"): (FEWER, 3, (UNTUNED,)),
}
NASH = "nash_mtl"

SHOWN = 4  # photographs in a picture


def main(argv: Sequence[str] | None = None) -> int:
    """Trains what is missing, writes the results after every seed and prints the tables."""
    return shared(lambda: attempt(argv))


def attempt(argv: Sequence[str] | None = None) -> int:
    """`main`, but for waiting for other processes.

    Raises:
      Busy: they are making what is left.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True, help="a hub folder of DINOv2 ViT-S/14")
    parser.add_argument("--photographs", type=Path, default=ROOT.parent / "shared" / "data")
    parser.add_argument("--data", choices=("people", "people+mixed"), default="people")
    parser.add_argument("--tuned", choices=("frozen", "lora"), default="frozen", help="what of the backbone learns")
    parser.add_argument("--lora_scale", help="LoRA's rate relative to the rest's, untuned")
    parser.add_argument("--out", type=Path, default=Path("runs/real"))
    parser.add_argument("--seeds", type=int, help="fewer than planned")
    parser.add_argument("--results", type=Path, help="where the numbers go too, for the page of results")
    parser.add_argument("--no_taps", action="store_true", help="no cache of the frozen backbone's: for accelerators")
    parser.add_argument("--pictures", type=Path, help="draw the first seed's predictions there; trains nothing")
    parser.add_argument("--cache_dir", type=Path, default=Path.home() / ".cache" / "sgw_jax")
    arguments, overrides = parser.parse_known_args(argv)
    if arguments.lora_scale is not None and arguments.tuned != "lora":
        parser.error("--lora_scale is a rate of LoRA's factors: give --tuned=lora with it.")
    console = begin(arguments.cache_dir)

    photographs, out = arguments.photographs.resolve(), arguments.out.resolve()
    methods, planned, tried = SETTINGS[arguments.data, arguments.tuned]
    views = {start: view(photographs / "mixed", tasks, start, out) for start, tasks in MIXED.items()}
    config = f"{CONFIG}:root={photographs},tuned={arguments.tuned}"
    given = [f"--config.backbone_weights={arguments.weights.resolve()}"]
    if arguments.data != "people":
        config += f",views={out / 'views'}"
    elif arguments.tuned == "frozen" and not arguments.no_taps:
        given.append(f"--config.backbone_cache={out / 'taps'}")
    tuned = arguments.tuned + ("" if arguments.lora_scale is None else f"_scale={arguments.lora_scale}")
    setting = f"{arguments.data}, {tuned}"
    folder = out / (tuned if arguments.data == "people" else f"mixed_{tuned}")
    runs = Runs(config, (*given, *overrides), STEPS, folder, arguments.cache_dir)
    tasks = runs.build(("none", {}), seed=0).tasks
    cases: dict[str, Method] = {name: METHODS[name] for name in methods}
    if "widened" in cases:
        width = equal_mlp_width(runs.build(METHODS["kem_plain"], seed=0))
        cases["widened"] = ("none", {"interactions.none.mlp_width": str(width)})
    cases |= single_task_models(tasks)
    mixed = arguments.data != "people" and arguments.tuned == "frozen" and not arguments.no_taps
    mixed_taps = out / "taps_mixed" if mixed else None
    made = {name: of_case(runs, name, mixed_taps) for name in (*cases, NASH)}
    if arguments.pictures:
        draw(made, arguments.pictures, console)
        return 0

    clock = Clock(console)
    scale = None
    if arguments.tuned == "lora":
        none = with_option(cases["none"], RATE, UNTUNED)
        scale = {"chosen": arguments.lora_scale}
        if arguments.lora_scale is None:
            scale = runs.tune("none", none, LORA_SCALES, clock.begun, LORA_SCALE)
        if not scale:
            raise Busy
        cases = {name: with_option(method, LORA_SCALE, scale["chosen"]) for name, method in cases.items()}
    best, rates = None, {name: {"chosen": tried[0]} for name in cases}
    if len(tried) > 1:
        rates = {name: made[name].tune(name, method, tried, clock.begun) for name, method in cases.items()}
        if not all(rates.values()):
            raise Busy
        best = best_exchange(rates, tasks)
        interaction, options = cases[best]
        cases[NASH] = (interaction, {**options, **BY_REPRESENTATION, "objective": NASH})
        rates[NASH] = runs.tune(NASH, cases[NASH], tried, clock.begun)
        if not rates[NASH]:
            raise Busy
    chosen = {name: with_option(method, RATE, rates[name]["chosen"]) for name, method in cases.items()}
    forget_checkpoints(runs.out / "tuning")

    complete = True
    for seed in range(planned if arguments.seeds is None else arguments.seeds):
        for name, method in chosen.items():
            complete &= made[name].make(name, method, seed, clock.begun)
            if seed:  # the first seed's are kept: for pictures, and for what they find elsewhere
                forget_checkpoints(runs.folder(name, seed))
        if not complete:  # other processes are at runs of this seed: on with the next
            continue
        found = runs.results(list(chosen), seed + 1)
        summary = summarise(found, tasks) | {
            "steps": STEPS,
            "seeds": seed + 1,
            "rates": rates,
            "best": best,
            "lora_scale": scale,
            "runs": without_repeats(found),
            "environment": measured_on(found),
        }
        keep(summary, setting, arguments)
    if not complete:
        raise Busy
    for name in chosen:
        scored = elsewhere.scores(made[name], name, views)
        complete &= scored is not None
        summary["elsewhere"] = summary.get("elsewhere", {}) | {name: scored}
    if not complete:
        raise Busy
    keep(summary, setting, arguments)
    clock.begun("done")
    console.print(markdown(summary), elsewhere.table(summary), sep="\n\n", soft_wrap=True)
    return 0


def of_case(runs: Runs, name: str, mixed_taps: Path | None = None) -> Runs:
    """The runs of a network of one task read the images with labels of it alone; of a mixture these are others, whose
    taps have a folder of their own."""
    task = name.removeprefix(SINGLE)
    config = runs.config if task == name else f"{runs.config},tasks={task}"
    folder = None if mixed_taps is None else mixed_taps / ("all" if task == name else task)
    taps = () if folder is None else (f"--config.backbone_cache={folder}",)
    return dataclasses.replace(runs, config=config, overrides=(*runs.overrides, *taps))


def keep(summary: Mapping[str, Any], setting: str, arguments: argparse.Namespace) -> None:
    """Writes the setting's summary beside those of the others."""
    for path in (arguments.out / "real.json", arguments.results):
        if path is not None:
            Results("real", path, **summary["environment"]).label(setting, without_nan(summary))


class Clock:
    """Says which run begins, and how long the one before it took."""

    def __init__(self, console: Console) -> None:
        self._console, self._before, self._since = console, "", time.monotonic()

    def begun(self, what: str) -> None:
        """A run begins."""
        now = time.monotonic()
        if self._before:
            self._console.print(f"{self._before}: {now - self._since:.0f} s", soft_wrap=True, highlight=False)
        self._before, self._since = what, now


def best_exchange(rates: Mapping[str, Any], tasks: Sequence[Task]) -> str:
    """The interaction of the largest delta_m over the single-task networks, on validation with the tuning's seed."""
    singles = {task.name: rates[SINGLE + task.name]["validation"][task.name] for task in tasks}
    gains = {name: delta_m(rates[name]["validation"], singles, tasks) for name in EXCHANGES if name in rates}
    return max(gains, key=gains.__getitem__)


def forget_checkpoints(folder: Path) -> None:
    """Removes the checkpoints of all complete runs below a folder: they hold the whole backbone."""
    for result in folder.rglob("result.json"):
        shutil.rmtree(result.parent / "checkpoints", ignore_errors=True)


def by_task(summary: Mapping[str, Any]) -> str:
    """Markdown: each task's relative gain over its single-task network in %, by pairs of the same seed."""
    names = [task["name"] for task in summary["tasks"]]
    runs = {name: found for name, found in summary["runs"].items() if not name.startswith(SINGLE)}
    alone = [
        {"metrics": {name: summary["runs"][SINGLE + name][seed]["metrics"][name] for name in names}}
        for seed in range(summary["seeds"])
    ]
    views = "" if set(names) <= set(PEOPLE) else ",views=DIR"  # tasks of mixed/ are those of its sources
    return seeds.by_task({"single": alone, **runs}, f"{CONFIG}:tasks={'+'.join(names)}{views}")


def draw(made: Mapping[str, Runs], folder: Path, console: Console) -> None:
    """Predictions above truth on the first photographs of test, a picture for each network of the first seed."""
    if folder.resolve().is_relative_to(ROOT):
        raise SystemExit(
            f"--pictures={folder} lies in the repository, which may hold no photograph: give another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, runs in made.items():
        if not (runs.folder(name, 0) / "result.json").exists():
            console.print(f"{name}: its first run is not complete; no picture.")
            continue
        experiment, variables = trained_network(runs.folder(name, 0), runs.cache_dir)
        with experiment.data.evaluation("test", "network") as batches:
            batch = next(iter(batches))
        found = collect_examples(experiment.model, variables, batch, experiment.mesh, experiment.tasks, SHOWN)
        with replacing(folder / f"{name}.png") as temporary:
            gallery(found, SHOWN).save(temporary, "PNG")
        console.print(str(folder / f"{name}.png"), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
