"""The jitted training and evaluation step of an experiment, and the evaluation of one split."""

from collections.abc import Callable
from typing import Any

import jax

from sgw_jax.evaluation.evaluate import Evaluation, evaluation_of, evaluation_of_mixture, evaluation_sums
from sgw_jax.experiment.experiment import Experiment
from sgw_jax.run.finite import check_finite_losses
from sgw_jax.sharding import replicated
from sgw_jax.train_step import TrainState, make_eval_step, make_train_step


def compiled_steps(experiment: Experiment, state: TrainState) -> tuple[Any, Any]:
    """The training step, which updates the state in place and leaves it where it lies, and the evaluation step."""
    settings = experiment.settings
    step = make_train_step(
        experiment.model,
        experiment.tasks,
        experiment.optimizer,
        objective=experiment.objective,
        gradients=experiment.gradients,
        accumulate=settings.accumulate,
        ema_decay=settings.ema_decay,
        trained=experiment.trained,
        sources=experiment.data.source_tasks,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    return (
        jax.jit(step, out_shardings=(shardings, replicated(experiment.mesh)), donate_argnums=0),
        compiled_eval_step(experiment),
    )


def compiled_eval_step(experiment: Experiment) -> Any:
    """The evaluation step, whose sums are on every device."""
    return jax.jit(make_eval_step(experiment.model, experiment.tasks), out_shardings=replicated(experiment.mesh))


def evaluate_split(experiment: Experiment, eval_step: Callable, state: TrainState, split: str) -> Evaluation:
    """The metrics of one split, of a mixture those of each source too.

    Raises:
      NonFiniteError: a loss is not finite; metrics would be numbers all the same, of predictions that are none.
    """
    parts = experiment.data.by_source(split)
    variables, sums = state.variables, {}
    for name, data in (parts or {"": experiment.data}).items():
        with data.evaluation(split) as batches:
            sums[name] = evaluation_sums(eval_step, variables, batches, experiment.mesh)
    found = evaluation_of_mixture(sums, experiment.tasks) if parts else evaluation_of(sums[""], experiment.tasks)
    check_finite_losses(found, int(state.step), split)
    return found
