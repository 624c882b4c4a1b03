"""The launchers: what they would run, that it runs (with stand-ins for the cloud's commands), and what they refuse."""

import ast
import contextlib
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
NAMES = ("gke", "slurm", "tpu_vm")
gke, slurm, tpu_vm = (importlib.import_module(f"sgw_jax.launch.{name}") for name in NAMES)

COMMAND = [
    "train",
    "--config=nyud:swin_l,interaction=skem",
    "--workdir=/mnt/runs/it's",
    "--config.data.root='$(rm -rf /); \"x",
    "--config.name=`id` $HOME ${HOME} $$ $$(HOME) $(HOME) !! \\ * ~ #  two  spaces\t\u00e9",
    "",
    "--",
    "=",
    "-n",
    "\\'",
]
WORDS = ["-m", "sgw_jax", *COMMAND]
PLACE = ["--name=run-1", "--project=my-project", "--zone=us-central1-a"]
MACHINE = ["--accelerator-type=v5litepod-16"]
CODE = ["--repository=https://example.com/me/sgw_jax.git"]
TPU = {  # subcommand -> its arguments
    "create": [*PLACE, *MACHINE],
    "status": PLACE,
    "install": [*PLACE, *CODE],
    "run": [*PLACE, "--", *COMMAND],
    "logs": PLACE,
    "stop": PLACE,
    "resume": [*PLACE, *MACHINE, *CODE, "--", *COMMAND],
    "delete": PLACE,
}
GKE = ["--name=run-1", "--image=example.com/me/sgw_jax:1", "--tpu=v5e", "--topology=4x4"]
SLURM = ["--time=1:00:00"]


@pytest.fixture
def printed(capsys):
    """Calls a launcher with --dry-run and gives what it prints."""

    def run(module, *argv):
        place = argv.index("--") if "--" in argv else len(argv)
        assert module.main([*argv[:place], "--dry-run", *argv[place:]]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return run


@pytest.fixture
def lines(printed):
    """The commands that the launcher for TPU VMs would run, as lists."""

    def run(subcommand, *more):
        argv = TPU[subcommand]
        place = argv.index("--") if "--" in argv else len(argv)
        words = shlex.split(printed(tpu_vm, subcommand, *argv[:place], *more, *argv[place:]))
        starts = [index for index, word in enumerate(words) if word == "gcloud"]
        return [words[start:end] for start, end in zip(starts, [*starts[1:], None], strict=True)]

    return run


@pytest.fixture
def script(lines):
    """The script that the launcher for TPU VMs would run on the workers."""
    return lambda *argv: script_of(lines(*argv)[0])


def script_of(line):
    return line[-1].removeprefix("--command=")


@pytest.fixture
def stand_in(tmp_path):
    """Puts a command in front of all others on the PATH that `bash` gives to scripts; the folder is its home too."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def write(name, text):
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)

    return write


@pytest.fixture
def bash(tmp_path):
    """Starts a script as ssh and sbatch do; a wait gives its exit code, output and error output."""
    started = []

    def start(text, **environment):
        environment |= {"HOME": str(tmp_path), "PATH": f"{tmp_path}/bin:/usr/bin:/bin"}
        pipe = subprocess.PIPE
        process = subprocess.Popen(["bash", "-c", text], env=environment, stdout=pipe, stderr=pipe, text=True)
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


def finish(process):
    out, err = process.communicate(timeout=30)
    return process.returncode, out, err


def dumped(path):
    return path.read_text().split("\0")[:-1]


def wait_for(path):
    deadline = time.monotonic() + 20
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline, f"{path} was not written"
        time.sleep(0.01)


def refusal(capsys, module, argv):
    with pytest.raises(SystemExit) as caught:
        module.main(argv)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err.rpartition("error: ")[2]


# All launchers


@pytest.mark.parametrize("name", ["__main__", *NAMES, "local_cluster", "command_line"])
def test_the_standard_library_is_enough(name):
    tree = ast.parse((LAUNCH / f"{name}.py").read_text(encoding="utf-8"))
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in modules} <= sys.stdlib_module_names | {"sgw_jax"}


@pytest.mark.parametrize("name", ["local", "tpu-vm", "gke", "slurm"])
def test_a_checkout_alone_is_enough(name, tmp_path):
    """From anywhere, by a Python that sees its standard library alone."""
    command = [sys.executable, "-I", "-S", str(LAUNCH), name, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: sgw-jax launch {name} ")
    assert f"    sgw-jax launch {name} " in done.stdout  # an example
    assert done.stderr == ""


def test_a_checkout_sends_what_an_installation_sends(tmp_path, printed):
    command = [sys.executable, "-I", "-S", str(LAUNCH), "tpu-vm", "resume", "--dry-run", *TPU["resume"]]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == printed(tpu_vm, "resume", *TPU["resume"])


BAD = [  # launcher, arguments before the command, what the message names
    (gke, [*GKE, "--name=Run_1"], "--name: 'Run_1' found; allowed is"),
    (gke, [*GKE, f"--name={'a' * 41}"], "--name"),
    (gke, [*GKE, "--name=run\n"], "--name"),
    (gke, [*GKE, "--image=no image"], "--image: 'no image' found; allowed is"),
    (gke, [*GKE, "--tpu=v3"], "--tpu: invalid choice: 'v3'"),
    (
        gke,
        [*GKE, "--topology=4x5"],
        "--topology: '4x5' (20 chips, 4 to a host) found; allowed for v5e is, say, 2x2, 2x4",
    ),
    (gke, [*GKE, "--topology=2x2x4"], "--topology"),
    (gke, [*GKE, "--topology=1x1"], "--topology"),
    (gke, [*GKE, "--topology=0x4"], "--topology"),
    (gke, [*GKE, "--topology=four"], "--topology: 'four' found"),
    (gke, [*GKE, "--tpu=v5p"], "--topology: '4x4' (16 chips, 4 to a host) found; allowed for v5p is, say, 2x2x1"),
    (gke, [*GKE, "--tpu=v5p", "--topology=8x4x4"], "--topology"),
    (gke, [*GKE, "--tpu=v5p", "--topology=4x4x6"], "--topology"),
    (gke, [*GKE, "--namespace=a b"], "--namespace: 'a b' found"),
    (gke, [*GKE, "--context=$(id)"], "--context: '$(id)' found"),
    (gke, [*GKE, "--service-account=A"], "--service-account: 'A' found"),
    (gke, [*GKE, "--env=1A=b"], "--env: '1A=b' found; allowed is NAME=VALUE"),
    (gke, [*GKE, "--env=A=b\nc"], "--env: 'A=b\\nc' found; allowed is text without line breaks"),
    (gke, [*GKE, "--max-restarts=-1"], "--max-restarts: '-1' found; allowed is an integer from 0"),
    (gke, [*GKE, "--seconds-to-save=0"], "--seconds-to-save: '0' found; allowed is an integer from 1"),
    (gke, [*GKE, "--spo"], "--spo"),
    (slurm, [], "--time"),
    (slurm, ["--time=tomorrow"], "--time: 'tomorrow' found; allowed is minutes, "),
    (slurm, ["--time=1:00\n#SBATCH --uid=0"], "--time"),
    (slurm, ["--time=1:00:00:00"], "--time: '1:00:00:00' found"),
    (slurm, [*SLURM, "--nodes=0"], "--nodes: '0' found; allowed is an integer from 1"),
    (slurm, [*SLURM, "--nodes=two"], "--nodes: 'two' found"),
    (slurm, [*SLURM, "--gpus-per-node=1.5"], "--gpus-per-node: '1.5' found"),
    (
        slurm,
        [*SLURM, "--gpus-per-node=8", "--processes-per-node=3"],
        "--processes-per-node: 3 found; allowed is a divisor",
    ),
    (slurm, [*SLURM, "--cpus-per-task=\u0663"], "--cpus-per-task"),
    (slurm, [*SLURM, "--partition=a b"], "--partition: 'a b' found"),
    (slurm, [*SLURM, "--account=;"], "--account: ';' found"),
    (slurm, [*SLURM, "--job-name=a b"], "--job-name: 'a b' found"),
    (slurm, [*SLURM, "--output=a b"], "--output: 'a b' found"),
    (
        slurm,
        [*SLURM, "--seconds-to-save=100000"],
        "--seconds-to-save: '100000' found; allowed is an integer from 1 to 65535",
    ),
    (slurm, [*SLURM, "--container-image=a b"], "--container-image: 'a b' found"),
    (slurm, [*SLURM, "--container-image=a", "--container-mounts=/a"], "--container-mounts: '/a' found"),
    (slurm, [*SLURM, "--container-mounts=/a:/a"], "--container-mounts: found without --container-image"),
    (slurm, [*SLURM, "--setup=a\nb"], "--setup: 'a\\nb' found; allowed is text without line breaks"),
    (tpu_vm, ["run", *PLACE[1:]], "--name"),
    (tpu_vm, ["run", *PLACE, "--name=-x"], "--name: '-x' found"),
    (tpu_vm, ["run", *PLACE, "--project=X"], "--project: 'X' found; allowed is a project ID"),
    (tpu_vm, ["run", *PLACE, "--zone=us-central1"], "--zone: 'us-central1' found; allowed is a zone"),
    (
        tpu_vm,
        ["resume", *PLACE, *CODE, "--accelerator-type=v5e"],
        "--accelerator-type: 'v5e' found; allowed is a type of v4",
    ),
    (tpu_vm, ["resume", *PLACE, *CODE, "--accelerator-type=v3-8"], "--runtime-version: nothing found; only for v4, "),
    (tpu_vm, ["resume", *PLACE, *CODE, *MACHINE, "--runtime-version=$x"], "--runtime-version: '$x' found"),
    (tpu_vm, ["resume", *PLACE, *CODE, *MACHINE, "--service-account=me"], "--service-account: 'me' found"),
    (tpu_vm, ["resume", *PLACE, *CODE, *MACHINE, "--valid-until-duration=6"], "--valid-until-duration: '6' found"),
    (tpu_vm, ["resume", *PLACE, *CODE, *MACHINE, "--poll-seconds=0"], "--poll-seconds: '0' found"),
    (tpu_vm, ["resume", *PLACE, *CODE, *MACHINE, "--max-restarts=x"], "--max-restarts: 'x' found"),
    (tpu_vm, ["resume", *PLACE, *MACHINE, "--repository=/tmp/x"], "--repository: '/tmp/x' found; allowed is https://"),
    (tpu_vm, ["resume", *PLACE, *MACHINE, "--repository=https://me:word@example.com/x"], "--repository"),
    (tpu_vm, ["resume", *PLACE, *MACHINE, "--repository=--upload-pack=x"], "--repository"),
    (tpu_vm, ["resume", *PLACE, *MACHINE, *CODE, "--revision=--all"], "--revision: '--all' found"),
]


@pytest.mark.parametrize(("module", "argv", "named"), BAD, ids=[f"{m.__name__} {' '.join(a[-1:])}" for m, a, _ in BAD])
def test_a_bad_argument_is_named(module, argv, named, capsys):
    assert named in refusal(capsys, module, [*argv, "--", *COMMAND])


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["logs", *PLACE, "--worker=all"], "--worker: 'all' found"),
        (["logs", *PLACE, "--lines=0"], "--lines: '0' found"),
        (["stop", *PLACE, "--seconds-to-save=1m"], "--seconds-to-save: '1m' found"),
        (["stop", *PLACE, "--", "train"], "-- command: ['train'] found; allowed is nothing"),
        (["start", *PLACE], "'start'"),
        ([], "create | status"),
    ],
)
def test_a_bad_argument_of_the_other_subcommands_is_named(argv, named, capsys):
    assert named in refusal(capsys, tpu_vm, argv)


@pytest.mark.parametrize("start", [[gke, *GKE], [slurm, *SLURM], [tpu_vm, "run", *PLACE]], ids=NAMES)
@pytest.mark.parametrize(
    ("command", "named"),
    [
        ([], "nothing found; allowed is train | evaluate | predict | plan"),
        (["--"], "nothing found"),
        (["--", "python", "-m", "sgw_jax", "train"], "'python' found; allowed is what follows `python -m sgw_jax`"),
        (
            ["--", "train", "--workdir=/b/c", "--config=a\nb"],
            "'--config=a\\nb' found; allowed is text without line",
        ),
        (["--", "train", "--workdir=/b/c", "--config=a\rb"], "'--config=a\\rb' found"),
        (["--", "train", "--workdir=/b/c", "--config=a\0b"], "'--config=a\\x00b' found"),
        (
            ["--", "train", "--workdir=/b/c", "--config=\udcff"],
            "'--config=\\udcff' found; allowed is text in UTF-8",
        ),
    ],
)
def test_a_bad_command_is_named(start, command, named, capsys):
    module, *argv = start
    error = refusal(capsys, module, [*argv, *command])
    assert error.startswith("-- command: ")
    assert named in error


@pytest.mark.parametrize("start", [[gke, *GKE], [tpu_vm, "resume", *PLACE, *MACHINE, *CODE]], ids=["gke", "resume"])
@pytest.mark.parametrize(
    ("workdir", "found"),
    [
        ([], "nothing"),
        (["--workdir=runs/x"], "'runs/x'"),
        (["--workdir=gs://bucket/x"], "'gs://bucket/x'"),
        (["--workdir=/a", "--workdir", "x"], "'x'"),
        (["--workdir"], ""),
    ],
)
def test_a_run_that_moves_needs_a_directory_that_stays(start, workdir, found, capsys):
    module, *argv = start
    error = refusal(capsys, module, [*argv, "--", "train", "--config=nyud", *workdir])
    assert error.startswith(f"--workdir: {found}")
    assert "allowed is a directory" in error


@pytest.mark.parametrize(
    ("module", "argv", "missing"),
    [(gke, GKE, "kubectl"), (slurm, SLURM, "sbatch"), (tpu_vm, ["run", *PLACE], "gcloud")],
)
def test_a_missing_program_is_named(module, argv, missing, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert module.main([*argv, "--", *COMMAND]) == 127
    assert f"{missing} found nowhere on PATH" in capsys.readouterr().err


def scripts(lines, printed):
    found = {name: script_of(lines(name)[0]) for name in ("install", "run", "logs", "stop")}
    found["install with a bucket"] = script_of(lines("install", "--bucket=my-runs")[0])
    found["probe"] = script_of(lines("resume")[1])
    found["slurm"] = printed(slurm, *SLURM, "--", *COMMAND)
    options = ["--gpus-per-node=8", "--processes-per-node=2", "--no-requeue", "--setup=module load cuda"]
    return found | {"slurm options": printed(slurm, *SLURM, *options, "--", *COMMAND)}


def test_scripts_are_bash(lines, printed):
    for name, text in scripts(lines, printed).items():
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), name


def test_shellcheck_finds_nothing(lines, printed, tmp_path):
    files = []
    for name, text in scripts(lines, printed).items():
        files.append(tmp_path / name)
        files[-1].write_text(text)
    done = subprocess.run(["shellcheck", "--shell=bash", *files], capture_output=True, text=True, check=False)
    assert done.stdout == ""
    assert done.returncode == 0


# Cloud TPU VMs


def test_create_asks_for_a_queued_resource(lines):
    head = ["gcloud", "compute", "tpus", "queued-resources", "create", "run-1", *PLACE[1:], "--node-id=run-1"]
    assert lines("create") == [[*head, *MACHINE, "--runtime-version=v2-alpha-tpuv5-lite"]]
    more = ["--spot", "--service-account=me@my-project.iam.gserviceaccount.com", "--valid-until-duration=6h"]
    assert set(more) < set(lines("create", *more)[0])


@pytest.mark.parametrize(
    ("argv", "runtime"),
    [
        (["--accelerator-type=v4-8"], "tpu-ubuntu2204-base"),
        (["--accelerator-type=v5p-128"], "v2-alpha-tpuv5"),
        (["--accelerator-type=v6e-256"], "v2-alpha-tpuv6e"),
        (["--accelerator-type=v6e-8", "--runtime-version=other"], "other"),
        (["--accelerator-type=v3-8", "--runtime-version=tpu-vm-base"], "tpu-vm-base"),
    ],
)
def test_the_runtime_version_follows_the_accelerator_type(argv, runtime, lines):
    assert f"--runtime-version={runtime}" in lines("create", *argv)[0]


def test_the_other_subcommands_are_one_command_each(lines):
    queued = ["gcloud", "compute", "tpus", "queued-resources"]
    ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "run-1", *PLACE[1:]]
    assert lines("status") == [[*queued, "describe", "run-1", *PLACE[1:]]]
    assert lines("delete") == [[*queued, "delete", "run-1", *PLACE[1:], "--force", "--quiet"]]
    for name in ("install", "run", "stop"):
        assert [line[:-1] for line in lines(name)] == [[*ssh, "--worker=all", "--quiet"]]
    [line] = lines("logs", "--worker=3", "--follow", "--lines=7")
    assert line[:-1] == [*ssh, "--worker=3", "--quiet"]
    assert 'tail --lines=7 --follow "$HOME/sgw_jax_run/log"' in line[-1]


def test_resume_shows_all_that_it_may_run(lines):
    found = lines("resume")
    assert found[2:4] == [*lines("install"), *lines("run")]
    assert found[5:] == [*lines("delete"), *lines("create")]
    assert [line[4] for line in found] == ["describe", "ssh", "ssh", "ssh", "describe", "delete", "create"]


def test_what_fails_ends_with_gclouds_exit_code(stand_in, tmp_path, monkeypatch):
    stand_in("gcloud", "exit 5")
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    assert tpu_vm.main(["run", *TPU["run"]]) == 5


CURL = """\
case "${@: -1}" in
  */attributes/worker-network-endpoints) echo "$ENDPOINTS" ;;
  */attributes/agent-worker-number) echo 1 ;;
  *) exit 22 ;;
esac"""


@pytest.fixture
def worker(stand_in, tmp_path):
    """A host: metadata server, `python` that notes what it is given and runs until it is told to stop."""
    (tmp_path / "sgw_jax").mkdir()
    stand_in("curl", CURL)
    note = 'env | grep ^SGW_ | sort >"$HOME/variables"\nprintf "%s\\0" "$@" >"$HOME/arguments"\necho hello\n'
    stand_in("python", f"trap 'exit 143' TERM\n{note}while [ ! -e \"$HOME/end\" ]; do sleep 0.02; done\nexit 7")
    yield tmp_path
    with contextlib.suppress(OSError, ValueError):
        os.kill(int((tmp_path / "sgw_jax_run" / "pid").read_text()), signal.SIGKILL)


def test_the_run_gets_its_arguments_literally(worker, script, bash):
    code, out, err = finish(bash(script("run"), ENDPOINTS="host-0"))
    assert (code, err) == (0, "")
    assert out.startswith("sgw_jax: started on ")
    wait_for(worker / "sgw_jax_run" / "log")
    assert dumped(worker / "arguments") == WORDS
    assert (worker / "variables").read_text() == ""  # one host: nobody to join


@pytest.mark.parametrize("endpoints", ["id:0:10.0.0.5,id:1:10.0.0.6,id:2:10.0.0.7", "10.0.0.5,10.0.0.6,10.0.0.7"])
def test_hosts_of_a_pod_join_each_other(endpoints, worker, script, bash):
    assert finish(bash(script("run"), ENDPOINTS=endpoints))[0] == 0
    wait_for(worker / "sgw_jax_run" / "log")
    assert (worker / "variables").read_text().split() == [
        "SGW_COORDINATOR=10.0.0.5:8482",
        "SGW_PROCESS=1",
        "SGW_PROCESSES=3",
    ]


def test_a_run_is_started_once_looked_after_and_stopped(worker, lines, bash):
    probe, _, run = (script_of(line) for line in lines("resume")[1:4])
    stop = script_of(lines("stop")[0])
    folder = worker / "sgw_jax_run"

    def state():
        code, out, err = finish(bash(probe))
        assert (code, err) == (0, "")
        return out

    assert state() == "sgw_jax: none\n"
    assert finish(bash(stop))[1].startswith("sgw_jax: nothing runs on ")
    assert finish(bash(run, ENDPOINTS="host-0"))[0] == 0
    wait_for(folder / "log")
    assert state() == "sgw_jax: running\n"
    code, _, err = finish(bash(run, ENDPOINTS="host-0"))
    assert code == 3
    assert f"process {(folder / 'pid').read_text().strip()}; stop it first" in err
    assert finish(bash(probe.replace("swin_l", "swin_t")))[1] == "sgw_jax: other\n"
    assert finish(bash(stop))[1].startswith("sgw_jax: stopped on ")
    assert (folder / "exit_code").read_text() == "143\n"
    assert state() == "sgw_jax: stopped\n"
    assert finish(bash(probe.replace("swin_l", "swin_t")))[1] == "sgw_jax: none\n"

    assert finish(bash(run, ENDPOINTS="host-0"))[0] == 0  # the lock is free again; this one ends by itself
    assert state() == "sgw_jax: running\n"
    (worker / "end").touch()
    wait_for(folder / "exit_code")
    code, out, _ = finish(bash(script_of(lines("logs", "--lines=1")[0])))
    assert (code, out) == (0, "hello\n")
    assert (folder / "log").read_text() == "hello\nhello\n"
    deadline = time.monotonic() + 20
    while state() == "sgw_jax: running\n":  # between the exit code and the end of what wrote it
        assert time.monotonic() < deadline
    assert state() == "sgw_jax: ended 7\n"


def test_no_metadata_no_start(worker, script, bash, stand_in):
    stand_in("curl", "echo unreachable >&2; exit 6")
    assert finish(bash(script("run")))[::2] == (6, "unreachable\n")
    assert not (worker / "arguments").exists()


@pytest.fixture
def repository(tmp_path, stand_in):
    """A repository with a branch `main` that goes on after tag v1, under the address of CODE; and Pythons that note."""
    if not shutil.which("git"):
        pytest.skip("git is not installed")
    folder = tmp_path / "repository"

    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.com", "-c", "commit.gpgsign=false"]
        done = subprocess.run(["git", "-C", folder, *identity, *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    folder.mkdir()
    git("init", "--quiet", "--initial-branch=main")
    commits = []
    for text in ("one", "two"):
        (folder / "file").write_text(text)
        git("add", "file")
        git("commit", "--quiet", f"--message={text}")
        commits.append(git("rev-parse", "HEAD"))
    git("tag", "v1", commits[0])
    (tmp_path / ".gitconfig").write_text(f'[url "file://{folder}"]\n insteadOf = {CODE[0].partition("=")[2]}\n')
    note = 'echo "$(basename "$0") $*" >>"$HOME/notes"\n'
    make = f"mkdir -p .venv/bin; echo '{note}' >.venv/bin/python; chmod +x .venv/bin/python\n"
    for name in ("python3.13", "python3.12", "python3.11", "python3"):
        stand_in(name, f'[ "$1" != -c ] || exit "${{OLD:-0}}"\n{note}[[ "$*" != *venv* ]] || {{ {make}}}')
    return git, commits


def test_install_takes_branches_tags_and_commits(repository, script, bash, tmp_path):
    git, commits = repository
    checkout = tmp_path / "sgw_jax" / "file"
    for revision, text in (("main", "two"), ("v1", "one"), (commits[1][:10], "two")):
        code, out, err = finish(bash(script("install", f"--revision={revision}")))
        assert (code, err) == (0, ""), revision
        assert out == f"sgw_jax: installed {commits[text == 'two']}\n"
        assert checkout.read_text() == text
        checkout.write_text("changed by hand")
    (tmp_path / "repository" / "file").write_text("three")
    git("commit", "--quiet", "--all", "--message=three")
    assert finish(bash(script("install")))[0] == 0
    assert checkout.read_text() == "three"  # the branch as it is now
    notes = (tmp_path / "notes").read_text().splitlines()
    assert notes == ["python3.13 -m venv .venv", *["python -m pip install --quiet --editable .[train,tpu]"] * 4]


@pytest.mark.parametrize("mounted", [False, True])
def test_install_mounts_a_bucket(mounted, repository, script, bash, stand_in, tmp_path):
    stand_in("mountpoint", f"exit {0 if mounted else 1}")
    for name in ("sudo", "gcsfuse"):
        stand_in(name, 'echo "$(basename "$0") $*" >>"$HOME/mounts"')
    code, out, err = finish(bash(script("install", "--bucket=my-runs"), USER="me"))
    assert (code, err) == (0, "")
    assert out.startswith("sgw_jax: installed ")
    steps = ["sudo mkdir -p /mnt/runs", "sudo chown me /mnt/runs", "gcsfuse --implicit-dirs my-runs /mnt/runs"]
    done = (tmp_path / "mounts").read_text().splitlines() if (tmp_path / "mounts").exists() else []
    assert done == ([] if mounted else steps)


def test_a_bucket_needs_gcsfuse(repository, script, bash, stand_in, tmp_path):
    stand_in("mountpoint", "exit 1")
    code, out, err = finish(bash(script("install", "--bucket=my-runs"), USER="me"))
    assert (code, out) == (1, "")
    assert "gcsfuse found nowhere on " in err


def test_install_names_a_revision_that_is_not_there(repository, script, bash):
    code, _, err = finish(bash(script("install", "--revision=v9")))
    assert code == 1
    assert "--revision: 'v9' found; allowed is a branch, tag or commit of https://example.com/me/sgw_jax.git" in err


def test_install_brings_a_python_where_there_is_only_an_old_one(repository, script, bash, tmp_path):
    assert finish(bash(script("install"), OLD="1"))[::2] == (0, "")
    assert (tmp_path / "notes").read_text().splitlines() == [
        "python3 -m pip install --quiet --user uv",
        "python3 -m uv venv --quiet --seed --python 3.12 .venv",
        "python -m pip install --quiet --editable .[train,tpu]",
    ]


GCLOUD = """\
printf '%s\\0' "$@" >>"$HOME/calls"
printf '\\n\\n' >>"$HOME/calls"
answer() {
  local line
  line=$(head -n 1 "$HOME/$1")
  sed -i 1d "$HOME/$1"
  case "$line" in
    "NOT_FOUND" | "") echo "ERROR: $line" >&2; exit 1 ;;
    *) echo -e "$line" ;;
  esac
}
case "$3 $4 ${@: -1}" in
  "queued-resources describe "*) answer states ;;
  "tpu-vm describe "*) answer nodes ;;
  "tpu-vm ssh "*"same()"*) answer runs ;;
  "tpu-vm ssh "*"git clone"*) exit "${INSTALL:-0}" ;;
esac"""


@pytest.fixture
def resumed(tmp_path, stand_in, monkeypatch, lines, capsys):
    """`resume` with a gcloud that answers with one state after the other: exit code, what was called, what was said."""
    names = {tuple(lines(name)[0][1:]): name for name in ("create", "delete", "install", "run")}
    looks = {tuple(line[1:]): "" for line in (*lines("resume")[:2], lines("resume")[4])}
    stand_in("gcloud", GCLOUD)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    naps = []
    monkeypatch.setattr(tpu_vm.time, "sleep", naps.append)

    def run(states, runs=(), nodes=(), *argv):
        for name, answers in (("states", states), ("runs", runs), ("nodes", nodes)):
            (tmp_path / name).write_text("".join(f"{answer}\n" for answer in answers))
        code = tpu_vm.main(["resume", "--poll-seconds=9", *argv, *TPU["resume"]])
        calls = [
            tuple((text + "\0").split("\0")[:-1]) for text in (tmp_path / "calls").read_text().split("\0\n\n")[:-1]
        ]
        assert set(naps) <= {9}
        done = [(names | looks)[call] for call in calls]  # whatever was called is one of those commands, literally
        return code, [name for name in done if name], capsys.readouterr().err

    return run


def answers(*runs):
    """One line of every worker."""
    return "\\n".join(f"sgw_jax: {run}" for run in runs)


NONE, RUNNING = answers("none", "none"), answers("running", "running")


def test_resume_goes_on_through_a_preemption(resumed):
    states = ["NOT_FOUND", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "ACTIVE"]
    states += ["SUSPENDING", "SUSPENDED", "CREATING", "ACTIVE", "ACTIVE", "ACTIVE"]
    runs = [NONE, RUNNING, NONE, RUNNING, answers("ended 0", "ended 0")]
    code, done, said = resumed(states, runs, (), "--max-restarts=1")
    assert code == 0
    assert done == ["create", "install", "run", "delete", "create", "install", "run"]
    assert "restart 1 of 1" in said


def test_resume_starts_a_failed_run_again_on_the_same_machines(resumed):
    ended = answers("ended 1", "ended 134")
    code, done, said = resumed(["ACTIVE"] * 5, [NONE, RUNNING, ended, ended], (), "--max-restarts=1")
    assert code == 1
    assert done == ["install", "run"] * 2
    assert "--max-restarts=1 are used up" in said


@pytest.mark.parametrize("state", ["FAILED", "SUSPENDED"])
def test_resume_has_a_bound(state, resumed):
    code, done, _ = resumed([state] * 3, (), (), "--max-restarts=2")
    assert (code, done) == (1, ["delete", "create"] * 2)


def test_resume_waits_while_one_worker_still_runs(resumed):
    runs = [answers("ended 0", "running"), answers("ended 0", "ended 0")]
    assert resumed(["ACTIVE"] * 2, runs)[:2] == (0, [])


def test_resume_ends_when_the_run_is_stopped(resumed):
    stopped = answers("stopped", "stopped")
    code, done, said = resumed(["ACTIVE"] * 2, [RUNNING, stopped])
    assert (code, done) == (143, [])
    assert "was stopped and has saved" in said
    assert resumed(["ACTIVE"] * 2, [stopped, answers("ended 0")])[1] == ["install", "run"]  # stopped before it began


def test_resume_ends_when_the_machines_are_deleted(resumed):
    code, done, _ = resumed(["ACTIVE", "NOT_FOUND"], [RUNNING])
    assert (code, done) == (1, [])


def test_resume_leaves_another_run_alone(resumed):
    code, done, said = resumed(["ACTIVE"], [answers("other", "other")])
    assert (code, done) == (3, [])
    assert "another command runs there" in said


def test_resume_replaces_machines_that_are_gone_before_their_queued_resource_says_so(resumed):
    states = ["ACTIVE", "ACTIVE", "ACTIVE", "ACTIVE"]
    code, done, _ = resumed(states, [RUNNING, "", NONE, answers("ended 0")], ["PREEMPTED"])
    assert code == 0
    assert done == ["delete", "create", "install", "run"]


def test_resume_gives_up_when_nothing_answers(resumed, monkeypatch):
    code, done, said = resumed(["ACTIVE"] * 3 + [""] * 7, ["", "", ""], ["READY", "READY", "READY"])
    assert (code, done) == (1, [])
    assert "no answer 10 times in a row" in said
    monkeypatch.setenv("INSTALL", "1")
    code, done, _ = resumed(["ACTIVE"] * 10, [NONE] * 10)
    assert code == 1
    assert done == ["install"] * 10


# GKE


def unpack(manifest):
    job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    return job, pod, pod["containers"][0]


def expand(text, variables):
    """What Kubernetes makes of a command's arguments and of variables."""

    def replace(match):
        return "$" if match[0] == "$$" else variables.get(match[1], match[0])

    return re.sub(r"\$\$|\$\(([^)]*)\)", replace, text)


def test_the_manifest(printed):
    manifest = json.loads(printed(gke, *GKE, "--max-restarts=7", "--seconds-to-save=90", "--", *COMMAND))
    assert (manifest["apiVersion"], manifest["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    annotations = {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"}
    assert manifest["metadata"] == {"name": "run-1", "annotations": annotations}
    assert manifest["spec"]["failurePolicy"] == {"maxRestarts": 7}
    [replicated] = manifest["spec"]["replicatedJobs"]
    assert (replicated["name"], replicated["replicas"]) == ("workers", 1)
    job, pod, container = unpack(manifest)
    assert (job["parallelism"], job["completions"], job["completionMode"], job["backoffLimit"]) == (4, 4, "Indexed", 0)
    assert (pod["restartPolicy"], pod["terminationGracePeriodSeconds"]) == ("Never", 90)
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "4x4",
    }
    assert "tolerations" not in pod
    assert "serviceAccountName" not in pod
    assert container["image"] == "example.com/me/sgw_jax:1"
    assert container["resources"] == {"requests": {"google.com/tpu": 4}, "limits": {"google.com/tpu": 4}}
    assert [port["containerPort"] for port in container["ports"]] == [8471, 8080]


def test_options_of_the_manifest(printed):
    options = ["--spot", "--service-account=writer", "--namespace=team", "--env=HOME=/a=b", "--env=B=$(HOME) $$"]
    manifest = json.loads(printed(gke, *GKE, *options, "--", *COMMAND))
    _, pod, container = unpack(manifest)
    assert manifest["metadata"]["namespace"] == "team"
    assert pod["serviceAccountName"] == "writer"
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert [toleration["key"] for toleration in pod["tolerations"]] == ["cloud.google.com/gke-spot"]
    values = {variable["name"]: expand(variable["value"], {"HOME": "/a=b"}) for variable in container["env"]}
    assert values == {"HOME": "/a=b", "B": "$(HOME) $$"}


def test_the_container_gets_its_arguments_literally(printed):
    _, _, container = unpack(json.loads(printed(gke, *GKE, "--env=HOME=/root", "--", *COMMAND)))
    assert [expand(word, {"HOME": "/root"}) for word in container["command"]] == ["python", *WORDS]
    assert "args" not in container


@pytest.mark.parametrize(
    ("tpu", "topology", "hosts"),
    [
        ("v5e", "2x2", 1),
        ("v5e", "16x16", 64),
        ("v6e", "2x4", 2),
        ("v6e", "8x16", 32),
        ("v5p", "2x2x1", 1),
        ("v5p", "2x4x4", 8),
        ("v5p", "4x4x12", 48),
        ("v5p", "16x16x24", 1536),
    ],
)
def test_every_host_of_a_topology_gets_a_pod(tpu, topology, hosts, printed):
    manifest = json.loads(printed(gke, *GKE, f"--tpu={tpu}", f"--topology={topology}", "--", *COMMAND))
    job, pod, _ = unpack(manifest)
    assert (job["parallelism"], job["completions"]) == (hosts, hosts)
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == topology
    assert ("annotations" in manifest["metadata"]) == (hosts > 1)


def test_kubectl_gets_the_manifest(printed, stand_in, tmp_path, monkeypatch):
    stand_in("kubectl", 'printf "%s\\0" "$@" >"$HOME/arguments"\ncat >"$HOME/manifest"\nexit 4')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert gke.main([*GKE, "--context=mine", "--", *COMMAND]) == 4
    assert dumped(tmp_path / "arguments") == ["--context=mine", "apply", "-f", "-"]
    assert json.loads((tmp_path / "manifest").read_text()) == json.loads(printed(gke, *GKE, "--", *COMMAND))


def test_a_bucket_is_mounted(printed):
    manifest = json.loads(printed(gke, *GKE, "--bucket=my-runs", "--", *COMMAND))
    job, pod, container = unpack(manifest)
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    assert pod["volumes"][0]["csi"]["volumeAttributes"] == {"bucketName": "my-runs"}
    assert container["volumeMounts"] == [{"name": "runs", "mountPath": "/mnt/runs"}]


@pytest.mark.parity
def test_kubernetes_knows_every_field_of_the_job(printed):
    validate = pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed")
    options = ["--spot", "--service-account=writer", "--env=A=b", "--bucket=my-runs"]
    template = json.loads(printed(gke, *GKE, *options, "--", *COMMAND))["spec"]["replicatedJobs"][0]["template"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "run-1-workers-0"}, **template}
    validate.validate(job, validate.latest_version(), strict=True)


# Slurm


def directives(text):
    found = [
        line.removeprefix("#SBATCH --").partition("=") for line in text.splitlines() if line.startswith("#SBATCH ")
    ]
    return {name: value for name, _, value in found}


def test_the_batch_script_asks_for_what_was_asked_for(printed):
    found = directives(printed(slurm, *SLURM, "--nodes=2", "--gpus-per-node=8", "--", *COMMAND))
    assert found == {
        "job-name": "sgw_jax",
        "nodes": "2",
        "ntasks-per-node": "8",
        "gpus-per-node": "8",
        "time": "1:00:00",
        "output": "slurm-%j.out",
        "open-mode": "append",
        "signal": "B:USR1@120",
        "requeue": "",
    }
    options = {"cpus-per-task": "6", "partition": "gpu,gpu2", "account": "lab", "job-name": "a", "output": "/x/%j.log"}
    text = printed(slurm, *SLURM, *(f"--{k}={v}" for k, v in options.items()), "--seconds-to-save=600", "--", *COMMAND)
    assert directives(text).items() >= {**options, "signal": "B:USR1@600"}.items()
    assert "srun=(srun --kill-on-bad-exit=1 --cpus-per-task=6)" in text


@pytest.mark.parametrize("limit", ["90", "90:00", "1:30:00", "2-12", "2-12:30", "2-12:30:00"])
def test_every_form_of_a_time_limit(limit, printed):
    assert directives(printed(slurm, f"--time={limit}", "--", *COMMAND))["time"] == limit


def test_containers(printed):
    options = ["--container-image=nvcr.io#nvidia/jax:25.01-py3", "--container-mounts=/data:/data:ro,/home/me:/home/me"]
    text = printed(slurm, *SLURM, *options, "--", *COMMAND)
    [line] = [line for line in text.splitlines() if line.startswith("srun=(")]
    assert shlex.split(line.removeprefix("srun=(").removesuffix(")")) == ["srun", "--kill-on-bad-exit=1", *options]
    assert "--container-image=/shared/jax.sqsh" in printed(
        slurm, *SLURM, "--container-image=/shared/jax.sqsh", "--", *COMMAND
    )


@pytest.fixture
def cluster(stand_in, tmp_path):
    """srun that runs one task here, python that notes what it is given and ends as it is told, scontrol, scancel."""
    stand_in("srun", 'while [[ "$1" == --* ]]; do shift; done\nexec "$@"')
    note = (
        'printf "%s\\0" "$@" >"$HOME/arguments"\necho "${JAX_LOCAL_DEVICE_IDS:-} ${FROM_SETUP:-}" >"$HOME/variables"\n'
    )
    wait = 'if [ "$CODE" = wait ]; then while :; do sleep 0.02; done; fi\nexit "$CODE"'
    stand_in("python", f"trap 'sleep 0.1; exit 143' TERM\necho $$ >\"$HOME/pid\"\n{note}{wait}")
    shown = 'echo "JobId=$3 PreemptEligibleTime=2025-01-01T00:00:00 PreemptTime=${PREEMPTED:-None}"'
    stand_in("scontrol", f'if [ "$1" = show ]; then {shown}; else echo "$*" >>"$HOME/scontrol"; fi')
    stand_in("scancel", 'echo "$*" >"$HOME/scancel"\nkill -TERM "$(cat "$HOME/pid")"')
    return tmp_path


def queued_again(folder):
    return (folder / "scontrol").read_text() if (folder / "scontrol").exists() else ""


def test_tasks_get_their_arguments_literally(cluster, printed, bash):
    text = printed(slurm, *SLURM, "--setup=FROM_SETUP=$((1 + 1)); export FROM_SETUP $UNSET", "--", *COMMAND)
    assert finish(bash(text, SLURM_JOB_ID="77", CODE="0")) == (0, "", "")
    assert dumped(cluster / "arguments") == WORDS
    assert (cluster / "variables").read_text() == " 2\n"
    assert queued_again(cluster) == ""


def test_fewer_processes_share_the_gpus(cluster, printed, bash):
    text = printed(slurm, *SLURM, "--gpus-per-node=8", "--processes-per-node=2", "--", *COMMAND)
    assert directives(text)["ntasks-per-node"] == "2"
    assert finish(bash(text, SLURM_JOB_ID="77", SLURM_LOCALID="1", CODE="0")) == (0, "", "")
    assert dumped(cluster / "arguments") == WORDS
    assert (cluster / "variables").read_text() == "4,5,6,7 \n"


@pytest.mark.parametrize(
    ("code", "preempted", "options", "again"),
    [
        ("1", "None", [], ""),
        ("137", "2025-01-01T00:00:00", [], ""),
        ("143", "None", [], ""),  # one process failed, srun ended the others
        ("143", "2025-01-01T00:00:00", [], "requeue 77\n"),
        ("143", "2025-01-01T00:00:00", ["--no-requeue"], ""),
    ],
)
def test_only_what_was_preempted_is_queued_again(code, preempted, options, again, cluster, printed, bash):
    text = printed(slurm, *SLURM, *options, "--", *COMMAND)
    assert finish(bash(text, SLURM_JOB_ID="77", CODE=code, PREEMPTED=preempted)) == (int(code), "", "")
    assert queued_again(cluster) == again


@pytest.mark.parametrize(("options", "again"), [([], "requeue 77\n"), (["--no-requeue"], "")])
def test_before_the_time_limit_the_run_saves_and_is_queued_again(options, again, cluster, printed, bash):
    process = bash(printed(slurm, *SLURM, *options, "--", *COMMAND), SLURM_JOB_ID="77", CODE="wait")
    wait_for(cluster / "variables")
    process.send_signal(signal.SIGUSR1)
    assert finish(process) == (143, "", "")
    assert (cluster / "scancel").read_text() == "--signal=TERM 77\n"
    assert queued_again(cluster) == again


def test_a_setup_that_fails_starts_nothing(cluster, printed, bash):
    text = printed(slurm, *SLURM, "--setup=false", "--", *COMMAND)
    assert finish(bash(text, SLURM_JOB_ID="77", CODE="0"))[0] == 1
    assert not (cluster / "arguments").exists()


def test_sbatch_gets_the_script(printed, stand_in, tmp_path, monkeypatch):
    stand_in("sbatch", 'echo "$#" >"$HOME/count"\ncat >"$HOME/script"\nexit 4')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert slurm.main([*SLURM, "--", *COMMAND]) == 4
    assert (tmp_path / "count").read_text() == "0\n"
    assert (tmp_path / "script").read_text() == printed(slurm, *SLURM, "--", *COMMAND)
