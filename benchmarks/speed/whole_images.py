"""What `sgw-jax predict` costs on a photograph of 24 megapixels: time, memory and size of what it writes.

    python benchmarks/speed/whole_images.py --workdir=runs/scenes [--size=4000,6000]

Each row is the command in a process of its own on one picture, smooth with fine grain as photographs are: shrunk to the
training size, and as it is, in tiles; with arrays as npz, as pictures, and without. Processor time and the greatest
resident memory are the process's, programs compiled by an earlier run of the same row. Writes
benchmarks/results/whole_images_DEVICE.json.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import cv2
import jax
import numpy as np
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, where this runs as a script

from benchmarks.measure import DASH, Results

ROWS = {
    "shrunk, npz": ("--arrays=npz",),
    "shrunk, png": ("--arrays=png",),
    "shrunk, none": ("--arrays=none",),
    "tiles, npz": ("--arrays=npz", "--resolution=native"),
    "tiles, png": ("--arrays=png", "--resolution=native"),
}
GRAIN = 6.0  # levels, standard deviation


def picture(size: tuple[int, int], path: Path) -> None:
    """A JPEG of soft shapes and grain."""
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0, 255, (size[0] // 200, size[1] // 200, 3)).astype(np.float32)
    smooth = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_CUBIC)
    grain = rng.normal(0, GRAIN, (*size, 3)).astype(np.float32)
    cv2.imwrite(str(path), np.clip(smooth + grain, 0, 255).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 92])


def measure(label: str, workdir: Path, path: Path, folder: Path) -> dict[str, Any]:
    """One row: the command, once to compile and once measured."""
    row: dict[str, Any] = {"label": label}
    for turn in ("compile", "measure"):
        output = folder / turn / label.replace(", ", "_")
        command = [sys.executable, "-m", "sgw_jax", "predict", f"--workdir={workdir}", f"--output={output}", str(path)]
        started = time.monotonic()
        child = subprocess.Popen([*command, f"--cache_dir={folder / 'cache'}", *ROWS[label]], stdout=subprocess.DEVNULL)
        _, status, used = os.wait4(child.pid, 0)
        if status:
            raise SystemExit(f"{' '.join(command)} failed, see above.")
        row |= {"seconds": time.monotonic() - started, "processor": used.ru_utime + used.ru_stime}
        row |= {"peak": used.ru_maxrss * 1024, "bytes": written(output)}
    return row


def written(output: Path) -> int:
    """Bytes of the arrays: of all files but the panel and the record of the call."""
    files = [file for file in output.rglob("*") if file.is_file() and file.suffix != ".json"]
    return sum(file.stat().st_size for file in files if file.parent != output or file.suffix == ".npz")


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown."""
    lines = ["| | arrays | processor time | wall time | peak memory |", "|---|---|---|---|---|"]
    for row in rows:
        size = f"{row['bytes'] / 1e6:.0f} MB" if row["bytes"] else DASH
        times = f"{row['processor']:.0f} s | {row['seconds']:.0f} s"
        lines.append(f"| {row['label']} | {size} | {times} | {row['peak'] / 1e9:.2f} GB |")
    return lines


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="a run of the scenes configuration")
    parser.add_argument("--size", default="4000,6000", help="height and width of the photograph, in pixels")
    parser.add_argument("--only", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    height, width = map(int, arguments.size.split(","))
    results = Results(f"whole_images_{jax.default_backend()}", arguments.output, height=height, width=width)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "photo.jpg"
        picture((height, width), path)
        for label in arguments.only:
            rows = results.add([measure(label, arguments.workdir, path, Path(folder))], "label")
    Console().print("\n".join(table(rows)), soft_wrap=True)


if __name__ == "__main__":
    main()
