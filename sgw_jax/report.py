"""The report of a run: one HTML page that needs nothing beside it, and the headline as a table in the terminal."""

import importlib.resources
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import rich.box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sgw_jax.album import Album, overlay
from sgw_jax.charts import finite, loss_curves
from sgw_jax.writers import write_atomically

MISSING = "–"
REFERENCES = {"linear": "linear probe", "constant": "constant"}  # known references, in the order of the columns
ABLATIONS = {"zeroed": "read-out zeroed", "swapped": "read-out of another image"}
IMAGES_WITH_MAPS = 2

Values = Mapping[str, Any]
Record = dict[str, Any]

# key, name, what it means, what is healthy, and when to look closer. The limits are our decision, taken from runs in
# which the module had failed in that way: slots that only average, a static bank, an inert module.
DIAGNOSTICS: Sequence[tuple[str, str, str, str, Callable[[float], bool]]] = (
    (
        "slot_diversity",
        "Slot diversity",
        "1 − mean Jaccard overlap of the token sets that two slots keep: 1 if no two share one, 0 if all are equal.",
        "near 1; below 0.5 slots duplicate each other",
        lambda value: value < 0.5,
    ),
    (
        "retrieve_entropy",
        "Retrieve entropy",
        "Entropy of a slot's attention over the tokens it keeps, relative to the maximum: 1 if it averages them.",
        "clearly below 1; above 0.98 slots average, they do not weigh",
        lambda value: value > 0.98,
    ),
    (
        "write_entropy",
        "Write entropy",
        "Entropy of a token's attention over the slots, relative to the maximum: 1 if it takes every slot alike.",
        "clearly below 1; above 0.98 all tokens receive the same update",
        lambda value: value > 0.98,
    ),
    (
        "readout_cosine",
        "Read-out cosine",
        "Mean cosine between what the same slot reads from two different images: 1 if it does not depend on the image.",
        "the lower the better; above 0.95 the workspace is nearly a constant bank",
        lambda value: value > 0.95,
    ),
    (
        "selection_stability",
        "Selection stability",
        "Jaccard overlap of the tokens that a slot keeps for an image and for a slightly noisy copy of it.",
        "near 1; below 0.3 the choice follows the noise",
        lambda value: value < 0.3,
    ),
    (
        "selection_between_images",
        "Selection between images",
        "The same overlap for two different images; a choice that ignores the image is stable under any noise.",
        "far below the stability; above 0.8 the slots keep the same places in every image",
        lambda value: value > 0.8,
    ),
    (
        "update_ratio",
        "Update ratio",
        "Size of the update relative to the features that it is added to.",
        "about 0.05 to 1; below 0.01 the module is inert, above 2 it replaces the features",
        lambda value: not 0.01 <= value <= 2,
    ),
)


def write_report(path: Path, results: Values, examples: Values | None, history: Sequence[Values]) -> None:
    """Writes the page; what `results`, `examples` or `history` lack is left out or shown as a dash.

    Args:
      results: what `results.gather` returns (results.json).
      examples: what `diagnostics.collect_examples` returns, or None.
      history: the lines of metrics.jsonl.

    The file is complete whenever it exists, makes no request, and stays below 4 MB: pictures shrink until they fit.
    """
    source = importlib.resources.files("sgw_jax").joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.from_string(source).render(page=page_of(results, examples, history), missing=MISSING)
    write_atomically(Path(path), page)


def print_table(console: Console, results: Values) -> None:
    """Rows are tasks; columns are the network, and each reference predictor with the gain over it. Fits 80 columns."""
    headline = _headline(results)
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


def page_of(results: Values, examples: Values | None, history: Sequence[Values]) -> Record:
    """Everything that the template shows, as text, numbers in [0, 1] and points; no formatting is left to it."""
    album = Album()
    found = results.get("diagnostics")
    page: Record = {
        "title": str(results.get("name") or "run"),
        "sentence": _sentence(results),
        "cards": _cards(results),
        "headline": _headline(results),
        "metrics": _all_metrics(results),
        "classes": _classes(results),
        "curves": loss_curves([task["name"] for task in _tasks(results)], history),
        "examples": _examples(examples, album),
        "interaction": _interaction(results, found, examples, album) if found else None,
        "facts": _facts(results),
        "configuration": _configuration(results),
    }
    album.encode()
    return page


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


def _percent(value: float) -> Record:
    """A signed change, good or bad."""
    if not math.isfinite(value):
        return {"text": MISSING, "tone": ""}
    value = round(value, 1)
    if not value:
        return {"text": "0.0 %", "tone": ""}
    return {"text": f"{value:+.1f} %", "tone": "good" if value > 0 else "bad"}


def _tasks(results: Values) -> list[Values]:
    return list(results.get("tasks", ()))


def _references(results: Values) -> dict[str, Values]:
    """Title -> metrics of the reference predictors; known ones first."""
    there = results.get("references") or {}
    order = [name for name in REFERENCES if name in there] + [name for name in there if name not in REFERENCES]
    return {REFERENCES[name] if name in REFERENCES else str(name): there[name] for name in order}


def _sentence(results: Values) -> str:
    names = [task["name"] for task in _tasks(results)]
    subject = "The network predicts one task" if len(names) == 1 else f"One network predicts {len(names)} tasks at once"
    parts = [f"{subject}: {', '.join(names)}." if names else ""]
    checkpoint = f"{str(results.get('checkpoint', 'last')).capitalize()} checkpoint"
    step = f" (step {results['step']:,})" if "step" in results else ""
    images = (results.get("diagnostics") or {}).get("images")
    size = f" ({images:,} images)" if images else ""
    parts.append(f"{checkpoint}{step}, evaluated on the {results.get('split', 'test')} split{size}.")
    if results.get("protocol") == "published":
        parts.append("Metrics follow the published protocol, with the departures of the field's code.")
    return " ".join(part for part in parts if part)


def _cards(results: Values) -> list[Record]:
    cards = []
    for name, value in sorted((results.get("delta_m") or {}).items(), key=lambda item: item[0] != "linear"):
        change = _percent(math.nan if value is None else value)
        cards.append({"label": f"mean gain over {REFERENCES.get(name, name)}", **change})
    parameters = results.get("parameters") or {}
    if "total" in parameters:
        cards.append({"label": "parameters", "text": _count(parameters["total"]), "tone": ""})
    speed = results.get("speed") or {}
    if speed.get("images_per_second"):
        cards.append({"label": "images per second, training", "text": f"{speed['images_per_second']:,.0f}", "tone": ""})
    seconds = speed.get("train_seconds", speed.get("seconds"))
    if seconds:
        cards.append({"label": "wall time", "text": _duration(seconds), "tone": ""})
    return cards


def _count(value: float) -> str:
    for limit, suffix in ((1e9, " B"), (1e6, " M"), (1e4, " k")):
        if value >= limit:
            return f"{value / (1e3 if limit == 1e4 else limit):.3g}{suffix}"
    return f"{value:,.0f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"


def _headline(results: Values) -> Record:
    """The table of headline metrics: network, references, relative gains, and their mean (delta_m)."""
    references = _references(results)
    sources: dict[str, Values] = {"network": results.get("metrics") or {}, **references}
    rows = []
    for task in _tasks(results):
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
                "gains": [_percent(gain) for gain in gains],
            }
        )
    deltas = {REFERENCES.get(name, name): value for name, value in (results.get("delta_m") or {}).items()}
    means = [_percent(deltas[name] if finite(deltas.get(name)) else math.nan) for name in references]
    return {"columns": list(sources), "gains": list(references), "rows": rows, "means": means if deltas else []}


def _all_metrics(results: Values) -> Record:
    """Every metric of every task; only the headline's unit is known unless a task lists its "units"."""
    sources = {"network": results.get("metrics") or {}, **_references(results)}
    tables = []
    for task in _tasks(results):
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


def _classes(results: Values) -> list[Record]:
    return [
        {
            "task": task,
            "rows": [
                {"name": name, "text": number(iou, "%", 1), "width": max(0.0, min(iou, 100)) if finite(iou) else 0.0}
                for name, iou in values.items()
            ],
        }
        for task, values in (results.get("per_class") or {}).items()
        if values
    ]


def _facts(results: Values) -> list[Record]:
    """Short tables: speed, parameters, environment."""
    speed = [
        (name.replace("_", " "), _duration(value) if name.endswith("seconds") else number(value, digits=1))
        for name, value in (results.get("speed") or {}).items()
    ]
    parameters = [(name, f"{value:,}") for name, value in (results.get("parameters") or {}).items()]
    environment = [(name, str(value)) for name, value in (results.get("environment") or {}).items()]
    tables = (("Speed", speed), ("Parameters", parameters), ("Environment", environment))
    return [{"title": title, "rows": rows} for title, rows in tables if rows]


def _configuration(results: Values) -> list[Record]:
    """The configuration, and of the run's identity what is not in it: data and tasks."""
    config, identity = results.get("config") or {}, results.get("identity") or {}
    rest = {key: value for key, value in identity.items() if key not in config}
    tables = (("Configuration", config), ("Data and tasks", rest))
    return [{"title": title, "rows": [(k, str(v)) for k, v in sorted(t.items())]} for title, t in tables if t]


# --- pictures -------------------------------------------------------------------------------------------------------


def _examples(examples: Values | None, album: Album) -> Record | None:
    if not examples or not len(examples["image"]):
        return None
    rows = []
    for i, image in enumerate(examples["image"]):
        cells = [
            {
                "task": name,
                "truth": album.add(found["pictures"]["truth"][i], f"{name} of image {i + 1}, truth"),
                "prediction": album.add(found["pictures"]["prediction"][i], f"{name} of image {i + 1}, prediction"),
            }
            for name, found in examples["tasks"].items()
        ]
        rows.append({"image": album.add(image, f"image {i + 1}", photo=True), "cells": cells})
    legends = [
        {"task": name, "entries": [{"text": text, "colour": f"#{bytes(colour).hex()}"} for text, colour in legend]}
        for name, found in examples["tasks"].items()
        if (legend := found.get("legend"))
    ]
    return {"tasks": list(examples["tasks"]), "rows": rows, "legends": legends}


# --- the interaction ------------------------------------------------------------------------------------------------


def _interaction(results: Values, found: Values, examples: Values | None, album: Album) -> Record:
    numbers = [
        {"name": name, "text": number(found.get(key)), "meaning": meaning, "healthy": healthy, "watch": watch}
        for key, name, meaning, healthy, alarm in DIAGNOSTICS
        for watch in (finite(found.get(key)) and alarm(found[key]),)
    ]
    numbers += [
        {
            "name": f"Gate of {task}",
            "text": number(gate, digits=3),
            "meaning": "Learned factor of the update that the task takes from the slots, from 0 at the start.",
            "healthy": "any; 0 takes nothing, the sign alone means nothing",
            "watch": False,
        }
        for task, gate in (found.get("task_gates") or {}).items()
    ]
    return {
        "numbers": numbers,
        "ablations": _ablations(results, found.get("ablations") or {}),
        "heat": _heat_maps(found),
        "maps": _retrieve_maps(examples, album),
    }


def _ablations(results: Values, ablations: Values) -> Record | None:
    """Headline metrics under ablation, and their relative change against the whole network."""
    if not ablations:
        return None
    rows = []
    for task in _tasks(results):
        whole = ((results.get("metrics") or {}).get(task["name"]) or {}).get(task["metric"])
        cells = []
        for ablated in ablations.values():
            value = (ablated["metrics"].get(task["name"]) or {}).get(task["metric"])
            change = relative_gain(value, whole, task["higher_is_better"])
            cells.append({"text": number(value, task.get("unit", "")), "change": _percent(change)})
        row = {"task": task["name"], "metric": task["metric"], "unit": task.get("unit", "")}
        rows.append({**row, "whole": number(whole, row["unit"]), "cells": cells})
    return {"columns": [ABLATIONS.get(name, name) for name in ablations], "rows": rows}


def _heat_maps(found: Values) -> list[Record]:
    tasks = found["tasks"]
    slots = [str(number) for number in range(len(found["reads"]))]
    return [
        _heat_map(
            "Who learns from whom",
            "Of a task's attention through the slots (row), the percentage that falls on each task's tokens (column).",
            found["flow"],
            (tasks, tasks),
            ("to", "from"),
        ),
        _heat_map(
            "What the slots read",
            "Of a slot's attention (column), the percentage that falls on the tokens of each task.",
            np.transpose(found["reads"]).tolist(),
            (tasks, slots),
            ("task", "slot"),
        ),
        _heat_map(
            "Whom the slots write to",
            "How the tokens of a task (row) divide their attention over the slots, in percent.",
            found["writes"],
            (tasks, slots),
            ("task", "slot"),
        ),
    ]


def _heat_map(
    title: str,
    caption: str,
    values: Sequence[Sequence[float]],
    labels: tuple[Sequence[str], Sequence[str]],
    axes: tuple[str, str],
) -> Record:
    """A table whose cells are shaded between 0 and the largest value."""
    highest = max((value for row in values for value in row if finite(value)), default=0.0) or 1.0
    rows = [
        {
            "name": name,
            "cells": [
                {"text": f"{100 * value:.0f}" if finite(value) else MISSING, "heat": round(_heat(value, highest), 3)}
                for value in row
            ],
        }
        for name, row in zip(labels[0], values, strict=True)
    ]
    corner = f"{axes[0]} \\ {axes[1]}"
    wide = len(labels[1]) > 10
    return {"title": title, "caption": caption, "corner": corner, "columns": labels[1], "rows": rows, "wide": wide}


def _heat(value: float, highest: float) -> float:
    return max(0.0, value / highest) if finite(value) else 0.0


def _retrieve_maps(examples: Values | None, album: Album) -> list[Record]:
    """Per image: a row for every shown slot, a picture for every task whose tokens it reads."""
    retrieve = (examples or {}).get("retrieve")
    if not examples or not retrieve:
        return []
    shown = []
    for i, image in enumerate(examples["image"][:IMAGES_WITH_MAPS]):
        rows = []
        for j, slot in enumerate(retrieve["slots"]):
            maps = {name: np.asarray(values[i][j], np.float64) for name, values in retrieve["maps"].items()}
            highest = max(values.max() for values in maps.values())
            cells = [
                {
                    "share": f"{100 * values.sum():.0f} %",
                    "picture": album.add(
                        overlay(image, values / highest if highest > 0 else values),
                        f"where slot {slot} reads the tokens of {name} in image {i + 1}",
                        photo=True,
                    ),
                }
                for name, values in maps.items()
            ]
            rows.append({"slot": slot, "cells": cells})
        picture = album.add(image, f"image {i + 1}", photo=True)
        shown.append({"title": f"Image {i + 1}", "image": picture, "tasks": list(retrieve["maps"]), "rows": rows})
    return shown
