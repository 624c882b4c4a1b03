"""A run that is killed, interrupted or refused: what goes on does so bit by bit, and nothing bad is ever saved."""

import contextlib
import dataclasses
import io
import json
import os
import signal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from sgw_jax import train as train_module
from sgw_jax.configs import base
from sgw_jax.data_pipelines.errors import FileError
from sgw_jax.data_pipelines.loader import Stream
from sgw_jax.evaluation.evaluate import Evaluation
from sgw_jax.experiment.build import build
from sgw_jax.layers.drop_path import DropPath
from sgw_jax.optimizers import learning_rates
from sgw_jax.run.checkpoints import CheckpointError, Checkpoints
from sgw_jax.run.finite import NonFiniteError, check_finite, check_finite_losses
from sgw_jax.run.logs import read_metrics
from sgw_jax.run.state import abstract_state, first_state, new_state, restored_state
from sgw_jax.run.steps import compiled_eval_step, compiled_steps, evaluate_split
from sgw_jax.run.warm_start import run_start
from sgw_jax.run.workdir import WorkdirError, claim_workdir
from sgw_jax.sharding import make_mesh, mesh_sizes
from sgw_jax.tasks import Depth
from sgw_jax.train import check_start, train

STEPS = 7  # no multiple of the evaluations' interval: the last step is evaluated too
SIZE = (32, 32)  # of an image that the configured backbone takes too
DEPTH = (Depth(),)


class Killed(BaseException):
    """Stands for the end of the process."""


@dataclasses.dataclass(frozen=True)
class Noise:
    """Random images with random depth; `poisoned` items have labels that are not a number."""

    length: int
    seed: int
    poisoned: tuple[int, ...] = ()

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        rng = np.random.default_rng((self.seed, index))
        depth = rng.uniform(1, 4, SIZE).astype(np.float32)
        return {
            "image": rng.integers(0, 256, (*SIZE, 3), dtype=np.uint8),
            "depth": np.full_like(depth, np.nan) if index in self.poisoned else depth,
        }

    def fingerprint(self):
        return {"name": "noise", "length": self.length, "seed": self.seed}


@dataclasses.dataclass(frozen=True)
class Trusting(Depth):
    """Takes every label for valid."""

    def valid(self, target):
        return jnp.ones(target.shape[:3], bool)


class Tiny(nn.Module):
    """Stands for a network: parameters, a constant, and drop path; test_interruptions.py has the real one."""

    width: int = 4

    @nn.compact
    def __call__(self, image, train=False):
        scale = self.variable("constants", "scale", lambda: jnp.full((), 1.5)).value
        features = nn.Conv(self.width, (3, 3), name="body")(image)
        features = nn.relu(DropPath()(features, 0.3, train))
        return {"depth": scale * nn.Conv(1, (1, 1), name="head")(features)}


def experiment(tasks=DEPTH, poisoned=(), train_seed=1, devices=2, model=Tiny(), **changes):  # noqa: B008
    config = base.get_config()
    with config.unlocked():
        config.update(
            {"steps": STEPS, "checkpoint_every": 2, "eval_every": 4, "log_every": 1, "ema_decay": 0.9, "channels": 4}
        )
        config.tasks = ("depth",)
        config.data.update(size=SIZE, threads=1)
        config.data.lengths.test = 0
        config.optimizer.learning_rate = 1e-2
        config.update_from_flattened_dict(changes)
    built = build(config, "unused", tasks)
    sources = {"train": Noise(60, train_seed, poisoned), "validation": Noise(5, 2)}
    data = dataclasses.replace(built.data, sources=sources)
    mesh = make_mesh(mesh_sizes(**config.mesh), jax.devices()[:devices])
    return dataclasses.replace(built, data=data, mesh=mesh, model=model)


def quiet():
    return Console(file=io.StringIO(), width=200)


def interrupting(built, at, action):
    """The experiment with `action()` called when the batch of step `at` (counted from 1) is asked for."""

    class Data(type(built.data)):
        def train(self, start_step, steps):
            return watched(super().train(start_step, steps), start_step)

    @contextlib.contextmanager
    def watched(batches, start):
        def numbered():
            for step, batch in enumerate(batches, start + 1):
                if step == at:
                    action()
                yield batch

        with batches:
            yield numbered()

    fields = {field.name: getattr(built.data, field.name) for field in dataclasses.fields(built.data)}
    return dataclasses.replace(built, data=Data(**fields))


def kill():
    raise Killed


def outcome(built, workdir):
    """All that must not depend on interruptions."""
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    states = {step: restored_state(built, checkpoints, step) for step in {checkpoints.best_step, STEPS}}
    found = {
        "best": checkpoints.best_step,
        "last": checkpoints.latest_step,
        "metrics": (workdir / "metrics.jsonl").read_bytes(),
        "states": {step: [np.array(leaf).tobytes() for leaf in jax.tree.leaves(states[step])] for step in states},
    }
    checkpoints.close()
    return found


@pytest.fixture(scope="module")
def built():
    return experiment()


@pytest.fixture(scope="module")
def finished(built, tmp_path_factory):
    """The working directory of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("finished")
    trained = train(built, workdir, quiet())
    assert (trained.step, trained.stopped_by) == (STEPS, None)
    return workdir


@pytest.fixture(scope="module")
def uninterrupted(built, finished):
    found = outcome(built, finished)
    lines = [json.loads(line) for line in found["metrics"].splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if line["split"] == "validation"] == [4, STEPS]
    assert found["last"] == STEPS
    scores = {line["step"]: line["loss"] for line in lines if line["split"] == "validation"}
    assert found["best"] == min(scores, key=scores.get)
    return found


@pytest.mark.parametrize("kills", [(1,), (2, 3), (4, 5, 5, 7), (6, 7)])
def test_killed_runs_go_on_bit_by_bit(built, uninterrupted, tmp_path, kills):
    for at in kills:
        with pytest.raises(Killed):
            train(interrupting(built, at, kill), tmp_path, quiet())
    assert train(built, tmp_path, quiet()).step == STEPS
    assert outcome(built, tmp_path) == uninterrupted


def test_a_kill_while_metrics_are_written_leaves_no_trace(built, uninterrupted, tmp_path):
    with pytest.raises(Killed):
        train(interrupting(built, 6, kill), tmp_path, quiet())
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "split": "train", "loss": 1.0}\n{"step": 6, "spl')
    (tmp_path / "metrics.jsonl.tmp").write_text('{"step"')
    train(built, tmp_path, quiet())
    assert outcome(built, tmp_path) == uninterrupted
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [1, 3, 4, STEPS])
def test_a_signal_saves_the_step_and_changes_nothing_else(built, uninterrupted, tmp_path, number, at):
    handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    stopped = train(interrupting(built, at, lambda: os.kill(os.getpid(), number)), tmp_path, quiet())
    assert (stopped.step, stopped.stopped_by) == (at, number)
    assert [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)] == handlers
    checkpoints = Checkpoints(tmp_path / "checkpoints", read_only=True)
    assert checkpoints.latest_step == at
    checkpoints.close()
    trained = train(built, tmp_path, quiet())
    assert (trained.step, trained.stopped_by) == (STEPS, None)
    assert outcome(built, tmp_path) == uninterrupted


@pytest.mark.parametrize(("evaluation", "step"), [(1, 4), (2, STEPS)])
def test_a_signal_during_an_evaluation_stops_after_it(built, uninterrupted, tmp_path, monkeypatch, evaluation, step):
    evaluate_split, calls = train_module.evaluate_split, []

    def signalled(*arguments):
        calls.append(arguments)
        if len(calls) == evaluation:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate_split(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "evaluate_split", signalled)
        stopped = train(built, tmp_path, quiet())
    assert (stopped.step, stopped.stopped_by) == (step, signal.SIGTERM)
    train(built, tmp_path, quiet())
    assert outcome(built, tmp_path) == uninterrupted


@pytest.mark.parametrize(("evaluation", "step"), [(1, 4), (2, STEPS)])
@pytest.mark.parametrize("recorded", [False, True])
def test_a_failing_evaluation_loses_nothing(built, uninterrupted, tmp_path, monkeypatch, evaluation, step, recorded):
    """Its checkpoint is there, and the next start evaluates it first: before its line was written, and after."""
    calls = []

    def failing(function):
        def call(*arguments):
            calls.append(arguments)
            if len(calls) == evaluation:
                raise Killed
            return function(*arguments)

        return call

    owner, name = (Checkpoints, "record") if recorded else (train_module, "evaluate_split")
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, failing(getattr(owner, name)))
        with pytest.raises(Killed):
            train(built, tmp_path, quiet())
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert (checkpoints.latest_step, checkpoints.is_scored(step)) == (step, False)
    train(built, tmp_path, quiet())
    assert outcome(built, tmp_path) == uninterrupted


def test_a_second_interrupt_stops_at_once(built, tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(interrupting(built, 4, twice), tmp_path, quiet())
    checkpoints = Checkpoints(tmp_path / "checkpoints", read_only=True)
    assert checkpoints.latest_step == 2  # its save, which was under way, was completed
    checkpoints.close()


def test_a_finished_run_makes_no_step(built, finished, uninterrupted, monkeypatch):
    monkeypatch.setattr(train_module, "global_batch", lambda *_: pytest.fail("a step was made"))
    again = train(built, finished, quiet())
    assert (again.step, again.stopped_by, again.images_per_second) == (STEPS, None, 0.0)
    assert outcome(built, finished) == uninterrupted


# Reading a trace makes a type of jaxlib's without __module__, which Python 3.13 warns of; raised inside nanobind, the
# warning would end the interpreter.
@pytest.mark.filterwarnings("ignore:builtin type event_stats has no __module__:DeprecationWarning")
def test_some_steps_are_recorded_and_no_number_changes(tmp_path, uninterrupted):
    run = experiment(profile_after=1, profile_steps=2)
    train(run, tmp_path, quiet())
    assert outcome(run, tmp_path) == uninterrupted
    (record,) = (tmp_path / "profile").rglob("*.xplane.pb")
    planes = jax.profiler.ProfileData.from_file(str(record)).planes
    events = [event for plane in planes for line in plane.lines for event in line.events]
    assert [dict(event.stats)["step_num"] for event in events if event.name == "train_step"] == [2, 3]


@pytest.mark.parametrize("devices", [1, 8])
def test_a_run_compiles_each_function_once(tmp_path, monkeypatch, devices):
    """Batches, the state after a step and that after a save must all look alike to jit, also after a resumption."""
    compiled = []

    def watched(*arguments):
        compiled.append(compiled_steps(*arguments))
        return compiled[-1]

    monkeypatch.setattr("sgw_jax.train.compiled_steps", watched)
    run = experiment(devices=devices)
    with pytest.raises(Killed):
        train(interrupting(run, 6, kill), tmp_path, quiet())
    train(run, tmp_path, quiet())
    assert len(compiled) == 2
    assert [step._cache_size() for pair in compiled for step in pair] == [1, 1, 1, 1]


def test_between_steps_nothing_is_computed_or_fetched_unasked(built, tmp_path, monkeypatch):
    """Such a computation would wait for the step in flight; the guard refuses the transfers that it begins with."""

    def guarded(function):
        def run(*arguments):
            with jax.transfer_guard("disallow"):
                return function(*arguments)

        return run

    def steps(*arguments):
        train_step, eval_step = compiled_steps(*arguments)
        return guarded(train_step), eval_step

    monkeypatch.setattr(train_module, "compiled_steps", steps)
    for owner, name in (
        (train_module, "global_batch"),
        (train_module.LateLog, "push"),
        (train_module.LateLog, "flush"),
        (train_module.StepProfile, "after"),
        (Checkpoints, "reached_preemption"),
    ):
        monkeypatch.setattr(owner, name, guarded(getattr(owner, name)))
    assert train(built, tmp_path, quiet()).step == STEPS
    rates = [line["learning_rate"] for line in read_metrics(tmp_path / "metrics.jsonl") if line["split"] == "train"]
    assert rates == learning_rates(built.schedule, STEPS).tolist()


def test_another_mesh_gives_the_same_run_up_to_rounding(tmp_path):
    """The losses differ by the order of summation alone: relative 1e-5 is 100 float32 roundings."""
    for devices in (1, 8):
        train(experiment(devices=devices, **{"optimizer.name": "sgd"}), tmp_path / str(devices), quiet())
    first, second = (read_metrics(tmp_path / name / "metrics.jsonl") for name in "18")
    for a, b in zip(first, second, strict=True):
        assert a["step"] == b["step"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seed": 1}, "seed: 0 there, 1 now"),
        ({"batch_size": 16}, "batch_size: 8 there, 16 now"),
        ({"optimizer.learning_rate": 2e-2}, "optimizer.learning_rate: 0.01 there, 0.02 now"),
        ({"interactions.kem.top_k": None}, "interactions.kem.top_k: 32 there, None now"),
        ({"tasks": (Depth(weight=2.0),)}, "tasks.depth"),
        ({"train_seed": 9}, "data.train.seed: 1 there, 9 now"),
    ],
)
def test_another_runs_directory_is_refused(finished, change, named):
    before = sorted(path.name for path in finished.iterdir())
    for check in (lambda other: check_start(other, finished), lambda other: claim_workdir(finished, other)):
        with pytest.raises(WorkdirError) as caught:
            check(experiment(**change))
        assert str(finished) in str(caught.value)
        assert named in str(caught.value)
    assert sorted(path.name for path in finished.iterdir()) == before


def test_what_changes_no_number_may_change(finished):
    for change in ({"keep": 5}, {"log_every": 3}, {"data.threads": 2}, {"devices": 8, "mesh.fsdp": 2}):
        check_start(experiment(**change), finished)


def test_a_directory_that_cannot_be_made_is_named(built, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match=f"--workdir={tmp_path / 'file' / 'run'}: {tmp_path / 'file'} is no directory"):
        train(built, tmp_path / "file" / "run", quiet())


def test_a_damaged_record_of_the_run_is_named(built, tmp_path):
    (tmp_path / "run.json").write_text('{"seed"')
    with pytest.raises(WorkdirError, match=r"run\.json is damaged"):
        check_start(built, tmp_path)


def test_checkpoints_of_unknown_origin_are_refused(built, tmp_path):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    with pytest.raises(WorkdirError, match=r"has checkpoints, but no run\.json"):
        check_start(built, tmp_path)


class Wide(nn.Module):
    """A network that has the body of Tiny, a head of another shape, and more."""

    @nn.compact
    def __call__(self, image, train=False):
        features = nn.relu(nn.Conv(4, (3, 3), name="body")(image))
        features = nn.relu(nn.Conv(6, (1, 1), use_bias=False, name="neck")(features))
        return {"depth": nn.Conv(1, (1, 1), name="head")(features)}


def test_fine_tuning_takes_what_fits_and_lists_the_rest(built, finished, tmp_path):
    wider = experiment(model=Wide(), seed=3)
    console = quiet()
    fresh = jax.tree.map(np.array, new_state(wider).params)
    with run_start(finished) as start:
        tuned = first_state(wider, start, console)
    checkpoints = Checkpoints(finished / "checkpoints", read_only=True)
    source = restored_state(built, checkpoints, checkpoints.best_step)
    checkpoints.close()
    text = console.file.getvalue()
    assert "Initialised 3 of 5 parameters" in text
    assert "(ema)" in text
    assert "fresh: head/kernel (1, 1, 4, 1) (of another shape there)" in text
    assert "fresh: neck/kernel (absent there)" in text
    for tree in (tuned.params, tuned.ema):
        jax.tree.map(np.testing.assert_array_equal, tree["body"], source.ema["body"])
        np.testing.assert_array_equal(tree["head"]["kernel"], fresh["head"]["kernel"])
        np.testing.assert_array_equal(tree["neck"]["kernel"], fresh["neck"]["kernel"])
    assert int(tuned.step) == 0
    trained = train(wider, tmp_path, quiet(), init_from=finished)
    assert trained.step == STEPS


def test_fine_tuning_from_nowhere_is_refused_before_anything_is_written(built, tmp_path):
    with pytest.raises(CheckpointError, match="nowhere"):
        check_start(built, tmp_path / "new", tmp_path / "nowhere")
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    with pytest.raises(WorkdirError, match="no complete checkpoint"):
        check_start(built, tmp_path / "new", tmp_path / "empty")
    assert not (tmp_path / "new").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_names_step_and_task(built, tmp_path):
    bad_step = 6
    item = bad_step_item(built, bad_step)
    poisoned = experiment(tasks=(Trusting(),), poisoned=(item,))
    with pytest.raises(NonFiniteError, match=rf"Step {bad_step}: the loss of depth is not finite .*loss/depth = nan"):
        train(poisoned, tmp_path, quiet())
    checkpoints = Checkpoints(tmp_path / "checkpoints", read_only=True)
    assert checkpoints.latest_step == 4
    check_finite(restored_state(poisoned, checkpoints, 4), 4)
    checkpoints.close()
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["step"] < bad_step
    with pytest.raises(NonFiniteError, match=f"Step {bad_step}"):  # the same again, from the checkpoint
        train(poisoned, tmp_path, quiet())


def bad_step_item(built, step):
    """An item of the step's batch that no earlier batch has."""
    data = built.data
    stream = Stream(data.sources["train"], data.targets, data.augmentation, data.seed)
    seen = {stream.position(n)[1] for n in range((step - 1) * 8)}
    new = {stream.position(n)[1] for n in range((step - 1) * 8, step * 8)} - seen
    return new.pop()


def test_a_state_that_is_not_finite_is_named(built):
    state = new_state(built)
    check_finite(state, 3)
    head = state.params["head"]
    bad = jax.tree.map(lambda leaf: jax.device_put(jnp.full_like(leaf, jnp.inf), leaf.sharding), head)
    with pytest.raises(NonFiniteError, match=r"Step 3: .* arrays of the state are not finite .*params/head/"):
        check_finite(state.replace(params={**state.params, "head": bad}), 3)


def test_an_evaluation_whose_loss_is_not_finite_is_named():
    good = Evaluation({}, {}, {"depth": 1.0}, 1.0)
    check_finite_losses(good, 4, "test")
    with pytest.raises(NonFiniteError, match="Step 4: the test loss of depth is not finite"):
        check_finite_losses(dataclasses.replace(good, losses={"depth": float("nan")}, loss=float("nan")), 4, "test")


def test_predictions_that_are_not_finite_get_no_score(built):
    """Of a state that somebody else saved: metrics of NaN are numbers."""
    state = new_state(built)
    head = jax.tree.map(lambda leaf: jax.device_put(jnp.full_like(leaf, jnp.nan), leaf.sharding), state.params["head"])
    broken = state.replace(params={**state.params, "head": head}, ema=None)
    with jax.set_mesh(built.mesh), pytest.raises(NonFiniteError, match="Step 0: the validation loss of depth"):
        evaluate_split(built, compiled_eval_step(built), broken, "validation")


def test_a_checkpoint_of_another_model_is_an_error_that_lists_the_leaves(finished):
    other = experiment(model=Tiny(8))
    checkpoints = Checkpoints(finished / "checkpoints", read_only=True)
    with pytest.raises(CheckpointError, match=r"params/head/kernel: \(1, 1, 4, 1\) in the .*, \(1, 1, 8, 1\) expected"):
        restored_state(other, checkpoints, checkpoints.latest_step)
    checkpoints.close()


def test_the_abstract_state_is_the_new_state(built):
    state, shapes = new_state(built), abstract_state(built)
    assert jax.tree.structure(state) == jax.tree.structure(shapes)
    for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(shapes), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (shape.shape, shape.dtype, shape.sharding)
