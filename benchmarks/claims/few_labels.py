"""Labels of a task in a share of the training images alone, for comparisons: another task then knows more."""

import dataclasses
import zlib
from collections.abc import Mapping
from typing import Any

from sgw_jax.experiment.experiment import Experiment


class FewLabels:
    """A source without some of its labels.

    The label of task t stays with item i where a number of (t, i), uniform in [0, 1), is below the task's share: the
    same items in every run, and for a smaller share a part of them.

    source: whose items they are. shares: task -> share of the items with labels, in (0, 1]; a task without: all.
    """

    def __init__(self, source: Any, shares: Mapping[str, float]) -> None:
        self._source, self._shares = source, dict(shares)

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: value for name, value in self._source[index].items() if self.labelled(name, index)}

    def labelled(self, task: str, index: int) -> bool:
        """Whether the item keeps the task's label."""
        return zlib.crc32(f"{task} {index}".encode()) / 2**32 < self._shares.get(task, 1.0)

    def fingerprint(self) -> dict[str, Any]:
        """Which data this is."""
        return {**self._source.fingerprint(), "few_labels": self._shares}


def with_few_labels(experiment: Experiment, shares: Mapping[str, float]) -> Experiment:
    """The experiment with fewer labels in training; validation and test keep all of theirs."""
    sources = {**experiment.data.sources, "train": FewLabels(experiment.data.sources["train"], shares)}
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, sources=sources))


def read_shares(given: list[str]) -> dict[str, float]:
    """{task: share} of a command line's TASK=SHARE.

    Raises:
      SystemExit: another form, or a share outside (0, 1].
    """
    shares = {}
    for item in given:
        task, _, share = item.partition("=")
        try:
            shares[task] = float(share)
        except ValueError:
            shares[task] = 0.0
        if not 0 < shares[task] <= 1:
            raise SystemExit(f"--labelled {item}: give TASK=SHARE, a share in (0, 1].")
    return shares
