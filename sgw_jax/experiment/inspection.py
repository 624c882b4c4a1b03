"""The look at the data of a configuration before anything is trained on them."""

import dataclasses
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from sgw_jax.data_pipelines.errors import files_named
from sgw_jax.data_pipelines.inspection import cache
from sgw_jax.data_pipelines.inspection.findings import raise_errors
from sgw_jax.data_pipelines.inspection.look import Inspection, look
from sgw_jax.data_pipelines.inspection.values import Asked
from sgw_jax.data_pipelines.transforms import Target
from sgw_jax.experiment.data_sets import CLASS_KEYS, DATA_SETS
from sgw_jax.experiment.experiment import Data
from sgw_jax.tasks.base import Task

__all__ = ["Inspection", "Look", "inspect", "raise_errors"]

# Of config.data, what changes nothing that a look finds.
IRRELEVANT = ("workers", "threads", "size")
EXAMPLES = 4


@dataclasses.dataclass(frozen=True)
class Look:
    """What is looked at: a configuration's data for its tasks; and, once it was, what was found.

    remembered: whether that is from a look at the same data before, kept in ``cache_dir``.
    """

    config: ConfigDict
    tasks: tuple[Task, ...]
    data: Data
    cache_dir: Path | str
    found: Inspection = dataclasses.field(default_factory=lambda: Inspection("off", {}, ()))
    remembered: bool = False

    @property
    def title(self) -> str:
        """What was looked at, in words."""
        return f"{self.config.data.source} {self.config.data.root}".strip()

    def examples(self, count: int = EXAMPLES) -> list[tuple[str, dict[str, Any]]]:
        """A few items of the first split to show, read anew, as (file, arrays): those that show each task first, then
        others as far apart as may be."""
        split, facts = next(iter(self.found.splits.items()))
        source: Any = self.data.sources[split]
        shown = [facts.tasks[task.name].shown for task in self.tasks if task.name in facts.tasks]
        apart = [item * len(source) // count for item in range(count)]
        items = list(dict.fromkeys(item for item in (*shown, *apart) if item is not None))[
            : max(count, len(set(shown)))
        ]
        name = source.file_of if hasattr(source, "file_of") else str
        return [(name(item), source[item]) for item in sorted(items)]


def inspect(subject: Look, console: Console, *, again: bool = False) -> Look | None:
    """Looks at all splits as `config.data.check` says; what was looked at before and is as it was is not read again.

    Args:
      console: shows how far it is.
      again: look even if a result is kept.

    Returns:
      What was found, errors included, of which none is raised. None where there is nothing to look at: data that we
      render ourselves, and the level "off".
    """
    config, data = subject.config, subject.data
    level, data_set = config.data.check, DATA_SETS[config.data.source]
    if level == "off" or data_set.rendered:
        return None
    wanted = {
        "level": level,
        "data": {key: value for key, value in config.data.to_dict().items() if key not in IRRELEVANT},
        "protocol": config.protocol,
        "tasks": [task.to_dict() for task in subject.tasks],
    }
    with files_named(f"config.data.root={config.data.root}"):
        key = cache.state(data.sources, wanted)
        named = data_set.name_findings(data.sources)
    kept = None if again else cache.kept(Path(subject.cache_dir), key)
    if kept is not None:
        return dataclasses.replace(subject, found=kept, remembered=True)
    asked = {task.name: asked_of(task) for task in subject.tasks}
    found = look(data.sources, asked, level, console, fixed=data_set.fixed_classes, named=named)
    if not found.errors:
        with files_named(f"--cache_dir={subject.cache_dir}"):
            cache.keep(Path(subject.cache_dir), key, found)
    return dataclasses.replace(subject, found=found)


def asked_of(task: Task) -> Asked:
    """What a task wants of its labels."""
    metres = task.target["kind"] == "depth" and getattr(task, "quantity", "depth") == "depth"
    key = f"config.data.{CLASS_KEYS[task.name]}" if task.name in CLASS_KEYS else "num_classes"
    return Asked(Target(**task.target), tuple(getattr(task, "class_names", ())), metres, key)
