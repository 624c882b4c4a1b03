"""What the launchers share: arguments that are checked one by one, and the training command after `--`.

    sgw-jax launch X [options] -- train --config=... --workdir=...

Whatever is wrong ends with exit code 2 and a sentence that names the argument, what was found and what is allowed.
"""

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

COMMANDS = ("train", "evaluate", "predict", "plan")
SCRIPTS = Path(__file__).parent / "scripts"


def parser(name: str, docstring: str | None) -> argparse.ArgumentParser:
    """A launcher's. Options are not abbreviated: what is mistyped must fail, not mean something else."""
    shape: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter, "allow_abbrev": False}
    return argparse.ArgumentParser(f"sgw-jax launch {name}", description=docstring, **shape)


def split(argv: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """The launcher's own arguments, and those after the first `--`; None where there is no `--`.

    argparse would take `--` out by rules that differ from one version of Python to the next.
    """
    if "--" not in argv:
        return list(argv), None
    place = list(argv).index("--")
    return list(argv[:place]), list(argv[place + 1 :])


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, durable: bool = False
) -> tuple[argparse.Namespace, list[str]]:
    """The launcher's own arguments and the checked training command; argv None: those of this process."""
    own, command = split(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(own)
    return arguments, check_command(parser, command, durable)


def feed(program: Sequence[str], text: str, remedy: str) -> int:
    """Runs a program on a text; returns its exit code, 127 and a sentence with the remedy where it is not there."""
    try:
        return subprocess.run(program, input=text, text=True, check=False).returncode
    except FileNotFoundError:
        print(f"{program[0]} found nowhere on PATH; {remedy}, or use --dry-run", file=sys.stderr)
        return 127


def script(name: str, **variables: str) -> str:
    """A file of scripts/, after assignments of the variables that it needs."""
    text = (SCRIPTS / name).read_text(encoding="utf-8")
    return "".join(f"{variable}={shlex.quote(value)}\n" for variable, value in variables.items()) + text


def array(name: str, words: Sequence[str]) -> str:
    """The assignment of an array of bash. Quotes, and = and , are meant as they stand."""
    return f"# shellcheck disable=SC1003,SC2016,SC2054,SC2191\n{name}=({shlex.join(words)})\n"


def check_command(parser: argparse.ArgumentParser, command: Sequence[str] | None, durable: bool = False) -> list[str]:
    """The training command. durable: the machine's own disk does not outlive a restart, or is not the only one."""
    if not command:
        parser.error(f"-- command: nothing found; allowed is {' | '.join(COMMANDS)} with its arguments after `--`")
    for argument in command:
        try:
            plain(argument)
        except argparse.ArgumentTypeError as error:
            parser.error(f"-- command: {error}")
    if command[0] not in COMMANDS:
        allowed = " | ".join(COMMANDS)
        parser.error(f"-- command: {command[0]!r} found; allowed is what follows `python -m sgw_jax`: {allowed}")
    workdir = _workdir(command)
    if workdir and "://" in workdir:
        parser.error(f"--workdir: {workdir!r} found; allowed is a directory: mount the bucket (--bucket does)")
    if durable and command[0] == "train" and not (workdir or "").startswith("/"):
        found = "nothing" if workdir is None else repr(workdir)
        parser.error(f"--workdir: {found} found; allowed is a directory that all hosts see and keep, as /mnt/runs/it")
    return list(command)


def refuse_command(parser: argparse.ArgumentParser, command: Sequence[str] | None) -> None:
    if command is not None:
        parser.error(f"-- command: {list(command)} found; allowed is nothing: this subcommand starts no run")


def _workdir(command: Sequence[str]) -> str | None:
    """The last one counts, as in sgw_jax itself."""
    found = None
    for argument, following in zip(command, [*command[1:], None], strict=True):
        if argument == "--workdir":
            found = following
        elif argument.startswith("--workdir="):
            found = argument.partition("=")[2]
    return found


def plain(text: str) -> str:
    """Any text that is one line: line breaks and NUL do not pass through every shell and log on the way."""
    if re.search(r"[\n\r\0]", text):
        raise argparse.ArgumentTypeError(f"{text!r} found; allowed is text without line breaks and NUL")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} found; allowed is text in UTF-8") from None
    return text


def matching(pattern: str, allowed: str) -> Callable[[str], str]:
    """An argument's type for argparse: text that the pattern matches from end to end."""

    def check(text: str) -> str:
        if not re.fullmatch(pattern, text, flags=re.ASCII):
            raise argparse.ArgumentTypeError(f"{text!r} found; allowed is {allowed}")
        return text

    return check


def whole(low: int, high: int = 10**6) -> Callable[[str], int]:
    """An argument's type for argparse: an integer between low and high."""

    def check(text: str) -> int:
        if not re.fullmatch(r"[0-9]{1,9}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} found; allowed is an integer from {low} to {high}")
        return int(text)

    return check


BUCKET = matching(r"[a-z0-9][-a-z0-9_.]{1,61}[a-z0-9]", "the name of a bucket, without gs://")

# Names and places of Google Cloud and of container images, as their documentation spells them.
NAME = matching(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", "up to 40 of a-z, 0-9 and -, beginning with a letter, as run-1")
SERVICE_ACCOUNT = matching(r"[a-z0-9][a-z0-9-]*@[a-z0-9.-]+\.com", "an address as name@project.iam.gserviceaccount.com")
IMAGE = r"[A-Za-z0-9][A-Za-z0-9._-]*(:[0-9]+)?(/[A-Za-z0-9][A-Za-z0-9._-]*)*(:[A-Za-z0-9._-]+)?(@sha256:[0-9a-f]{64})?"
