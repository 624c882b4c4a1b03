"""The pass over a data set: every item read once, by threads; what is found, and the findings that follow from it."""

import dataclasses
import functools
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

from rich.console import Console

from sgw_jax.data_pipelines.errors import UserError
from sgw_jax.data_pipelines.inspection.facts import SplitFacts, TaskFacts, task_facts
from sgw_jax.data_pipelines.inspection.findings import Finding
from sgw_jax.data_pipelines.inspection.values import TRAIN, Asked, value_findings
from sgw_jax.data_pipelines.loader import Source
from sgw_jax.data_pipelines.progress import Progress
from sgw_jax.data_pipelines.readers import first_few
from sgw_jax.data_pipelines.transforms import Target, check_example

LEVELS = ("full", "sizes", "off")
AHEAD = 256  # items that threads are given before the first is taken


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What a look found: the level it was taken at, the facts by split, and the findings."""

    level: str
    splits: Mapping[str, SplitFacts]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.error]

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if not finding.error]

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "level": self.level,
            "splits": {split: facts.to_dict() for split, facts in self.splits.items()},
            "findings": [dataclasses.asdict(finding) for finding in self.findings],
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`, but for what findings were made of: digests of contents, and items not read."""
        return cls(
            stored["level"],
            {split: SplitFacts.from_dict(facts) for split, facts in stored["splits"].items()},
            tuple(Finding(**finding) for finding in stored["findings"]),
        )


def look(
    sources: Mapping[str, Source],
    asked: Mapping[str, Asked],
    level: str,
    console: Console | None,
    *,
    fixed: bool = False,
    named: Sequence[Finding] = (),
) -> Inspection:
    """Reads every item of the sources by split, or at the level "sizes" the headers of the images alone.

    Args:
      asked: what the run wants of each task.
      fixed: whether the classes are the data set's own, not a user's choice.
      named: what is already found, in names of files.
    """
    targets = {name: wanted.target for name, wanted in asked.items()}
    one = _sizes if level == "sizes" else functools.partial(_item, targets=targets)
    readable = {s: source for s, source in sources.items() if level == "full" or hasattr(source, "size_of")}
    with Progress("looking at the data", sum(map(len, readable.values())), console) as progress:
        splits = {split: _added(_facts(source, one), progress) for split, source in readable.items()}
    found = list(named)
    for split, facts in splits.items():
        found += [Finding(True, f"{split} split", said, "", "Mend or replace it.") for said in facts.unreadable]
    if level == "full":
        files = {split: functools.partial(_file, source) for split, source in readable.items()}
        found += value_findings(splits, asked, files, fixed)
        found += _without_labels(splits, readable)
        found += _duplicates(splits, readable)
    return Inspection(level, splits, tuple(found))


def _facts(source: Source, one: Callable[[Source, int], SplitFacts]) -> Iterator[SplitFacts]:
    """Of the items one by one, in order, read by as many threads as there are processors."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(source), AHEAD):
            yield from pool.map(functools.partial(one, source), range(start, min(start + AHEAD, len(source))))


def _sizes(source: Any, item: int) -> SplitFacts:
    try:
        return SplitFacts(1, {source.size_of(item): 1})
    except UserError as error:
        return SplitFacts(1, unreadable=(str(error),))


def _item(source: Source, item: int, targets: Mapping[str, Target]) -> SplitFacts:
    try:
        example = source[item]
        check_example(example, targets)
    except UserError as error:
        return SplitFacts(1, unreadable=(str(error),))
    image = example["image"]
    height, width = image.shape[:2]
    digest = hashlib.blake2b(image.tobytes(), digest_size=16, person=f"{height}x{width}".encode()).digest()
    tasks = task_facts(example, targets, item)
    return SplitFacts(1, {(height, width): 1}, tasks, () if tasks else (item,), {digest: (item,)})


def _added(facts: Iterator[SplitFacts], progress: Progress) -> SplitFacts:
    images, sizes, tasks = 0, Counter[tuple[int, int]](), dict[str, TaskFacts]()
    unlabelled, unreadable, contents = list[int](), list[str](), dict[bytes, tuple[int, ...]]()
    for one in facts:
        images += one.images
        sizes.update(one.sizes)
        for name, found in one.tasks.items():
            tasks[name] = tasks[name] + found if name in tasks else found
        unlabelled += one.unlabelled
        unreadable += one.unreadable
        for digest, items in one.contents.items():
            contents[digest] = contents.get(digest, ()) + items
        progress.advance()
    return SplitFacts(images, dict(sizes), tasks, tuple(unlabelled), contents, tuple(unreadable))


def _file(source: Any, task: str, item: int) -> str:
    """The labels' own file where the source tells it, else the image's."""
    if hasattr(source, "target_file"):
        return source.target_file(item, task)
    return _image(source, item)


def _image(source: Any, item: int) -> str:
    return source.file_of(item) if hasattr(source, "file_of") else f"item {item}"


def _without_labels(splits: Mapping[str, SplitFacts], sources: Mapping[str, Source]) -> Iterator[Finding]:
    for split, facts in splits.items():
        if facts.unlabelled:
            files = first_few([_image(sources[split], item) for item in facts.unlabelled], 3)
            found = f"{len(facts.unlabelled):,} of {facts.images:,} images have no labels of any task: {files}"
            advice = (
                "They are read and teach nothing; take them out of the list."
                if split == TRAIN
                else "They do not count."
            )
            yield Finding(False, f"{split} split", found, "", advice)


def _duplicates(splits: Mapping[str, SplitFacts], sources: Mapping[str, Source]) -> Iterator[Finding]:
    """Images of the same pixels: within a split, and in training and an evaluation at once."""
    for split, facts in splits.items():
        again = [items for items in facts.contents.values() if len(items) > 1]
        if again:
            pairs = [" = ".join(_image(sources[split], item) for item in items[:3]) for items in again]
            found = f"images that are there more than once: {first_few(pairs, 3)}"
            yield Finding(False, f"{split} split", found, "", "They count several times; keep one of each.")
    for one, other in itertools.combinations(splits, 2):
        shared = splits[one].contents.keys() & splits[other].contents.keys()
        if shared:
            places = sorted((splits[one].contents[digest][0], splits[other].contents[digest][0]) for digest in shared)
            pairs = [f"{_image(sources[one], a)} = {_image(sources[other], b)}" for a, b in places]
            found = f"images that are in both: {first_few(pairs, 3)}"
            advice = "Scores on images that were seen before are too good; take them out of one of the lists."
            yield Finding(False, f"splits {one} and {other}", found, "", advice)
