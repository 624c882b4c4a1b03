"""The record of an evaluated run, as results.json holds it."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, get_args, get_origin, get_type_hints

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.json_files import read_object
from sgw_jax.run.logs import without_nan

Metrics = dict[str, dict[str, float]]  # {task: {metric: value}}

REMEDY = "Remove the file and evaluate the run again."


class ResultsError(InputError):
    """A results.json that is not what it should be."""


@dataclasses.dataclass(frozen=True)
class TaskDescription:
    """A task's name, its headline metric, and of all its metrics the units and whether a larger value is better.

    A metric without a direction is not compared; files of earlier releases give none.
    """

    name: str
    metric: str
    unit: str
    higher_is_better: bool
    units: dict[str, str]
    directions: dict[str, bool] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Ablation:
    """What the network finds with its slots' read-out changed."""

    metrics: Metrics
    losses: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Diagnostics:
    """What `diagnostics.diagnose` says of a KEM; NaN where a number is not defined."""

    tasks: list[str]
    images: int
    slot_diversity: float
    retrieve_entropy: float
    write_entropy: float
    selection_stability: float
    update_ratio: float
    readout_cosine: float
    selection_between_images: float
    reads: list[list[float]]
    writes: list[list[float]]
    flow: list[list[float]]
    task_gates: dict[str, float]
    ablations: dict[str, Ablation]
    pair_gates: list[list[float]] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Speed:
    """Of the training that the command did: its speed, and the command's wall time."""

    images_per_second: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class SourceResults:
    """What a checkpoint does on one source of a mixture, of the tasks that have labels there; as of `Results`."""

    images: int
    metrics: Metrics
    losses: dict[str, float]
    per_class: Metrics
    references: dict[str, Metrics]
    delta_m: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Results:
    """What a checkpoint is and does on one split.

    references, delta_m: of each reference predictor its metrics, and the network's mean gain over it (NaN where it is
    not defined). diagnostics: None where the interaction has none. config, identity: the configuration, and what else
    the run depends on, on one level of keys. speed: None where no training was measured. sources: of a mixture each
    source by itself.
    """

    name: str
    step: int
    protocol: str
    split: str
    tasks: list[TaskDescription]
    metrics: Metrics
    losses: dict[str, float]
    per_class: Metrics
    references: dict[str, Metrics]
    delta_m: dict[str, float]
    diagnostics: Diagnostics | None
    parameters: dict[str, int]
    environment: dict[str, str]
    config: dict[str, Any]
    identity: dict[str, Any]
    checkpoint: str
    speed: Speed | None
    sources: dict[str, SourceResults] = dataclasses.field(default_factory=dict)

    def of_source(self, name: str) -> Self:
        """The record as it is of one source alone."""
        found = self.sources[name]
        return dataclasses.replace(
            self,
            tasks=[task for task in self.tasks if task.name in found.metrics],
            metrics=found.metrics,
            losses=found.losses,
            per_class=found.per_class,
            references=found.references,
            delta_m=found.delta_m,
            sources={},
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data, null for NaN and {} for a speed that was not measured; no sources where there is no mixture."""
        values = without_nan(dataclasses.asdict(self))
        left_out = () if self.sources else ("sources",)
        return {
            name: value or {} if name == "speed" else value for name, value in values.items() if name not in left_out
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: Path | str = "results") -> Self:
        """What `to_dict` gave.

        Raises:
          ResultsError: a key is missing, unknown, or of another type; it names `source` and the key.
        """
        measured = {name: None if name == "speed" and item == {} else item for name, item in values.items()}
        return read_value(cls, measured, str(source))


def read_results(path: Path) -> Results:
    """The record in a results.json."""
    return Results.from_dict(read_object(path, REMEDY, ResultsError), path)


def read_value(kind: Any, value: Any, source: str, key: str = "") -> Any:
    """A value of a type that the record's classes are made of, from plain data; null is NaN where a float belongs.

    Raises:
      ResultsError: it is not of that type.
    """

    def inner(part: Any, name: object, item: Any) -> Any:
        return read_value(part, item, source, f"{key}.{name}" if key else str(name))

    parts = get_args(kind)
    if type(None) in parts:
        return None if value is None else read_value(parts[0], value, source, key)
    if kind is Any or type(value) is kind:
        return value
    if kind is float and (value is None or type(value) is int):
        return math.nan if value is None else float(value)
    if get_origin(kind) is list and isinstance(value, list | tuple):
        return [inner(parts[0], place, item) for place, item in enumerate(value)]
    if get_origin(kind) is dict and isinstance(value, Mapping):
        return {name: inner(parts[1], name, item) for name, item in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        make: Any = kind
        kinds = get_type_hints(kind)
        optional = {f.name for f in dataclasses.fields(make) if f.default_factory is not dataclasses.MISSING}
        needed = kinds.keys() - optional
        for names, problem in ((needed - value.keys(), "missing"), (value.keys() - kinds.keys(), "unknown")):
            if names:
                listed = ", ".join(f"{key}.{name}" if key else name for name in sorted(names))
                raise ResultsError(f"{source}: {problem}: {listed}. {REMEDY}")
        return make(**{name: inner(part, name, value[name]) for name, part in kinds.items() if name in value})
    expected = kind.__name__ if isinstance(kind, type) else str(kind)
    raise ResultsError(f"{source}: {key or 'the whole'} is {value!r} where {expected} belongs. {REMEDY}")
