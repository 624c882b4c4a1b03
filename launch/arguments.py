"""What the launchers share: checked arguments, and a training command that reaches the other side as it was typed."""

import argparse
import re
import shlex
import subprocess
from collections.abc import Callable, Sequence

NAME = r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?"  # of resources in Google Cloud and Kubernetes


def matching(pattern: str, what: str) -> Callable[[str], str]:
    """An argparse type: the whole text must match; ``what`` says what is allowed."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text):
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return text

    return check


name = matching(NAME, "a name of lower-case letters, digits and hyphens, at most 63, that starts with a letter")
BUCKET = matching(r"[a-z0-9][-a-z0-9_.]{1,61}[a-z0-9]", "the name of a bucket, without gs://")
one_line = matching(r"[^\n\r\0]+", "one line of text")


def count(text: str) -> int:
    """An argparse type: a positive whole number."""
    if not re.fullmatch(r"[1-9]\d{0,8}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def add_command(parser: argparse.ArgumentParser) -> None:
    """The arguments after ``--``: what follows `python -m sgw_jax`."""
    parser.add_argument("command", nargs="+", type=one_line, metavar="-- command", help="of `python -m sgw_jax`")


def add_dry_run(parser: argparse.ArgumentParser) -> None:
    """Every launcher can say what it would do."""
    parser.add_argument("--dry-run", action="store_true", help="print what would be run, and run nothing")


def training_command(command: Sequence[str], python: str = "python") -> str:
    """For a POSIX shell: every argument quoted, so that no character of a configuration value means anything to it."""
    return shlex.join([python, "-m", "sgw_jax", *command])


def run(commands: Sequence[Sequence[str]], dry_run: bool, given: str | None = None) -> int:
    """Runs local commands one after another, without a shell, up to the first that fails; or prints them.

    Args:
      given: standard input of each.

    Returns the last exit code.
    """
    code = 0
    for command in commands:
        if dry_run:
            print(shlex.join(command))
            continue
        code = subprocess.run(command, input=given, text=True, check=False).returncode
        if code:
            break
    return code
