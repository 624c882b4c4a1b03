"""The report of a run: one HTML page that needs nothing beside it, and the headline as a table in the terminal."""

import importlib.resources
import math
from collections.abc import Sequence
from pathlib import Path

import jinja2

from sgw_jax.data_pipelines.atomic import write_atomically
from sgw_jax.pictures.album import Album
from sgw_jax.pictures.charts import Values, loss_curves
from sgw_jax.report.interaction import interaction_part
from sgw_jax.report.record import Results
from sgw_jax.report.tables import MISSING, Record, all_metrics, cards, duration, headline_table, number, source_table


def write_report(path: Path, results: Results, examples: Values | None, history: Sequence[Values]) -> None:
    """Writes the page; a number that is not defined is a dash, what there is no example or history of left out.

    Args:
      results: the numbers (results.json).
      examples: what `diagnostics.collect_examples` returns, or None.
      history: the lines of metrics.jsonl.

    The file is complete whenever it exists, makes no request, and stays below 4 MB: pictures shrink until they fit.
    """
    write_atomically(Path(path), render("page.html.jinja", page_of(results, examples, history)))


def render(template: str, page: Record) -> str:
    """The page that a template of this folder makes of text."""
    folder = importlib.resources.files("sgw_jax.report")
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8")),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(template).render(page=page, missing=MISSING)


def page_of(results: Results, examples: Values | None, history: Sequence[Values]) -> Record:
    """Everything that the template shows, as text, numbers in [0, 1] and points; no formatting is left to it."""
    album = Album()
    page: Record = {
        "title": results.name,
        "sentence": _sentence(results),
        "cards": cards(results),
        "headline": headline_table(results),
        "metrics": all_metrics(results),
        "classes": _classes(results),
        "sources": _sources(results),
        "curves": loss_curves([task.name for task in results.tasks], history),
        "examples": _examples(examples, album),
        "interaction": None
        if results.diagnostics is None
        else interaction_part(results, results.diagnostics, examples, album),
        "facts": _facts(results),
        "configuration": _configuration(results),
    }
    album.encode()
    return page


def _sentence(results: Results) -> str:
    names = [task.name for task in results.tasks]
    subject = "The network predicts one task" if len(names) == 1 else f"One network predicts {len(names)} tasks at once"
    size = "" if results.diagnostics is None else f" ({results.diagnostics.images:,} images)"
    parts = [
        f"{subject}: {', '.join(names)}.",
        f"{results.checkpoint.capitalize()} checkpoint (step {results.step:,}), evaluated on the {results.split} "
        f"split{size}.",
    ]
    if results.protocol == "published":
        parts.append("Metrics follow the published protocol, with the departures of the field's code.")
    return " ".join(parts)


def _classes(results: Results) -> list[Record]:
    return [
        {
            "task": task,
            "rows": [
                {
                    "name": name,
                    "text": number(iou, "%", 1),
                    "width": max(0.0, min(iou, 100)) if math.isfinite(iou) else 0.0,
                }
                for name, iou in values.items()
            ],
        }
        for task, values in results.per_class.items()
    ]


def _sources(results: Results) -> Record | None:
    """Of a mixture the headline by source, and each source's own tables."""
    if not results.sources:
        return None
    alone = {name: results.of_source(name) for name in results.sources}
    return {
        "headline": source_table(results),
        "each": [{"name": name, "metrics": all_metrics(own)} for name, own in alone.items()],
    }


def _facts(results: Results) -> list[Record]:
    """Short tables: speed, parameters, environment."""
    parameters = [(name, f"{value:,}") for name, value in results.parameters.items()]
    tables = [("Parameters", parameters), ("Environment", list(results.environment.items()))]
    if results.speed is not None:
        speed = [
            ("images per second", number(results.speed.images_per_second, digits=1)),
            ("seconds", duration(results.speed.seconds)),
        ]
        tables.insert(0, ("Speed", speed))
    return [{"title": title, "rows": rows} for title, rows in tables]


def _configuration(results: Results) -> list[Record]:
    """The configuration, and of the run's identity what is not in it: data and tasks."""
    rest = {key: value for key, value in results.identity.items() if key not in results.config}
    tables = (("Configuration", results.config), ("Data and tasks", rest))
    return [{"title": title, "rows": [(k, str(v)) for k, v in sorted(t.items())]} for title, t in tables if t]


# --- pictures -------------------------------------------------------------------------------------------------------


def _examples(examples: Values | None, album: Album) -> Record | None:
    if examples is None:
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
        source = examples.get("sources", [""] * (i + 1))[i]
        rows.append({"image": album.add(image, f"image {i + 1}", photo=True), "source": source, "cells": cells})
    legends = [
        {"task": name, "entries": [{"text": text, "colour": f"#{bytes(colour).hex()}"} for text, colour in legend]}
        for name, found in examples["tasks"].items()
        if (legend := found["legend"])
    ]
    return {"tasks": list(examples["tasks"]), "rows": rows, "legends": legends}
