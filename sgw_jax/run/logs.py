"""Where numbers go: metrics.jsonl and TensorBoard."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter

from sgw_jax.data_pipelines.atomic import write_atomically
from sgw_jax.data_pipelines.errors import InputError, files_named
from sgw_jax.data_pipelines.json_files import file_bytes, json_object

REMEDY = "Remove the line, or the file if a run of this package did not write it."


class MetricsWriter:
    """Appends lines to metrics.jsonl and scalars to TensorBoard, on the first process alone.

    Lines of steps after `resume_step`, which will be computed again, and a half-written last line are dropped, so that
    no step is missing or doubled, provided that `flush` is called before the checkpoint of a step is written, and again
    before its score is. Where `resume_step` is to be evaluated again, its line of the validation is dropped too. Lines
    hold nothing that depends on time: those of a resumed run equal those of an uninterrupted one.
    """

    def __init__(self, workdir: Path, resume_step: int = 0, evaluate_again: bool = False):
        self.path = workdir / "metrics.jsonl"
        self._active = jax.process_index() == 0
        if not self._active:
            return
        _keep_until(self.path, resume_step, evaluate_again)
        self._file = self.path.open("a", buffering=1, encoding="utf-8")  # whoever follows it sees each line at once
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
      ValueError: a line that is none of a run's; it names file and line.
    """
    if not path.exists():
        return []
    with files_named("The lines of metrics cannot be read"):
        *lines, _ = file_bytes(path).split(b"\n")  # what follows the last newline was cut off in the writing
    return [_read_line(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _read_line(line: bytes, name: str) -> dict[str, Any]:
    values = json_object(line, name, REMEDY, keys=("step", "split"))
    found = {key: math.nan if value is None else value for key, value in values.items()}
    for key, value in found.items():
        kinds = {"step": int, "split": str}.get(key, (int, float))
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise InputError(f"{name} is not what it should be: {key} is {value!r}. {REMEDY}")
    return found


def without_nan(value: Any) -> Any:
    """The same data with None for NaN and infinity, which JSON does not have; tuples become lists."""
    if isinstance(value, dict):
        return {key: without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _line(values: dict[str, Any]) -> str:
    return json.dumps(without_nan(values), allow_nan=False) + "\n"


def _keep_until(path: Path, step: int, evaluate_again: bool) -> None:
    again = (step, "validation") if evaluate_again else None
    lines = [line for line in read_metrics(path) if line["step"] <= step]
    kept = [line for line in lines if (line["step"], line["split"]) != again]
    write_atomically(path, "".join(map(_line, kept)))
