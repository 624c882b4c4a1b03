"""A profile of some training steps, for a look at where their time goes."""

from pathlib import Path
from typing import Any

import jax


class StepProfile:
    """Records training steps ``first + 1 .. first + number`` under ``directory`` with `jax.profiler`.

    Open it with xprof or TensorBoard (``--logdir``), or its ``trace.json.gz`` in Perfetto. Before and after, and only
    there, the loop waits for the device, so that these steps and no others are in it. The first steps of a run compile
    and fill queues: leave them out. Every process records its own devices.

    Args:
      first: updates made before the record begins; None records nothing. number: of steps.
    """

    def __init__(self, directory: Path, first: int | None, number: int):
        self._directory, self._first, self._last = directory, first, None if first is None else first + number
        self._recording = False

    def __enter__(self) -> "StepProfile":
        return self

    def after(self, step: int, state: Any) -> None:
        """To be called after every step (and before the first one of a run) with the state it made."""
        if step == self._first:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every Python call: slow, and far more than the rest of the record
            jax.profiler.start_trace(str(self._directory), profiler_options=options)
            self._recording = True
        elif step == self._last and self._recording:
            jax.block_until_ready(state)
            self._stop()

    def __exit__(self, *_: object) -> None:
        if self._recording:
            self._stop()

    def _stop(self) -> None:
        self._recording = False
        jax.profiler.stop_trace()
