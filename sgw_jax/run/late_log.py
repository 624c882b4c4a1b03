"""A training step's metrics, taken one step late: checked, shown and written."""

from collections.abc import Mapping
from typing import Any

import jax

from sgw_jax.experiment.experiment import Experiment
from sgw_jax.optimizers import learning_rates
from sgw_jax.run.finite import check_finite_step
from sgw_jax.run.logs import MetricsWriter
from sgw_jax.run.progress import TrainProgress


class LateLog:
    """Fetches metrics one step late, so that the device always has the next step to work on; checks and writes them."""

    def __init__(self, experiment: Experiment, writer: MetricsWriter, progress: TrainProgress):
        self._settings, self._writer, self._progress = experiment.settings, writer, progress
        self._rates = learning_rates(experiment.schedule, experiment.settings.steps)
        self._waiting: tuple[int, Any] | None = None

    def push(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Takes the metrics of the step before, and keeps these."""
        previous, self._waiting = self._waiting, (step, metrics)
        self._take(previous)

    def flush(self) -> None:
        """Takes those that wait."""
        previous, self._waiting = self._waiting, None
        self._take(previous)

    def _take(self, waiting: tuple[int, Any] | None) -> None:
        if waiting is None:
            return
        step, values = waiting[0], {name: float(value) for name, value in jax.device_get(waiting[1]).items()}
        check_finite_step(step, values)
        shown = {name: value for name, value in values.items() if name.startswith("loss") and name.count("/") < 2}
        self._progress.update(step, shown)
        if step % self._settings.log_every == 0 or step == self._settings.steps:
            self._writer.write(step, "train", {**values, "learning_rate": float(self._rates[step - 1])})
