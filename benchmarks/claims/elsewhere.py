"""What a comparison's first networks find on other data sets' photographs: edges of BSDS500, saliency of ECSSD."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from benchmarks.claims.comparison import SINGLE
from benchmarks.claims.runs import Busy, Runs, claim, trained_network
from benchmarks.measure import DASH, Results
from sgw_jax.evaluation.edge_scores import edge_scores
from sgw_jax.evaluation.evaluate import evaluate
from sgw_jax.experiment.data import build_data
from sgw_jax.experiment.network import build_model
from sgw_jax.run.finite import check_finite_losses
from sgw_jax.train_step import make_eval_step

SCORED = {"bsds500": "edges", "ecssd": "saliency"}  # images of mixed/ by the beginning of their names: the task
SIZE = (224, 224)  # upright and lying images fit into it
MAX_DIST = 0.0075  # of a match of edges, as a share of the diagonal


def scores(runs: Runs, name: str, views: Mapping[str, Path]) -> dict[str, Any] | None:
    """{images: {metric: value in %}} of the first seed's network on the images of `SCORED`, of tasks that it has;
    kept beside its other results. Nothing where the run was made on another machine and came without its checkpoints;
    None where another process is at it."""
    results = Results("real", runs.folder(name, 0) / "elsewhere.json")
    try:
        with claim(runs.folder(name, 0)):
            if not results.path.exists():
                if not (runs.folder(name, 0) / "checkpoints").is_dir():
                    return {}
                results.write({"found": measure(runs, name, views)})
    except Busy:
        return None
    return results.load()["found"]


def measure(runs: Runs, name: str, views: Mapping[str, Path]) -> dict[str, Any]:
    """What `scores` keeps."""
    experiment, variables = trained_network(runs.folder(name, 0), runs.cache_dir)
    found: dict[str, dict[str, float]] = {}
    for task in experiment.tasks:
        for start in (start for start, labelled in SCORED.items() if labelled == task.name):
            config = copy.deepcopy(experiment.config)
            with config.unlocked():
                config.data.update({"source": "folder", "root": str(views[start]), "size": SIZE})
            model, mesh = build_model(config, experiment.tasks, experiment.size), experiment.mesh
            data = build_data(config, [task], cache_dir="")
            with jax.set_mesh(mesh), data.evaluation("test") as batches:
                if task.boundary_scores:
                    found[start] = edge_scores(model, variables, batches, mesh, task=task, max_dist=MAX_DIST)
                else:
                    result = evaluate(jax.jit(make_eval_step(model, [task])), variables, batches, mesh, [task])
                    check_finite_losses(result, runs.steps, start)
                    found[start] = {task.metric: result.metrics[task.name][task.metric]}
    return found


def table(summary: Mapping[str, Any]) -> str:
    """Markdown: ODS and OIS on BSDS500's images, max-F on ECSSD's, of each network that has the task."""
    heads = {
        "edges ods % ↑": ("bsds500", "ods"),
        "edges ois % ↑": ("bsds500", "ois"),
        "saliency max_f % ↑": ("ecssd", "max_f"),
    }
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, found in summary["elsewhere"].items():
        if found:
            cells = [f"{found[images][metric]:.1f}" if images in found else DASH for images, metric in heads.values()]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def not_scored(summary: Mapping[str, Any]) -> list[str]:
    """The networks that have a task of `SCORED`, and no score of it: their checkpoints are not here."""
    tasks = set(SCORED.values())
    able = (name for name in summary["elsewhere"] if not name.startswith(SINGLE) or name.removeprefix(SINGLE) in tasks)
    return [name for name in able if not summary["elsewhere"][name]]
