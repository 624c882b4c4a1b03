"""The report of a run: one HTML page that needs nothing beside it, and the headline as a table in the terminal."""

import importlib.resources
from collections.abc import Sequence
from pathlib import Path

import jinja2

from sgw_jax.pictures.album import Album
from sgw_jax.pictures.charts import finite, loss_curves
from sgw_jax.report.interaction import interaction_part
from sgw_jax.report.tables import (
    MISSING,
    Record,
    Values,
    all_metrics,
    cards,
    duration,
    headline_table,
    number,
    tasks_of,
)
from sgw_jax.run.logs import write_atomically


def write_report(path: Path, results: Values, examples: Values | None, history: Sequence[Values]) -> None:
    """Writes the page; what `results`, `examples` or `history` lack is left out or shown as a dash.

    Args:
      results: what `results.gather` returns (results.json).
      examples: what `diagnostics.collect_examples` returns, or None.
      history: the lines of metrics.jsonl.

    The file is complete whenever it exists, makes no request, and stays below 4 MB: pictures shrink until they fit.
    """
    source = importlib.resources.files("sgw_jax.report").joinpath("page.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    page = environment.from_string(source).render(page=page_of(results, examples, history), missing=MISSING)
    write_atomically(Path(path), page)


def page_of(results: Values, examples: Values | None, history: Sequence[Values]) -> Record:
    """Everything that the template shows, as text, numbers in [0, 1] and points; no formatting is left to it."""
    album = Album()
    found = results.get("diagnostics")
    page: Record = {
        "title": str(results.get("name") or "run"),
        "sentence": _sentence(results),
        "cards": cards(results),
        "headline": headline_table(results),
        "metrics": all_metrics(results),
        "classes": _classes(results),
        "curves": loss_curves([task["name"] for task in tasks_of(results)], history),
        "examples": _examples(examples, album),
        "interaction": interaction_part(results, found, examples, album) if found else None,
        "facts": _facts(results),
        "configuration": _configuration(results),
    }
    album.encode()
    return page


def _sentence(results: Values) -> str:
    names = [task["name"] for task in tasks_of(results)]
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
        (name.replace("_", " "), duration(value) if name.endswith("seconds") else number(value, digits=1))
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
