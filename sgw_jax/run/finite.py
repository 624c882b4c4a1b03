"""NaN and infinity stop a run, naming the step and the task, before anything of them is saved."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sgw_jax.data_pipelines.errors import UserError
from sgw_jax.evaluation.evaluate import Evaluation
from sgw_jax.sharding import path_name, replicated
from sgw_jax.train_step import TrainState

ADVICE = (
    "Training stops; the last checkpoint is untouched. Look at the labels near this step, lower "
    "config.optimizer.learning_rate, or set config.optimizer.clip_norm."
)


class NonFiniteError(UserError, RuntimeError):
    """A loss or the gradient became NaN or infinite."""


def check_finite_step(step: int, values: Mapping[str, float]) -> None:
    """Raises a NonFiniteError that names what of a step's metrics is not finite."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    if not bad:
        return
    tasks = [name.removeprefix("loss/") for name in bad if name.startswith("loss/")]
    if tasks:
        what = f"the loss of {', '.join(tasks)}"
    elif "loss" in bad:
        what = "the weighted sum of the losses (each of them is finite)"
    else:
        what = "the gradient's norm (all losses are finite)"
    raise NonFiniteError(
        f"Step {step}: {what} is not finite ({', '.join(f'{name} = {values[name]}' for name in bad)}). {ADVICE}"
    )


def check_finite(state: TrainState, step: int) -> None:
    """Raises a NonFiniteError unless all parameters, averages and optimiser moments are finite.

    Finite losses and gradients do not imply it: they were taken before the update.
    """
    checked = {"params": state.params, "ema": state.ema, "opt_state": state.opt_state}
    leaves = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(checked)}
    mesh = next(iter(leaves.values())).sharding.mesh
    finite = jax.jit(_each_finite, out_shardings=replicated(mesh))(leaves)
    bad = [name for name, good in jax.device_get(finite).items() if not good]
    if bad:
        raise NonFiniteError(
            f"Step {step}: {len(bad)} arrays of the state are not finite after the update, such as {bad[0]}. {ADVICE}"
        )


def _each_finite(leaves: Mapping[str, Any]) -> dict[str, Any]:
    return {name: jnp.isfinite(leaf).all() for name, leaf in leaves.items()}


def check_finite_losses(found: Evaluation, step: int, split: str) -> None:
    """Raises a NonFiniteError that names the tasks: their metrics would be of no number, and rank no checkpoints."""
    bad = {task: loss for task, loss in found.losses.items() if not math.isfinite(loss)}
    if bad or not math.isfinite(found.loss):
        raise NonFiniteError(
            f"Step {step}: the {split} loss of {', '.join(bad) or 'the weighted sum'} is not finite: no score is "
            "written, and the checkpoints are untouched. Look at the images and labels of the split; at another size "
            "than in training, or in bfloat16, a network may leave the range of numbers."
        )
