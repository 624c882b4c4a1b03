"""A training run on Cloud TPU VMs, from a machine with `gcloud`: create, install, run, watch, resume, delete.

    python launch/tpu_vm.py create  NAME --project=P --zone=Z --accelerator-type=v5litepod-16 --spot
    python launch/tpu_vm.py install NAME --project=P --zone=Z --repository=https://... --revision=main
    python launch/tpu_vm.py run     NAME --project=P --zone=Z -- train --config=nyud --workdir=/mnt/runs/run-1
    python launch/tpu_vm.py logs    NAME --project=P --zone=Z --worker=0
    python launch/tpu_vm.py resume  NAME ... (the arguments of create, install and run together)
    python launch/tpu_vm.py delete  NAME --project=P --zone=Z

`run` starts the command on all workers and returns; it is the same program on each, and JAX finds the others. The
working directory must be one that all see: a Filestore, or a bucket that `install --bucket` mounts with Cloud Storage
FUSE. `resume` watches: when the slice was taken away it asks for a new one, installs, and runs the same command, which
goes on from its last checkpoint. `stop` lets the run save first. `--dry-run` prints the commands.
"""

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence

from arguments import BUCKET, add_command, add_dry_run, count, matching, name, run, training_command

# Accelerator type -> the image of its VMs, as Google's documentation pairs them.
RUNTIMES = {
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
    "v4": "tpu-ubuntu2204-base",
}
GONE = ("SUSPENDED", "SUSPENDING", "FAILED")  # states of a queued resource whose machines were taken away
ABSENT = "ABSENT"

INSTALL = """\
set -euo pipefail
[ -d "$HOME/sgw_jax/.git" ] || git clone {repository} "$HOME/sgw_jax"
cd "$HOME/sgw_jax"
git fetch --tags origin
git checkout --detach {revision}
[ -d .venv ] || python3 -m venv .venv
.venv/bin/pip install --quiet -e '.[tpu]'
"""

MOUNT = """\
command -v gcsfuse > /dev/null || {{ echo 'gcsfuse is not here; install it, or mount /mnt/runs' >&2; exit 1; }}
sudo mkdir -p /mnt/runs
sudo chown "$USER" /mnt/runs
mountpoint --quiet /mnt/runs || gcsfuse --implicit-dirs {bucket} /mnt/runs
"""

# A lock, held by the run as long as it lives, keeps a second one off the chips.
RUN = """\
set -euo pipefail
cd "$HOME/sgw_jax"
mkdir -p logs
exec 9> logs/lock
flock --nonblock 9 || {{ echo 'a run is under way on this worker' >&2; exit 1; }}
PATH="$PWD/.venv/bin:$PATH" nohup {command} >> logs/run.log 2>&1 < /dev/null &
echo $! > logs/pid
"""

STOP = """\
set -eu
cd "$HOME/sgw_jax"
if [ -f logs/pid ]; then kill -TERM "$(cat logs/pid)" || true; fi
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one subcommand; returns the exit code of the first `gcloud` that fails, else 0."""
    arguments = _parser().parse_args(argv)
    return arguments.run(arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(
        required=True, metavar="create | status | install | run | logs | stop | resume | delete"
    )

    def command(title: str, function, text: str, *groups) -> None:
        sub = commands.add_parser(title, help=text, description=text, allow_abbrev=False)
        sub.set_defaults(run=function)
        sub.add_argument("name", type=name, help="of the slice")
        project = matching(r"[a-z][-a-z0-9:.]{4,61}[a-z0-9]", "the id of a Google Cloud project")
        sub.add_argument("--project", required=True, type=project)
        sub.add_argument("--zone", required=True, type=matching(r"[a-z]+-[a-z]+\d+-[a-z]", "a zone such as us-west4-a"))
        add_dry_run(sub)
        for add in groups:
            add(sub)

    command("create", lambda a: run([_create(a)], a.dry_run), "Ask for a slice (a queued resource).", _slice)
    command("status", lambda a: run([_describe(a)], a.dry_run), "The state of the slice.")
    command("install", lambda a: run([_install(a)], a.dry_run), "Install this package on all workers.", _source)
    command("run", lambda a: run([_start(a)], a.dry_run), "Start the command on all workers.", add_command)
    command("logs", lambda a: run([_logs(a)], a.dry_run), "Follow the output of a worker.", _worker)
    command("stop", lambda a: run([_ssh(a, STOP)], a.dry_run), "Let the run save and end.")
    text = "Run to the end, on new machines whenever they are taken away."
    command("resume", _resume, text, _slice, _source, _patience, add_command)
    command("delete", lambda a: run([_delete(a)], a.dry_run), "Give the slice back.")
    return parser


def _slice(sub: argparse.ArgumentParser) -> None:
    kind = matching(r"(v5litepod|v5p|v6e|v4)-[1-9]\d*", f"a type such as v5litepod-16; known are {', '.join(RUNTIMES)}")
    sub.add_argument("--accelerator-type", required=True, type=kind)
    sub.add_argument("--runtime-version", type=matching(r"[-a-z0-9.]+", "a runtime version"), help="default: by type")
    sub.add_argument("--spot", action="store_true", help="cheaper machines that may be taken away")
    account = matching(r"[-\w.]+@[-\w.]+", "the address of a service account")
    sub.add_argument("--service-account", type=account)
    sub.add_argument("--valid-until-duration", type=matching(r"\d+[smhd]", "a duration such as 6h"))


def _source(sub: argparse.ArgumentParser) -> None:
    url = matching(r"(https|ssh)://[^\s'\"]+|git@[\w.-]+:[\w./-]+", "an https://, ssh:// or git@ address")
    sub.add_argument("--repository", required=True, type=url)
    revision = matching(r"[\w][\w./-]*", "a branch, tag or commit")
    sub.add_argument("--revision", default="main", type=revision, help="default: %(default)s")
    sub.add_argument("--bucket", type=BUCKET, help="of runs and data, mounted at /mnt/runs with Cloud Storage FUSE")


def _worker(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--worker", default="0", type=matching(r"\d+", "a worker's number"), help="default: %(default)s")
    sub.add_argument("--lines", default=100, type=count, help="default: %(default)s")


def _patience(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--poll-seconds", default=60, type=count, help="default: %(default)s")
    sub.add_argument("--max-restarts", default=100, type=count, help="default: %(default)s")


def _queued(arguments: argparse.Namespace, verb: str, *more: str) -> list[str]:
    place = [f"--project={arguments.project}", f"--zone={arguments.zone}"]
    return ["gcloud", "compute", "tpus", "queued-resources", verb, arguments.name, *place, *more]


def _create(arguments: argparse.Namespace) -> list[str]:
    kind = arguments.accelerator_type
    more = [f"--node-id={arguments.name}", f"--accelerator-type={kind}"]
    more.append(f"--runtime-version={arguments.runtime_version or RUNTIMES[kind.partition('-')[0]]}")
    more += ["--spot"] if arguments.spot else []
    for option in ("service_account", "valid_until_duration"):
        if value := getattr(arguments, option):
            more.append(f"--{option.replace('_', '-')}={value}")
    return _queued(arguments, "create", *more)


def _describe(arguments: argparse.Namespace) -> list[str]:
    return _queued(arguments, "describe", "--format=value(state.state)")


def _delete(arguments: argparse.Namespace) -> list[str]:
    return _queued(arguments, "delete", "--force", "--quiet")  # force: with its machines


def _ssh(arguments: argparse.Namespace, script: str, worker: str = "all") -> list[str]:
    place = [f"--project={arguments.project}", f"--zone={arguments.zone}", f"--worker={worker}"]
    shell = f"bash -c {shlex.quote(script)}"  # whatever the user's login shell is
    return ["gcloud", "compute", "tpus", "tpu-vm", "ssh", arguments.name, *place, f"--command={shell}"]


def _install(arguments: argparse.Namespace) -> list[str]:
    source = {key: shlex.quote(getattr(arguments, key)) for key in ("repository", "revision")}
    mount = MOUNT.format(bucket=shlex.quote(arguments.bucket)) if arguments.bucket else ""
    return _ssh(arguments, INSTALL.format(**source) + mount)


def _start(arguments: argparse.Namespace) -> list[str]:
    return _ssh(arguments, RUN.format(command=training_command(arguments.command)))


def _logs(arguments: argparse.Namespace) -> list[str]:
    return _ssh(arguments, f'tail -n {arguments.lines} -F "$HOME/sgw_jax/logs/run.log"', arguments.worker)


def _resume(arguments: argparse.Namespace) -> int:
    """Watches the slice; each time it is there anew, installs and runs."""
    if arguments.dry_run:
        print("# until the run has ended, each time the slice is new:")
        return run([_describe(arguments), _create(arguments), _install(arguments), _start(arguments)], dry_run=True)
    running, restarts = False, 0
    while True:
        state = _state(arguments)
        if state == "ACTIVE" and not running:
            running = run([_install(arguments), _start(arguments)], dry_run=False) == 0
        elif state == "ACTIVE" and not _alive(arguments):
            print("The run has ended; `logs` shows how.")
            return 0
        elif state in (*GONE, ABSENT):
            running = False
            if state != ABSENT:
                restarts += 1
                run([_delete(arguments)], dry_run=False)
            if restarts > arguments.max_restarts:
                print(f"The slice was taken away {restarts} times; --max-restarts allows no more.", file=sys.stderr)
                return 1
            run([_create(arguments)], dry_run=False)
        time.sleep(arguments.poll_seconds)


def _state(arguments: argparse.Namespace) -> str:
    done = subprocess.run(_describe(arguments), capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return done.stdout.strip()
    # Only a slice that is not there may be created; anything else (network, rights) is for the user or the next poll.
    if "NOT_FOUND" in done.stderr or "not found" in done.stderr.lower():
        return ABSENT
    print(done.stderr.strip(), file=sys.stderr)
    return "UNKNOWN"


def _alive(arguments: argparse.Namespace) -> bool:
    """Whether the run's process on worker 0 lives; a worker that cannot be asked is taken as alive."""
    script = 'cd "$HOME/sgw_jax" && if kill -0 "$(cat logs/pid)" 2> /dev/null; then echo alive; else echo ended; fi'
    done = subprocess.run(_ssh(arguments, script, worker="0"), capture_output=True, text=True, check=False)
    return "ended" not in done.stdout


if __name__ == "__main__":
    sys.exit(main())
