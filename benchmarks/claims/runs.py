"""The runs of a comparison: each is built, trained, evaluated and kept once; what is there is not made again.

Several processes that are given the same command share its runs: each takes the next that is neither complete nor
taken. On an accelerator, which one small network does not fill, as many as there are cores are faster than one.
"""

import contextlib
import dataclasses
import io
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from absl import logging
from rich.console import Console

from benchmarks.claims.blind import with_blind_task
from benchmarks.claims.distractors import distractors, with_distractors
from benchmarks.claims.few_labels import with_few_labels
from benchmarks.measure import Results
from sgw_jax.configs import base
from sgw_jax.data_pipelines.atomic import alone
from sgw_jax.evaluation.diagnostics import diagnose
from sgw_jax.experiment.build import build
from sgw_jax.experiment.config_files import read_config
from sgw_jax.experiment.experiment import Experiment
from sgw_jax.experiment.tasks import build_tasks
from sgw_jax.host import keep_freed_memory, sound_fusions
from sgw_jax.report.results import count_parameters
from sgw_jax.run.logs import without_nan
from sgw_jax.run.saved_run import open_run
from sgw_jax.run.steps import compiled_eval_step, evaluate_split
from sgw_jax.train import train

Method = tuple[str, Mapping[str, str]]  # the interaction, and options over the configuration's

RATE = "optimizer.learning_rate"
TUNING_SEED = 500  # none of those that are compared
PATIENCE = 10.0  # seconds, between looks at what other processes are making: a look costs about one

T = TypeVar("T")

_complete: set[Path] = set()  # folders of runs that this process has found complete


class Busy(Exception):
    """Other processes are making what is needed next."""


def shared(attempt: Callable[[], T]) -> T:
    """What the call returns, once no other process is making what it needs."""
    while True:
        try:
            return attempt()
        except Busy:
            time.sleep(PATIENCE)


def begin(cache_dir: Path) -> Console:
    """What a script of comparisons does before its first run: programs are kept, and routine words are not said."""
    jax.config.update("jax_compilation_cache_dir", str(cache_dir / "xla"))
    logging.set_verbosity(logging.ERROR)  # Orbax reports every routine save as a warning
    keep_freed_memory()
    sound_fusions()
    return Console()


@dataclasses.dataclass(frozen=True)
class Runs:
    """What the runs of a comparison have in common, and where they lie.

    config, overrides: of `read_config`. steps: of each run. trunk: a run that each goes on from; None: each starts as
    the configuration says. labelled: task -> share of the training images that have its labels. distractors: tasks of
    noise beside the configuration's. blind: a task that sees nothing of the image; "" for none. A run is complete when
    its folder has a result.json, which is written last.
    """

    config: str
    overrides: Sequence[str]
    steps: int
    out: Path
    cache_dir: Path
    trunk: Path | None = None
    labelled: Mapping[str, float] = dataclasses.field(default_factory=dict)
    distractors: int = 0
    blind: str = ""

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
        experiment = with_distractors(experiment, others) if others else experiment
        return with_blind_task(experiment, self.blind) if self.blind else experiment

    def tune(
        self, name: str, method: Method, values: Sequence[str], begun: Callable[[str], None], key: str = RATE
    ) -> dict[str, Any]:
        """Tries values of a key with a seed of its own, and chooses that of the lowest loss on the validation split:
        {"chosen": value, "validation_loss": {value: loss}, "validation": {task: {metric: value}} of the chosen};
        nothing where another process is still at one of them."""
        folders = {value: self.out / "tuning" / name / value for value in values}
        methods = {value: with_option(method, key, value) for value in values}
        complete = [
            self._made(
                folder,
                lambda value=value: self.build(methods[value], TUNING_SEED, tuning=True),
                "validation",
                lambda value=value: begun(f"{name}, {key}={value}"),
            )
            for value, folder in folders.items()
        ]
        if not all(complete):
            return {}
        found = {value: read_result(folder) for value, folder in folders.items()}
        losses = {value: result["loss"] for value, result in found.items()}
        chosen = min(losses, key=losses.__getitem__)
        return {"chosen": chosen, "validation_loss": losses, "validation": found[chosen]["metrics"]}

    def make(self, name: str, method: Method, seed: int, begun: Callable[[str], None]) -> bool:
        """The method's run of the seed, scored on the test split; False where another process is at it."""
        build = lambda: self.build(method, seed)  # noqa: E731
        return self._made(self.folder(name, seed), build, "test", lambda: begun(f"{name}, seed {seed}"))

    def _made(self, folder: Path, build: Callable[[], Experiment], split: str, begun: Callable[[], None]) -> bool:
        if folder in _complete:
            return True
        try:
            with claim(folder):
                experiment = build()
                if not done(experiment, folder, self.trunk):
                    begun()
                    run(experiment, folder, self.trunk, split)
        except Busy:
            return False
        _complete.add(folder)
        return True

    def folder(self, name: str, seed: int) -> Path:
        """Where a run lies."""
        return self.out / name / f"seed{seed}"

    def results(self, names: Sequence[str], seeds: int) -> dict[str, list[dict[str, Any]]]:
        """The results of the methods' first seeds, all of them complete."""
        return {name: [read_result(self.folder(name, seed)) for seed in range(seeds)] for name in names}


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """The run in this folder is left to this process, until it leaves or ends, however it ends.

    Raises:
      Busy: another has it.
    """

    def busy() -> None:
        raise Busy

    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder.parent / f"{folder.name}.claim", busy):
        yield


def measured_on(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """The environment of the runs, which need not be that of the process that sums them up; what differs is a list."""
    environments = [result["environment"] for results in found.values() for result in results]
    values = {key: list(dict.fromkeys(one.get(key) for one in environments)) for key in environments[0]}
    return {key: value[0] if len(value) == 1 else value for key, value in values.items()}


def with_option(method: Method, key: str, value: str) -> Method:
    """The method with a value of a key of the configuration."""
    return method[0], {**method[1], key: value}


def equal_mlp_width(kem: Experiment) -> int:
    """The hidden width at which no interaction with an MLP has as many parameters as this KEM, to half a unit."""
    image = jax.ShapeDtypeStruct((1, *kem.size, 3), jnp.float32)
    params = jax.eval_shape(kem.model.init, jax.random.key(0), image)["params"]
    count = sum(leaf.size for leaf in jax.tree.leaves(params["interaction"]))
    channels = kem.config.channels
    # Layer norm 2 c, kernels 2 c h, biases h + c.
    return round((count - 3 * channels) / (2 * channels + 1))


def made_by(experiment: Experiment, trunk: Path | None) -> dict[str, Any]:
    """What a result depends on: its configuration and its trunk's, wherever that lies. From a cache of a frozen
    backbone's taps or without one a run is the same but for rounding, so that a machine may do without."""
    data = experiment.data.sources["train"].fingerprint()
    changes = {name: data[name] for name in ("few_labels", "distractors") if name in data}
    configuration = json.loads(experiment.config.to_json_best_effort())
    configuration.pop("backbone_cache")
    blind = getattr(experiment.model, "blind", "")
    changes |= {"blind": blind} if blind else {}
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
    defaults = json.loads(base.get_config().to_json_best_effort())
    old, new = filled(read_result(workdir).get("made_by", {}), defaults), made_by(experiment, trunk)
    other = [key for key in new if old.get(key) != new[key]]
    if other:
        raise SystemExit(
            f"{path} was made with another {', '.join(other)}: give another --out, or delete {workdir} to run it anew."
        )
    return True


def filled(old: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """An earlier version's configuration: a key that it did not know has its default, what it knew keeps its value."""
    inner = {
        key: filled(old[key], value)
        for key, value in defaults.items()
        if isinstance(old.get(key), dict) and isinstance(value, dict)
    }
    return {**defaults, **old, **inner}


def run(experiment: Experiment, workdir: Path, trunk: Path | None, split: str = "test") -> None:
    """Trains, evaluates on a split and writes result.json, the sign that the run is complete."""
    trained = train(experiment, workdir, Console(file=io.StringIO()), init_from=trunk)
    if trained.stopped_by is not None:
        raise SystemExit(f"Stopped by {trained.stopped_by.name}; the same command goes on.")
    model, tasks, variables = experiment.model, experiment.tasks, trained.state.variables
    with jax.set_mesh(experiment.mesh):
        found = evaluate_split(experiment, compiled_eval_step(experiment), trained.state, split)
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


def trained_network(folder: Path, cache_dir: Path) -> tuple[Experiment, Any]:
    """A complete run's experiment, and the variables that it is evaluated by."""
    with open_run(folder, "last") as run:
        experiment = build(run.config, cache_dir, run.tasks)
        return experiment, run.variables(experiment.model)
