"""The runs of a comparison: each is built, trained, evaluated and kept once; what is there is not made again."""

import dataclasses
import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from rich.console import Console

from benchmarks.claims.distractors import distractors, with_distractors
from benchmarks.claims.few_labels import with_few_labels
from benchmarks.measure import Results
from sgw_jax.evaluation.diagnostics import diagnose
from sgw_jax.experiment.build import build
from sgw_jax.experiment.config_files import read_config
from sgw_jax.experiment.experiment import Experiment
from sgw_jax.experiment.tasks import build_tasks
from sgw_jax.host import keep_freed_memory
from sgw_jax.report.results import count_parameters
from sgw_jax.run.logs import without_nan
from sgw_jax.run.steps import compiled_eval_step, evaluate_split
from sgw_jax.train import train

Method = tuple[str, Mapping[str, str]]  # the interaction, and options over the configuration's

TUNING_SEED = 500  # none of those that are compared


def begin(cache_dir: Path) -> Console:
    """What a script of comparisons does before its first run: programs are kept, and routine words are not said."""
    jax.config.update("jax_compilation_cache_dir", str(cache_dir / "xla"))
    logging.set_verbosity(logging.ERROR)  # Orbax reports every routine save as a warning
    keep_freed_memory()
    return Console()


@dataclasses.dataclass(frozen=True)
class Runs:
    """What the runs of a comparison have in common, and where they lie.

    config, overrides: of `read_config`. steps: of each run. trunk: a run that each goes on from; None: each starts as
    the configuration says. labelled: task -> share of the training images that have its labels. distractors: tasks of
    noise beside the configuration's. A run is complete when its folder has a result.json, which is written last.
    """

    config: str
    overrides: Sequence[str]
    steps: int
    out: Path
    cache_dir: Path
    trunk: Path | None = None
    labelled: Mapping[str, float] = dataclasses.field(default_factory=dict)
    distractors: int = 0

    def build(self, method: Method, seed: int, steps: int | None = None, tuning: bool = False) -> Experiment:
        """The experiment of one run: the user's configuration, the method's options, no evaluation on the way, and of
        scenes only with ``tuning`` a validation split."""
        (interaction, options), steps = method, steps or self.steps
        keys = {"interaction": interaction, "seed": seed, "steps": steps, "checkpoint_every": steps}
        keys |= {"eval_every": steps, "keep": 1, **({} if tuning else {"data.lengths.validation": 0}), **options}
        given = [f"--config.{key}={value}" for key, value in keys.items()]
        config, others = read_config(self.config, [*self.overrides, *given]), distractors(self.distractors)
        experiment = build(config, self.cache_dir, (*build_tasks(config), *others))
        for source in experiment.data.each_source().values():
            prepare = getattr(source, "prepare", None)
            if prepare is not None:  # rendered once, read from then on
                prepare()
        experiment = with_few_labels(experiment, self.labelled) if self.labelled else experiment
        return with_distractors(experiment, others) if others else experiment

    def tune(self, name: str, method: Method, rates: Sequence[str], begun: Callable[[str], None]) -> dict[str, Any]:
        """Tries the learning rates with a seed of its own, and chooses that of the lowest loss on the validation split:
        {"chosen": rate, "validation_loss": {rate: loss}, "validation": {task: {metric: value}} of the chosen}."""
        found = {}
        for rate in rates:
            begun(f"{name}, learning rate {rate}")
            workdir = self.out / "tuning" / name / rate
            experiment = self.build(with_rate(method, rate), TUNING_SEED, tuning=True)
            if not done(experiment, workdir, self.trunk):
                run(experiment, workdir, self.trunk, "validation")
            found[rate] = read_result(workdir)
        losses = {rate: result["loss"] for rate, result in found.items()}
        chosen = min(losses, key=losses.__getitem__)
        return {"chosen": chosen, "validation_loss": losses, "validation": found[chosen]["metrics"]}

    def make(self, name: str, method: Method, seed: int) -> None:
        """The method's run of the seed, scored on the test split."""
        experiment = self.build(method, seed)
        if not done(experiment, self.folder(name, seed), self.trunk):
            run(experiment, self.folder(name, seed), self.trunk)

    def folder(self, name: str, seed: int) -> Path:
        """Where a run lies."""
        return self.out / name / f"seed{seed}"

    def results(self, names: Sequence[str], seeds: int) -> dict[str, list[dict[str, Any]]]:
        """The results of the methods' first seeds, all of them complete."""
        return {name: [read_result(self.folder(name, seed)) for seed in range(seeds)] for name in names}


def with_rate(method: Method, rate: str) -> Method:
    """The method at a learning rate."""
    return method[0], {**method[1], "optimizer.learning_rate": rate}


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
    data = experiment.data.sources["train"].fingerprint()
    changes = {name: data[name] for name in ("few_labels", "distractors") if name in data}
    configuration = json.loads(experiment.config.to_json_best_effort())
    return {**configuration, **changes, "trunk": trunk and read_result(trunk)["made_by"]}


def without_repeats(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """Results without what is the same for all runs."""
    once = ("made_by", "environment")
    return {name: [{k: v for k, v in r.items() if k not in once} for r in results] for name, results in found.items()}


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
        found = evaluate_split(experiment, compiled_eval_step(experiment), variables, split)
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
    jax.clear_caches()  # a hundred runs' programs would fill the memory; the next of this network reads them from disk
