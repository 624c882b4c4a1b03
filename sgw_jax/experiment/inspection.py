"""The look at the data of a configuration before anything is trained on them."""

import dataclasses
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict
from rich.console import Console

from sgw_jax.data_pipelines.errors import files_named
from sgw_jax.data_pipelines.inspection import cache
from sgw_jax.data_pipelines.inspection.findings import Finding, raise_errors
from sgw_jax.data_pipelines.inspection.look import Inspection, look
from sgw_jax.data_pipelines.inspection.values import Asked
from sgw_jax.data_pipelines.transforms import Target
from sgw_jax.experiment.data_set import CLASS_KEYS
from sgw_jax.experiment.data_sets import DATA_SETS
from sgw_jax.experiment.experiment import Data
from sgw_jax.experiment.mixture import MIXTURE, entries, named_part, of_part, part_config
from sgw_jax.tasks.base import Task
from sgw_jax.tasks.normals import AXES, Normals

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
        sources = ", ".join(entries(self.config.data)) or self.config.data.root
        return f"{self.config.data.source} {sources}".strip()

    def examples(self, count: int = EXAMPLES) -> list[tuple[str, dict[str, Any]]]:
        """A few items of the first split to show, of a mixture of every source, read anew, as (file, arrays): those
        that show each task first, then others as far apart as may be."""
        first: dict[str, str] = {}
        for split in self.found.splits:
            first.setdefault(split.rpartition(" ")[0], split)
        return [example for split in first.values() for example in self._examples_of(split, count)]

    def _examples_of(self, split: str, count: int) -> list[tuple[str, dict[str, Any]]]:
        facts, source = self.found.splits[split], self.data.each_source()[split]
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
    if subject.config.data.source == MIXTURE:
        return _inspect_sources(subject, console, again)
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
        alone: dict[str, Any] = {s: getattr(source, "source", source) for s, source in data.sources.items()}
        named = data_set.name_findings(alone)  # of a mixture's parts the sources themselves
    kept = None if again else cache.kept(Path(subject.cache_dir), key)
    if kept is not None:
        return dataclasses.replace(subject, found=kept, remembered=True)
    asked = {task.name: asked_of(task) for task in subject.tasks}
    found = look(data.sources, asked, level, console, fixed=data_set.fixed_classes, named=named)
    if not found.errors:
        with files_named(f"--cache_dir={subject.cache_dir}"):
            cache.keep(Path(subject.cache_dir), key, found)
    return dataclasses.replace(subject, found=found)


def _inspect_sources(subject: Look, console: Console, again: bool) -> Look | None:
    """The look at each source of a mixture by itself, put together; what is found names the source."""
    looks: dict[str, Look] = {}
    for name in entries(subject.config.data):
        config = part_config(subject.config, name)
        parts = {split: subject.data.by_source(split).get(name) for split in subject.data.sources}
        own = {split: data.sources[split] for split, data in parts.items() if data is not None}
        tasks = tuple(task for task in subject.tasks if task.name in config.data.tasks)
        data = dataclasses.replace(subject.data, sources=own)
        with named_part(name):
            look = inspect(dataclasses.replace(subject, config=config, tasks=tasks, data=data), console, again=again)
        if look is not None:
            looks[name] = look
    if not looks:
        return None
    found = Inspection(
        subject.config.data.check,
        {f"{name} {split}": facts for name, look in looks.items() for split, facts in look.found.splits.items()},
        tuple(_of_source(name, finding) for name, look in looks.items() for finding in look.found.findings),
    )
    return dataclasses.replace(subject, found=found, remembered=all(look.remembered for look in looks.values()))


def _of_source(name: str, finding: Finding) -> Finding:
    where, advice = f"source {name}: {of_part(name, finding.where)}", of_part(name, finding.advice)
    return dataclasses.replace(finding, where=where, advice=advice)


def asked_of(task: Task) -> Asked:
    """What a task wants of its labels."""
    metres = task.target["kind"] == "depth" and getattr(task, "quantity", "depth") == "depth"
    key = f"config.data.{CLASS_KEYS[task.kind]}" if task.kind in CLASS_KEYS else "num_classes"
    facing = -AXES[task.axes][2] if isinstance(task, Normals) else 0
    return Asked(Target(**task.target), tuple(getattr(task, "class_names", ())), metres, key, facing)
