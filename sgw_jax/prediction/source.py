"""Where a network that predicts comes from: a run, a model's folder, the hub, or a StableHLO file."""

import dataclasses
from pathlib import Path

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.prediction.predictor import Predictor


@dataclasses.dataclass(frozen=True)
class Source:
    """One of the two; `load` makes the predictor.

    Args:
      workdir: of a run.
      model: a model's folder, the name of one of the hub, org/name, or a file that `sgw-jax export
        --format=stablehlo` wrote.
      which: of a run's checkpoints: "best", "last", or the one of a step.

    Raises:
      ValueError: both or neither, or a checkpoint of what is no run.
    """

    workdir: Path | str | None = None
    model: Path | str | None = None
    which: str | int = "best"

    def __post_init__(self) -> None:
        if (self.workdir is None) == (self.model is None):
            raise InputError(f"Give a run's directory or a model, one of the two; found {self.workdir}, {self.model}.")
        if self.model is not None and self.which != "best":
            raise InputError(f"The model {self.model} has no checkpoint {self.which!r}; checkpoints are a run's.")

    def __str__(self) -> str:
        return str(self.model if self.workdir is None else self.workdir)

    def load(self) -> Predictor:
        """The predictor.

        Returns:
          It.

        Raises:
          UserError: there is no such run, model or file, or it is damaged.
        """
        if self.workdir is not None:
            return Predictor.from_workdir(self.workdir, self.which)
        assert self.model is not None
        if Path(self.model).is_file():
            return Predictor.from_stablehlo(self.model)
        return Predictor.from_pretrained(self.model)
