"""The data of a configuration: sources by split, targets and augmentation."""

from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from sgw_jax.data_pipelines.colour import ColourDistortion
from sgw_jax.data_pipelines.errors import files_named
from sgw_jax.data_pipelines.transforms import Augmentation, Target
from sgw_jax.experiment.data_sets import DATA_SETS
from sgw_jax.experiment.experiment import BEFORE_FIT, Data
from sgw_jax.tasks.base import Task


def build_data(
    config: ConfigDict,
    tasks: Sequence[Task],
    cache_dir: Path | str | None,
    block: tuple[int, int] = (0, 1),
    parts: int = 1,
) -> Data:
    """Sources, targets and augmentation.

    block: which of how many blocks of the rows are read here. parts: what the number of a batch's rows must divide by.
    """
    targets = {task.name: Target(**task.target) for task in tasks}
    data_set = DATA_SETS[config.data.source]
    with files_named(f"config.data.root={config.data.root}"):
        sources = {} if cache_dir is None else data_set.sources(config, targets, cache_dir)
    return Data(
        sources=sources,
        targets=targets,
        augmentation=_augmentation(config, tasks),
        batch_size=config.batch_size,
        seed=config.seed,
        block=block,
        workers=config.data.workers,
        threads=config.data.threads,
        parts=parts,
        exact_frames=any(task.sees_frame for task in tasks),
    )


def _augmentation(config: ConfigDict, tasks: Sequence[Task]) -> Augmentation:
    augment, balanced = config.augment, None
    if augment.cat_max_ratio is not None:
        balanced = next((task.name for task in tasks if task.balances_crops), None)
    return Augmentation(
        size=tuple(config.data.size),
        fit=config.data.get("fit", BEFORE_FIT),
        scale=tuple(augment.scale),
        scale_crop=tuple(augment.scale_crop),
        cat_max_ratio=augment.cat_max_ratio,
        cat_max_target=balanced,
        flip=augment.flip,
        colour=ColourDistortion() if augment.colour else None,
    )
