"""What is exported: a trained network with all that using it needs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from ml_collections import ConfigDict

from sgw_jax.data_pipelines.errors import FileError, InputError
from sgw_jax.model import MultiTaskModel
from sgw_jax.tasks.base import Task


class Trained(Protocol):
    """What every format is made from; a `Predictor` is one.

    Attributes:
      module: the network, a `MultiTaskModel`; of a predictor from StableHLO the program, of which nothing can be made.
      variables: its collections, "params" and "constants".
      tasks: what it predicts.
      size: (height, width) that it was trained at, in pixels.
      config: of the run; None for a network put together by hand.
      step: of the run.
      origin: the directory that it was loaded from, a run's or a model's folder.
    """

    @property
    def module(self) -> Any: ...
    @property
    def variables(self) -> Mapping[str, Any]: ...
    @property
    def tasks(self) -> tuple[Task, ...]: ...
    @property
    def size(self) -> tuple[int, int]: ...
    @property
    def config(self) -> ConfigDict | None: ...
    @property
    def step(self) -> int | None: ...
    @property
    def origin(self) -> Path | None: ...


def check_program(trained: Trained, output: Path | str) -> None:
    """Raises unless a program can be made of it, in a file that is not there yet."""
    if not isinstance(trained.module, MultiTaskModel):
        raise InputError(f"export: it is of a {type(trained.module).__name__}; export the run that it was made from.")
    if Path(output).exists():
        raise FileError(f"--output={output} is there already; give a file that is not.")
