"""Tasks that have nothing to do with the image, for comparisons: what passes from them to the others is noise."""

import dataclasses
from typing import Any

import cv2
import numpy as np

from sgw_jax.experiment.experiment import Experiment
from sgw_jax.tasks import Depth, Task

COARSE = (4, 6)  # cells of a map that is enlarged: smooth, as depth is
NEAR, FAR = 1.0, 5.0  # metres, about the range of scenes


def distractors(number: int) -> tuple[Task, ...]:
    """Tasks of depth with the weight that scenes give depth."""
    return tuple(Depth(name=f"distractor{n:02d}", weight=8.0) for n in range(number))


class WithDistractors:
    """A source with a map of noise for each distractor, drawn from the split, the task and the item alone."""

    def __init__(self, source: Any, split: str, tasks: tuple[Task, ...]) -> None:
        self._source, self._split, self._tasks = source, split, tasks

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        found = dict(self._source[index])
        height, width = found["image"].shape[:2]
        for place, task in enumerate(self._tasks):
            rng = np.random.default_rng([*self._split.encode(), place, index])
            coarse = rng.uniform(NEAR, FAR, COARSE).astype(np.float32)
            found[task.name] = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR)
        return found

    def fingerprint(self) -> dict[str, Any]:
        """Which data this is."""
        return {**self._source.fingerprint(), "distractors": [task.name for task in self._tasks]}


def with_distractors(experiment: Experiment, tasks: tuple[Task, ...]) -> Experiment:
    """The experiment, which was built with these tasks among its own, with their maps in every split."""
    sources = {split: WithDistractors(source, split, tasks) for split, source in experiment.data.sources.items()}
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, sources=sources))
