"""What a data set is to a configuration: the interface of every entry of DATA_SETS."""

import abc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from ml_collections import ConfigDict

from sgw_jax.data_pipelines.inspection.findings import Finding
from sgw_jax.data_pipelines.loader import Source
from sgw_jax.data_pipelines.transforms import Target

SPLITS = ("train", "validation", "test")
# Task -> the key of config.data that says how many classes a user's own labels have.
CLASS_KEYS = {"semseg": "num_classes", "human_parts": "num_parts"}


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
