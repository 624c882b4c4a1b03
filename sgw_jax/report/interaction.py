"""The page's part on the slots: what they read, whom they write to, what happens without them."""

import math
from collections.abc import Callable, Sequence

import numpy as np

from sgw_jax.evaluation.metrics import relative_gain
from sgw_jax.pictures.album import Album, overlay
from sgw_jax.pictures.charts import Values
from sgw_jax.report.record import Diagnostics, Results
from sgw_jax.report.tables import MISSING, Record, number, percent

ABLATIONS = {"zeroed": "read-out zeroed", "swapped": "read-out of another image"}
IMAGES_WITH_MAPS = 2

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


def interaction_part(results: Results, found: Diagnostics, examples: Values | None, album: Album) -> Record:
    numbers = [
        {
            "name": name,
            "text": number(value),
            "meaning": meaning,
            "healthy": healthy,
            "watch": math.isfinite(value) and alarm(value),
        }
        for key, name, meaning, healthy, alarm in DIAGNOSTICS
        for value in (getattr(found, key),)
    ]
    numbers += [
        {
            "name": f"Gate of {task}",
            "text": number(gate, digits=3),
            "meaning": "Learned factor of the update that the task takes from the slots, from 0 at the start.",
            "healthy": "any; 0 takes nothing, the sign alone means nothing",
            "watch": False,
        }
        for task, gate in found.task_gates.items()
    ]
    return {
        "numbers": numbers,
        "ablations": _ablations(results, found),
        "heat": _heat_maps(found),
        "maps": _retrieve_maps(examples, album),
    }


def _ablations(results: Results, found: Diagnostics) -> Record:
    """Headline metrics under ablation, and their relative change against the whole network."""
    rows = []
    for task in results.tasks:
        whole = results.metrics[task.name][task.metric]
        cells = []
        for ablated in found.ablations.values():
            value = ablated.metrics[task.name][task.metric]
            change = relative_gain(value, whole, task.higher_is_better)
            cells.append({"text": number(value, task.unit), "change": percent(change)})
        row = {"task": task.name, "metric": task.metric, "unit": task.unit}
        rows.append({**row, "whole": number(whole, task.unit), "cells": cells})
    return {"columns": [ABLATIONS[name] for name in found.ablations], "rows": rows}


def _heat_maps(found: Diagnostics) -> list[Record]:
    tasks = found.tasks
    slots = [str(number) for number in range(len(found.reads))]
    return [
        _heat_map(
            "Who learns from whom",
            "Of a task's attention through the slots (row), the percentage that falls on each task's tokens (column).",
            found.flow,
            (tasks, tasks),
            ("to", "from"),
        ),
        _heat_map(
            "What the slots read",
            "Of a slot's attention (column), the percentage that falls on the tokens of each task.",
            np.transpose(found.reads).tolist(),
            (tasks, slots),
            ("task", "slot"),
        ),
        _heat_map(
            "Whom the slots write to",
            "How the tokens of a task (row) divide their attention over the slots, in percent.",
            found.writes,
            (tasks, slots),
            ("task", "slot"),
        ),
        *_pair_gates(found),
    ]


def _pair_gates(found: Diagnostics) -> list[Record]:
    if not found.pair_gates:
        return []
    sizes = [[abs(gate) for gate in row] for row in found.pair_gates]
    caption = "Size of the learned factor, times 100, on what a task (row) reads of the slots of another (column)."
    return [_heat_map("Gates between tasks", caption, sizes, (found.tasks, found.tasks), ("to", "from"))]


def _heat_map(
    title: str,
    caption: str,
    values: Sequence[Sequence[float]],
    labels: tuple[Sequence[str], Sequence[str]],
    axes: tuple[str, str],
) -> Record:
    """A table whose cells are shaded between 0 and the largest value."""
    highest = max((value for row in values for value in row if math.isfinite(value)), default=0.0) or 1.0
    rows = [
        {
            "name": name,
            "cells": [
                {
                    "text": f"{100 * value:.0f}" if math.isfinite(value) else MISSING,
                    "heat": round(_heat(value, highest), 3),
                }
                for value in row
            ],
        }
        for name, row in zip(labels[0], values, strict=True)
    ]
    corner = f"{axes[0]} \\ {axes[1]}"
    wide = len(labels[1]) > 10
    return {"title": title, "caption": caption, "corner": corner, "columns": labels[1], "rows": rows, "wide": wide}


def _heat(value: float, highest: float) -> float:
    return max(0.0, value / highest) if math.isfinite(value) else 0.0


def _retrieve_maps(examples: Values | None, album: Album) -> list[Record]:
    """Per image: a row for every shown slot, a picture for every task whose tokens it reads."""
    if examples is None or (retrieve := examples["retrieve"]) is None:
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
