"""The command killed, told to stop, without its partner or without room: it ends, and computes the same later."""

import contextlib
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
from test_multiprocess import ALONE, LAUNCHER, STEPS, TIMEOUT, Command, environments

from sgw_jax.experiment.build import build
from sgw_jax.run.checkpoints import Checkpoints
from sgw_jax.run.logs import read_metrics
from sgw_jax.run.saved_run import open_run
from sgw_jax.run.state import restored_state
from sgw_jax.run.workdir import saved_steps
from sgw_jax.sharding import make_mesh
from sgw_jax.train import train

pytestmark = pytest.mark.multiprocess

PAIR = (sys.executable, *LAUNCHER, "--processes=2", "--devices-per-process=1", "--")


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
