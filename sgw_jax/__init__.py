"""sgw_jax: one network, many dense vision tasks, with shared-workspace interactions (KEM, sKEM), in JAX and Flax."""

from pathlib import Path
from typing import Any

from sgw_jax.backbones.pretrained import load_pretrained
from sgw_jax.etf import SimplexETF, simplex_etf
from sgw_jax.interactions import INTERACTIONS, KEM, CrossTaskAttention
from sgw_jax.interactions.shared_workspace import SharedWorkspace
from sgw_jax.interactions.shared_workspace_checkpoint import shared_workspace_params
from sgw_jax.layers.placement import Placement
from sgw_jax.metrics import delta_m
from sgw_jax.model import MultiTaskModel
from sgw_jax.tasks import TASKS, Task
from sgw_jax.train_step import make_eval_step, make_train_step

__version__ = "0.1.0"

__all__ = [
    "INTERACTIONS",
    "KEM",
    "TASKS",
    "CrossTaskAttention",
    "MultiTaskModel",
    "Placement",
    "SharedWorkspace",
    "SimplexETF",
    "Task",
    "delta_m",
    "load",
    "load_pretrained",
    "make_eval_step",
    "make_train_step",
    "shared_workspace_params",
    "simplex_etf",
]


def load(workdir: str | Path, which: str = "best", **options: Any) -> Any:
    """A `sgw_jax.predict.Predictor` from the checkpoints of a finished or running training; see its `from_workdir`."""
    from sgw_jax.predict import Predictor  # what commands need is not needed to import the modules

    return Predictor.from_workdir(workdir, which, **options)
