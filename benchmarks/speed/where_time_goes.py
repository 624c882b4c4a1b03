"""Where a training step's time goes, by part of the network and by kind of operation, from a profile of a real run.

    python benchmarks/speed/where_time_goes.py [--config=scenes] [--label=now] [--config.key=value ...]

Trains for a few steps by the command's own loop, with jax.profiler's record of the last of them. While several
operations run at once, each gets its part of the time, so that the shares add up; "idle" is when none runs: the host
had nothing ready, or the device waited for it. On accelerators times are the device's own. Adds to
benchmarks/results/where_time_goes_DEVICE.json under the label, so that a change can be seen beside what was before.
"""

import argparse
import io
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, where this runs as a script

from benchmarks.measure import Results
from sgw_jax.experiment.build import build
from sgw_jax.experiment.config_files import read_config
from sgw_jax.experiment.experiment import Experiment
from sgw_jax.host import keep_freed_memory
from sgw_jax.plan.hlo import parse
from sgw_jax.plan.network import PARTS, part_of
from sgw_jax.run.state import new_state
from sgw_jax.run.steps import compiled_steps
from sgw_jax.sharding import global_batch
from sgw_jax.train import train

WARM_UP, STEPS = 20, 10
LOSSES, UPDATE = "losses", "optimiser, average"
KINDS = {
    "matrix products, convolutions": "dot|conv|ynn|onednn|gemm|cublas|cudnn",
    "copies, transposes": "^(copy|transpose|wrapped_transpose|bitcast_copy|concatenate|pad|slice)",
    "reductions": "reduce",
    "elementwise and the rest": "",
}


class Interval(NamedTuple):
    """An operation's time, in ns."""

    start: float
    end: float
    name: str


def profiled(experiment: Experiment) -> tuple[Any, str]:
    """(the profile of the last steps of a short run, the text of its program)."""
    with tempfile.TemporaryDirectory() as folder:
        train(experiment, folder, Console(file=io.StringIO()))
        (record,) = (Path(folder) / "profile").rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(record))
    with jax.set_mesh(experiment.mesh), experiment.data.train(0, 1) as batches:
        state = new_state(experiment)
        step = compiled_steps(experiment, state)[0]
        program = step.lower(state, global_batch(next(iter(batches)), experiment.mesh)).compile().as_text()
    return data, program


def intervals(data: Any) -> list[Interval]:
    """All operations of the step's program, from the beginning of each to its completion."""
    events = [event for plane in data.planes for line in plane.lines for event in line.events]
    stats = [dict(event.stats) for event in events]
    ends = {found["_c"]: event.start_ns for event, found in zip(events, stats, strict=True) if "_c" in found}
    return [
        # On the CPU an operation may go on in other threads after its own event, until an event that names it.
        Interval(event.start_ns, max(event.end_ns, ends.get(found.get("_p"), 0)), event.name)
        for event, found in zip(events, stats, strict=True)
        if found.get("hlo_module", "").startswith("jit_step") and not re.match("while|call|conditional", event.name)
    ]


def shared_time(found: Iterable[Interval]) -> tuple[dict[str, float], float]:
    """({operation: ns, each moment divided by what runs in it}, ns in which nothing runs)."""
    edges = sorted(
        [(one.start, True, i, one.name) for i, one in enumerate(found)]
        + [(one.end, False, i, one.name) for i, one in enumerate(found)]
    )
    times: Counter[str] = Counter()
    running: dict[int, str] = {}
    idle, before = 0.0, edges[0][0]
    for moment, begins, number, name in edges:
        for other in running.values():
            times[other] += (moment - before) / len(running)
        idle += 0 if running else moment - before
        before = moment
        if begins:
            running[number] = name
        else:
            del running[number]
    return dict(times), idle


def kind_of(name: str) -> str:
    """The first of `KINDS` that fits an operation."""
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name))


def measure(config: str, overrides: list[str], cache: Path) -> dict[str, Any]:
    """Milliseconds of a step: in all, idle, by part and kind, and of the costliest operations."""
    last = WARM_UP + STEPS
    keys = {"steps": last, "checkpoint_every": last, "eval_every": last, "schedule.warmup_steps": 1}
    keys |= {"profile_after": WARM_UP, "profile_steps": STEPS, "data.lengths.validation": 0}
    experiment = build(read_config(config, [*overrides, *(f"--config.{k}={v}" for k, v in keys.items())]), cache)
    data, program = profiled(experiment)
    found = intervals(data)
    times, idle = shared_time(found)
    path_of = {one.name: one.path for block in parse(program)[0].values() for one in block.values()}
    table: dict[str, dict[str, float]] = defaultdict(lambda: dict.fromkeys(KINDS, 0.0))
    for name, time in times.items():
        path = path_of.get(name, "")
        # What is differentiated, but in no part of the network, is a loss.
        table[part_of(path) or (LOSSES if "jvp(" in path else UPDATE)][kind_of(name)] += time / STEPS / 1e6
    span = (max(one.end for one in found) - min(one.start for one in found)) / STEPS / 1e6
    costly = sorted(times.items(), key=lambda item: -item[1])[:10]
    return {
        "config": " ".join([config, *overrides]),
        "ms": span,
        "idle_ms": idle / STEPS / 1e6,
        "operations": len(found) // STEPS,
        "parts": {name: table[name] for name in (*PARTS, LOSSES, UPDATE) if name in table},
        "costliest": [{"name": n, "path": path_of.get(n, ""), "ms": t / STEPS / 1e6} for n, t in costly],
    }


def table(found: dict[str, Any]) -> list[str]:
    """Markdown: a label's row by part and by kind."""
    names = list(dict.fromkeys(name for row in found.values() for name in row["parts"]))
    lines = ["| | step ms | idle ms | " + " | ".join([*names, *KINDS]) + " | operations |"]
    lines.append("|---" * (len(names) + len(KINDS) + 4) + "|")
    for label, row in found.items():
        parts = [sum(row["parts"].get(name, {}).values()) for name in names]
        kinds = [sum(part[kind] for part in row["parts"].values()) for kind in KINDS]
        cells = [f"{value:.1f}" for value in (row["ms"], row["idle_ms"], *parts, *kinds)]
        lines.append(f"| {label} | " + " | ".join([*cells, f"{row['operations']:,}"]) + " |")
    return lines


def plan_table(found: dict[str, Any]) -> list[str]:
    """Markdown: by label, the estimate of `python -m sgw_jax plan --topology=... --json=...` for a device and step."""
    parts = list(dict.fromkeys(name for row in found.values() for name in row["memory_by"]))
    lines = ["| | compute ms | memory ms | exchange ms | peak GiB | " + " | ".join(f"{p} GB" for p in parts) + " |"]
    lines.append("|---" * (len(parts) + 5) + "|")
    for label, row in found.items():
        cells = [f"{1e3 * row['seconds'][part]:.0f}" for part in ("compute", "memory", "exchange")]
        cells += [f"{row['peak'] / 2**30:.1f}", *(f"{row['memory_by'].get(part, 0) / 1e9:.1f}" for part in parts)]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def main() -> None:
    """Profiles and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="scenes")
    parser.add_argument("--label", default="now")
    parser.add_argument("--cache_dir", type=Path, default=Path.home() / ".cache" / "sgw_jax")
    parser.add_argument("--output", type=Path)
    arguments, overrides = parser.parse_known_args()
    jax.config.update("jax_compilation_cache_dir", str(arguments.cache_dir / "xla"))
    keep_freed_memory()
    results = Results(f"where_time_goes_{jax.default_backend()}", arguments.output)
    found = results.label(arguments.label, measure(arguments.config, overrides, arguments.cache_dir))
    console = Console()
    console.print("\n".join(table(found)), soft_wrap=True)
    for row in found[arguments.label]["costliest"]:
        console.print(f"{row['ms']:6.2f} ms  {row['name']}  {row['path']}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
