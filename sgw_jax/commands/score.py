"""sgw-jax score: anybody's predictions of a split, by a configuration's protocol, without a network."""

import argparse
import dataclasses
import functools
import json
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console

from sgw_jax.commands import sources
from sgw_jax.data_pipelines.atomic import write_atomically
from sgw_jax.data_pipelines.consoles import results
from sgw_jax.data_pipelines.errors import files_named
from sgw_jax.evaluation.score import score
from sgw_jax.experiment.build import build_protocol
from sgw_jax.experiment.config_files import UsageError, read_config
from sgw_jax.report.results import describe
from sgw_jax.report.tables import print_metrics
from sgw_jax.run.logs import without_nan


def run(arguments: argparse.Namespace, overrides: Sequence[str], console: Console) -> int:
    protocol = build_protocol(read_config(arguments.config, overrides), arguments.cache_dir)
    split, tasks = arguments.split, protocol.tasks
    if split not in protocol.data.sources:
        raise UsageError(f"--split={split}: the data has the splits {sorted(protocol.data.sources)}.")
    data = dataclasses.replace(protocol.data, sources={split: protocol.data.sources[split]})
    with files_named(f"--predictions={arguments.predictions}"):
        predictions = data.predictions(split, arguments.predictions, {task.name: task.channels for task in tasks})
    with files_named(f"--cache_dir={arguments.cache_dir}"):
        sources.prepare(data, console)
    pairs = functools.partial(predictions.pairs, threads=data.threads)
    found = score(tasks, pairs, protocol.boundary, total=len(predictions), console=console)
    described = [describe(task, found.metrics[task.name]) for task in tasks]
    title = f"{arguments.predictions} on {split}, {len(predictions)} images, protocol {protocol.name}"
    print_metrics(results(console), title, described, found.metrics)
    if arguments.json and jax.process_index() == 0:
        record = {
            "predictions": str(arguments.predictions),
            "split": split,
            "images": len(predictions),
            "protocol": protocol.name,
            "data": data.fingerprint()[split],
            "tasks": [
                {**dataclasses.asdict(about), "options": t.to_dict()} for about, t in zip(described, tasks, strict=True)
            ],
            **dataclasses.asdict(found),
            "boundary": dataclasses.asdict(protocol.boundary),
        }
        with files_named(f"--json={arguments.json}"):
            write_atomically(Path(arguments.json), json.dumps(without_nan(record), indent=1, allow_nan=False))
    return 0
