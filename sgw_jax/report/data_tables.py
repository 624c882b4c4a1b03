"""What a look at the data found, as text: the terminal's tables, and the same rows for the page."""

import dataclasses
from collections.abc import Mapping

import rich.box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sgw_jax.experiment.inspection import Inspection, Look
from sgw_jax.report.tables import MISSING
from sgw_jax.tasks.base import Task


@dataclasses.dataclass(frozen=True)
class Rows:
    """A table as text: its title, the columns, how many of them are names (the rest are numbers), and the rows."""

    title: str
    columns: tuple[str, ...]
    names: int
    rows: tuple[tuple[str, ...], ...]


def print_inspection(look: Look, console: Console, *, classes: bool = True) -> None:
    """Prints the tables; ``classes``: the classes' shares too."""
    for rows in tables(look)[: None if classes else 2]:
        table = Table(
            title=rows.title,
            title_justify="left",
            title_style="bold",
            box=rich.box.SIMPLE_HEAD,
            padding=(0, 1, 0, 0),
        )
        for i, name in enumerate(rows.columns):
            table.add_column(name, justify="left" if i < rows.names else "right")
        for row in rows.rows:
            table.add_row(*row)
        console.print(table)


def print_warnings(look: Look, console: Console) -> None:
    """Prints a line for each warning."""
    for warning in look.found.warnings:
        console.print(Text.assemble(("warning:", "yellow"), f" {warning}"), soft_wrap=True)


def tables(look: Look) -> list[Rows]:
    """The splits; then the tasks; then the classes of each task that has some."""
    found, tasks = look.found, look.tasks
    splits = [("split", "images", "height x width", "without labels")]
    for split, facts in found.splits.items():
        unlabelled = f"{len(facts.unlabelled):,}" if found.level == "full" else MISSING
        splits.append((split, f"{facts.images:,}", _sizes(facts.sizes), unlabelled))
    made = [Rows("splits", splits[0], 1, tuple(splits[1:]))]
    if found.level == "full":
        made.append(_task_rows(found, tasks))
        made += [_class_rows(found, task) for task in tasks if task.target["kind"] == "labels"]
    return made


def _sizes(sizes: Mapping[tuple[int, int], int]) -> str:
    """The one size, or how many there are, and their ranges."""
    if len(sizes) <= 1:
        return " ".join(f"{height} x {width}" for height, width in sizes) or MISSING
    heights, widths = ([size[axis] for size in sizes] for axis in (0, 1))
    ranges = " x ".join(
        f"{min(sides)}..{max(sides)}" if len(set(sides)) > 1 else f"{sides[0]}" for sides in (heights, widths)
    )
    return f"{ranges} ({len(sizes)} sizes)"


def _task_rows(found: Inspection, tasks: tuple[Task, ...]) -> Rows:
    rows = [
        (task.name if i == 0 else "", split, *_task_cells(task, found, split))
        for task in tasks
        for i, split in enumerate(_splits_with(found, task))
    ]
    return Rows("labels", ("task", "split", "what they hold", "images", "ignored"), 3, tuple(rows))


def _splits_with(found: Inspection, task: Task) -> list[str]:
    """The splits, of a mixture ("SOURCE SPLIT") those alone that have labels of the task."""
    mixed = any(" " in split for split in found.splits)
    return [split for split, facts in found.splits.items() if not mixed or task.name in facts.tasks]


def _task_cells(task: Task, found: Inspection, split: str) -> tuple[str, str, str]:
    facts = found.splits[split].tasks.get(task.name)
    if facts is None or not facts.valid:
        return MISSING, "0" if facts is None else f"{facts.images:,}", MISSING if facts is None else "100.0 %"
    kind, holds = task.target["kind"], ""
    if facts.levels is not None and kind == "labels":
        seen = sum(facts.levels.pixels[value] > 0 for value in range(len(task.legend())))
        holds = f"{seen} of {len(task.legend())} classes"
    elif facts.levels is not None:
        share = 100 * facts.levels.pixels[128:].sum() / facts.valid
        holds = f"{share:.2f} % positive, {len(facts.levels.seen)} levels"
    elif facts.spread is not None:
        means = [total / facts.valid for total in facts.spread.total]
        if kind == "vectors":
            holds = f"mean direction {', '.join(f'{mean:.2f}' for mean in means)}"
        else:
            unit = f" {task.units.get(task.metric, '')}".rstrip()
            holds = f"{facts.spread.low[0]:.3g}..{facts.spread.high[0]:.3g}{unit}, mean {means[0]:.3g}{unit}"
    return holds, f"{facts.images:,}", f"{100 * facts.ignored:.1f} %"


def _class_rows(found: Inspection, task: Task) -> Rows:
    """Of each class the share of the labelled pixels in each split, and the images of the first that show it."""
    splits = _splits_with(found, task)
    columns = ("", "class", *splits, *(f"images of {split}" for split in splits[:1]))
    rows = []
    for value, (name, _) in enumerate(task.legend()):
        cells = [_share(found, split, task.name, value) for split in splits]
        for split in splits[:1]:
            first = found.splits[split].tasks.get(task.name)
            cells.append(
                f"{first.levels.images[value]:,}" if first is not None and first.levels is not None else MISSING
            )
        rows.append((str(value), name, *cells))
    return Rows(f"classes of {task.name}, % of labelled pixels", columns, 2, tuple(rows))


def _share(found: Inspection, split: str, task: str, value: int) -> str:
    facts = found.splits[split].tasks.get(task)
    if facts is None or facts.levels is None or not facts.valid:
        return MISSING
    share = 100 * int(facts.levels.pixels[value]) / facts.valid
    return f"{share:.2f}" if share >= 0.005 or not share else f"{share:.1g}"
