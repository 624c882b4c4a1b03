"""sgw-jax plan: what a configuration costs."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import jax
from rich.console import Console

from sgw_jax.data_pipelines.atomic import write_atomically
from sgw_jax.data_pipelines.consoles import results
from sgw_jax.data_pipelines.errors import files_named
from sgw_jax.experiment.build import build, build_freezing, build_model, build_tasks
from sgw_jax.experiment.config_files import read_config
from sgw_jax.plan.network import plan, print_plan
from sgw_jax.plan.pod import pod_plan, print_pod_plan, topology_devices
from sgw_jax.sharding import make_mesh, mesh_sizes


def run(arguments: argparse.Namespace, overrides: Sequence[str], console: Console) -> int:
    config, console = read_config(arguments.config, overrides), results(console)
    found = plan(build_model(config, build_tasks(config)), tuple(config.data.size), build_freezing(config))
    print_plan(found, console)
    numbers = found.to_dict()
    if arguments.topology:
        devices = jax.devices() if arguments.topology == "here" else topology_devices(arguments.topology)
        step = pod_plan(build(config, None, mesh=make_mesh(mesh_sizes(**config.mesh), devices)))
        print_pod_plan(step, console)
        numbers["step"] = step.to_dict()
    if arguments.json:
        with files_named(f"--json={arguments.json}"):
            write_atomically(Path(arguments.json), json.dumps(numbers, indent=1))
    return 0
