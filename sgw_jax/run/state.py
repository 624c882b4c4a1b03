"""A train state on its mesh: new, restored or warm."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from sgw_jax.experiment.experiment import Experiment
from sgw_jax.run.checkpoints import Checkpoints
from sgw_jax.run.warm_start import Start, warm_from, warm_from_backbone
from sgw_jax.sharding import check_split, state_sharding
from sgw_jax.train_step import TrainState, init_state


def new_state(experiment: Experiment) -> TrainState:
    """The state at step 0, born under jit where its sharding puts it."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(experiment))
    with jax.set_mesh(experiment.mesh):
        return jax.jit(_init(experiment), out_shardings=shardings)(np.uint32(experiment.settings.seed))


def restored_state(experiment: Experiment, checkpoints: Checkpoints, step: int) -> TrainState:
    """The whole state of a checkpoint, on the experiment's mesh."""
    return checkpoints.restore(abstract_state(experiment), step)


def first_state(experiment: Experiment, start: Start | None, console: Console) -> TrainState:
    """The state at step 0: with parameters from elsewhere, or the pretrained backbone's, or as the model draws them."""
    state = new_state(experiment)
    if start is not None:
        return warm_from(state, start, console)
    if experiment.backbone_weights:
        return warm_from_backbone(state, experiment, console)
    if experiment.trained is not None:
        console.print(
            "The frozen part of the backbone is random: config.optimizer or config.lora freezes it, but there is "
            "neither config.backbone_weights nor --init_from.",
            soft_wrap=True,
        )
    return state


def abstract_state(experiment: Experiment) -> TrainState:
    """Shapes, dtypes and shardings of the state without the numbers. Options that the model refuses show up here, and
    a mesh over which its parameters cannot be split."""
    with jax.set_mesh(experiment.mesh):
        shapes = jax.eval_shape(_init(experiment), np.uint32(0))
        shardings = state_sharding(shapes, experiment.mesh, experiment.rules)
        check_split(shapes.params, shardings.params, experiment.mesh)
    return jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), shapes, shardings
    )


def _init(experiment: Experiment) -> Callable[[Any], TrainState]:
    return lambda seed: init_state(
        experiment.model,
        experiment.optimizer,
        jnp.zeros((experiment.settings.batch_size, *experiment.size, 3), jnp.float32),
        seed=seed,
        ema=experiment.settings.ema_decay is not None,
        objective=experiment.objective,
        trained=experiment.trained,
    )
