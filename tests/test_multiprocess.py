"""The command as processes of its own: killed for good, in pairs, interrupted; what it computes stays the same."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from rich.console import Console
from test_any_size import write_folder
from test_train_step import DEPTHS, MESHES, ROWS, SGD, assert_gradients_close, selecting_model, selecting_start

from sgw_jax.__main__ import main
from sgw_jax.experiment.build import build
from sgw_jax.run.checkpoints import Checkpoints
from sgw_jax.run.logs import read_metrics
from sgw_jax.run.saved_run import open_run
from sgw_jax.run.state import restored_state
from sgw_jax.run.workdir import saved_steps
from sgw_jax.sharding import global_batch, make_mesh, mesh_sizes, own_rows, replicated, state_sharding
from sgw_jax.train import train
from sgw_jax.train_step import make_train_step

pytestmark = pytest.mark.multiprocess

REPOSITORY = Path(__file__).resolve().parents[1]
STEPS = 12
TINY = (
    "--config=scenes:tasks=depth",
    "--config.data.size=32,64",
    "--config.data.lengths.train=32",
    "--config.data.lengths.test=0",
    "--config.backbones.vit.width=8",
    "--config.backbones.vit.num_heads=1",
    "--config.channels=4",
    "--config.interactions.kem.num_slots=2",
    "--config.interactions.kem.top_k=None",
    "--config.optimizer.name=sgd",
    "--config.optimizer.learning_rate=1e-3",
    "--config.batch_size=8",
    f"--config.steps={STEPS}",
    "--config.schedule.warmup_steps=2",
    "--config.checkpoint_every=2",
    "--config.eval_every=4",
    "--config.log_every=1",
)
ALONE = (sys.executable, "-m", "sgw_jax")
LAUNCHER = ("-m", "sgw_jax", "launch", "local")
FOURS = (sys.executable, *LAUNCHER, "--processes=2", "--devices-per-process=4", "--")
PAIR = (sys.executable, *LAUNCHER, "--processes=2", "--devices-per-process=1", "--")
TIMEOUT = 240
# Most programs of such small runs compile in less than the second from which on they are kept.
CACHED = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}


class Command:
    """The command, on one set of scenes and compiled programs."""

    def __init__(self, cache_dir):
        self.cache_dir = cache_dir

    def start(self, program, workdir, *more, validation=0, environment=()):
        # Little optimisation: compiling takes most of the time of such small runs.
        flags = "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0"
        arguments = (*TINY, f"--config.data.lengths.validation={validation}", *more)
        return subprocess.Popen(
            [*program, "train", *arguments, f"--workdir={workdir}", f"--cache_dir={self.cache_dir}"],
            cwd=REPOSITORY,
            env={**os.environ, **CACHED, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **dict(environment)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, process, code=0):
        output, _ = process.communicate(timeout=TIMEOUT)
        assert process.returncode == code, output
        return output

    def run(self, *arguments, **options):
        return self.finish(self.start(*arguments, **options))


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    return Command(tmp_path_factory.mktemp("cache"))


def wait_for(process, condition):
    deadline = time.monotonic() + TIMEOUT
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)


def saved(workdir, step):
    return lambda: (workdir / "checkpoints" / str(step)).is_dir()


def saving(workdir):
    return lambda: any((workdir / "checkpoints").glob("*.orbax-checkpoint-tmp"))


def outcome(workdir):
    """Metrics, which checkpoints are best and last, and all their numbers."""
    checkpoints = Checkpoints(workdir / "checkpoints", read_only=True)
    best, last = checkpoints.best_step, checkpoints.latest_step
    experiment = build(open_run(workdir).config, workdir / "unused")
    steps = {best, last} - {None}
    states = {step: jax.tree.leaves(restored_state(experiment, checkpoints, step)) for step in steps}
    states = {step: [np.asarray(leaf).tobytes() for leaf in leaves] for step, leaves in states.items()}
    checkpoints.close()
    return (workdir / "metrics.jsonl").read_bytes(), best, last, states


def test_two_processes_score_what_one_does_at_any_size(command, tmp_path):
    """Metrics of the network and of the reference predictors, on images of mixed sizes."""
    sizes = [(32, 64), (48, 96), (64, 32), (20, 30), (33, 65)]
    write_folder(tmp_path / "data", {"train": sizes, "validation": sizes[2:], "test": sizes[::-1]})
    options = (f"--config.data.root={tmp_path / 'data'}", "--config.data.source=folder", "--config.steps=4")
    found = []
    for program, workdir in ((ALONE, tmp_path / "one"), (FOURS, tmp_path / "two")):
        command.run(program, workdir, *options)
        found.append(json.loads((workdir / "results.json").read_text()))
    one, two = found
    # Images are scored one at a time in float32, and added in float64 in another order.
    for reference, metrics in one["references"].items():
        assert two["references"][reference]["depth"] == pytest.approx(metrics["depth"], rel=1e-6), reference
    assert two["metrics"]["depth"] == pytest.approx(one["metrics"]["depth"], rel=1e-4)  # of networks trained apart


def children(process):
    """The processes that the launcher started, in order."""
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_run_killed_again_and_again_goes_on_bit_by_bit(command, tmp_path):
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    torn = []  # steps whose checkpoint was half written when the process was killed
    for condition in (saving(killed), saved(killed, 4), saving(killed)):
        process = command.start(ALONE, killed, validation=12)
        wait_for(process, condition)
        process.kill()
        process.communicate()
        torn += [path.name.partition(".")[0] for path in (killed / "checkpoints").glob("*.orbax-checkpoint-tmp")]
    assert torn
    last = Checkpoints(killed / "checkpoints", read_only=True).latest_step
    assert last >= 4
    assert f"Resuming {killed} at step {last}." in command.run(ALONE, killed, validation=12)
    command.run(ALONE, reference, validation=12)
    assert outcome(killed) == outcome(reference)
    assert not [path for path in killed.rglob("*") if path.name.endswith("tmp")]
    train = [line["step"] for line in read_metrics(killed / "metrics.jsonl") if line["split"] == "train"]
    assert train == list(range(1, STEPS + 1))
    assert (killed / "report_validation.html").exists()

    changed = {path: path.stat().st_mtime_ns for path in killed.glob("checkpoints/*")}
    results = (killed / "results_validation.json").read_bytes()
    (killed / "results_validation.json").unlink()
    assert f"Resuming {killed} at step {STEPS}" in command.run(ALONE, killed, validation=12)  # evaluates again
    assert changed == {path: path.stat().st_mtime_ns for path in killed.glob("checkpoints/*")}
    assert len((killed / "results_validation.json").read_bytes()) > len(results) // 2


def test_two_processes_are_one_run(command, tmp_path):
    """2 x 4 devices against 1 x 8 and 1 x 1: the sums' order differs, so losses agree to 1e-5, 100 float32 roundings.

    The validation split, 12 images, does not divide into batches of 8.
    """
    command.run(FOURS, tmp_path / "2x4", "--config.steps=8", "--config.checkpoint_every=4", validation=12)
    pair = read_metrics(tmp_path / "2x4" / "metrics.jsonl")
    config = open_run(tmp_path / "2x4").config
    for devices in (8, 1):
        name = f"1x{devices}"
        experiment = dataclasses.replace(
            build(config, command.cache_dir), mesh=make_mesh(mesh_sizes(**config.mesh), jax.devices()[:devices])
        )
        train(experiment, tmp_path / name, Console(quiet=True))
        lines = read_metrics(tmp_path / name / "metrics.jsonl")
        for line, other in zip(pair, lines, strict=True):
            assert line.keys() == other.keys()
            assert (line["step"], line["split"]) == (other["step"], other["split"])
            assert line["loss/depth"] == pytest.approx(other["loss/depth"], rel=1e-5), (name, line["step"])
            if line["split"] == "validation":
                assert line["depth/rmse"] == pytest.approx(other["depth/rmse"], rel=1e-5)


def first_steps(mesh):
    """Losses of three steps of SGD in float64; and its state after the first, the momentum, which is that gradient."""
    state, batch = selecting_start(0, np.float64)
    block, blocks = own_rows(mesh)
    rows = slice(block * ROWS // blocks, (block + 1) * ROWS // blocks)
    shardings = state_sharding(state, mesh, min_size=1)
    step = make_train_step(selecting_model(np.float64), DEPTHS, SGD)
    with jax.set_mesh(mesh):
        step = jax.jit(step, out_shardings=(shardings, replicated(mesh)))
        everywhere = jax.jit(lambda tree: tree, out_shardings=replicated(mesh))
        host = jax.tree.map(np.asarray, state)
        state = jax.tree.map(
            lambda x, place: jax.make_array_from_callback(x.shape, place, lambda index: x[index]), host, shardings
        )
        batch = global_batch({name: value[rows] for name, value in batch.items()}, mesh)
        losses = []
        for number in range(3):
            state, metrics = step(state, batch)
            losses.append([metrics[f"loss/{task.name}"] for task in DEPTHS])
            momentum = jax.tree.leaves(everywhere(state.opt_state)) if number == 0 else momentum
    return {"losses": np.array(jax.device_get(losses)), **{str(i): np.asarray(x) for i, x in enumerate(momentum)}}


def one_of_two(folder):
    """The process that the next test starts twice."""
    jax.config.update("jax_enable_x64", True)
    process = int(os.environ["SGW_PROCESS"])
    jax.distributed.initialize(os.environ["SGW_COORDINATOR"], 2, process)
    for index, sizes in enumerate(MESHES):
        found = first_steps(make_mesh(sizes))
        if process == 0:
            np.savez(folder / f"{index}.npz", **found)


def test_two_processes_are_one_to_the_last_digits(tmp_path):
    """2 x 4 devices, and 8 of one process, against one device: in float64 only a real difference could make 1e-9."""
    pair = [
        subprocess.Popen([sys.executable, __file__, str(tmp_path)], env={**os.environ, **own}, stderr=subprocess.PIPE)
        for own in environments(devices=4)
    ]
    with jax.enable_x64(True):
        expected = first_steps(make_mesh({"data": 1}, jax.devices()[:1]))
        meshes = {"8": first_steps(make_mesh({"data": 8}))}
    for process in pair:
        _, errors = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, errors.decode()
    meshes |= {str(sizes): dict(np.load(tmp_path / f"{index}.npz")) for index, sizes in enumerate(MESHES)}
    for name, found in meshes.items():
        assert found["losses"].dtype == np.float64
        np.testing.assert_allclose(found.pop("losses"), expected["losses"], rtol=1e-9, err_msg=name)
        assert_gradients_close(found, {key: value for key, value in expected.items() if key in found}, 1e-9)
        assert len(found) == len(expected) - 1


@pytest.mark.parametrize("gradients", ["parameters", "representation"])
def test_task_gradients_of_two_processes_are_those_of_one(command, tmp_path, gradients):
    """Losses of the first step to 1e-5 as above; its weights and cosines, from the same parameters, to 1e-3, because
    they come from differences of such sums. So an update may be off by 1e-3 of itself, and with it later losses by
    1e-3 of what the updates have changed in them."""
    options = ("--config.tasks=depth,normals", "--config.objective=upgrad", f"--config.gradients={gradients}")
    options += ("--config.mesh.fsdp=4", "--config.steps=3", "--config.checkpoint_every=3", "--config.eval_every=3")
    command.run(FOURS, tmp_path / "2x4", *options)
    pair = read_metrics(tmp_path / "2x4" / "metrics.jsonl")
    experiment = build(open_run(tmp_path / "2x4").config, command.cache_dir)
    train(experiment, tmp_path / "1x8", Console(quiet=True))
    first = pair[0]
    for line, other in zip(pair, read_metrics(tmp_path / "1x8" / "metrics.jsonl"), strict=True):
        assert line.keys() == other.keys()
        assert {"weight/depth", "weight/normals", "cosine/depth-normals", "conflict_rate"} <= line.keys()
        for name in line:
            if name.startswith("loss"):
                moved = abs(other[name] - first[name])
                tolerance = 1e-5 * max(abs(other[name]), 1) + 1e-3 * moved
                assert line[name] == pytest.approx(other[name], rel=0, abs=tolerance), (name, line["step"])
            elif line["step"] == 1 and name != "split":
                assert line[name] == pytest.approx(other[name], rel=1e-3, abs=1e-3), (name, line["step"])


LONG = ("--config.steps=40", "--config.checkpoint_every=4")  # far enough that a slow signal comes before the end


@pytest.fixture(scope="module")
def undisturbed(command, tmp_path_factory):
    """What comes of a long run of a pair that nothing disturbs."""
    workdir = tmp_path_factory.mktemp("undisturbed") / "run"
    command.run(PAIR, workdir, *LONG)
    return outcome(workdir)


def test_a_pair_that_is_told_to_stop_saves_one_step_and_goes_on_bit_by_bit(command, undisturbed, tmp_path):
    stopped = tmp_path / "stopped"
    process = command.start(PAIR, stopped, *LONG)  # the scheduler's notice, to one of the two
    wait_for(process, saved(stopped, 4))
    os.kill(children(process)[1], signal.SIGTERM)
    assert "Stopped by SIGTERM; saved at step" in command.finish(process, code=128 + signal.SIGTERM)

    last = Checkpoints(stopped / "checkpoints", read_only=True).latest_step
    process = command.start(PAIR, stopped, *LONG)  # Ctrl-C at the launcher
    wait_for(process, saved(stopped, last + 4 - last % 4))
    process.send_signal(signal.SIGINT)
    assert "Stopped by SIGTERM; saved at step" in command.finish(process, code=128 + signal.SIGINT)

    command.run(PAIR, stopped, *LONG)
    assert outcome(stopped) == undisturbed


def test_a_second_pair_in_the_same_directory_is_refused_and_ends(command, tmp_path):
    first = command.start(PAIR, tmp_path / "run", "--config.steps=100000")
    try:
        wait_for(first, saved(tmp_path / "run", 2))
        output = command.finish(command.start(PAIR, tmp_path / "run", "--config.steps=100000"), code=1)
        assert f"being trained in already, by process {children(first)[0]} on {socket.gethostname()}" in output
    finally:
        first.kill()
        first.communicate()
    # What was killed holds no lock; the directory goes on.
    last = max(saved_steps(tmp_path / "run"))
    third = command.start(ALONE, tmp_path / "run", "--config.steps=100000")
    wait_for(third, lambda: max(saved_steps(tmp_path / "run")) > last)
    third.send_signal(signal.SIGHUP)
    command.finish(third, code=128 + signal.SIGHUP)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_pair_ends_when_one_dies(command, tmp_path, victim):
    process = command.start(PAIR, tmp_path / "run", "--config.steps=100000")
    try:
        wait_for(process, lambda: (tmp_path / "run" / "metrics.jsonl").exists())
        pair = children(process)
        os.kill(pair[victim], signal.SIGKILL)
        output, _ = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 128 + signal.SIGKILL
    assert f"process {victim} was ended by SIGKILL" in output
    assert not any(alive(pid) for pid in pair)


def environments(devices):
    """Of two processes without a launcher: what a cluster sets on its machines."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=0"
    cluster = {"SGW_COORDINATOR": address, "SGW_PROCESSES": "2", "XLA_FLAGS": flags}
    return [cluster | {"SGW_PROCESS": str(index)} for index in range(2)]


@pytest.mark.parametrize(("victim", "how"), [(1, signal.SIGKILL), (0, signal.SIGKILL), (1, signal.SIGSTOP)])
def test_processes_without_a_launcher_do_not_wait_for_a_lost_one(command, undisturbed, tmp_path, victim, how):
    """A machine that dies is noticed by the next collective operation, one that falls silent by its heartbeat; what was
    saved is whole, and a restart goes on from it bit by bit."""
    options = (*LONG, "--heartbeat_seconds=10")
    pair = [command.start(ALONE, tmp_path / "run", *options, environment=own) for own in environments(devices=1)]
    try:
        wait_for(pair[0], saved(tmp_path / "run", 4))
        os.kill(pair[victim].pid, how)
        start = time.monotonic()
        output, _ = pair[1 - victim].communicate(timeout=60)
        assert time.monotonic() - start < 10 + 20  # the heartbeat's time, and that of a loaded machine
    finally:
        for process in pair:
            process.kill()
            process.communicate()
    assert pair[1 - victim].returncode not in (0, None)
    # Ours where a collective operation fails first; JAX's own where its coordination service does, which ends the
    # process outright.
    ours = "error: Another process of this run has ended or cannot be reached" in output
    theirs = (
        "JAX distributed service detected fatal errors. This most likely indicates that another task died" in output
    )
    assert ours or theirs, output
    if victim == 1 and how == signal.SIGKILL:
        command.run(PAIR, tmp_path / "run", *LONG)
        assert outcome(tmp_path / "run") == undisturbed


MOVES = {
    "fsdp": ("--config.mesh.data=2", "--config.mesh.fsdp=4"),
    "context within": ("--config.mesh.context=2",),
    "context over both": ("--config.mesh.context=8", "--config.batch_size=8"),
}


def test_a_run_goes_on_on_another_mesh_and_number_of_processes(command, tmp_path):
    """One process makes half of the steps, a pair on another mesh the rest: the same order of the data, and losses to
    1e-5 of those of one process all the way. A context over both processes has every row on both of them."""
    reference, half = tmp_path / "reference", 4
    options = (f"--config.steps={2 * half}", f"--config.checkpoint_every={half}", "--config.keep=100")
    command.run(ALONE, reference, *options, validation=12)
    expected = read_metrics(reference / "metrics.jsonl")
    for name, mesh in MOVES.items():
        moved = tmp_path / name
        shutil.copytree(reference, moved)
        for folder in (moved / "checkpoints").iterdir():
            if folder.name.isdigit() and int(folder.name) > half:
                shutil.rmtree(folder)
        assert f"at step {half}" in command.run(FOURS, moved, *options, *mesh, validation=12)
        lines = read_metrics(moved / "metrics.jsonl")
        for line, other in zip(lines, expected, strict=True):
            assert (line["step"], line["split"]) == (other["step"], other["split"])
            assert line["loss/depth"] == pytest.approx(other["loss/depth"], rel=1e-5), (name, line["step"])
    # On yet another number of devices, on which the run's own mesh would not do.
    evaluate = ["evaluate", f"--workdir={moved}", "--split=validation", "--mesh=data", "--checkpoint=last"]
    assert main([*evaluate, f"--cache_dir={command.cache_dir}"]) == 0
    found = json.loads((moved / "results_validation.json").read_text())
    last = [line for line in lines if line["split"] == "validation"][-1]
    assert found["metrics"]["depth"]["rmse"] == pytest.approx(last["depth/rmse"], rel=1e-5)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB."""
    mount = tmp_path / "disk"
    mount.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(mount)], capture_output=True, text=True, check=False
    )
    if made.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {made.stderr.strip()}")
    yield mount
    subprocess.run(["umount", "-l", str(mount)], check=True)


@pytest.mark.parametrize("left", [0, 100_000], ids=["nothing left", "room for metrics alone"])
def test_a_full_disk_fails_the_save_and_keeps_the_last(command, small_disk, left):
    workdir = small_disk / "run"
    process = command.start(
        ALONE, workdir, "--config.steps=5000", "--config.checkpoint_every=20", "--config.eval_every=20"
    )
    wait_for(process, saved(workdir, 40))
    with open(small_disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
        free = shutil.disk_usage(small_disk).free - left
        while free > 0:
            free -= filler.write(bytes(min(4096, free)))
    output = command.finish(process, code=1)
    assert f"error: The disk that holds {workdir} is full." in output
    assert "Traceback" not in output  # of the threads that met it too
    kept = Checkpoints(workdir / "checkpoints", read_only=True).latest_step
    assert kept >= 40

    (small_disk / "filler").unlink()
    config = open_run(workdir, "last").config
    config.steps = kept + 20
    experiment = build(config, command.cache_dir, mesh=make_mesh({}, jax.devices()[:1]))
    (workdir / "run.json").write_text(json.dumps(experiment.identity()))  # a shorter run, to see it end
    assert train(experiment, workdir, Console(quiet=True)).step == kept + 20


def test_a_killed_launcher_leaves_no_process_behind(command, tmp_path):
    process = command.start(PAIR, tmp_path / "run")
    wait_for(process, lambda: len(children(process)) == 2)
    pair = children(process)
    process.kill()
    process.communicate(timeout=30)
    deadline = time.monotonic() + 10
    while any(alive(pid) for pid in pair):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_error_of_all_is_shown_once_and_ends_them(command, tmp_path):
    output = command.finish(command.start(FOURS, tmp_path / "run", "--config.batch_size=9"), code=1)
    assert "error: batch_size 9 must divide by 8 devices" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))
