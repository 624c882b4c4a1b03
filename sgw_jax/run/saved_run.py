"""A run's directory opened again: from its checkpoint alone to configuration, tasks and state."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from sgw_jax.data_pipelines.errors import InputError, UserError
from sgw_jax.differentiate import flat, unflat
from sgw_jax.experiment.build import build_model
from sgw_jax.layers.parameter_names import CONSTANTS, PARAMS
from sgw_jax.model import MultiTaskModel
from sgw_jax.run.averages import evaluated_parameters
from sgw_jax.run.checkpoints import CheckpointError, Checkpoints
from sgw_jax.tasks import TASKS, task_from_dict
from sgw_jax.tasks.base import Task

__all__ = ["SavedRun", "abstract_variables", "open_run", "saved_model"]

CHECKPOINTS = "checkpoints"


@dataclasses.dataclass(frozen=True)
class SavedRun:
    """One checkpoint of a run: its step and what was saved beside the arrays. Leaving a `with` block closes it."""

    checkpoints: Checkpoints
    step: int
    config: ConfigDict
    tasks: tuple[Task, ...]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.checkpoints.close()

    def variables(self, model: MultiTaskModel) -> dict[str, Any]:
        """The model's variables on the default device: averaged parameters where there are any, and constants."""
        abstract = abstract_variables(model, tuple(self.config.data.size))
        params, constants = (abstract[name] for name in (PARAMS, CONSTANTS))
        if constants:
            constants = self.checkpoints.restore_variables({CONSTANTS: constants}, self.step)[CONSTANTS]
        found = evaluated_parameters(self.checkpoints, self.step, flat(params))
        return {PARAMS: unflat(found, params), CONSTANTS: constants}


def open_run(workdir: Path | str, which: str | int = "best", kinds: dict[str, type[Task]] | None = None) -> SavedRun:
    """Opens the best (or, without a validation split, the last), the last, or the checkpoint of a step.

    Args:
      which: "best", "last", or a step.
      kinds: task classes by name where the run used a user's own, {**TASKS, "Mine": Mine}.

    Raises:
      CheckpointError: no complete checkpoint there, or none of that step.
    """
    if which not in ("best", "last") and not isinstance(which, int):
        raise InputError(f"checkpoint {which!r}: it must be 'best' or 'last', or a step.")
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(Path(workdir) / CHECKPOINTS, read_only=True))
        best = checkpoints.best_step if which == "best" else None
        step = which if isinstance(which, int) else best or checkpoints.latest_step
        if step is None:
            raise CheckpointError(f"{workdir} holds no complete checkpoint; training has not saved one yet.")
        metadata = checkpoints.metadata(step)
        try:
            tasks = tuple(task_from_dict(description, kinds or TASKS) for description in metadata["tasks"])
            config = ConfigDict(json.loads(metadata["config"]))
        except UserError:
            raise
        except Exception as error:  # whatever is missed in metadata that another program wrote
            raise CheckpointError(
                f"The checkpoint of step {step} in {workdir} does not describe a run of this package "
                f"({type(error).__name__}: {error}); give another --workdir."
            ) from error
        stack.pop_all()  # open for the caller
    return SavedRun(checkpoints, step, config, tasks)


def abstract_variables(model: MultiTaskModel, size: tuple[int, int]) -> dict[str, Any]:
    """Shapes and types of the model's parameters and constants, to lie on the default device."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *size, 3)))
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    wanted = {PARAMS: shapes[PARAMS], CONSTANTS: shapes.get(CONSTANTS, {})}
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), wanted)


def saved_model(run: SavedRun) -> MultiTaskModel:
    """The network of the run, without its data."""
    return build_model(run.config, run.tasks)
