"""The command in pairs of processes, on any mesh: what it computes is what one process does."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from quick import QUICK
from rich.console import Console
from test_any_size import write_folder
from test_train_step import DEPTHS, MESHES, ROWS, SGD, assert_gradients_close, selecting_model, selecting_start

from sgw_jax.__main__ import main
from sgw_jax.experiment.build import build
from sgw_jax.run.logs import read_metrics
from sgw_jax.run.saved_run import open_run
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
TIMEOUT = 240
# Most programs of such small runs compile in less than the second from which on they are kept.
CACHED = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}


class Command:
    """The command, on one set of scenes and compiled programs."""

    def __init__(self, cache_dir):
        self.cache_dir = cache_dir

    def start(self, program, workdir, *more, validation=0, environment=()):
        flags = f"--xla_force_host_platform_device_count=2 {QUICK}"
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
            if number == 0:
                momentum = jax.tree.leaves(everywhere(state.opt_state))
    return {"losses": np.array(jax.device_get(losses)), **{str(i): np.asarray(x) for i, x in enumerate(momentum)}}


def environments(devices):
    """Of two processes without a launcher: what a cluster sets on its machines."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
    flags = f"--xla_force_host_platform_device_count={devices} {QUICK}"
    cluster = {"SGW_COORDINATOR": address, "SGW_PROCESSES": "2", "XLA_FLAGS": flags}
    return [cluster | {"SGW_PROCESS": str(index)} for index in range(2)]


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


def test_an_error_of_all_is_shown_once_and_ends_them(command, tmp_path):
    output = command.finish(command.start(FOURS, tmp_path / "run", "--config.batch_size=9"), code=1)
    assert "error: batch_size 9 must divide by 8 devices" in output
    assert "Traceback" not in output
    assert not (tmp_path / "run").exists()


if __name__ == "__main__":
    one_of_two(Path(sys.argv[1]))
