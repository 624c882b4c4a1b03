"""One run on the GPUs of a Slurm cluster, one process per GPU, queued again until it is through.

    sgw-jax launch slurm --nodes=2 --gpus-per-node=8 --time=12:00:00 --partition=gpu \\
        --setup='source ~/sgw_jax/.venv/bin/activate' \\
        -- train --config=nyud:swin_l,interaction=skem --workdir=/shared/runs/nyud

The batch script goes to `sbatch`; --dry-run prints it instead. Shortly before the time limit (--seconds-to-save), and
when the job is preempted, the run saves and the job is queued again: the same script goes on from the last checkpoint.
A run that fails is not queued again. Under srun the processes find each other by Slurm's variables.
"""

import argparse
from collections.abc import Sequence

from sgw_jax.launch import command_line
from sgw_jax.launch.command_line import array, matching, script, whole

WORD = matching(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*", "letters, digits and _ . + -")
TIME = r"[0-9]+-[0-9]{1,2}(:[0-9]{1,2}){0,2}|[0-9]+(:[0-9]{1,2}){0,2}"
PATH = r"[A-Za-z0-9._/%+=@-]+"


def main(argv: Sequence[str] | None = None) -> int:
    """Submits the script, or prints it; returns sbatch's exit code."""
    parser = _parser()
    arguments, command = command_line.parse(parser, argv)
    processes = arguments.processes_per_node or arguments.gpus_per_node
    if arguments.gpus_per_node % processes:
        allowed = f"a divisor of --gpus-per-node={arguments.gpus_per_node}"
        parser.error(f"argument --processes-per-node: {processes} found; allowed is {allowed}")
    if arguments.container_mounts and not arguments.container_image:
        parser.error("argument --container-mounts: found without --container-image; allowed is both or neither")
    text = batch_script(arguments, processes, command)
    if arguments.dry_run:
        print(text, end="")
        return 0
    return command_line.feed(["sbatch"], text, remedy="run this on the cluster")


def _parser() -> argparse.ArgumentParser:
    parser = command_line.parser("slurm", __doc__)
    add = parser.add_argument
    add("--nodes", type=whole(1), default=1, help="default: %(default)s")
    add("--gpus-per-node", type=whole(1, 64), default=1, help="default: %(default)s")
    add("--processes-per-node", type=whole(1, 64), help="default: one per GPU")
    add("--cpus-per-task", type=whole(1), help="of each process")
    time = "minutes, minutes:seconds, hours:minutes:seconds or days-hours[:minutes[:seconds]]"
    add("--time", required=True, type=matching(TIME, time), help=f"limit, after which the job is queued again: {time}")
    add("--partition", type=matching(r"[A-Za-z0-9_][A-Za-z0-9_.,+-]*", "names with , between them"))
    add("--account", type=WORD)
    add("--job-name", type=WORD, default="sgw_jax", help="default: %(default)s")
    output = matching(PATH, "a path of letters, digits and . _ / % + = @ -")
    add("--output", type=output, default="slurm-%j.out", help="log, appended to; default: slurm-%%j.out")
    help = "whether the job is queued again when its time is up or it is preempted; default: it is"
    add("--requeue", action=argparse.BooleanOptionalAction, default=True, help=help)
    help = "before the time limit, at which the run is asked to stop; default: %(default)s"
    add("--seconds-to-save", type=whole(1, 65_535), default=120, help=help)
    image = rf"{command_line.IMAGE}|[A-Za-z0-9._-]+#{command_line.IMAGE}|/{PATH}"
    image_type = matching(image, "host#path:tag or /a/file.sqsh")
    add("--container-image", type=image_type, help="for clusters with pyxis")
    mount = rf"{PATH}:{PATH}(:[a-z+]+)?"
    mounts = matching(f"{mount}(,{mount})*", "from:to, with , between them")
    add("--container-mounts", type=mounts, help="what the container sees of the cluster's disks")
    help = "a line of shell to run first, as it stands: 'module load cuda'; may be repeated"
    add("--setup", action="append", default=[], type=command_line.plain, metavar="LINE", help=help)
    add("--dry-run", action="store_true", help="print the script and submit nothing")
    return parser


def batch_script(arguments: argparse.Namespace, processes: int, command: Sequence[str]) -> str:
    options = {
        "job-name": arguments.job_name,
        "nodes": arguments.nodes,
        "ntasks-per-node": processes,
        "gpus-per-node": arguments.gpus_per_node,
        "cpus-per-task": arguments.cpus_per_task,
        "time": arguments.time,
        "partition": arguments.partition,
        "account": arguments.account,
        "output": arguments.output,
        "open-mode": "append",  # or the second part of a run would overwrite the log of the first
        "signal": f"B:USR1@{arguments.seconds_to_save}",
    }
    directives = [f"#SBATCH --{name}={value}\n" for name, value in options.items() if value is not None]
    directives.append(f"#SBATCH --{'requeue' if arguments.requeue else 'no-requeue'}\n")
    srun = ["srun", "--kill-on-bad-exit=1"]
    if arguments.cpus_per_task:
        srun.append(f"--cpus-per-task={arguments.cpus_per_task}")  # which srun takes no longer from sbatch
    if arguments.container_image:
        srun.append(f"--container-image={arguments.container_image}")
    if arguments.container_mounts:
        srun.append(f"--container-mounts={arguments.container_mounts}")
    share = arguments.gpus_per_node // processes
    if share > 1:
        srun += ["bash", "-c", script("slurm/share.sh"), "bash", str(share)]
    lines = [
        "#!/bin/bash\n",
        *directives,
        "set -eo pipefail\n",
        *(f"{line}\n" for line in arguments.setup),
        "set -u\n",  # not before: what sets up modules and environments seldom bears it
        array("srun", srun),
        array("command", ["python", "-m", "sgw_jax", *command]),
        script("slurm/batch.sh", requeue="yes" if arguments.requeue else "no"),
    ]
    return "".join(lines)
