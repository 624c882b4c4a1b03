"""A training run on a Slurm cluster of GPUs: one process a GPU, requeued when it is interrupted.

    python launch/slurm.py --nodes=4 --gpus-per-node=8 --time=24:00:00 --partition=gpu \\
        --setup='source .venv/bin/activate' -- train --config=nyud --workdir=/shared/run

Writes the batch script and gives it to `sbatch`; `--dry-run` prints it. Two minutes before the time limit, and when the
job is preempted, every process gets SIGTERM: the run saves, ends with 143 (128 + SIGTERM), and the script puts itself
into the queue again; the same command goes on from the last checkpoint. The processes find each other through Slurm.
"""

import argparse
import sys
from collections.abc import Sequence

from arguments import add_command, add_dry_run, count, matching, one_line, run, training_command

WORD = matching(r"[\w][\w.@+-]*", "a word of letters, digits and . _ @ + -")

SCRIPT = """\
#!/usr/bin/env bash
{options}
set -euo pipefail
{setup}
code=0
srun {srun} {command} || code=$?
{again}
exit "$code"
"""

AGAIN = """\
if [ "$code" -eq 143 ]; then  # saved on SIGTERM: into the queue again
  scontrol requeue "$SLURM_JOB_ID"
fi"""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints or submits the script."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--job-name", type=WORD, default="sgw_jax", help="default: %(default)s")
    parser.add_argument("--nodes", type=count, required=True)
    parser.add_argument("--gpus-per-node", type=count, required=True)
    parser.add_argument("--processes-per-node", type=count, help="default: one a GPU")
    parser.add_argument("--cpus-per-task", type=count, default=8, help="default: %(default)s")
    limit = matching(r"(\d+-)?\d{1,3}(:\d{2}){0,2}", "a time such as 90, 24:00:00 or 2-00:00:00")
    parser.add_argument("--time", type=limit, required=True)
    parser.add_argument("--partition", type=WORD)
    parser.add_argument("--account", type=WORD)
    output = matching(r"[\w./%-]+", "a path of letters, digits and . / _ - %")
    parser.add_argument("--output", type=output, default="slurm-%j.out", help="default: %(default)s")
    parser.add_argument("--container-image", type=matching(r"[\w][\w.:/@+#-]*", "a container image"), help="with pyxis")
    parser.add_argument("--seconds-to-save", type=count, default=120, help="default: %(default)s")
    parser.add_argument("--no-requeue", action="store_true", help="do not go on after an interruption")
    help = "a line of shell before the command, such as `module load cuda`; it is read by the shell as it is"
    parser.add_argument("--setup", type=one_line, action="append", default=[], help=help)
    add_dry_run(parser)
    add_command(parser)
    arguments = parser.parse_args(argv)
    text = script(arguments)
    if arguments.dry_run:
        print(text, end="")
        return 0
    return run([["sbatch"]], dry_run=False, given=text)


def script(arguments: argparse.Namespace) -> str:
    """The batch script."""
    processes = arguments.processes_per_node or arguments.gpus_per_node
    options = {
        "job-name": arguments.job_name,
        "nodes": arguments.nodes,
        "ntasks-per-node": processes,
        "gpus-per-node": arguments.gpus_per_node,
        "cpus-per-task": arguments.cpus_per_task,
        "time": arguments.time,
        "output": arguments.output,
        "signal": f"TERM@{arguments.seconds_to_save}",  # to the steps, not to this script
        "open-mode": "append",  # one log for all of the run's lives
        "partition": arguments.partition,
        "account": arguments.account,
    }
    lines = [f"#SBATCH --{key}={value}" for key, value in options.items() if value is not None]
    lines.append("#SBATCH --no-requeue" if arguments.no_requeue else "#SBATCH --requeue")
    image = [f"--container-image={arguments.container_image}"] if arguments.container_image else []
    return SCRIPT.format(
        options="\n".join(lines),
        setup="\n".join(arguments.setup),
        srun=" ".join(["--kill-on-bad-exit=1", *image]),
        command=training_command(arguments.command),
        again="" if arguments.no_requeue else AGAIN,
    )


if __name__ == "__main__":
    sys.exit(main())
