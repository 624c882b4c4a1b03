"""sgw_jax: one network, many dense vision tasks, with shared-workspace interactions (KEM, sKEM), in JAX and Flax.

A name is loaded when it is first used: importing the package costs next to nothing, and processes that only read and
augment images (`sgw_jax.data_pipelines`) never import JAX.
"""

import contextlib
import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sgw_jax import moved

if TYPE_CHECKING:
    from sgw_jax.backbones import BACKBONES
    from sgw_jax.backbones.pretrained import load_pretrained
    from sgw_jax.etf import SimplexETF, simplex_etf
    from sgw_jax.evaluation import boundary
    from sgw_jax.evaluation.metrics import delta_m
    from sgw_jax.experiment.build import build
    from sgw_jax.experiment.config_files import read_config
    from sgw_jax.interactions import INTERACTIONS, KEM, CrossTaskAttention
    from sgw_jax.interactions.shared_workspace import SharedWorkspace
    from sgw_jax.interactions.shared_workspace_checkpoint import shared_workspace_params
    from sgw_jax.layers.placement import Placement
    from sgw_jax.model import MultiTaskModel
    from sgw_jax.multi_objective import AGGREGATORS, SCALARIZERS
    from sgw_jax.prediction.predictor import Predictor
    from sgw_jax.tasks import TASKS, Task
    from sgw_jax.train_step import TrainState, init_state, make_eval_step, make_train_step

__version__ = "0.1.0"

__all__ = [
    "AGGREGATORS",
    "BACKBONES",
    "INTERACTIONS",
    "KEM",
    "SCALARIZERS",
    "TASKS",
    "CrossTaskAttention",
    "MultiTaskModel",
    "Placement",
    "Predictor",
    "SharedWorkspace",
    "SimplexETF",
    "Task",
    "TrainState",
    "boundary",
    "build",
    "delta_m",
    "from_pretrained",
    "init_state",
    "load",
    "load_pretrained",
    "make_eval_step",
    "make_train_step",
    "read_config",
    "shared_workspace_params",
    "simplex_etf",
]

# The module that each public name comes from; the imports above are the same for type checkers (test_structure.py).
_HOMES = {
    "AGGREGATORS": "multi_objective",
    "BACKBONES": "backbones",
    "CrossTaskAttention": "interactions",
    "INTERACTIONS": "interactions",
    "KEM": "interactions",
    "MultiTaskModel": "model",
    "Placement": "layers.placement",
    "Predictor": "prediction.predictor",
    "SCALARIZERS": "multi_objective",
    "SharedWorkspace": "interactions.shared_workspace",
    "SimplexETF": "etf",
    "TASKS": "tasks",
    "Task": "tasks",
    "TrainState": "train_step",
    "build": "experiment.build",
    "delta_m": "evaluation.metrics",
    "init_state": "train_step",
    "load_pretrained": "backbones.pretrained",
    "make_eval_step": "train_step",
    "make_train_step": "train_step",
    "read_config": "experiment.config_files",
    "shared_workspace_params": "interactions.shared_workspace_checkpoint",
    "simplex_etf": "etf",
}

_MODULES = {"boundary": "evaluation.boundary"}

# What the base install does not hold the packages of.
_TRAIN = {"Predictor", "boundary", "build", "read_config"}

moved.install()


def __getattr__(name: str) -> Any:
    home = _MODULES.get(name) or _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'sgw_jax' has no attribute {name!r}")
    with _extra_named(f"sgw_jax.{name}") if name in _TRAIN else contextlib.nullcontext():
        module: Any = importlib.import_module(f"sgw_jax.{home}")
    value = module if name in _MODULES else getattr(module, name)
    globals()[name] = value  # found without this function the next time
    return value


def _extra_named(what: str) -> contextlib.AbstractContextManager[None]:
    from sgw_jax.data_pipelines.errors import extra_named

    return extra_named(what)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load(workdir: str | Path, which: str = "best", **options: Any) -> "Predictor":
    """The `Predictor` of a finished or running training, from its checkpoint alone.

    Args:
      workdir: the run's directory.
      which: "best" (by validation) or "last" checkpoint.
      options: of `Predictor.from_workdir`.

    Returns:
      A function of images of any size: uint8 (H, W, 3) -> {task: map}.

    Raises:
      CheckpointError: there is no complete checkpoint, or it is damaged.

    >>> import sgw_jax
    >>> predictor = sgw_jax.load("runs/scenes")  # doctest: +SKIP
    >>> maps = predictor(photo)  # doctest: +SKIP
    """
    with _extra_named("sgw_jax.load"):
        from sgw_jax.prediction.predictor import Predictor

    return Predictor.from_workdir(workdir, which, **options)


def from_pretrained(
    name: str | Path,
    revision: str | None = None,
    kinds: "dict[str, type[Task]] | None" = None,
    batch_size: int | None = None,
) -> "Predictor":
    """The `Predictor` of a model's folder, or of a model of the Hugging Face hub by its name.

    A folder is what `sgw-jax export` and `Predictor.save_pretrained` write. Its tensors are all accounted for by name,
    shape, type and checksum; nothing in it is run. ``predictor.module`` and ``predictor.variables`` are the Flax module
    and its parameters, for fine-tuning in a loop of your own; `sgw-jax train --init_from=NAME` takes the same names.

    Args:
      name: a directory, or "org/name" of the hub, which needs the extra [hub]. A directory here goes first.
      revision: of the hub's model: a branch, a tag or a commit; None is its main branch.
      kinds: task classes by name where the model has your own, {**TASKS, "Mine": Mine}.
      batch_size: as of `Predictor`.

    Returns:
      A function of images of any size: uint8 (H, W, 3) -> {task: map}.

    Raises:
      FileNotFoundError: neither a directory nor a name of the hub's form.
      PretrainedError: a file that is missing, damaged, another library's or of a later release.
      HubError: no such model or revision, none that you may see, or no connection and nothing in the cache.

    >>> import sgw_jax
    >>> predictor = sgw_jax.from_pretrained("scenes-model")  # doctest: +SKIP
    >>> maps = predictor(photo)  # doctest: +SKIP
    """
    with _extra_named("sgw_jax.from_pretrained"):
        from sgw_jax.prediction.predictor import Predictor

    return Predictor.from_pretrained(name, revision, kinds, batch_size)
