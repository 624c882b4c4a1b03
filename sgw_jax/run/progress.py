"""The training loop's progress: step, speed, time left and losses."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from typing import Self

from rich.console import Console

from sgw_jax.data_pipelines.progress import Progress


class TrainProgress:
    """`Progress` of the steps, with the speed, which it measures, and the losses."""

    def __init__(self, console: Console, total: int, start: int, batch_size: int):
        self._console, self._total, self._batch_size = console, total, batch_size
        self._clock: tuple[float, int] | None = None  # when and at which step the current stretch of training began
        self._steps, self._seconds, self._recent = 0, 0.0, 0.0
        self._shown = Progress("step", total, console, done=start, transient=False)

    def __enter__(self) -> Self:
        self._shown.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._shown.__exit__(*error)

    @property
    def images_per_second(self) -> float:
        """Over all steps but the first of each stretch: neither compilation nor evaluations nor saves count."""
        return self._steps * self._batch_size / self._seconds if self._seconds else 0.0

    def update(self, step: int, losses: Mapping[str, float]) -> None:
        """Shows that `step` updates are done."""
        self._count(time.monotonic(), step)
        speed = left = ""
        if self._recent:
            speed = f"{self._recent:.0f} images/s"
            seconds = (self._total - step) * self._batch_size / self._recent
            left = "" if self._shown.drawn else f"{seconds:.0f} s left"
        shown = (f"{name.removeprefix('loss/')} {value:.3g}" for name, value in losses.items())
        self._shown.update(step, speed, left, *shown)

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
        self._console.print(text, soft_wrap=True, markup=False)

    @contextlib.contextmanager
    def compiling(self, what: str) -> Iterator[None]:
        """Lines before and after a compilation, during which nothing else is to be seen."""
        self.note(f"Compiling {what} (once; some minutes for large networks).")
        began = time.monotonic()
        yield
        self.note(f"Compiled {what} in {time.monotonic() - began:.0f} s.")
