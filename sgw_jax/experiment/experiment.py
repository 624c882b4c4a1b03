"""Everything a configuration describes, as objects, and what must be equal for a run to go on."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from sgw_jax.backbones.freezing import Freezing
from sgw_jax.data_pipelines.evaluation import View, eval_batches, image_sizes
from sgw_jax.data_pipelines.images import ImageRows, image_batches
from sgw_jax.data_pipelines.loader import Batches, Source, train_batches
from sgw_jax.data_pipelines.mixture import Chosen, Mixture
from sgw_jax.data_pipelines.predictions import Predictions
from sgw_jax.data_pipelines.tap_cache import TapCache
from sgw_jax.data_pipelines.transforms import Augmentation, Size, Target
from sgw_jax.differentiate import Objective
from sgw_jax.experiment.ranges import PROPER_SHARE, optional, whole
from sgw_jax.model import MultiTaskModel
from sgw_jax.sharding import Rules
from sgw_jax.tasks.base import Task

# Keys that may differ between a run and its resumption: they change no number of the run on the same mesh.
FREE_KEYS = (
    *("log_every", "keep", "mesh", "data.workers", "data.threads", "data.root", "data.format", "boundary"),
    *("profile_after", "profile_steps", "checkpoint_every", "eval_every"),
    *("data.mixture.*.root", "data.mixture.*.format"),
    "data.check",  # a look at the data changes none
    "backbone_weights",  # read at step 0 alone
    "backbone_cache",  # what it holds is what would be computed, up to rounding
)

# What `evaluate` may be told otherwise than the run was.
EVALUATION_KEYS = (*FREE_KEYS, "data.size", "data.fit")
BEFORE_FIT = "pad"  # what runs of before config.data.fit was a key did


@dataclasses.dataclass(frozen=True)
class Settings:
    """The loop's own numbers; see configs/base.py for their meaning."""

    seed: int
    steps: int
    batch_size: int
    accumulate: int
    ema_decay: float | None
    log_every: int
    checkpoint_every: int
    eval_every: int
    keep: int
    profile_after: int | None
    profile_steps: int


@dataclasses.dataclass(frozen=True)
class Boundary:
    """How boundaries are matched at the end of a run; see boundary.py. ``max_dist`` None: not at all."""

    max_dist: float | None
    outline_targets: bool
    workers: int
    suppress: bool = False  # runs of before it was a key have none

    def __post_init__(self) -> None:
        optional(PROPER_SHARE).check("Boundary: max_dist", self.max_dist)
        whole(0).check("Boundary: workers", self.workers)


@dataclasses.dataclass(frozen=True)
class Data:
    """The sources by split, and how their examples become batches."""

    sources: Mapping[str, Source]
    targets: Mapping[str, Target]
    augmentation: Augmentation
    batch_size: int
    seed: int
    block: tuple[int, int]  # this process's, of how many blocks of the batch's rows
    workers: int
    threads: int
    parts: int = 1  # of the mesh: the number of a batch's rows is a multiple of it
    exact_frames: bool = False  # whether metrics look at the images' frames
    taps: Mapping[str, TapCache] = dataclasses.field(default_factory=dict)  # by split, of a frozen backbone

    def train(self, start_step: int, steps: int) -> Batches:
        """Augmented batches of this process's rows for steps start_step .. steps - 1."""
        return train_batches(
            self.sources["train"],
            self.targets,
            self.augmentation,
            batch_size=self.batch_size,
            seed=self.seed,
            start_step=start_step,
            num_steps=steps,
            taps=self.taps.get("train"),
            **self._reading(),
        )

    def evaluation(self, split: str, view: View = "scored") -> Batches:
        """Every example of the split once; batches are filled up with ignored rows (data_pipelines/evaluation.py).

        view: "scored", images as the network sees them, and their labels at their own size; "network", labels as it
        sees them too; "own", images too at their own size.
        """
        return eval_batches(
            self.sources[split],
            self.targets,
            batch_size=self.batch_size,
            size=self.augmentation.size,
            fit=self.augmentation.fit,
            view=view,
            sizes=self.sizes(split),
            parts=self.parts,
            exact_frames=self.exact_frames,
            taps=self.taps.get(split) if view == "scored" else None,
            **self._reading(),
        )

    def images(self, split: str, wanted: Sequence[tuple[int, bool]], batch_size: int) -> Batches:
        """Batches of this process's rows of images alone, as the network sees them: (item, whether mirrored) each."""
        return image_batches(
            self.sources[split],
            wanted,
            batch_size=batch_size,
            size=self.augmentation.size,
            fit=self.augmentation.fit,
            **self._reading(),
        )

    def image(self, split: str, item: int) -> np.ndarray:
        """One of them, not mirrored: float32 (H, W, 3)."""
        rows = ImageRows(self.sources[split], self.augmentation.size, self.augmentation.fit, ((item, False),))
        return rows.example(0)["image"]

    def by_source(self, split: str) -> dict[str, Self]:
        """The data of each source of a mixture that has the split, by name; empty where there is no mixture."""
        if split not in self._by_source:  # kept, as they know their images' sizes
            source = self.sources[split]
            parts = source.parts if isinstance(source, Mixture) else {}
            # Taps are those of the mixture's items, not of a part's.
            replaced = functools.partial(dataclasses.replace, self, taps={})
            found = {name: replaced(sources={split: part}) for name, part in parts.items()}
            self._by_source[split] = found
        return self._by_source[split]

    @functools.cached_property
    def _by_source(self) -> dict[str, dict[str, Self]]:
        return {}

    def examples(self, split: str, count: int) -> tuple[Self, list[str]]:
        """Data whose first batch of the split begins with items to show, and the source of each of these, "" where
        there is no mixture: the first ``count`` items, or as many of every source (`Mixture.spread`)."""
        source = self.sources[split]
        if not isinstance(source, Mixture):
            return self, [""] * min(count, self.batch_size, len(source))
        items, names = zip(*source.spread(count), strict=True)
        rows = -(-len(items) // self.parts) * self.parts
        chosen = {split: Chosen(source, items)}
        return dataclasses.replace(self, sources=chosen, batch_size=rows, taps={}), list(names)

    @property
    def source_tasks(self) -> dict[str, tuple[str, ...]]:
        """Source -> its tasks, in the order of a training batch's numbers of them; empty where there is no mixture."""
        source = self.sources.get("train")
        return {name: tuple(part.names) for name, part in source.parts.items()} if isinstance(source, Mixture) else {}

    def each_source(self) -> dict[str, Source]:
        """The sources by split; those of a mixture one by one, as "SOURCE SPLIT"."""
        found: dict[str, Source] = {}
        for split, source in self.sources.items():
            parts = {f"{name} {split}": data.sources[split] for name, data in self.by_source(split).items()}
            found |= parts or {split: source}
        return found

    def sizes(self, split: str) -> tuple[Size, ...]:
        """(height, width) of every image of the split; looked up once."""
        if split not in self._sizes:
            self._sizes[split] = image_sizes(self.sources[split], self.threads)
        return self._sizes[split]

    @functools.cached_property
    def _sizes(self) -> dict[str, tuple[Size, ...]]:
        return {}

    def shrunk(self) -> dict[str, str]:
        """Split -> a sentence on its images that evaluation shrinks although pixels keep their scale (fit "pad")."""
        size, found = self.augmentation.size, {}
        for split in self.sources if self.augmentation.fit == "pad" else ():
            larger = sum(own[0] > size[0] or own[1] > size[1] for own in self.sizes(split)) if split != "train" else 0
            if larger:
                found[split] = (
                    f"{larger} of {len(self.sizes(split))} images of {split} are larger than config.data.size, "
                    f"{size[0]} x {size[1]} (height x width), and are shrunk to fit (config.data.fit is 'pad')."
                )
        return found

    def predictions(self, split: str, directory: Path | str, channels: Mapping[str, int]) -> Predictions:
        """Anybody's predictions of the split, beside its labels; channels: of each task's raw prediction."""
        return Predictions(directory, self.sources[split], self.targets, channels)

    def _reading(self) -> dict[str, int]:
        return {
            "process_index": self.block[0],
            "process_count": self.block[1],
            "num_workers": self.workers,
            "num_threads": self.threads,
        }

    def fingerprint(self) -> dict[str, Any]:
        """Which data this is, by split."""
        return {split: source.fingerprint() for split, source in self.sources.items()}


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What predictions are judged by."""

    name: str  # exact or published
    tasks: tuple[Task, ...]
    data: Data
    boundary: Boundary


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Everything that a configuration describes."""

    config: ConfigDict
    tasks: tuple[Task, ...]
    model: MultiTaskModel
    size: tuple[int, int]
    mesh: Mesh
    rules: Rules  # where parameters lie that the mesh would place otherwise
    data: Data
    settings: Settings
    boundary: Boundary
    optimizer: optax.GradientTransformation
    trained: Freezing | None  # which parameters learn; None is all
    schedule: optax.Schedule
    objective: Objective
    gradients: Literal["parameters", "representation"]
    backbone_weights: str  # a pretrained backbone's file or folder; empty for none
    backbone_cache: str  # a directory for what a frozen backbone makes of the images; empty for none

    def identity(self) -> dict[str, Any]:
        """What must be equal for a run to go on: the configuration but for FREE_KEYS, and the data."""
        flat = flatten(self.config.to_dict())
        return {
            **{key: value for key, value in flat.items() if not among(key, FREE_KEYS)},
            **{f"tasks.{task.name}": task.to_dict() for task in self.tasks},
            **flatten(self.data.fingerprint(), "data."),
        }

    def metadata(self) -> dict[str, Any]:
        """What prediction needs to know, as JSON: kept in every checkpoint."""
        return {
            "config": self.config.to_json(),
            "tasks": [task.to_dict() for task in self.tasks],
            "identity": self.identity(),
        }


def among(key: str, keys: Iterable[str]) -> bool:
    """Whether a dotted key is one of those, or lies in a section that is one; * stands for any name."""
    return any(_leads(other.split("."), key.split(".")) for other in keys)


def _leads(first: Sequence[str], names: Sequence[str]) -> bool:
    return len(first) <= len(names) and all(a in ("*", b) for a, b in zip(first, names, strict=False))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as {"a.b.c": value}; tuples become lists, as in JSON."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterable[str]:
    """One line per key whose value differs, but for FREE_KEYS, which records of earlier releases hold too."""
    missing = "(absent)"
    for key in sorted(key for key in set(old) | set(new) if not among(key, FREE_KEYS)):
        before, after = old.get(key, missing), new.get(key, missing)
        if before != after:
            yield f"{key}: {before!r} there, {after!r} now"
