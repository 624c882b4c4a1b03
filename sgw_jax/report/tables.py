"""Numbers as text: the terminal's table and the page's."""

import math
from collections.abc import Sequence
from typing import Any

import rich.box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sgw_jax.evaluation.metrics import relative_gain
from sgw_jax.report.record import Metrics, Results, TaskDescription

MISSING = "–"
REFERENCES = {"linear": "linear probe", "constant": "constant"}  # known references, in the order of the columns

Record = dict[str, Any]


def print_table(console: Console, results: Results) -> None:
    """Rows are tasks; columns are the network, and each reference predictor with the gain over it. Fits 80 columns."""
    headline = headline_table(results)
    title = Text(f"{results.name} on {results.split}")
    table = Table(title=title, title_justify="left", title_style="bold", box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("task")
    table.add_column("metric", no_wrap=True)
    for name in headline["columns"]:
        table.add_column(Text(name.replace(" ", "\n")), justify="right", no_wrap=True)
        if name in headline["gains"]:
            table.add_column("gain", justify="right", no_wrap=True)
    colours = {"good": "green", "bad": "red", "": "dim"}
    for row in headline["rows"]:
        values = [Text(cell["text"], "bold" if cell["best"] else "") for cell in row["values"]]
        gains = [Text(cell["text"], colours[cell["tone"]]) for cell in row["gains"]]
        metric = " ".join(part for part in (row["metric"], row["unit"], row["arrow"]) if part)
        table.add_row(Text(row["task"]), Text(metric), values[0], *_interleaved(values[1:], gains))
    if headline["means"]:
        means = [Text(cell["text"], "bold") for cell in headline["means"]]
        table.add_section()
        table.add_row("mean gain", "", "", *_interleaved([Text()] * len(means), means))
    console.print(table)
    if results.sources:
        print_sources(console, results)


def print_sources(console: Console, results: Results) -> None:
    """The network's headline metrics by source; a source is a column, and has a dash for a task without labels."""
    found = source_table(results)
    table = Table(title=Text("by source"), title_justify="left", box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("task")
    table.add_column("metric", no_wrap=True)
    for name in found["columns"]:
        table.add_column(Text(name), justify="right")
    for row in found["rows"]:
        metric = " ".join(part for part in (row["metric"], row["unit"], row["arrow"]) if part)
        table.add_row(Text(row["task"]), Text(metric), *map(Text, row["values"]))
    console.print(table)


def print_metrics(console: Console, title: str, tasks: Sequence[TaskDescription], metrics: Metrics) -> None:
    """Every metric of every task with its unit and direction, the headline in bold."""
    console.print(Text(title, "bold"), soft_wrap=True)  # of a path: longer than the table is wide
    table = Table(box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("task")
    table.add_column("metric", no_wrap=True)
    table.add_column("value", justify="right", no_wrap=True)
    for task in tasks:
        name = task.name
        for metric, value in metrics[task.name].items():
            unit = task.units.get(metric, "")
            parts = (metric, unit, arrow_of(task.directions.get(metric))["arrow"])
            text = number(value, unit)
            headline = Text(text, "bold" if metric == task.metric else "")
            table.add_row(Text(name), Text(" ".join(part for part in parts if part)), headline)
            name = ""
        table.add_section()
    console.print(table)


def _interleaved(values: Sequence[Text], gains: Sequence[Text]) -> list[Text]:
    return [text for pair in zip(values, gains, strict=True) for text in pair]


def number(value: float, unit: str = "", digits: int | None = None) -> str:
    """A number as the page shows it: two decimals for % and degrees, else three, unless `digits` says how many; a dash
    where there is none."""
    if not math.isfinite(value):
        return MISSING
    if digits is not None:
        return f"{value:.{digits}f}"
    digits = 2 if unit in ("%", "deg") else 3
    return f"{value:.{digits}f}" if not value or abs(value) >= 10.0**-digits else f"{value:.1e}"


def percent(value: float) -> Record:
    """A signed change, good or bad."""
    if not math.isfinite(value):
        return {"text": MISSING, "tone": ""}
    value = round(value, 1)
    if not value:
        return {"text": "0.0 %", "tone": ""}
    return {"text": f"{value:+.1f} %", "tone": "good" if value > 0 else "bad"}


def references_of(results: Results) -> dict[str, tuple[Metrics, float]]:
    """Title -> metrics of a reference predictor, and the mean gain over it; known ones first."""
    there = results.references
    order = [name for name in REFERENCES if name in there] + [name for name in there if name not in REFERENCES]
    return {REFERENCES.get(name, name): (there[name], results.delta_m[name]) for name in order}


def cards(results: Results) -> list[Record]:
    cards = [
        {"label": f"mean gain over {title}", **percent(gain)} for title, (_, gain) in references_of(results).items()
    ]
    cards.append({"label": "parameters", "text": count(results.parameters["total"]), "tone": ""})
    if results.speed is not None:
        speed = f"{results.speed.images_per_second:,.0f}"
        cards.append({"label": "images per second, training", "text": speed, "tone": ""})
        cards.append({"label": "wall time", "text": duration(results.speed.seconds), "tone": ""})
    return cards


def count(value: float) -> str:
    for limit, suffix in ((1e9, " B"), (1e6, " M"), (1e4, " k")):
        if value >= limit:
            return f"{value / (1e3 if limit == 1e4 else limit):.3g}{suffix}"
    return f"{value:,.0f}"


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def headline_table(results: Results) -> Record:
    """The table of headline metrics: network, references, relative gains, and their mean (delta_m)."""
    references = references_of(results)
    sources = [results.metrics, *(metrics for metrics, _ in references.values())]
    rows = []
    for task in results.tasks:
        values = [source[task.name][task.metric] for source in sources]
        gains = [relative_gain(values[0], baseline, task.higher_is_better) for baseline in values[1:]]
        known = [value for value in values if math.isfinite(value)]
        apart = len(set(known)) > 1 or len(values) == 1
        best = (max if task.higher_is_better else min)(known) if known and apart else None
        rows.append(
            {
                "task": task.name,
                "metric": task.metric,
                "unit": task.unit,
                **arrow_of(task.higher_is_better),
                "values": [{"text": number(value, task.unit), "best": value == best} for value in values],
                "gains": [percent(gain) for gain in gains],
            }
        )
    means = [percent(gain) for _, gain in references.values()]
    return {"columns": ["network", *references], "gains": list(references), "rows": rows, "means": means}


def source_table(results: Results) -> Record:
    """Headline metrics of the network in all and by source."""
    rows = []
    for task in results.tasks:
        found = [results.metrics, *(source.metrics for source in results.sources.values())]
        values = [metrics.get(task.name, {}).get(task.metric, math.nan) for metrics in found]
        rows.append(
            {
                "task": task.name,
                "metric": task.metric,
                "unit": task.unit,
                **arrow_of(task.higher_is_better),
                "values": [number(value, task.unit) for value in values],
            }
        )
    images = {name: f"{source.images:,} images" for name, source in results.sources.items()}
    return {"columns": ["all", *images], "images": images, "rows": rows}


def arrow_of(higher_is_better: bool | None) -> Record:
    """A direction as a sign and in words; empty where there is none."""
    if higher_is_better is None:
        return {"arrow": "", "direction": ""}
    return {
        "arrow": "↑" if higher_is_better else "↓",
        "direction": "higher is better" if higher_is_better else "lower is better",
    }


def all_metrics(results: Results) -> Record:
    """Every metric of every task; a reference may lack some, such as ODS."""
    references = references_of(results)
    sources = [results.metrics, *(metrics for metrics, _ in references.values())]
    tables = []
    for task in results.tasks:
        found = [source[task.name] for source in sources]
        units = {name: task.units.get(name, "") for name in found[0]}
        rows = [
            {
                "name": name,
                "unit": unit,
                **arrow_of(task.directions.get(name)),
                "values": [number(values.get(name, math.nan), unit) for values in found],
            }
            for name, unit in units.items()
        ]
        tables.append({"task": task.name, "rows": rows, "loss": number(results.losses[task.name])})
    return {"columns": ["network", *references], "tables": tables}
