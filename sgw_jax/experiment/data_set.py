"""What a data set is to a configuration: the interface of every entry of DATA_SETS."""

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ml_collections import ConfigDict

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.inspection.findings import Finding
from sgw_jax.data_pipelines.loader import Source
from sgw_jax.data_pipelines.transforms import Target
from sgw_jax.tasks.colours import spread_colours

SPLITS = ("train", "validation", "test")
# Task -> the keys of config.data that say how many classes a user's own labels have, and their names.
CLASS_KEYS = {"semseg": "num_classes", "human_parts": "num_parts"}
NAME_KEYS = {"semseg": "class_names", "human_parts": "part_names"}
BACKGROUND, BLACK = "background", (0, 0, 0)


class DataSet(abc.ABC):
    """How a data set enters: what a configuration says is read here, and the source gets plain arguments.

    rendered: whether the items are our own rendering, in which there is nothing to check.
    fixed_classes: whether the classes are the data set's own, not the user's choice.
    """

    rendered: ClassVar[bool] = False
    fixed_classes: ClassVar[bool] = True

    @abc.abstractmethod
    def task_options(self, data: ConfigDict) -> Mapping[str, Mapping[str, Any]]:
        """Task name -> its fields that are not the task's defaults, such as the classes; ``data`` is `config.data`."""

    def check(self, config: ConfigDict) -> None:
        """Raises where keys of the data do not go together; no file is looked at."""
        del config

    @abc.abstractmethod
    def sources(self, config: ConfigDict, targets: Mapping[str, Target], cache_dir: Path | str) -> dict[str, Source]:
        """The sources by split."""

    def name_findings(self, sources: Mapping[str, Source]) -> Sequence[Finding]:
        """What is odd about the names of the files, by what the data set's form says."""
        del sources
        return ()


def own_axes(data: ConfigDict) -> dict[str, dict[str, Any]]:
    """What the labels' axes are to the tasks, by the key of ``data``."""
    return {"normals": {"axes": data.get("normals_axes", "opencv")}}  # no key in earlier checkpoints


def own_classes(data: ConfigDict, task: str) -> dict[str, Any]:
    """Number and, if the user gives them, names and colours of a task's classes, by the keys of ``data``.

    A first class that is named background is black, and leaves the colours to the others.

    Raises:
      InputError: another number of names than of classes.
    """
    number, names = data[CLASS_KEYS[task]], tuple(data.get(NAME_KEYS[task], ()))  # no key in earlier checkpoints
    if not names:
        return {"num_classes": number}
    if len(names) != number:
        raise InputError(
            f"config.data.{NAME_KEYS[task]} are {len(names)} names, {', '.join(names)}; config.data.{CLASS_KEYS[task]} "
            f"is {number}: give as many, or none."
        )
    colours = (BLACK, *spread_colours(number - 1)) if names[0] == BACKGROUND else ()
    return {"num_classes": number, "class_names": names, "colours": colours}
