"""The card of a model's folder: README.md with the hub's metadata, from the configuration and what the run measured."""

import dataclasses
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from sgw_jax.data_pipelines.errors import FileError, InputError
from sgw_jax.data_pipelines.json_files import file_bytes
from sgw_jax.export.description import CONFIG, LIBRARY
from sgw_jax.export.trained import Trained
from sgw_jax.layers.parameter_names import PARAMS
from sgw_jax.report.record import Results, read_results
from sgw_jax.report.tables import all_metrics, count, headline_table
from sgw_jax.tasks.base import Task

CARD = "README.md"
LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")


@dataclasses.dataclass(frozen=True)
class Kind:
    """What the hub calls a kind of task, and what a pixel of its map is."""

    tag: str
    pipeline: str  # one of the hub's pipeline tags; "" where it has none
    pixel: str


KINDS = {
    "semseg": Kind("semantic-segmentation", "image-segmentation", "a class, uint8"),
    "human_parts": Kind("human-parsing", "image-segmentation", "a part of the body, uint8; 0 is background"),
    "saliency": Kind("saliency-detection", "image-segmentation", "the probability of being salient, float32"),
    "depth": Kind("depth-estimation", "depth-estimation", "the depth, float32"),
    "normals": Kind("surface-normals", "", "a unit vector, float32"),
    "edges": Kind("edge-detection", "", "the probability of an edge, float32"),
}
OWN = Kind("dense-prediction", "", "what the task's own class decodes")  # of a user's class

# config.data.source -> its name in prose, and whether the hub should list it as a data set.
DATA = {
    "scenes": ("rooms rendered by the library (no photographs)", False),
    "folder": ("a folder of its maker's own images", False),
    "nyud": ("NYUD-v2", True),
    "pascal_context": ("PASCAL-Context", True),
    "cityscapes": ("Cityscapes", True),
    "mtan_nyuv2": ("NYUv2 as MTAN has it", True),
    "mtan_cityscapes": ("Cityscapes as MTAN has it", True),
    "mixture": ("a mixture", False),  # of the others
}


@dataclasses.dataclass(frozen=True)
class Measured:
    """What lies beside a network: a run's results of the very checkpoint and the pictures that go with them, or the
    card and pictures of a folder."""

    results: Results | None = None
    pictures: Sequence[Path] = ()
    card: str | None = None


def measured_in(origin: Path, step: int | None) -> Measured:
    """What the directory that a network came from holds about this step of it, best the test split's.

    Raises:
      ResultsError: a results.json that is damaged.
      FileError: a card that cannot be read.
    """
    if (origin / CONFIG).exists():
        try:
            card = file_bytes(origin / CARD).decode() if (origin / CARD).exists() else None
        except (OSError, ValueError) as error:
            raise FileError(
                f"{origin / CARD} cannot be read ({error}); remove it, and a new one is written."
            ) from error
        return Measured(card=card, pictures=sorted(origin.glob("examples*.png")))
    for suffix in ("", "_validation"):
        path = origin / f"results{suffix}.json"
        if path.exists() and (results := read_results(path)).step == step:
            return Measured(results, [p for p in [origin / f"examples{suffix}.png"] if p.exists()])
    return Measured()


def check_license(license: str | None) -> None:
    """Raises where it cannot be one of the hub's identifiers.

    Raises:
      InputError: names it.
    """
    if license is not None and not LICENSE.fullmatch(license):
        raise InputError(
            f"license is {license!r}; give the hub's identifier, in small letters: apache-2.0, mit, cc-by-4.0, "
            "cc-by-nc-4.0, or other."
        )


def model_card(
    trained: Trained, name: str, results: Results | None, pictures: Sequence[str], license: str | None
) -> str:
    """The card's text.

    Args:
      name: of the folder.
      results: of this very checkpoint.
      pictures: names of files beside the card.
      license: the hub's identifier.
    """
    names = [task.name for task in trained.tasks]
    parts = [
        _metadata(trained, name, results, license),
        f"# {_text(name)}\n",
        f"One network, made with sgw_jax, that predicts {_listed(names)} at every pixel of an image.\n",
        *[f"![Images, predictions and labels]({picture})\n" for picture in pictures],
        "## How to load it\n",
        f'```\npip install "sgw_jax[train,hub]"\n```\n\n```python\n{_usage(name)}```\n',
        "## What it predicts\n",
        _table(["task", "a pixel of its map is", "classes"], [_task_row(task) for task in trained.tasks]),
        "## What it was trained on\n",
        _training(trained, license),
        "## What it scores\n",
        "No results of this checkpoint were there when the card was written.\n"
        if results is None
        else _scores(results),
        "## Limits\n",
        _limits(trained),
    ]
    return "\n".join(parts)


def _metadata(trained: Trained, name: str, results: Results | None, license: str | None) -> str:
    """The hub's metadata: YAML, of which JSON values are a part."""
    kinds = [KINDS.get(task.kind, OWN) for task in trained.tasks]
    pipelines = [kind.pipeline for kind in kinds if kind.pipeline]
    values: dict[str, Any] = {"library_name": LIBRARY}
    if license is not None:
        values["license"] = license
    if pipelines:
        values["pipeline_tag"] = pipelines[0]
    values["tags"] = list(dict.fromkeys(["jax", "flax", "multi-task-learning", *(kind.tag for kind in kinds)]))
    if sets := [source for source in _sources(trained) if DATA.get(source, ("", False))[1]]:
        values["datasets"] = sets
    if results is not None:
        values["metrics"] = list(dict.fromkeys(task.metric for task in results.tasks))
        values["model-index"] = [{"name": name, "results": _entries(trained, results)}]
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in values.items()]
    return "\n".join(["---", *lines, "---", ""])


def _entries(trained: Trained, results: Results) -> list[dict[str, Any]]:
    """The headline metrics as the hub's model index has them; those that are not defined are left out."""
    kinds = {task.name: KINDS.get(task.kind, OWN) for task in trained.tasks}
    source = _config(trained).data.source
    dataset = {"name": DATA.get(source, (source, False))[0], "type": source, "split": results.split}
    entries = []
    for task in results.tasks:
        value = results.metrics[task.name][task.metric]
        if math.isfinite(value):
            metric = {"type": task.metric, "value": value, "name": f"{task.metric} {task.unit}".strip()}
            about = {"type": kinds[task.name].pipeline or "other", "name": task.name}
            entries.append({"task": about, "dataset": dataset, "metrics": [metric]})
    return entries


def _usage(name: str) -> str:
    return (
        "import numpy as np\n"
        "from PIL import Image\n\n"
        "import sgw_jax\n\n"
        f'predictor = sgw_jax.from_pretrained("{name}")  # this folder; of the hub "org/name"\n'
        'maps = predictor(np.asarray(Image.open("photo.jpg").convert("RGB")))  # {task: map of the photo\'s size}\n'
        "module, variables = predictor.module, predictor.variables  # the Flax module, for more\n"
    )


def _task_row(task: Task) -> list[str]:
    about = KINDS.get(task.kind, OWN).pixel
    if task.kind == "depth":
        about += f" ({getattr(task, 'quantity', 'depth')}, {task.units.get(task.metric) or 'no unit'})"
    if task.kind == "normals":
        about += f": {getattr(task, 'axes_in_words', 'axes of the training data')}"
    return [task.name, about, ", ".join(getattr(task, "class_names", ()))]


def _training(trained: Trained, license: str | None) -> str:
    config = _config(trained)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(trained.variables[PARAMS]))
    backbone = config.backbones[config.backbone].get("size")
    size = " x ".join(map(str, trained.size))
    rows = [
        ["data", _data(trained)],
        ["image size, height x width", size],
        ["steps x batch", f"{trained.step:,} x {config.batch_size}"],
        ["backbone", f"{config.backbone}{f' {backbone}' if backbone else ''}"],
        ["start", "pretrained weights of the backbone" if config.backbone_weights else "no pretrained backbone"],
        ["interaction", config.interaction],
        ["parameters", count(parameters)],
        ["objective", config.objective],
        ["optimiser", f"{config.optimizer.name}, learning rate {config.optimizer.learning_rate:g}"],
        ["licence", license or "none was stated: ask the maker before you use it"],
    ]
    more = "\nThe licences of the data and of the pretrained weights hold for what was made from them, too.\n"
    return _table(["", ""], rows) + f"\n{CONFIG} has every key of the configuration.\n{more}"


def _data(trained: Trained) -> str:
    config = _config(trained)
    names = [DATA.get(source, (source, False))[0] for source in _sources(trained)]
    lengths = f", {config.data.lengths.train:,} images" if config.data.source == "scenes" else ""
    return (f"a mixture of {_listed(names)}" if config.data.source == "mixture" else names[0]) + lengths


def _sources(trained: Trained) -> list[str]:
    """The data sets; of a mixture those within."""
    data = _config(trained).data
    inside = [part.source for part in data.get("mixture", {}).values()] if data.source == "mixture" else [data.source]
    return list(dict.fromkeys(inside))


def _scores(results: Results) -> str:
    headline = headline_table(results)
    rows = [
        [row["task"], _metric(row["metric"], row["unit"], row["arrow"]), *(value["text"] for value in row["values"])]
        for row in headline["rows"]
    ]
    text = f"Split {results.split}, protocol {results.protocol}, step {results.step:,}.\n\n"
    text += _table(["task", "metric", *headline["columns"]], rows)
    text += "\n<details><summary>All metrics</summary>\n\n"
    found = all_metrics(results)
    every = [
        [table["task"], _metric(row["name"], row["unit"], row["arrow"]), *row["values"]]
        for table in found["tables"]
        for row in table["rows"]
    ]
    return text + _table(["task", "metric", *found["columns"]], every) + "\n</details>\n"


def _metric(name: str, unit: str, arrow: str) -> str:
    return " ".join(part for part in (name, unit, arrow) if part)


def _limits(trained: Trained) -> str:
    kinds = {task.kind for task in trained.tasks}
    height, width = trained.size
    lines = [
        f"An image is shrunk or enlarged to fit {height} x {width} (height x width): what is smaller than a few pixels "
        "there is not found.",
        f"It knows {_data(trained)}; on other kinds of images its maps look as sure as ever, and need not be right.",
    ]
    if _sources(trained) == ["scenes"]:
        lines.append("It has never seen a photograph.")
    if kinds & {"semseg", "human_parts"}:
        lines.append("Every pixel gets one of the classes above, also where none of them is there.")
    if "depth" in kinds:
        lines.append("Depth is as for the cameras of the training images; other focal lengths scale it.")
    lines.append("The scores above are all that was measured. Nobody has tested it for uses where errors do harm.")
    return "".join(f"- {line}\n" for line in lines)


def _config(trained: Trained) -> Any:
    return trained.config


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(
        "| " + " | ".join(cell if cell == "---" else _text(cell) for cell in line) + " |\n" for line in lines
    )


def _text(text: str) -> str:
    """In one line, with no sign that Markdown's tables or HTML would take for theirs."""
    return " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")


def _listed(names: Sequence[str]) -> str:
    *first, last = map(_text, names)
    return f"{', '.join(first)} and {last}" if first else last
