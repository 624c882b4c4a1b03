"""How far a long piece of work is: a bar on a terminal, elsewhere a plain line every few seconds and at the end."""

import time
from collections.abc import Iterable, Iterator
from typing import Self, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 10.0

Item = TypeVar("Item")


class Progress:
    """Shows "WHAT 3/10"; as a context manager it draws the bar.

    Args:
      console: None shows nothing.
      done: of `total`, before the beginning.
      transient: the bar is gone when the work is done.
    """

    def __init__(self, what: str, total: int | None, console: Console | None, *, done: int = 0, transient: bool = True):
        self._what, self._total, self._done = what, total, done
        self._console = Console(quiet=True) if console is None else console
        self._last_line = time.monotonic()
        self._bar = Bar(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[notes]}", markup=False),
            console=self._console,
            transient=transient,
            disable=not self.drawn,
        )
        self._task = self._bar.add_task(what, total=total, completed=done, notes="")

    @property
    def drawn(self) -> bool:
        """Whether there is a bar, which tells the time left by itself."""
        return self._console.is_terminal and not self._console.quiet

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self.update(self._done + count)

    def update(self, done: int, *notes: str) -> None:
        """So many are done; notes that are not empty stand behind."""
        self._done = done
        self._bar.update(self._task, completed=done, notes="  ".join(filter(None, notes)))
        now = time.monotonic()
        if not self.drawn and (done == self._total or now - self._last_line > SECONDS_BETWEEN_LINES):
            self._last_line = now
            parts = (f"{self._what} {done}/{'?' if self._total is None else self._total}", *notes)
            self._console.print("  ".join(filter(None, parts)), soft_wrap=True, markup=False)


def counted(items: Iterable[Item], what: str, total: int | None, console: Console | None) -> Iterator[Item]:
    """The items; each counts as done when the next one is asked for."""
    with Progress(what, total, console) as progress:
        for item in items:
            yield item
            progress.advance()
