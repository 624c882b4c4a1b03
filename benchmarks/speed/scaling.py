"""Weak scaling of the full-size systems over TPU slices, from compiled steps; needs no TPU, only .[train,tpu].

    python benchmarks/speed/scaling.py [--systems vit_l swin_l] [--slices v5e:2x2 v5e:4x4 ...]

Every point is `python -m sgw_jax plan --topology=SLICE` at a fixed number of images a chip: memory, what is exchanged,
and a roofline estimate. A point takes minutes of compilation; each is written as it is done to
benchmarks/results/scaling.json, and those that are there are not done again. Prints the table. Estimates, not
measurements: nothing runs. † marks rows that an earlier version compiled and counted.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, where this runs as a script

from benchmarks.measure import DASH, Results
from sgw_jax.plan.chips import CHIPS, GIB

SLICES = ("v5e:2x2", "v5e:4x4", "v5e:8x8", "v5e:16x16", "v5p:2x2x1", "v5p:2x2x4", "v5p:4x4x4")
IMAGES = {"v5e": 4, "v5p": 8, "v6e": 4}  # a chip
BACKBONES = {"vit_l": "vit", "swin_l": "swin"}


def measure(system: str, slice_name: str, mesh: str, console: Console) -> dict[str, Any] | None:
    """One compiled step; None, and its words printed, if the command failed."""
    chip, _, shape = slice_name.partition(":")
    chips = math.prod(int(n) for n in shape.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "sgw_jax", "plan", f"--config=nyud:{system},interaction=skem"]
        command += [f"--config.backbones.{BACKBONES[system]}.remat=full", f"--config.mesh.name={mesh}"]
        command += [f"--config.batch_size={IMAGES[chip] * chips}", f"--topology={slice_name}", f"--json={path}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        console.print(f"{system}, {slice_name}, {mesh}: exit code {done.returncode}")
        if done.returncode:
            console.print(done.stderr[-600:])
            return None
        found = json.loads(path.read_text())["step"]
    return {"system": system, "slice": slice_name, "chips": chips, "named_mesh": mesh, **found}


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown; times in ms."""
    head = (
        "| system | chips | mesh | batch | GiB of | compute | memory | exchange | ms a step | images/s a chip | MFU |"
    )
    lines = [head, "|" + "---|" * 11]
    for row in sorted(rows, key=lambda r: (r["system"], r["slice"].partition(":")[0], r["named_mesh"], r["chips"])):
        chip = CHIPS[row["slice"].partition(":")[0]]
        mark = " †" if row.get("outdated") else ""
        start = f"| {row['system']}{mark} | {row['chips']} {chip.name.removeprefix('TPU ')} | {row['named_mesh']} "
        if row["needed"]:
            cells = [row["batch_size"], f"does not fit: {row['needed'] / GIB:.1f} GiB", *[DASH] * 6]
            lines.append(start + "| " + " | ".join(map(str, cells)) + " |")
            continue
        times = row["seconds"]
        cells = [row["batch_size"], f"{row['peak'] / GIB:.1f} of {chip.memory / GIB:.1f}"]
        cells += [f"{1e3 * times[part]:.0f}" for part in ("compute", "memory", "exchange")]
        low, high = times["at least"], times["no overlap"]
        cells.append(f"{1e3 * low:.0f} to {1e3 * high:.0f}")
        images = row["batch_size"] / row["devices"]
        cells.append(f"{images / high:.0f} to {images / low:.0f}")
        cells.append(f"{row['useful'] / high / chip.flops:.0%} to {row['useful'] / low / chip.flops:.0%}")
        lines.append(start + "| " + " | ".join(map(str, cells)) + " |")
    return lines


def main() -> None:
    """Compiles what is missing."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", default=list(BACKBONES), choices=list(BACKBONES))
    parser.add_argument("--slices", nargs="+", default=list(SLICES))
    parser.add_argument("--mesh", default="data_fsdp4")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    results, console = Results("scaling", arguments.output), Console()
    rows, failed = results.rows(), []
    for system in arguments.systems:
        for slice_name in arguments.slices:
            point = (system, slice_name, arguments.mesh)
            if any((row["system"], row["slice"], row["named_mesh"]) == point for row in rows):
                continue
            found = measure(*point, console)
            if found is None:
                failed.append(", ".join(point))
            else:
                rows = results.add([found], "system", "slice", "named_mesh")
    console.print("\n".join(table(rows)), soft_wrap=True)
    if failed:
        raise SystemExit(f"Not compiled: {'; '.join(failed)}.")


if __name__ == "__main__":
    main()
