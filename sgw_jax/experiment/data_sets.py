"""The field's data sets as the library uses them: which source reads them, their splits, what each task is there."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sgw_jax.data_pipelines.cityscapes import Cityscapes
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.loader import Source
from sgw_jax.data_pipelines.mtan import MtanCityscapes, MtanNYUv2
from sgw_jax.data_pipelines.nyud import Nyud
from sgw_jax.data_pipelines.pascal_context import PascalContext
from sgw_jax.data_pipelines.prepared import Prepared

FORMATS = ("archive", "prepared")


@dataclasses.dataclass(frozen=True)
class DataSet:
    """How a published data set enters.

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

    def sources(self, root: Path, format: str, tasks: Sequence[str], protocol: str) -> dict[str, Source]:
        """The sources by split, over the archive's own files or over a set that `data_pipelines.prepare` made."""
        if format not in FORMATS:
            raise InputError(f"config.data.format is {format!r}; it must be one of {FORMATS}.")
        if format == "prepared":
            if self.by_protocol and protocol != "exact":
                raise InputError(
                    f"config.protocol is {protocol!r}, but prepared files of this data set hold the targets of the "
                    "exact protocol; use --config.data.format=archive."
                )
            return {ours: Prepared(root, theirs) for ours, theirs in self.splits.items()}
        options = {"protocol": protocol} if self.by_protocol else {}
        return {ours: self.archive(root, theirs, tasks, **options) for ours, theirs in self.splits.items()}


def _classes(names: tuple[str, ...], colours: tuple[tuple[int, int, int], ...] = ()) -> dict[str, Any]:
    return {"num_classes": len(names), "class_names": names, "colours": colours}


# Disparity in pixels; sky is 0 and valid. The peers leave pixels of 80 and more out of the error.
_DISPARITY = {"quantity": "disparity", "zero_is_valid": True, "max_depth": 80.0}

DATA_SETS: dict[str, DataSet] = {
    "nyud": DataSet(Nyud, {"semseg": _classes(Nyud.CLASSES)}),
    "pascal_context": DataSet(
        PascalContext,
        {
            "semseg": _classes(PascalContext.CLASSES, PascalContext.COLOURS),
            "human_parts": _classes(PascalContext.PART_CLASSES, PascalContext.PART_COLOURS),
        },
    ),
    "cityscapes": DataSet(
        Cityscapes, {"semseg": _classes(Cityscapes.CLASSES, Cityscapes.COLOURS), "depth": _DISPARITY}, by_protocol=True
    ),
    # The archives of MTAN hold no class names.
    "mtan_nyuv2": DataSet(MtanNYUv2, {"semseg": {"num_classes": 13}}),
    # The stored number is an inverse depth: it grows with a zoom, and 0 is invalid.
    "mtan_cityscapes": DataSet(MtanCityscapes, {"semseg": {"num_classes": 7}, "depth": {"quantity": "inverse_depth"}}),
}
