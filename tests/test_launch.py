"""The launchers: what they would run, what they refuse, and that no argument is ever read by a shell."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

LAUNCH = Path(__file__).resolve().parents[1] / "launch"
TPU = ("--project=my-project", "--zone=us-west4-a")
SLICE = ("--accelerator-type=v5litepod-16", "--spot")
SOURCE = ("--repository=https://example.org/sgw_jax.git", "--revision=v0.1")
TRAIN = ("--", "train", "--config=nyud", "--workdir=/mnt/runs/run-1")
# What a careless launcher would run, expand or split.
HOSTILE = (
    "--config.data.root=$(touch pwned); `touch pwned` \"$HOME\" 'x' & touch pwned",
    "--config.tasks=a b*?{c,d}~ !!",
    "-- ; \\ $$ $(NAME) %s {braces}",
)


def launch(script, *arguments, code=0, path=None, given=None):
    environment = {**os.environ, **({"PATH": f"{path}{os.pathsep}{os.environ['PATH']}"} if path else {})}
    done = subprocess.run(
        [sys.executable, str(LAUNCH / script), *arguments],
        capture_output=True, text=True, env=environment, input=given, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def stub(folder, name, body):
    """An executable of that name; ``body`` is Python."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!{sys.executable}\nimport json, os, sys\n{body}\n")
    file.chmod(0o755)
    return folder


RECORD = "open(os.environ['RECORD'], 'a').write(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]) + '\\n')"


@pytest.fixture
def record(tmp_path, monkeypatch):
    """The calls of stubs, as they come."""
    path = tmp_path / "calls.jsonl"
    path.touch()
    monkeypatch.setenv("RECORD", str(path))
    return lambda: [json.loads(line) for line in path.read_text().splitlines()]


def check_bash(script):
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0
    if shutil.which("shellcheck"):
        found = subprocess.run(
            ["shellcheck", "--shell=bash", "-"], input=script, text=True, capture_output=True, check=False
        )
        assert found.returncode == 0, found.stdout


# ---- Cloud TPU VMs -------------------------------------------------------------------------------------------------


def commands(*arguments, after=()):
    """The local commands that a dry run prints; a quoted argument may hold line breaks."""
    found = []
    for word in shlex.split(launch("tpu_vm.py", *arguments, "--dry-run", *after), comments=True):
        found += [[]] if word == "gcloud" else []
        found[-1].append(word)
    return found


def remote(command):
    """The bash script that a command hands to the workers."""
    (text,) = [part for part in command if part.startswith("--command=")]
    shell, option, script = shlex.split(text.removeprefix("--command="))
    assert (shell, option) == ("bash", "-c")
    return script


def test_a_slice_is_asked_for():
    (command,) = commands("create", "run-1", *TPU, *SLICE)
    assert command[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "run-1"]
    wanted = {"--node-id=run-1", "--accelerator-type=v5litepod-16", "--runtime-version=v2-alpha-tpuv5-lite", "--spot"}
    assert wanted | set(TPU) <= set(command)
    (command,) = commands("create", "run-1", *TPU, "--accelerator-type=v6e-8", "--runtime-version=other")
    assert "--runtime-version=other" in command
    assert "--spot" not in command


def test_a_slice_is_given_back_with_its_machines():
    (command,) = commands("delete", "run-1", *TPU)
    assert command[4:6] == ["delete", "run-1"]
    assert {"--force", "--quiet"} <= set(command)


@pytest.mark.parametrize(
    "arguments",
    [("install", *SOURCE, "--bucket=my-runs"), ("stop",), ("run",), ("logs", "--worker=3")],
    ids=lambda a: a[0],
)
def test_what_workers_are_told_is_sound_bash(arguments):
    title, *options = arguments
    after = TRAIN if title == "run" else ()
    (command,) = commands(title, "run-1", *TPU, *options, after=after)
    assert command[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "run-1"]
    assert ("--worker=3" if title == "logs" else "--worker=all") in command
    check_bash(remote(command))


def test_install_takes_the_revision():
    (command,) = commands("install", "run-1", *TPU, *SOURCE)
    script = remote(command)
    assert "git clone https://example.org/sgw_jax.git" in script
    assert "git checkout --detach v0.1" in script


def test_arguments_arrive_on_a_worker_as_they_were_typed(tmp_path, record, monkeypatch):
    """The script is run, with a home of its own and a `python` that records."""
    home = tmp_path / "home"
    (home / "sgw_jax" / ".venv").mkdir(parents=True)
    stub(home / "sgw_jax" / ".venv" / "bin", "python", RECORD)
    monkeypatch.setenv("HOME", str(home))
    (command,) = commands("run", "run-1", *TPU, after=(*TRAIN, *HOSTILE))
    script = remote(command)
    done = subprocess.run(["bash", "-c", script + "wait\n"], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    assert record() == [["python", "-m", "sgw_jax", *TRAIN[1:], *HOSTILE]]
    assert not list(tmp_path.rglob("pwned"))


def test_a_worker_runs_one_command_at_a_time(tmp_path, monkeypatch):
    home = tmp_path / "home"
    (home / "sgw_jax" / ".venv").mkdir(parents=True)
    stub(home / "sgw_jax" / ".venv" / "bin", "python", "import time; time.sleep(20)")
    monkeypatch.setenv("HOME", str(home))
    (start,), (stop,) = commands("run", "run-1", *TPU, after=TRAIN), commands("stop", "run-1", *TPU)
    scripts = [remote(command) for command in (start, start, stop)]
    codes = [subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False) for text in scripts]
    assert [done.returncode for done in codes] == [0, 1, 0]
    assert "a run is under way" in codes[1].stderr


GCLOUD = """
{record}
states = {states}
verb = sys.argv[4] if sys.argv[3] == 'queued-resources' else 'ssh'
if verb == 'describe':
    seen = os.environ['RECORD'] + '.n'
    n = int(open(seen).read()) if os.path.exists(seen) else 0
    open(seen, 'w').write(str(n + 1))
    state = states[min(n, len(states) - 1)]
    if state == 'ABSENT':
        sys.exit('ERROR: NOT_FOUND: no such resource')
    print(state)
elif any('kill -0' in part for part in sys.argv):
    print('{alive}')
"""


def resumed(folder, states, *more, alive="ended", code=0):
    stub(folder, "gcloud", GCLOUD.format(record=RECORD, states=states, alive=alive))
    arguments = ("resume", "run-1", *TPU, *SLICE, *SOURCE, "--poll-seconds=1", *more, *TRAIN)
    return launch("tpu_vm.py", *arguments, code=code, path=folder)


def steps(calls):
    """What was done, without looking at the state."""
    found = []
    for _, *call in calls:
        kind = call[3] if call[2] == "queued-resources" else "install" if "git" in call[-1] else "run"
        if kind != "describe" and "kill -0" not in call[-1]:
            found.append(kind)
    return found


def test_a_lost_slice_is_asked_for_again_and_the_run_goes_on(tmp_path, record):
    output = resumed(tmp_path / "bin", ["ABSENT", "WAITING_FOR_RESOURCES", "ACTIVE", "SUSPENDED", "ABSENT", "ACTIVE"])
    assert steps(record()) == ["create", "install", "run", "delete", "create", "create", "install", "run"]
    assert "The run has ended" in output


def test_restarts_are_bounded(tmp_path, record):
    message = resumed(tmp_path / "bin", ["SUSPENDED"], "--max-restarts=1", code=1)
    assert "taken away 2 times; --max-restarts allows no more" in message
    assert steps(record()) == ["delete", "create", "delete"]


# ---- GKE -----------------------------------------------------------------------------------------------------------


def manifest(*arguments, after=TRAIN):
    options = ("--image=registry.example.org/project/sgw_jax:1", "--accelerator=v5e", "--topology=4x4")
    return json.loads(launch("gke.py", "run-1", *options, *arguments, "--dry-run", *after))


def test_a_job_set_has_a_pod_a_host():
    found = manifest("--spot", "--service-account=trainer", "--bucket=my-runs")
    assert (found["apiVersion"], found["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    (workers,) = found["spec"]["replicatedJobs"]
    job = workers["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"], job["backoffLimit"]) == (4, 4, "Indexed", 0)
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v5-lite-podslice"
    assert pod["tolerations"][0]["key"] == "cloud.google.com/gke-spot"
    assert (pod["restartPolicy"], pod["serviceAccountName"]) == ("Never", "trainer")
    assert pod["volumes"][0]["csi"]["volumeAttributes"] == {"bucketName": "my-runs"}
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    (container,) = pod["containers"]
    assert container["volumeMounts"] == [{"name": "runs", "mountPath": "/mnt/runs"}]
    assert container["resources"]["limits"] == container["resources"]["requests"] == {"google.com/tpu": 4}
    assert container["command"] == ["python", "-m", "sgw_jax", *TRAIN[1:]]


def test_arguments_are_a_list_in_the_manifest():
    """Kubernetes itself replaces $(NAME) in a command, unless the dollar sign is doubled."""
    job = manifest(after=(*TRAIN, *HOSTILE))["spec"]["replicatedJobs"][0]["template"]["spec"]
    command = job["template"]["spec"]["containers"][0]["command"]
    assert [part.replace("$$", "$") for part in command[-len(HOSTILE) :]] == list(HOSTILE)
    assert all("$(" not in part.replace("$$", "") for part in command)


@pytest.mark.parity
def test_the_inner_job_fits_the_public_schema():
    """JobSet's own schema is in no package; that of the job inside is Kubernetes'."""
    validate = pytest.importorskip("kubernetes_validate", reason="the schemas are in kubernetes-validate")
    job = manifest("--spot", "--bucket=my-runs")["spec"]["replicatedJobs"][0]["template"]
    validate.validate({"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "x"}, **job}, "1.29", strict=True)


def test_the_manifest_is_applied(tmp_path, record):
    stub(tmp_path / "bin", "kubectl", f"{RECORD}\nassert json.load(sys.stdin)['kind'] == 'JobSet'")
    options = ("--image=a/b:1", "--accelerator=v5p", "--topology=2x2x2")
    launch("gke.py", "run-1", *options, *TRAIN, path=tmp_path / "bin")
    assert record() == [["kubectl", "apply", "-f", "-"]]


# ---- Slurm ---------------------------------------------------------------------------------------------------------

GPUS = ("--nodes=4", "--gpus-per-node=8", "--time=24:00:00")


def batch_script(*arguments, after=TRAIN):
    return launch("slurm.py", *GPUS, *arguments, "--dry-run", *after)


def test_a_batch_script():
    text = batch_script("--partition=gpu", "--setup=module load cuda")
    lines = text.splitlines()
    for option in (
        "nodes=4",
        "ntasks-per-node=8",
        "gpus-per-node=8",
        "time=24:00:00",
        "partition=gpu",
        "signal=TERM@120",
    ):
        assert f"#SBATCH --{option}" in lines
    assert lines.index("module load cuda") < next(i for i, line in enumerate(lines) if line.startswith("srun"))
    assert max(i for i, line in enumerate(lines) if line.startswith("#")) < lines.index("set -euo pipefail")
    check_bash(text)
    check_bash(batch_script("--no-requeue", "--container-image=nvcr.io/nvidia/jax:24.10-py3"))


@pytest.mark.parametrize(
    ("code", "options", "again"), [(0, (), False), (143, (), True), (1, (), False), (143, ("--no-requeue",), False)]
)
def test_a_run_that_saved_is_queued_again(tmp_path, record, monkeypatch, code, options, again):
    """The script is run with stubs of Slurm's commands; the arguments arrive as they were typed."""
    bin = stub(tmp_path / "bin", "srun", f"{RECORD}\nsys.exit({code})")
    stub(bin, "scontrol", RECORD)
    monkeypatch.setenv("PATH", f"{bin}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    text = batch_script(*options, after=(*TRAIN, *HOSTILE))
    done = subprocess.run(["bash"], input=text, text=True, capture_output=True, cwd=tmp_path, check=False)
    assert done.returncode == code, done.stderr
    srun, *rest = record()
    assert srun == ["srun", "--kill-on-bad-exit=1", "python", "-m", "sgw_jax", *TRAIN[1:], *HOSTILE]
    assert rest == ([["scontrol", "requeue", "7"]] if again else [])
    assert not list(tmp_path.rglob("pwned"))


def test_the_script_is_submitted(tmp_path, record):
    stub(tmp_path / "bin", "sbatch", f"{RECORD}\nassert sys.stdin.read().startswith('#!')")
    launch("slurm.py", *GPUS, *TRAIN, path=tmp_path / "bin")
    assert record() == [["sbatch"]]


# ---- bad arguments -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "arguments", "named"),
    [
        ("tpu_vm.py", ("create", "Run_1", *TPU, *SLICE), "argument name: 'Run_1'"),
        ("tpu_vm.py", ("create", "run-1", "--project=x;y", "--zone=us-west4-a", *SLICE), "--project: 'x;y'"),
        ("tpu_vm.py", ("create", "run-1", "--project=my-project", "--zone=mars", *SLICE), "--zone: 'mars'"),
        ("tpu_vm.py", ("create", "run-1", *TPU, "--accelerator-type=h100-8"), "--accelerator-type: 'h100-8'"),
        ("tpu_vm.py", ("install", "run-1", *TPU, "--repository=file:///etc"), "--repository: 'file:///etc'"),
        ("tpu_vm.py", ("install", "run-1", *TPU, *SOURCE, "--revision=-x"), "--revision: '-x'"),
        ("tpu_vm.py", ("logs", "run-1", *TPU, "--worker=all; id"), "--worker: 'all; id'"),
        ("tpu_vm.py", ("run", "run-1", *TPU, "--", "train\nid"), r"'train\nid' is not one line"),
        ("tpu_vm.py", ("run", "run-1", *TPU), "command"),
        ("gke.py", ("run-1", "--image=a b", "--accelerator=v5e", "--topology=4x4", *TRAIN), "--image: 'a b'"),
        ("gke.py", ("run-1", "--image=a", "--accelerator=gpu", "--topology=4x4", *TRAIN), "--accelerator"),
        ("gke.py", ("run-1", "--image=a", "--accelerator=v5e", "--topology=3x3", *TRAIN), "--topology=3x3 has 9 chips"),
        ("slurm.py", ("--nodes=0", *GPUS[1:], *TRAIN), "--nodes: '0' is not a positive whole number"),
        ("slurm.py", (*GPUS[:2], "--time=soon", *TRAIN), "--time: 'soon'"),
        ("slurm.py", (*GPUS, "--partition=a b", *TRAIN), "--partition: 'a b'"),
        ("slurm.py", (*GPUS, "--setup=a\nb", *TRAIN), r"--setup: 'a\nb' is not one line"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(script, arguments, named):
    assert named in launch(script, *arguments, code=2)
