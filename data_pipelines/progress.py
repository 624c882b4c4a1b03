"""How far a long piece of work is: a bar on a terminal, elsewhere a plain line every few seconds and at the end."""

import time
from collections.abc import Iterable, Iterator
from typing import Self, TypeVar

from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Column
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0

Item = TypeVar("Item")


class _Bar(Bars):
    """A bar on a line of its own, which keeps its figures in a narrow window, and notes below it."""

    def __init__(self, console: Console, transient: bool, disable: bool):
        whole = Column(no_wrap=True)  # of the line only the bar shrinks
        super().__init__(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(table_column=whole),
            TimeElapsedColumn(table_column=whole),
            TextColumn("left"),
            TimeRemainingColumn(table_column=whole),
            console=console,
            transient=transient,
            disable=disable,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["notes"]:
                yield Columns([Text(note) for note in task.fields["notes"]], padding=(0, 2))


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
        self._bar = _Bar(self._console, transient, disable=not self.drawn)
        self._task = self._bar.add_task(escape(what), total=total, completed=done, notes=())

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
        """So many are done; notes that are not empty stand below the bar, or behind on a plain line."""
        self._done = done
        self._bar.update(self._task, completed=done, notes=tuple(filter(None, notes)))
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
