"""One run on Cloud TPU VMs, from one host to a pod, by way of gcloud.

    sgw-jax launch tpu-vm create --name=nyud --project=my-project --zone=us-central1-a --accelerator-type=v5litepod-16
    sgw-jax launch tpu-vm status --name=nyud --project=my-project --zone=us-central1-a
    sgw-jax launch tpu-vm install ... --repository=https://github.com/OWNER/sgw_jax.git --revision=main
    sgw-jax launch tpu-vm run ... -- train --config=nyud:swin_l,interaction=skem --workdir=/mnt/runs/nyud
    sgw-jax launch tpu-vm logs ... --worker=0 --follow
    sgw-jax launch tpu-vm stop ...
    sgw-jax launch tpu-vm delete ...

Or all of it, for machines that may be taken away: waits for them, installs, runs, and begins again until it is through:

    sgw-jax launch tpu-vm resume ... --accelerator-type=v5litepod-16 --spot --repository=... -- train ...

All hosts must see the working directory: `install --bucket=NAME` mounts a bucket at /mnt/runs (Cloud Storage FUSE).
... are --name, --project and --zone each time; --dry-run prints the commands and runs none. On each host the code lies
in ~/sgw_jax; the log, the lock and the exit code of the run in ~/sgw_jax_run. The run survives the connection.
"""

import argparse
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence

from sgw_jax.launch import command_line
from sgw_jax.launch.command_line import array, matching, script, whole

RUNTIMES = {  # by the accelerator type before its dash
    "v4": "tpu-ubuntu2204-base",
    "v5litepod": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
PATIENCE = 10  # times in a row that `resume` takes no answer for an answer that is yet to come
ALREADY_RUNS = 3  # exit code of scripts/tpu_vm/run.sh


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what the subcommand consists of, one gcloud command after the other, up to the first that fails."""
    own, command = command_line.split(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    arguments = parser.parse_args(own)
    if arguments.subcommand in ("run", "resume"):
        arguments.command = command_line.check_command(parser, command, durable=arguments.subcommand == "resume")
    else:
        command_line.refuse_command(parser, command)
    if arguments.subcommand in ("create", "resume"):
        _choose_runtime(parser, arguments)
    try:
        if arguments.subcommand == "resume" and not arguments.dry_run:
            return resume(arguments)
        for line in COMMANDS[arguments.subcommand](arguments):
            if arguments.dry_run:
                print(shlex.join(line))
            elif code := _call(line):
                return code
        return 0
    except FileNotFoundError:
        print("tpu-vm: gcloud found nowhere on PATH; install the Google Cloud CLI, or use --dry-run", file=sys.stderr)
        return 127
    except KeyboardInterrupt:
        print("tpu-vm: interrupted; what runs on the machines goes on", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser("tpu-vm", __doc__)
    subcommands = parser.add_subparsers(dest="subcommand", required=True, metavar=" | ".join(COMMANDS))
    made = {}
    for name, text in HELP.items():
        made[name] = subcommands.add_parser(name, help=text, description=text, allow_abbrev=False)
        add = made[name].add_argument
        add("--name", required=True, type=command_line.NAME, help="of the queued resource and of its node")
        project = matching(r"([a-z0-9.-]+:)?[a-z][-a-z0-9]{4,28}[a-z0-9]", "a project ID, as my-project-1")
        add("--project", required=True, type=project)
        add("--zone", required=True, type=matching(r"[a-z]+-[a-z]+[0-9]+-[a-z]", "a zone, as us-central1-a"))
        add("--dry-run", action="store_true", help="print the commands and run none")
    for name in ("create", "resume"):
        _add_machine(made[name])
    for name in ("install", "resume"):
        _add_code(made[name])
    help = "to wait for the run to save; default: %(default)s"
    made["stop"].add_argument("--seconds-to-save", type=whole(1), default=600, help=help)
    add = made["logs"].add_argument
    add("--worker", type=whole(0), default=0, help="number of the host; default: %(default)s")
    add("--lines", type=whole(1), default=100, help="from the end; default: %(default)s")
    add("--follow", action="store_true", help="and what comes after, until Ctrl-C")
    add = made["resume"].add_argument
    add("--poll-seconds", type=whole(1), default=60, help="between two looks; default: %(default)s")
    help = "new machines and new starts, after which to give up; default: %(default)s"
    add("--max-restarts", type=whole(0), default=20, help=help)
    return parser


def _add_machine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    kind = matching(r"v[0-9]+[a-z]*-[0-9]+", f"a type of {', '.join(RUNTIMES)}, a dash and its size, as v5litepod-16")
    add("--accelerator-type", required=True, type=kind)
    help = "default: by accelerator type"
    add("--runtime-version", type=matching(r"[a-z0-9][a-z0-9.-]*", "a name, as v2-alpha-tpuv6e"), help=help)
    add("--spot", action="store_true", help="cheaper machines that may be taken away at any time")
    add("--service-account", type=command_line.SERVICE_ACCOUNT, help="that may write the working directory")
    duration = matching(r"[1-9][0-9]*[smhd]", "a number and s, m, h or d, as 6h")
    add("--valid-until-duration", type=duration, help="after which a request that was not met fails")


def _add_code(parser: argparse.ArgumentParser) -> None:
    path = r"[A-Za-z0-9._~/-]+"
    url = matching(
        rf"https://[A-Za-z0-9.-]+(:[0-9]+)?/{path}|(ssh://)?git@[A-Za-z0-9.-]+[:/]{path}",
        "https://host/path without user and password, or git@host:path",
    )
    parser.add_argument("--repository", required=True, type=url, help="that the machines can clone")
    revision = matching(r"[A-Za-z0-9_]([A-Za-z0-9._/+-]*[A-Za-z0-9_])?", "a branch, tag or commit")
    parser.add_argument("--revision", default="main", type=revision, help="default: %(default)s")
    parser.add_argument("--bucket", type=command_line.BUCKET, help="mounted at /mnt/runs on every host")


def _choose_runtime(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    kind = arguments.accelerator_type.partition("-")[0]
    arguments.runtime_version = arguments.runtime_version or RUNTIMES.get(kind)
    if not arguments.runtime_version:
        known = ", ".join(RUNTIMES)
        parser.error(f"argument --runtime-version: nothing found; only for {known} it may be left out, not for {kind}")


def create(arguments: argparse.Namespace) -> list[str]:
    line = _queued("create", arguments, f"--node-id={arguments.name}")
    line += [f"--accelerator-type={arguments.accelerator_type}", f"--runtime-version={arguments.runtime_version}"]
    if arguments.spot:
        line.append("--spot")
    if arguments.service_account:
        line.append(f"--service-account={arguments.service_account}")
    if arguments.valid_until_duration:
        line.append(f"--valid-until-duration={arguments.valid_until_duration}")
    return line


def install(arguments: argparse.Namespace) -> list[str]:
    mount = script("tpu_vm/mount.sh", bucket=arguments.bucket) if arguments.bucket else ""
    code = script("tpu_vm/install.sh", repository=arguments.repository, revision=arguments.revision)
    return _on_workers(arguments, mount + code)


def run(arguments: argparse.Namespace) -> list[str]:
    return _on_workers(arguments, _command(arguments) + script("tpu_vm/run.sh"))


def probe(arguments: argparse.Namespace) -> list[str]:
    return _on_workers(arguments, _command(arguments) + script("tpu_vm/probe.sh"))


def stop(arguments: argparse.Namespace) -> list[str]:
    return _on_workers(arguments, script("tpu_vm/stop.sh", seconds=str(arguments.seconds_to_save)))


def logs(arguments: argparse.Namespace) -> list[str]:
    follow = "--follow " if arguments.follow else ""
    text = f'set -euo pipefail\ntail --lines={arguments.lines} {follow}"$HOME/sgw_jax_run/log"\n'
    return _on_workers(arguments, text, str(arguments.worker))


def describe(arguments: argparse.Namespace, *options: str) -> list[str]:
    return _queued("describe", arguments, *options)


def delete(arguments: argparse.Namespace) -> list[str]:
    return _queued("delete", arguments, "--force", "--quiet")


def node_state(arguments: argparse.Namespace) -> list[str]:
    """Of the machine itself, which is sometimes gone before its queued resource says so."""
    place = [f"--project={arguments.project}", f"--zone={arguments.zone}"]
    return ["gcloud", "compute", "tpus", "tpu-vm", "describe", arguments.name, *place, "--format=value(state)"]


def _queued(verb: str, arguments: argparse.Namespace, *options: str) -> list[str]:
    place = [f"--project={arguments.project}", f"--zone={arguments.zone}"]
    return ["gcloud", "compute", "tpus", "queued-resources", verb, arguments.name, *place, *options]


def _on_workers(arguments: argparse.Namespace, text: str, worker: str = "all") -> list[str]:
    place = [f"--project={arguments.project}", f"--zone={arguments.zone}"]
    ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", arguments.name, *place, f"--worker={worker}"]
    return [*ssh, "--quiet", f"--command={text}"]


def _command(arguments: argparse.Namespace) -> str:
    return array("command", ["python", "-m", "sgw_jax", *arguments.command])


def resume(arguments: argparse.Namespace) -> int:
    """Looks, acts, waits, until the run is through (0), was stopped (143) or there is no use in going on (1)."""
    restarts = unanswered = 0
    seen = watched = False  # the queued resource, since it was last created; the run on it
    while True:
        action = _next(arguments, seen, watched)
        if action in END:
            text, code = END[action]
            return _say(text, code)
        if action == "recreate" or (action == "start" and watched):
            if restarts == arguments.max_restarts:
                return _say(f"--max-restarts={restarts} are used up; the log says why: sgw-jax launch tpu-vm logs", 1)
            restarts += 1
            _say(f"restart {restarts} of {arguments.max_restarts}")
        if action in ("create", "recreate"):
            lines = [delete(arguments), create(arguments)][action == "create" :]
            seen = watched = False
        elif action == "start":
            lines, seen = [install(arguments), run(arguments)], True
        else:
            lines, seen = [], seen or action != "unanswered"
        answered = action != "unanswered" and all(_call(line) == 0 for line in lines)
        watched |= action == "watch" or (action == "start" and answered)
        unanswered = 0 if answered else unanswered + 1
        if unanswered == PATIENCE:
            return _say(f"no answer {PATIENCE} times in a row; sgw-jax launch tpu-vm status and logs may tell why", 1)
        time.sleep(arguments.poll_seconds)


END = {
    "finished": ("the run is through", 0),
    "stopped": ("the run was stopped and has saved; the same command goes on", 143),
    "deleted": ("the queued resource was deleted, by someone else; the same command creates it again", 1),
    "other": ("another command runs there; stop it first: sgw-jax launch tpu-vm stop", ALREADY_RUNS),
}


def _next(arguments: argparse.Namespace, seen: bool, watched: bool) -> str:
    """What the state of the queued resource, and of the run on its machines, ask for."""
    state = _ask(describe(arguments, "--format=value(state.state)"))
    if state is None:
        return "unanswered"
    if state == "NOT_FOUND":
        return "deleted" if seen else "create"
    if state in ("SUSPENDED", "FAILED"):
        return "recreate"
    if state != "ACTIVE":
        _say(f"{state or 'no state yet'}: waiting")
        return "wait"
    answer = _ask(probe(arguments))
    runs = [line.removeprefix("sgw_jax: ") for line in (answer or "").splitlines() if line.startswith("sgw_jax: ")]
    if not runs:
        return "recreate" if _ask(node_state(arguments)) in ("PREEMPTED", "TERMINATED") else "unanswered"
    if "other" in runs:
        return "other"
    if "running" in runs:  # where one process has ended, JAX ends the others
        return "watch"
    if set(runs) == {"ended 0"}:
        return "finished"
    return "stopped" if watched and "stopped" in runs else "start"


def _ask(line: Sequence[str]) -> str | None:
    """What the command prints; NOT_FOUND where it names what is not there, None where it fails otherwise."""
    done = subprocess.run(line, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode == 0:
        return done.stdout.strip()
    if "NOT_FOUND" in done.stderr:
        return "NOT_FOUND"
    print(done.stderr, end="", file=sys.stderr)
    return None


def _call(line: Sequence[str]) -> int:
    return subprocess.run(line, check=False).returncode


def _say(text: str, code: int = 0) -> int:
    print(f"tpu-vm: {text}", file=sys.stderr, flush=True)
    return code


HELP = {
    "create": "ask for the machines, as a queued resource",
    "status": "what the queued resource is doing",
    "install": "the code at a revision and its environment, on every host",
    "run": "start a command on every host",
    "logs": "the end of the log of one host",
    "stop": "ask the run to save and stop, and wait until it has",
    "resume": "keep a run going until it is through, on new machines where they are taken away",
    "delete": "give the machines back",
}
COMMANDS = {
    "create": lambda arguments: [create(arguments)],
    "status": lambda arguments: [describe(arguments)],
    "install": lambda arguments: [install(arguments)],
    "run": lambda arguments: [run(arguments)],
    "logs": lambda arguments: [logs(arguments)],
    "stop": lambda arguments: [stop(arguments)],
    # Of resume, all that it may run, in the order of machines that are there at first and taken away later.
    "resume": lambda arguments: [
        describe(arguments, "--format=value(state.state)"),
        probe(arguments),
        install(arguments),
        run(arguments),
        node_state(arguments),
        delete(arguments),
        create(arguments),
    ],
    "delete": lambda arguments: [delete(arguments)],
}
