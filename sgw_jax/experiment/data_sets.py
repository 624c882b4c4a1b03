"""The data sets that a configuration can name: which source reads each, its splits, and what its tasks are there."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sgw_jax.data_pipelines import readers, scenes
from sgw_jax.data_pipelines.cityscapes import Cityscapes
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.folder import Folder
from sgw_jax.data_pipelines.inspection.findings import Finding
from sgw_jax.data_pipelines.inspection.folder_files import folder_findings
from sgw_jax.data_pipelines.loader import Source
from sgw_jax.data_pipelines.mtan import MtanCityscapes, MtanNYUv2
from sgw_jax.data_pipelines.nyud import Nyud
from sgw_jax.data_pipelines.pascal_context import PascalContext
from sgw_jax.data_pipelines.prepared import Prepared
from sgw_jax.data_pipelines.transforms import Target
from sgw_jax.experiment.data_set import CLASS_KEYS, SPLITS, DataSet, own_axes, own_classes
from sgw_jax.experiment.mixture import MixedDataSets

FORMATS = ("archive", "prepared")


@dataclasses.dataclass(frozen=True)
class Published(DataSet):
    """A published data set, over the archive's own files or over a set that `data_pipelines.prepare` made.

    archive: (root, split of the archive, task names) -> the source over its files.
    tasks: options of the tasks that are not the task's defaults.
    splits: our split -> the archive's. The peers report on the archive's validation images, so these are our "test":
        nothing is chosen by them unless a user says so.
    by_protocol: whether the targets themselves differ by protocol; the source then takes it.
    """

    archive: Callable[..., Source]
    tasks: Mapping[str, Mapping[str, Any]]
    by_protocol: bool = False
    splits: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"train": "train", "test": "validation"})

    def task_options(self, data: ConfigDict) -> Mapping[str, Mapping[str, Any]]:
        return {**self.tasks, **own_axes(data)}

    def sources(self, config: ConfigDict, targets: Mapping[str, Target], cache_dir: Path | str) -> dict[str, Source]:
        root, form, protocol = _root(config), config.data.format, config.protocol
        if form == "prepared":
            if self.by_protocol and protocol != "exact":
                raise InputError(
                    f"config.protocol is {protocol!r}, but prepared files of this data set hold the targets of the "
                    "exact protocol; use --config.data.format=archive."
                )
            return {ours: Prepared(root, theirs) for ours, theirs in self.splits.items()}
        options = {"protocol": protocol} if self.by_protocol else {}
        return {ours: self.archive(root, theirs, tuple(targets), **options) for ours, theirs in self.splits.items()}


class RenderedScenes(DataSet):
    """Procedural scenes, rendered into the cache directory: `config.data.lengths` of each split."""

    rendered = True

    def check(self, config: ConfigDict) -> None:
        if config.data.get("normals_axes", "opencv") != "opencv":
            raise InputError(
                f"config.data.normals_axes is {config.data.normals_axes!r}, but the normals of scenes are x right, y "
                "down, z forward; leave it at opencv."
            )

    def task_options(self, data: ConfigDict) -> Mapping[str, Mapping[str, Any]]:
        return {
            "semseg": _classes(scenes.SEMSEG_CLASSES, scenes.SEMSEG_COLOURS),
            "human_parts": _classes(scenes.PART_CLASSES, scenes.PART_COLOURS),
            "normals": {"axes": "opencv"},
        }

    def sources(self, config: ConfigDict, targets: Mapping[str, Target], cache_dir: Path | str) -> dict[str, Source]:
        data = config.data
        return {
            split: scenes.Scenes(split, data.lengths[split], size=tuple(data.size), seed=data.seed, cache_dir=cache_dir)
            for split in SPLITS
            if data.lengths[split]
        }


class OwnFolder(DataSet):
    """A user's own files, with the splits that lists of images name."""

    fixed_classes = False

    def task_options(self, data: ConfigDict) -> Mapping[str, Mapping[str, Any]]:
        return {task: own_classes(data, task) for task in CLASS_KEYS} | own_axes(data)

    def sources(self, config: ConfigDict, targets: Mapping[str, Target], cache_dir: Path | str) -> dict[str, Source]:
        root = _root(config)
        found = [split for split in SPLITS if (root / "splits" / f"{split}.txt").exists()]
        if "train" not in found:
            there = readers.first_few(sorted(path.name for path in (root / "splits").glob("[!.]*"))) or "nothing"
            raise InputError(
                f"config.data.root: {root / 'splits' / 'train.txt'} does not exist; it lists the training images. "
                f"{root / 'splits'} holds {there}."
            )
        return {split: Folder(root, split, targets) for split in found}

    def name_findings(self, sources: Mapping[str, Source]) -> Sequence[Finding]:
        return folder_findings({split: source for split, source in sources.items() if isinstance(source, Folder)})


def _root(config: ConfigDict) -> Path:
    if not config.data.root:
        raise InputError(
            f"config.data.source is {config.data.source!r}, but config.data.root is empty: give the data's directory "
            "(--config.data.root=DIR; docs/datasets.md says what it must hold)."
        )
    return Path(config.data.root)


def _classes(names: tuple[str, ...], colours: tuple[tuple[int, int, int], ...] = ()) -> dict[str, Any]:
    return {"num_classes": len(names), "class_names": names, "colours": colours}


# Disparity in pixels; sky is 0 and valid. The peers leave pixels of 80 and more out of the error.
_DISPARITY = {"quantity": "disparity", "zero_is_valid": True, "max_depth": 80.0}

DATA_SETS: dict[str, DataSet] = {
    "scenes": RenderedScenes(),
    "folder": OwnFolder(),
    "nyud": Published(Nyud, {"semseg": _classes(Nyud.CLASSES)}),
    "pascal_context": Published(
        PascalContext,
        {
            "semseg": _classes(PascalContext.CLASSES, PascalContext.COLOURS),
            "human_parts": _classes(PascalContext.PART_CLASSES, PascalContext.PART_COLOURS),
        },
    ),
    "cityscapes": Published(
        Cityscapes,
        {
            "semseg": {**_classes(Cityscapes.CLASSES, Cityscapes.COLOURS), "categories": Cityscapes.CATEGORIES},
            "depth": _DISPARITY,
        },
        by_protocol=True,
    ),
    # The archives of MTAN hold no class names.
    "mtan_nyuv2": Published(MtanNYUv2, {"semseg": {"num_classes": 13}}),
    # The stored number is an inverse depth: it grows with a zoom, and 0 is invalid.
    "mtan_cityscapes": Published(
        MtanCityscapes, {"semseg": {"num_classes": 7}, "depth": {"quantity": "inverse_depth"}}
    ),
}
DATA_SETS["mixture"] = MixedDataSets(DATA_SETS)
