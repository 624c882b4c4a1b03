"""Numbers as text: the terminal's table and the page's."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import rich.box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sgw_jax.pictures.charts import finite

MISSING = "–"


REFERENCES = {"linear": "linear probe", "constant": "constant"}  # known references, in the order of the columns


Values = Mapping[str, Any]


Record = dict[str, Any]


def print_table(console: Console, results: Values) -> None:
    """Rows are tasks; columns are the network, and each reference predictor with the gain over it. Fits 80 columns."""
    headline = headline_table(results)
    title = escape(f"{results.get('name', '')} on {results.get('split', 'test')}")
    table = Table(title=title, title_justify="left", title_style="bold", box=rich.box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("task")
    table.add_column("metric", no_wrap=True)
    for name in headline["columns"]:
        table.add_column(escape(name.replace(" ", "\n")), justify="right", no_wrap=True)
        if name in headline["gains"]:
            table.add_column("gain", justify="right", no_wrap=True)
    colours = {"good": "green", "bad": "red", "": "dim"}
    for row in headline["rows"]:
        values = [f"[bold]{cell['text']}[/bold]" if cell["best"] else cell["text"] for cell in row["values"]]
        gains = [f"[{colours[cell['tone']]}]{cell['text']}[/]" for cell in row["gains"]]
        metric = " ".join(part for part in (row["metric"], row["unit"], row["arrow"]) if part)
        table.add_row(escape(row["task"]), escape(metric), values[0], *_interleaved(values[1:], gains))
    if headline["means"]:
        means = [f"[bold]{cell['text']}[/bold]" for cell in headline["means"]]
        table.add_section()
        table.add_row("mean gain", "", "", *_interleaved([""] * len(means), means))
    console.print(table)


def _interleaved(values: Sequence[str], gains: Sequence[str]) -> list[str]:
    return [text for pair in zip(values, gains, strict=True) for text in pair]


def number(value: Any, unit: str = "", digits: int | None = None) -> str:
    """A number as the page shows it: two decimals for % and degrees, else three, unless `digits` says how many; a dash
    where there is none."""
    if value is None or not math.isfinite(value):
        return MISSING
    if digits is not None:
        return f"{value:.{digits}f}"
    digits = 2 if unit in ("%", "deg") else 3
    return f"{value:.{digits}f}" if not value or abs(value) >= 10.0**-digits else f"{value:.1e}"


def relative_gain(value: Any, baseline: Any, higher_is_better: bool) -> float:
    """100 (M - B) / B, negated where lower is better: one term of delta_m. NaN where it is not defined."""
    if not finite(value) or not finite(baseline) or baseline == 0:
        return math.nan
    return 100 * (1 if higher_is_better else -1) * (value - baseline) / baseline


def percent(value: float) -> Record:
    """A signed change, good or bad."""
    if not math.isfinite(value):
        return {"text": MISSING, "tone": ""}
    value = round(value, 1)
    if not value:
        return {"text": "0.0 %", "tone": ""}
    return {"text": f"{value:+.1f} %", "tone": "good" if value > 0 else "bad"}


def tasks_of(results: Values) -> list[Values]:
    return list(results.get("tasks", ()))


def references_of(results: Values) -> dict[str, Values]:
    """Title -> metrics of the reference predictors; known ones first."""
    there = results.get("references") or {}
    order = [name for name in REFERENCES if name in there] + [name for name in there if name not in REFERENCES]
    return {REFERENCES[name] if name in REFERENCES else str(name): there[name] for name in order}


def cards(results: Values) -> list[Record]:
    cards = []
    for name, value in sorted((results.get("delta_m") or {}).items(), key=lambda item: item[0] != "linear"):
        change = percent(math.nan if value is None else value)
        cards.append({"label": f"mean gain over {REFERENCES.get(name, name)}", **change})
    parameters = results.get("parameters") or {}
    if "total" in parameters:
        cards.append({"label": "parameters", "text": count(parameters["total"]), "tone": ""})
    speed = results.get("speed") or {}
    if speed.get("images_per_second"):
        cards.append({"label": "images per second, training", "text": f"{speed['images_per_second']:,.0f}", "tone": ""})
    seconds = speed.get("train_seconds", speed.get("seconds"))
    if seconds:
        cards.append({"label": "wall time", "text": duration(seconds), "tone": ""})
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


def headline_table(results: Values) -> Record:
    """The table of headline metrics: network, references, relative gains, and their mean (delta_m)."""
    references = references_of(results)
    sources: dict[str, Values] = {"network": results.get("metrics") or {}, **references}
    rows = []
    for task in tasks_of(results):
        values: list[Any] = [(source.get(task["name"]) or {}).get(task["metric"]) for source in sources.values()]
        gains = [relative_gain(values[0], baseline, task["higher_is_better"]) for baseline in values[1:]]
        known: list[float] = [value for value in values if finite(value)]
        apart = len(set(known)) > 1 or len(values) == 1
        best = (max if task["higher_is_better"] else min)(known) if known and apart else None
        rows.append(
            {
                "task": task["name"],
                "metric": task["metric"],
                "unit": task.get("unit", ""),
                "arrow": "↑" if task["higher_is_better"] else "↓",
                "direction": "higher is better" if task["higher_is_better"] else "lower is better",
                "values": [
                    {"text": number(value, task.get("unit", "")), "best": finite(value) and value == best}
                    for value in values
                ],
                "gains": [percent(gain) for gain in gains],
            }
        )
    deltas = {REFERENCES.get(name, name): value for name, value in (results.get("delta_m") or {}).items()}
    means = [percent(deltas[name] if finite(deltas.get(name)) else math.nan) for name in references]
    return {"columns": list(sources), "gains": list(references), "rows": rows, "means": means if deltas else []}


def all_metrics(results: Values) -> Record:
    """Every metric of every task; only the headline's unit is known unless a task lists its "units"."""
    sources = {"network": results.get("metrics") or {}, **references_of(results)}
    tables = []
    for task in tasks_of(results):
        units = {task["metric"]: task.get("unit", ""), **task.get("units", {})}
        found = [source.get(task["name"]) or {} for source in sources.values()]
        rows = [
            {
                "name": name,
                "unit": units.get(name, ""),
                "values": [number(values.get(name), units.get(name, "")) for values in found],
            }
            for name in found[0]
        ]
        loss = (results.get("losses") or {}).get(task["name"])
        tables.append({"task": task["name"], "rows": rows, "loss": None if loss is None else number(loss)})
    return {"columns": list(sources), "tables": [table for table in tables if table["rows"]]}
