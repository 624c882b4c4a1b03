"""`config.data.mixture`: several data sets as one, checked for contradictions before any file is looked at.

A run's task that is named KIND@LABEL (semseg@street) is a head of its own of that kind, so that sources with other
classes need not share one. What a source calls the task is always its kind.
"""

import contextlib
import copy
import dataclasses
import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from sgw_jax.configs.base import mixture_source
from sgw_jax.data_pipelines.errors import InputError, UserError, files_named
from sgw_jax.data_pipelines.loader import Source
from sgw_jax.data_pipelines.mixture import IGNORED, Mixture, Part
from sgw_jax.data_pipelines.transforms import Target
from sgw_jax.experiment.data_set import CLASS_KEYS, SPLITS, DataSet, own_classes
from sgw_jax.experiment.ranges import OneOf
from sgw_jax.tasks import TASKS
from sgw_jax.tasks.base import kind_of

MIXTURE = "mixture"  # the name among DATA_SETS
SECTION = f"config.data.{MIXTURE}"
NAME = re.compile(r"[A-Za-z0-9_-]+")  # of a source, and of a head: both are parts of files' names
OWN_HEAD = (
    "give each a head of its own (a task KIND@LABEL, such as {task}@{source}, in config.tasks and in {key}.tasks)"
)


class MixedDataSets(DataSet):
    """The sources that `config.data.mixture` names, each one of the other data sets."""

    def __init__(self, members: Mapping[str, DataSet]) -> None:
        self._members = members  # looked up when they are asked for, so that a user's own count

    def task_options(self, data: ConfigDict) -> Mapping[str, Mapping[str, Any]]:
        """What the sources say of each task; that of a source whose classes are mapped is not the run's."""
        found: dict[str, dict[str, Any]] = {}
        for name in entries(data):
            part = part_data(data, name)
            for task in part.tasks:
                said = {} if task in part.maps else self._options(name, part, task)
                found.setdefault(task, {}).update({field: value for field, value in said.items() if value != ()})
        for task, options in found.items():
            if kind_of(task) in CLASS_KEYS and "num_classes" not in options:  # no source has the run's: all are mapped
                options.update(own_classes(data, kind_of(task)))
        return found

    def _options(self, name: str, part: ConfigDict, task: str) -> dict[str, Any]:
        with named_part(name):
            return dict(self._members[part.source].task_options(part).get(kind_of(task), {}))

    def check(self, config: ConfigDict) -> None:
        data = config.data
        if not entries(data):
            raise InputError(
                f"config.data.source is {MIXTURE!r}, but {SECTION} names no source: a configuration file says "
                f"config.data.{MIXTURE}.NAME = base.mixture_source(...) (docs/your-data.md)."
            )
        for name, entry in entries(data).items():
            self._check_entry(name, entry, config)
        for task in config.tasks:
            givers = [name for name, entry in entries(data).items() if task in entry.tasks]
            if not givers:
                listed = sorted({task for entry in entries(data).values() for task in entry.tasks})
                raise InputError(
                    f"config.tasks has {task!r}, which no source of {SECTION} has: their tasks are {listed}. Add it to "
                    "the tasks of one, or leave it out."
                )
            self._check_maps(data, task, givers)
            self._check_agreement(data, task, givers)

    def _check_entry(self, name: str, entry: ConfigDict, config: ConfigDict) -> None:
        """A source by itself."""
        key = f"{SECTION}.{name}"
        if not NAME.fullmatch(name):
            raise InputError(f"{key}: a source's name is made of letters, digits, - and _.")
        known = mixture_source()
        for unknown in [other for other in entry if other not in known]:
            near = difflib.get_close_matches(unknown, known, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise InputError(f"{key} has no key {unknown!r}; its keys are {sorted(known)}.{hint}")
        part = part_data(config.data, name)
        if part.source == MIXTURE:
            raise InputError(f"{key}.source is {MIXTURE!r}; a mixture within a mixture is none: list its sources here.")
        with named_part(name):
            self._members[part.source].check(part_config(config, name))
        for task in part.tasks:
            if task not in config.tasks:
                OneOf(TASKS).check(f"{key}.tasks: the kind of {task!r}", kind_of(task))
            if task != kind_of(task) and not NAME.fullmatch(task.partition("@")[2]):
                raise InputError(f"{key}.tasks has {task!r}; after @ stands a name of letters, digits, - and _.")
        if not set(part.tasks) & set(config.tasks):
            raise InputError(
                f"{key}.tasks are {list(part.tasks)}, and config.tasks {list(config.tasks)}: the source has none of "
                "the run's tasks. Correct its tasks, or take the source out."
            )
        for task in part.maps:
            if task not in part.tasks:
                raise InputError(f"{key}.maps has {task!r}, which is none of {key}.tasks, {list(part.tasks)}.")

    def _check_maps(self, data: ConfigDict, task: str, givers: Sequence[str]) -> None:
        """A map has a class of the run for each of the source's."""
        options = self.task_options(data)[task]
        for name in givers:
            part, key = part_data(data, name), f"{SECTION}.{name}"
            if task not in part.maps:
                continue
            fields = _fields(kind_of(task), self._options(name, part, task))
            if "num_classes" not in fields:
                raise InputError(f"{key}.maps has {task!r}, whose labels are no classes; take the map out.")
            classes, own = part.maps[task], fields["num_classes"]
            if len(classes) != own:
                raise InputError(
                    f"{key}.maps.{task} has {len(classes)} entries, but the source has {own} classes; give one for "
                    f"each: the run's class, or {IGNORED} for a class to ignore."
                )
            number = _fields(kind_of(task), options)["num_classes"]
            if wrong := sorted({class_ for class_ in classes if class_ >= number and class_ != IGNORED}):
                raise InputError(
                    f"{key}.maps.{task} leads to the classes {wrong}, but the run's task has 0..{number - 1}; "
                    f"correct the map, or the number of classes ({_where_from(data, task, givers)})."
                )

    def _check_agreement(self, data: ConfigDict, task: str, givers: Sequence[str]) -> None:
        """Sources that share a head without maps say the same of it."""
        said: dict[str, tuple[str, Any]] = {}
        for name in givers:
            part = part_data(data, name)
            if task in part.maps:
                continue
            for field, value in _fields(kind_of(task), self._options(name, part, task)).items():
                other, known = said.setdefault(field, (name, value))
                if value != () != known and value != known:  # () is not said
                    remedy = OWN_HEAD.format(task=kind_of(task), source=name, key=f"{SECTION}.{name}")
                    if "num_classes" in TASKS[kind_of(task)].__dataclass_fields__:
                        remedy += f", or bring the classes of one to those of the other by {SECTION}.{name}.maps.{task}"
                    raise InputError(
                        f"{SECTION}: the sources of task {task!r} contradict each other: {field} is {_brief(known)} in "
                        f"{other}, {_brief(value)} in {name}; {remedy}."
                    )
                if known == ():
                    said[field] = (name, value)

    def sources(self, config: ConfigDict, targets: Mapping[str, Target], cache_dir: Path | str) -> dict[str, Source]:
        parts: dict[str, dict[str, Part]] = {split: {} for split in SPLITS}
        for name in entries(config.data):
            own = part_config(config, name)
            names = {task: kind_of(task) for task in own.data.tasks if task in targets}
            maps = {task: tuple(classes) for task, classes in own.data.maps.items() if task in names}
            balanced = next((task for task in names if getattr(TASKS.get(names[task]), "balances_crops", False)), None)
            with named_part(name), files_named(f"{SECTION}.{name}.root={own.data.root}"):
                asked = {names[task]: targets[task] for task in names}
                found = self._members[own.data.source].sources(own, asked, cache_dir)
            for split, source in found.items():
                parts[split][name] = Part(source, names, maps, balanced)
        weights = {name: float(part_data(config.data, name).weight) for name in entries(config.data)}
        return {
            split: Mixture(of_split, {name: weights[name] for name in of_split})
            for split, of_split in parts.items()
            if of_split
        }


def entries(data: ConfigDict) -> dict[str, ConfigDict]:
    """Name -> what `config.data.mixture` says of the source, in order."""
    return dict(data.get(MIXTURE, {}).items())  # no key in checkpoints of earlier releases


def part_data(data: ConfigDict, name: str) -> ConfigDict:
    """`config.data` as it is for one source: with the source's keys in place of the mixture's."""
    shared = {key: value for key, value in data.items() if key != MIXTURE}
    return ConfigDict({**shared, **mixture_source(), **dict(entries(data)[name])})


def part_config(config: ConfigDict, name: str) -> ConfigDict:
    """The configuration as it is for one source."""
    copied = copy.deepcopy(config)
    with copied.unlocked(), copied.ignore_type():
        copied.data = part_data(config.data, name)
    return copied


def of_part(name: str, text: str) -> str:
    """What is said of keys of a source's `config.data`, said of its keys in the mixture."""
    keys = "|".join(key for key in mixture_source() if key != "source")
    return re.sub(rf"\bconfig\.data\.({keys})\b", rf"{SECTION}.{name}.\1", text)


@contextlib.contextmanager
def named_part(name: str) -> Iterator[None]:
    """Errors of a source name its keys in the mixture."""
    try:
        yield
    except UserError as error:
        error.args = tuple(of_part(name, arg) if isinstance(arg, str) else arg for arg in error.args)
        raise


def _fields(kind: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options, and the defaults of the fields that are not among them, but for what the configuration says."""
    fields = {} if kind not in TASKS else {field.name: field.default for field in dataclasses.fields(TASKS[kind])}
    own = {"name", "weight", "protocol", *(() if kind not in TASKS else TASKS[kind].configured)}
    return {**{name: value for name, value in fields.items() if name not in own}, **options}


def _where_from(data: ConfigDict, task: str, givers: Sequence[str]) -> str:
    """What says how many classes the run's task has."""
    unmapped = [name for name in givers if task not in part_data(data, name).maps]
    key = CLASS_KEYS.get(kind_of(task), "num_classes")
    return f"those of {unmapped[0]}" if unmapped else f"config.data.{key}"


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
