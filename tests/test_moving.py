"""Runs that move and go on: paths, data in another place, longer runs, one training at a time, other signals."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from quick import QUICK
from test_resume import experiment, interrupting, quiet

from sgw_jax.__main__ import main
from sgw_jax.commands import evaluate as evaluate_command
from sgw_jax.commands.cluster import of_environment
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.paths import PathError, default_cache, user_path
from sgw_jax.experiment.build import build
from sgw_jax.experiment.config_files import UsageError, read_config, with_overrides
from sgw_jax.experiment.experiment import EVALUATION_KEYS
from sgw_jax.run.checkpoints import Checkpoints
from sgw_jax.run.lock import LOCK, check_free, held
from sgw_jax.run.saved_run import open_run
from sgw_jax.run.state import restored_state
from sgw_jax.run.stop_signal import StopSignal
from sgw_jax.run.workdir import WorkdirError, check_workdir, claim_workdir, saved_steps
from sgw_jax.train import check_start, train


def test_paths_are_read_as_a_shell_reads_them(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS", "/runs")
    assert user_path("~/a b") == f"{tmp_path}/a b"
    assert user_path("$RUNS/x") == user_path("${RUNS}/x") == "/runs/x"
    assert user_path("./~/x=$") == "./~/x=$"
    (tmp_path / "cost$US").mkdir()
    assert user_path(f"{tmp_path}/cost$US") == f"{tmp_path}/cost$US"
    for wrong, message in {
        "": "is no path",
        "$NOWHERE/x": r"variable \$NOWHERE is not set",
        "~nobody-of-that-name/x": "home directory ~nobody-of-that-name is not known",
    }.items():
        with pytest.raises(PathError, match=message):
            user_path(wrong)


def test_every_path_option_is_read_like_that(monkeypatch, capsys):
    monkeypatch.delenv("NOWHERE", raising=False)
    options = {
        "train": ("--workdir", "--cache_dir", "--init_from"),
        "evaluate": ("--workdir", "--cache_dir"),
        "predict": ("--workdir", "--model", "--output", "--list"),
        "export": ("--workdir", "--output"),
        "score": ("--predictions", "--json"),
        "plan": ("--json",),
        "prepare": ("--source", "--out"),
    }
    for command, names in options.items():
        for name in names:
            with pytest.raises(SystemExit):
                main([command, *(["nyud"] if command == "prepare" else []), f"{name}=$NOWHERE/x"])
            assert f"argument {name}: $NOWHERE/x: the variable $NOWHERE is not set" in capsys.readouterr().err


def test_paths_of_the_configuration_are_stored_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    config = read_config("scenes:tasks=depth", ["--config.data.root=data", "--config.backbone_weights=~/w"])
    stored = build(config, None).config
    assert (stored.data.root, stored.backbone_weights) == (str(tmp_path / "data"), str(tmp_path / "w"))
    assert config.data.root == "data"
    with pytest.raises(InputError, match=r"config\.data\.root=\$NOWHERE: the variable \$NOWHERE is not set"):
        build(read_config("scenes:tasks=depth", ["--config.data.root=$NOWHERE"]), None)


def test_a_checkpoints_configuration_takes_some_keys():
    config = build(read_config("scenes:tasks=depth"), None).config
    saved = type(config)(json.loads(config.to_json()))  # as a checkpoint gives it
    del saved.boundary.suppress  # a release before it was a key
    overrides = ["--config.data.root=new", "--config.boundary.max_dist=0.01", "--config.boundary.suppress=true"]
    found = with_overrides(saved, [*overrides, "--config.data.size=32,48"], EVALUATION_KEYS)
    assert (found.data.root, found.boundary.max_dist, found.boundary.suppress) == ("new", 0.01, True)
    assert tuple(found.data.size) == (32, 48)
    assert saved.data.root == ""
    for key in ("steps", "data.sise"):
        with pytest.raises(UsageError, match=rf"--config\.{key}: the checkpoint says it; .*, data\.root, .*mesh\.name"):
            with_overrides(saved, [f"--config.{key}=3"], EVALUATION_KEYS)


def test_help_of_evaluate_and_predict_names_what_they_take(capsys):
    for command, shown, not_shown in (
        ("evaluate", "--config.data.root=DIR", "--config=scenes"),
        ("predict", "comes from the checkpoint", "--config"),
        ("export", "comes from the checkpoint", "--config"),
    ):
        with pytest.raises(SystemExit):
            main([command, "--help"])
        text = capsys.readouterr().out
        assert shown in text
        assert not_shown not in text


def test_without_a_home_the_cache_is_among_temporary_files(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "given"))
    assert default_cache() == (tmp_path / "given" / "sgw_jax", "")
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    own = tmp_path / f"sgw_jax-{os.getuid()}"
    assert default_cache() == (own, f"{tmp_path / 'file'} is no directory")
    assert own.stat().st_mode & 0o777 == 0o700
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # no HOME, and an unknown user
    assert default_cache() == (own, "no home directory is known")


REPOSITORY = Path(__file__).resolve().parents[1]


# --- which processes form a run --------------------------------------------------------------------------------------
MPI = {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}


@pytest.mark.parametrize(
    ("environment", "found"),
    [
        ({}, None),
        ({"SGW_COORDINATOR": "a:1", "SGW_PROCESSES": "2", "SGW_PROCESS": "1"}, ("a:1", 2, 1)),
        ({"SGW_COORDINATOR": "[::1]:80", "SGW_PROCESSES": "1", "SGW_PROCESS": "0"}, ("[::1]:80", 1, 0)),
        ({"SLURM_STEP_NODELIST": "a[1-2]"}, ()),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, ()),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
        ({**MPI, "OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:3"}, ()),  # Open MPI 4
        ({**MPI, "SGW_COORDINATOR": "node1:12345"}, ("node1:12345", 4, 3)),
    ],
)
def test_the_environment_says_who_takes_part(environment, found):
    read = of_environment(environment)
    if not found:
        assert read == (None if found is None else {})
    else:
        assert (read["coordinator_address"], read["num_processes"], read["process_id"]) == found


def test_open_mpi_5_on_one_machine_meets_at_a_port_of_the_job():
    job = {**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "PMIX_NAMESPACE": "prterun-host-17@1"}
    ranks = [of_environment({**job, "OMPI_COMM_WORLD_RANK": str(rank)}) for rank in range(4)]
    assert len({rank["coordinator_address"] for rank in ranks}) == 1
    assert [rank["process_id"] for rank in ranks] == [0, 1, 2, 3]
    assert ranks[0]["local_device_ids"] == [1]
    other = of_environment({**job, "PMIX_NAMESPACE": "prterun-host-18@1"})
    assert other["coordinator_address"] != ranks[0]["coordinator_address"]


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"SGW_COORDINATOR": "a:1"}, "SGW_COORDINATOR without SGW_PROCESSES and SGW_PROCESS"),
        ({"SGW_PROCESSES": "2", "SGW_PROCESS": "0"}, "SGW_PROCESSES and SGW_PROCESS without SGW_COORDINATOR"),
        ({"SGW_COORDINATOR": "a:1", "SGW_PROCESSES": "two", "SGW_PROCESS": "0"}, "SGW_PROCESSES=two: .* at least 1"),
        ({"SGW_COORDINATOR": "a:1", "SGW_PROCESSES": "2", "SGW_PROCESS": "2"}, "SGW_PROCESS=2: .* from 0 to 1"),
        ({"SGW_COORDINATOR": "a", "SGW_PROCESSES": "2", "SGW_PROCESS": "0"}, "SGW_COORDINATOR=a: .*host:port"),
        ({"SGW_COORDINATOR": "a:99999", "SGW_PROCESSES": "2", "SGW_PROCESS": "0"}, "host:port"),
        ({**MPI, "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}, "mpirun -x SGW_COORDINATOR=HOST:PORT"),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "without OMPI_COMM_WORLD_RANK"),
    ],
)
def test_an_environment_that_cannot_be_is_named(environment, message):
    with pytest.raises(InputError, match=message):
        of_environment(environment)


# --- one training at a time ------------------------------------------------------------------------------------------
HOLD = "import fcntl, sys, time; f = open(sys.argv[1], 'r+'); fcntl.flock(f, fcntl.LOCK_EX); print(1); time.sleep(60)"


def test_a_directory_is_trained_in_once_at_a_time(tmp_path):
    with held(tmp_path, quiet()):
        holder = json.loads((tmp_path / LOCK).read_text())
        assert (holder["process"], holder["host"]) == (os.getpid(), socket.gethostname())
        for second in (lambda: check_free(tmp_path), lambda: held(tmp_path, quiet()).__enter__()):
            with pytest.raises(WorkdirError, match=f"already, by process {os.getpid()} on {socket.gethostname()}"):
                second()
    check_free(tmp_path)
    with held(tmp_path, quiet()):
        pass


def test_two_may_look_at_once_and_neither_keeps_a_training_out(tmp_path):
    with held(tmp_path, quiet()):
        pass
    looking = os.open(tmp_path / LOCK, os.O_RDWR)
    fcntl.flock(looking, fcntl.LOCK_SH)
    check_free(tmp_path)
    os.close(looking)


def test_what_a_killed_process_leaves_is_no_lock(tmp_path):
    (tmp_path / LOCK).write_text(json.dumps({"process": 1, "host": socket.gethostname(), "since": "then"}))
    process = subprocess.Popen([sys.executable, "-uc", HOLD, str(tmp_path / LOCK)], stdout=subprocess.PIPE)
    process.stdout.readline()
    with pytest.raises(WorkdirError, match="by process 1 on"):
        check_free(tmp_path)
    process.kill()
    process.wait()
    process.stdout.close()
    check_free(tmp_path)
    console = quiet()
    with held(tmp_path, console):
        assert console.file.getvalue() == ""
    (tmp_path / LOCK).write_text(json.dumps({"process": 7, "host": "elsewhere", "since": "then"}))
    with held(tmp_path, console):
        assert "(process 7 on elsewhere) left no word of its end" in console.file.getvalue()


# --- what a directory holds ------------------------------------------------------------------------------------------
def test_a_run_without_checkpoints_claims_nothing(tmp_path):
    claim_workdir(tmp_path, experiment())
    other = experiment(**{"optimizer.learning_rate": 0.5})
    claim_workdir(tmp_path, other)
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    check_workdir(tmp_path, other)
    with pytest.raises(WorkdirError, match=r"optimizer\.learning_rate: 0\.5 there, 0\.01 now"):
        check_workdir(tmp_path, experiment())


@pytest.mark.parametrize("name", ["metrics.jsonl", "report.html", "results.json", "results_validation.json"])
def test_files_of_unknown_origin_are_not_replaced(tmp_path, name):
    (tmp_path / name).write_text("mine")
    with pytest.raises(WorkdirError, match=rf"has {name}, but no run\.json"):
        train(experiment(), tmp_path, quiet())
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("content", ["[1]", '"a"', "{"])
def test_a_record_of_another_shape_is_named(tmp_path, content):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(WorkdirError, match=r"run\.json is damaged"):
        check_workdir(tmp_path, experiment())


def test_a_file_is_no_working_directory(tmp_path, capsys):
    (tmp_path / "run").touch()
    for command in (["train", "--config=scenes"], ["evaluate"]):
        with pytest.raises(SystemExit):
            main([*command, f"--workdir={tmp_path / 'run'}"])
        assert f"--workdir: {tmp_path / 'run'} is a file" in " ".join(capsys.readouterr().err.split())


# --- longer, and from an earlier step --------------------------------------------------------------------------------
CONSTANT = {"schedule.name": "constant", "eval_every": 2}


@pytest.mark.slow
def test_a_run_of_a_constant_rate_is_prolonged_to_the_same_run(tmp_path):
    train(experiment(steps=2, **CONSTANT), tmp_path / "a", quiet())
    often = experiment(steps=6, **CONSTANT, checkpoint_every=1)  # free, too
    assert train(often, tmp_path / "a", quiet()).step == 6
    train(experiment(steps=6, **CONSTANT), tmp_path / "b", quiet())
    states = []
    for name in "ab":
        with Checkpoints(tmp_path / name / "checkpoints", read_only=True) as checkpoints:
            states.append(restored_state(often, checkpoints, 6))
    jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.parametrize(
    ("schedule", "steps", "message"),
    [
        ("constant", 2, None),
        ("constant", 1, "config.steps is 1, but the run is at step 2 already"),
        ("constant", 9, None),
        ("poly", 9, "schedule 'poly' every step's learning rate depends on the number of steps"),
        ("cosine", 3, "schedule 'cosine' every step's learning rate depends on the number of steps"),
    ],
)
def test_a_run_is_prolonged_where_its_schedule_allows(tmp_path, schedule, steps, message):
    claim_workdir(tmp_path, experiment(**{"schedule.name": schedule, "steps": 4}))
    (tmp_path / "checkpoints" / "2").mkdir(parents=True)
    now = experiment(**{"schedule.name": schedule, "steps": steps, "checkpoint_every": 1, "eval_every": 1})
    if message is None:
        claim_workdir(tmp_path, now)
        assert json.loads((tmp_path / "run.json").read_text())["steps"] == steps
    else:
        with pytest.raises(WorkdirError, match=message):
            check_workdir(tmp_path, now)


def test_a_run_goes_on_from_an_earlier_step_when_asked(tmp_path):
    built = experiment(keep=9)

    def meanwhile():
        with pytest.raises(WorkdirError, match="being trained in already"):
            check_start(built, tmp_path)
        with open_run(tmp_path, 2) as run:
            assert run.step == 2

    train(interrupting(built, 5, meanwhile), tmp_path, quiet())
    before = (tmp_path / "metrics.jsonl").read_text()
    assert saved_steps(tmp_path) == [2, 4, 6, 7]
    with pytest.raises(WorkdirError, match=r"--step=3: .*\[2, 4, 6, 7\]"):
        check_start(built, tmp_path, step=3)
    for times in (1, 2):
        train(built, tmp_path, quiet(), step=4)
        assert saved_steps(tmp_path) == [2, 4, 6, 7]
        assert (tmp_path / "metrics.jsonl").read_text() == before
        assert len(list((tmp_path / "set_aside").iterdir())) == 2 * times
    with open_run(tmp_path, 4) as run:
        assert run.step == 4


# --- signals ---------------------------------------------------------------------------------------------------------
def test_a_lost_terminal_asks_for_a_save_like_other_signals(capfd):
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
        with StopSignal() as stop:
            signal.raise_signal(number)
            assert stop.number == number
    said = capfd.readouterr().err.splitlines()
    assert said == ["SIGTERM: saving after this step.", "SIGINT: saving after this step; again to stop at once."]


def test_a_signal_that_is_ignored_stays_so():
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under nohup
    try:
        with StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.number is None
    finally:
        signal.signal(signal.SIGHUP, previous)


BUSY = """
import ctypes, signal
from sgw_jax.run.stop_signal import StopSignal
with StopSignal():
    # As a compilation: Python's own handlers wait for its end. A signal to this thread would end the sleep.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    print("ready", flush=True)
    ctypes.CDLL(None).usleep(120_000_000)
"""


@pytest.mark.slow
def test_ctrl_c_is_answered_at_once_and_a_second_one_ends(tmp_path):
    """The thread speaks while the main thread does not listen; nothing else in the process could."""
    process = subprocess.Popen(
        [sys.executable, "-c", BUSY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        assert process.stderr.readline() == "SIGTERM: saving after this step.\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.readline().startswith("Stopped at once.")
        assert process.wait(timeout=20) == 130
    finally:
        process.kill()
        process.communicate()


# --- whole commands --------------------------------------------------------------------------------------------------
def photographs(root):
    rng = np.random.default_rng(0)
    for folder in ("images", "semseg", "splits"):
        (root / folder).mkdir(parents=True)
    for name in "ab":
        Image.fromarray(rng.integers(0, 256, (32, 64, 3), np.uint8)).save(root / "images" / f"{name}.png")
        Image.fromarray(rng.integers(0, 4, (32, 64), np.uint8)).save(root / "semseg" / f"{name}.png")
    (root / "splits" / "train.txt").write_text("a\nb\n")


@pytest.mark.slow
def test_a_run_outlives_the_move_of_its_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DATA", "data")
    photographs(tmp_path / "data")
    network = ["backbones.vit.width=8", "backbones.vit.depth=4", "backbones.vit.num_heads=1", "channels=4"]
    keys = [*network, "data.source=folder", "data.root=$DATA", "data.num_classes=4", "data.size=32,64", "steps=1"]
    keys += ["batch_size=8", "checkpoint_every=1", "eval_every=1", "schedule.warmup_steps=0"]
    options = ["--workdir=~/run", f"--cache_dir={tmp_path / 'cache'}"]
    configured = ["--config=scenes:interaction=none,tasks=semseg", *[f"--config.{key}" for key in keys]]
    quick = {**os.environ, "XLA_FLAGS": QUICK, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run([sys.executable, "-m", "sgw_jax", "train", *configured, *options], env=quick, check=True)
    assert saved_steps(tmp_path / "run") == [1]
    assert not Path("~").exists()
    Path("data").rename("moved")
    monkeypatch.chdir("/")
    finished, cache = [], jax.config.jax_compilation_cache_dir
    monkeypatch.setattr(evaluate_command, "finish", lambda *given: finished.append(given))
    options.append("--split=train")
    assert main(["evaluate", *options]) == 1
    assert f"{tmp_path / 'data'} does not exist here" in capsys.readouterr().err
    assert main(["evaluate", *options, f"--config.data.root={tmp_path / 'moved'}", "--step=1"]) == 0
    ((built, *others),) = finished
    assert built.config.data.root == str(tmp_path / "moved")
    assert others[:3] == [tmp_path / "run", "train", 1]
    jax.config.update("jax_compilation_cache_dir", cache)


@pytest.mark.slow
def test_help_needs_no_home():
    code = (
        "import os, pwd\n"
        "def unknown(uid): raise KeyError(uid)\n"
        "pwd.getpwuid = unknown\n"
        "from sgw_jax.__main__ import main\n"
        "main(['predict', '--help'])"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, stdout=subprocess.DEVNULL)
