"""Where commands speak: results on standard output, everything else on standard error, both as plain text.

Names of files and tasks may hold anything, so that no text is read as rich's markup or as an emoji's name; what is to
stand out is a `rich.text.Text` with a style.
"""

import sys

from rich.console import Console
from rich.text import Text


def messages(quiet: bool = False) -> Console:
    """The console of progress, of what a command notes on its way, and of errors."""
    return _plain(stderr=True, quiet=quiet)


def results(console: Console) -> Console:
    """The console of results, tables and numbers, beside one of `messages`; another console is for both."""
    if not console.stderr:
        return console
    if hasattr(sys.stdout, "reconfigure"):  # an arrow or a file's name must not end a run where output is ASCII
        sys.stdout.reconfigure(errors="backslashreplace")
    return _plain(stderr=False, quiet=console.quiet)


def print_error(text: str) -> None:
    """One error, on standard error."""
    messages().print(Text.assemble(("error:", "red"), f" {text}"), soft_wrap=True)


def _plain(stderr: bool, quiet: bool) -> Console:
    return Console(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False)
