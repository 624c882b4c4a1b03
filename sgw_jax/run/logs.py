"""Where numbers go: metrics.jsonl, TensorBoard, and a progress bar or plain lines."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from sgw_jax.data_pipelines.errors import InputError


class MetricsWriter:
    """Appends lines to metrics.jsonl and scalars to TensorBoard, on the first process alone.

    Lines of steps after `resume_step`, which will be computed again, and a half-written last line are dropped, so that
    no step is missing or doubled, provided that `flush` is called before the checkpoint of a step is written.
    Lines hold nothing that depends on time: those of a resumed run equal those of an uninterrupted one.
    """

    def __init__(self, workdir: Path, resume_step: int = 0):
        self.path = workdir / "metrics.jsonl"
        self._active = jax.process_index() == 0
        if not self._active:
            return
        _keep_until(self.path, resume_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=resume_step + 1, filename_suffix=f".{resume_step}"
        )

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """One line {"step", "split", values...}; a metric without anything to measure, NaN, is null."""
        if not self._active:
            return
        self._file.write(_line({"step": step, "split": split, **values}))
        for name, value in values.items():
            if math.isfinite(value):
                self._board.add_scalar(f"{split}/{name}", value, step)

    def flush(self) -> None:
        """Blocks until all lines are on disk."""
        if self._active:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._board.flush()

    def close(self) -> None:
        """Flushes and closes."""
        if self._active:
            self.flush()
            self._file.close()
            self._board.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics.jsonl, null as NaN.

    Raises:
      ValueError: a line that is not JSON; it names file and line.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")  # what follows the last newline was cut off in the writing
    found = []
    for number, line in enumerate(lines, 1):
        try:
            values = json.loads(line)
        except ValueError as error:
            raise InputError(f"{path}, line {number} is not JSON ({error}); remove the line to go on.") from error
        found.append({name: math.nan if value is None else value for name, value in values.items()})
    return found


def _line(values: Mapping[str, Any]) -> str:
    """One line of strict JSON, which knows no NaN."""
    finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    return json.dumps(finite, allow_nan=False) + "\n"


def _keep_until(path: Path, step: int) -> None:
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    write_atomically(path, "".join(map(_line, kept)))


def write_atomically(path: Path, text: str) -> None:
    """The file is either as it was or wholly new, whenever the process dies; the next call replaces a leftover .tmp."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


class TrainProgress:
    """A bar with step, images/s, time left and losses on a terminal; otherwise a plain line every few seconds."""

    SECONDS_BETWEEN_LINES = 10.0

    def __init__(self, console: Console, total: int, start: int, batch_size: int):
        self._console, self._total, self._batch_size = console, total, batch_size
        self._last_line = time.monotonic()
        self._clock: tuple[float, int] | None = None  # when and at which step the current stretch of training began
        self._steps, self._seconds, self._recent = 0, 0.0, 0.0
        self._bar = Progress(
            TextColumn("[bold]train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[losses]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=total, completed=start, speed="", losses="")

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @property
    def images_per_second(self) -> float:
        """Over all steps but the first of each stretch: neither compilation nor evaluations nor saves count."""
        return self._steps * self._batch_size / self._seconds if self._seconds else 0.0

    def update(self, step: int, losses: Mapping[str, float]) -> None:
        """Shows that `step` updates are done."""
        now = time.monotonic()
        self._count(now, step)
        shown = "  ".join(f"{name.removeprefix('loss/')} {value:.3g}" for name, value in losses.items())
        speed = f"{self._recent:.0f} images/s" if self._recent else ""
        self._bar.update(self._task, completed=step, losses=shown, speed=speed)
        finished = step == self._total
        if not self._console.is_terminal and (finished or now - self._last_line > self.SECONDS_BETWEEN_LINES):
            self._last_line = now
            left = f"{(self._total - step) * self._batch_size / self._recent:.0f} s left" if self._recent else ""
            parts = (f"step {step}/{self._total}", speed, left, shown)
            self._console.print("  ".join(filter(None, parts)), soft_wrap=True)

    def _count(self, now: float, step: int) -> None:
        if self._clock is not None:
            seconds, steps = now - self._clock[0], step - self._clock[1]
            self._seconds, self._steps = self._seconds + seconds, self._steps + steps
            # What is shown follows the last few seconds, whatever a step takes.
            weight = math.exp(-seconds / 3.0) if self._recent else 0.0
            self._recent = weight * self._recent + (1 - weight) * steps * self._batch_size / max(seconds, 1e-9)
        self._clock = (now, step)

    def pause(self) -> None:
        """What happens until the next update (an evaluation, a save) does not count as training time."""
        self._clock = None

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, soft_wrap=True)
