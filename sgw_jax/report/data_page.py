"""The page of a look at the data: the tables, what was found, and a few images with their labels drawn."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sgw_jax.experiment.inspection import Look
from sgw_jax.pictures.album import Album
from sgw_jax.report.data_tables import tables
from sgw_jax.report.page import render
from sgw_jax.report.tables import Record
from sgw_jax.tasks.base import Task


def data_json(look: Look) -> str:
    """The numbers and the findings."""
    record = {"data": look.data.fingerprint(), "tasks": [task.to_dict() for task in look.tasks], **look.found.to_dict()}
    return json.dumps(record, indent=1)


def data_page(look: Look) -> str:
    """The page, which needs nothing beside it and stays below 4 MB; with examples where every item was read well."""
    found, tasks = look.found, look.tasks
    examples = look.examples() if found.level == "full" and not found.errors else []
    album = Album()
    page: Record = {
        "title": look.title,
        "errors": [str(finding) for finding in found.errors],
        "warnings": [str(finding) for finding in found.warnings],
        "level": found.level,
        "images": f"{sum(facts.images for facts in found.splits.values()):,}",
        "tables": tables(look),
        "tasks": [task.name for task in tasks],
        "rows": [_row(file, arrays, tasks, album) for file, arrays in examples],
        "legends": [
            {"task": task.name, "entries": [{"text": t, "colour": f"#{bytes(c).hex()}"} for t, c in task.legend()]}
            for task in tasks
            if task.target["kind"] == "labels"
        ],
    }
    album.encode()
    return render("data.html.jinja", page)


def _row(file: str, arrays: Mapping[str, Any], tasks: tuple[Task, ...], album: Album) -> Record:
    cells = [
        album.add(np.asarray(task.draw(arrays[task.name])), f"{task.name} of {file}") if task.name in arrays else None
        for task in tasks
    ]
    return {"file": Path(file).name, "image": album.add(arrays["image"], file, photo=True), "cells": cells}
