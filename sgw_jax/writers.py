"""Where numbers go: metrics.jsonl, TensorBoard, and a progress bar or plain lines."""

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter


class MetricsWriter:
    """Appends lines to metrics.jsonl and scalars to TensorBoard, on the first process alone.

    A resumed run calls `start_after(step)`: lines of later steps, which will be computed again, and a half-written last
    line are dropped, so that no step is missing or doubled. `flush` puts everything on disk before a checkpoint that
    stands for it is written.
    """

    def __init__(self, workdir: Path, resume_step: int = 0):
        self.path = workdir / "metrics.jsonl"
        self._active = jax.process_index() == 0
        if not self._active:
            return
        _keep_until(self.path, resume_step)
        self._file = self.path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(workdir / "tensorboard"), purge_step=resume_step + 1)

    def write(self, step: int, split: str, values: Mapping[str, float]) -> None:
        """One line {"step", "split", values...}."""
        if not self._active:
            return
        self._file.write(json.dumps({"step": step, "split": split, **values}) + "\n")
        for name, value in values.items():
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
    """The complete lines of a metrics.jsonl."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]  # what follows the last newline was cut off in the writing


def _keep_until(path: Path, step: int) -> None:
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))


def write_atomically(path: Path, text: str) -> None:
    """The file is either as it was or wholly new, whenever the process dies."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
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
        self._last_line = self._since = time.monotonic()
        self._counted, self.images_per_second = start, 0.0
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

    def update(self, step: int, losses: Mapping[str, float]) -> None:
        """Shows that `step` updates are done."""
        now = time.monotonic()
        if now - self._since > 1.0:
            speed = (step - self._counted) * self._batch_size / (now - self._since)
            self.images_per_second = speed if not self.images_per_second else 0.7 * self.images_per_second + 0.3 * speed
            self._since, self._counted = now, step
        shown = "  ".join(f"{name.removeprefix('loss/')} {value:.3g}" for name, value in losses.items())
        speed_text = f"{self.images_per_second:.0f} images/s" if self.images_per_second else ""
        self._bar.update(self._task, completed=step, losses=shown, speed=speed_text)
        finished = step == self._total
        if not self._console.is_terminal and (finished or now - self._last_line > self.SECONDS_BETWEEN_LINES):
            self._last_line = now
            left = (self._total - step) * self._batch_size / self.images_per_second if self.images_per_second else 0.0
            self._console.print(f"step {step}/{self._total}  {speed_text}  {left:.0f} s left  {shown}", soft_wrap=True)

    def pause(self) -> None:
        """What happens until the next update (an evaluation) does not count as training time."""
        self._since, self._counted = time.monotonic(), self._counted

    def note(self, text: str) -> None:
        """A line above the bar."""
        self._console.print(text, soft_wrap=True)
