"""How much predictions flicker over the frames of a video, each by itself and with slots that last (--carry_slots).

    python benchmarks/claims/flicker.py --workdir runs/seed0 runs/seed1 runs/seed2 [--quick]

static  One rendered room, fourteen times, with fresh sensor noise of 4 levels in each frame.
pan     A window of the training size that slides by 4 pixels a frame over a larger picture of the room; predictions are
        compared where two windows overlap, moved over each other.

Written is the mean change between consecutive frames (`sgw_jax.evaluation.flicker`), from the third on, over the rooms,
which are of the test split, and the headline metric of the static clips' last frames, since a prediction that stands
still may be wrong.
Runs of one configuration and different seeds give means and ranges. Writes benchmarks/results/flicker.json.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from rich.console import Console

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, where this runs as a script

from benchmarks.measure import Results, select
from sgw_jax.data_pipelines.scenes import render_scene
from sgw_jax.evaluation.flicker import flicker
from sgw_jax.evaluation.metrics import add_sums
from sgw_jax.prediction.predictor import Predictor
from sgw_jax.prediction.slots import CarriedSlots

ROOMS, FRAMES, NOISE, STEP = 16, 14, 4.0, 4
SETTLED = 2  # frames that are left out: slots come from nowhere in the first, so that the next one jumps
SHARES = (None, 0.5, 1.0)  # of the slots, carried from frame to frame


def static(room: int, size: tuple[int, int], frames: int) -> Iterator[np.ndarray]:
    """The same picture with Gaussian noise of NOISE levels, drawn anew for each frame."""
    image = render_scene(0, "test", room, size)["image"].astype(np.float64)
    random = np.random.default_rng(room)
    for _ in range(frames):
        yield np.clip(np.rint(image + random.normal(scale=NOISE, size=image.shape)), 0, 255).astype(np.uint8)


def pan(room: int, size: tuple[int, int], frames: int) -> Iterator[np.ndarray]:
    """Windows over a picture that is larger by the way that they go, each STEP pixels to the right of the last."""
    height, width = size
    way = STEP * (frames - 1)
    image = render_scene(0, "test", room, (height + way * height // width, width + way))["image"]
    top = (image.shape[0] - height) // 2
    for index in range(frames):
        yield image[top : top + height, STEP * index : STEP * index + width]


def measured(predictor: Predictor, share: float | None, rooms: int, frames: int) -> list[dict[str, Any]]:
    """A row for each clip and task: flicker, and of the static clip the metric."""
    carried = None if share is None else CarriedSlots(predictor.module, predictor.variables, share)
    seeing = predictor if carried is None else predictor.with_network(carried)
    rows = []
    for name, clip, shift in (("static", static, 0), ("pan", pan, STEP)):
        changes: dict[str, list[dict[str, float]]] = {task.name: [] for task in predictor.tasks}
        sums: dict[str, Any] = {}
        for room in range(rooms):
            if carried is not None:
                carried.restart()
            maps = list(seeing.stream(clip(room, predictor.size, frames)))
            truth = render_scene(0, "test", room, predictor.size)
            for task in predictor.tasks:
                shown = np.stack([found[task.name] for found in maps[SETTLED:]])
                width = shown.shape[2]
                changes[task.name].append(flicker(task, shown[:-1, :, shift:], shown[1:, :, : width - shift]))
                if name == "static":
                    new = task.metric_sums(task.from_decoded(shown[-1:]), truth[task.name][None])
                    sums[task.name] = add_sums(sums.get(task.name), new)
        for task in predictor.tasks:
            found = {key: float(np.mean([c[key] for c in changes[task.name]])) for key in changes[task.name][0]}
            row = {"clip": name, "share": share, "task": task.name, "seed": predictor.config.seed, **found}
            if name == "static":
                row |= {"metric": task.metric, "score": task.metric_values(sums[task.name])[task.metric]}
            rows.append(row)
    return rows


UNITS = {"changed": "% of pixels", "absolute": "", "relative": "%", "angle": "°"}


def table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Markdown: a line for each clip and task, a column for each share, mean [lowest, highest] of several seeds."""

    def line(name: str, what: str, key: str, **wanted: str) -> str:
        cells = []
        for share in SHARES:
            values = [row[key] for row in select(rows, share=share, **wanted)]
            low, mean, high = (format(value, ".3g") for value in (min(values), np.mean(values), max(values)))
            cells.append(f"{mean} [{low}, {high}]" if len(values) > 1 else mean)
        return f"| {name} | {what} | {' | '.join(cells)} |"

    lines = ["| clip | task | each frame by itself | carried, 0.5 | carried, 1 |", "|---|---|---|---|---|"]
    tasks = {row["task"]: row for row in rows if row["clip"] == "static"}
    for clip in ("static", "pan"):
        for task, row in tasks.items():
            for key in filter(row.__contains__, UNITS):
                unit = "m" if (task, key) == ("depth", "absolute") else UNITS[key]
                lines.append(line(clip, f"{task}, {unit}" if unit else task, key, clip=clip, task=task))
    for task, row in tasks.items():
        lines.append(line("score", f"{task}, {row['metric']}", "score", clip="static", task=task))
    return lines


def main() -> None:
    """Measures, writes, prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    help = "of runs on the embedded scenes, with slots"
    parser.add_argument("--workdir", type=Path, required=True, nargs="+", help=help)
    parser.add_argument("--quick", action="store_true", help="two rooms, four frames, written nowhere")
    arguments = parser.parse_args()
    logging.set_verbosity(logging.ERROR)  # Orbax reports every routine restore
    rooms, frames = (2, 4) if arguments.quick else (ROOMS, FRAMES)
    rows: list[Any] = []
    about = {"rooms": rooms, "frames": frames, "noise": NOISE, "pixels_a_frame": STEP}
    for workdir in arguments.workdir:
        predictor = Predictor.from_workdir(workdir)
        about |= {"interaction": predictor.config.interaction, "step": predictor.step}
        for share in SHARES:
            rows += measured(predictor, share, rooms, frames)
    if not arguments.quick:
        Results("flicker", **about).write({"rows": rows})
    Console().print("\n".join(table(rows)), soft_wrap=True, markup=False)


if __name__ == "__main__":
    main()
