"""What cannot be right, or is not likely to be, in the values of a task's labels over a whole split.

A rule takes a `Seen` and yields findings; RULES lists those of each kind of target. A rule looks at the whole split,
for one image may well hold nothing but background, or nothing but ignored pixels.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from sgw_jax.data_pipelines.inspection.facts import SplitFacts, TaskFacts
from sgw_jax.data_pipelines.inspection.findings import Finding
from sgw_jax.data_pipelines.readers import first_few
from sgw_jax.data_pipelines.transforms import Target

TRAIN = "train"
FARTHEST = 200.0  # metres; a greater depth is more likely to be in millimetres
MOSTLY = 0.9  # from this share on, the images without labels look forgotten
AWAY = 0.1  # a mean of z beyond this on the wrong side is no chance of a few oblique surfaces
POSITIVE = 128  # of a mask's 256 levels: the first that counts as positive


@dataclasses.dataclass(frozen=True)
class Asked:
    """What a run wants of a task: how its target is encoded; of labels the classes, and what their number is called
    where it is set; whether depth is in metres; the sign of z of vectors that face the camera, 0 where that is not
    known."""

    target: Target
    class_names: tuple[str, ...] = ()
    metres: bool = False
    number_key: str = "num_classes"
    facing: int = 0

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def allowed(self) -> str:
        """The labels that may be."""
        return f"0..{self.classes - 1}, and {self.target.fill:g} = ignore"


@dataclasses.dataclass(frozen=True)
class Seen:
    """What a rule looks at: the labels of one task in one split. ``file(item)`` names the labels of an item."""

    split: str
    task: str
    asked: Asked
    facts: TaskFacts
    images: int
    file: Callable[[int], str]
    fixed: bool  # whether the classes are the data set's own, not a user's choice

    def error(self, found: str, allowed: str, advice: str, item: int | None = None) -> Finding:
        return Finding(True, self._where(item), found, allowed, advice)

    def warning(self, found: str, advice: str, item: int | None = None) -> Finding:
        return Finding(False, self._where(item), found, "", advice)

    def _where(self, item: int | None) -> str:
        part = f"{self.split} split, task {self.task!r}"
        return part if item is None else f"{self.file(item)}, {part}"

    def places(self, value: int) -> str:
        """In how many images a level stands, where that is more than the one that is named."""
        levels = self.facts.levels
        count = 0 if levels is None else int(levels.images[value])
        return f"{value} (in {count:,} images)" if count > 1 else str(value)


Rule = Callable[[Seen], Iterator[Finding]]


def value_findings(
    splits: Mapping[str, SplitFacts],
    asked: Mapping[str, Asked],
    files: Mapping[str, Callable[[str, int], str]],
    fixed: bool,
) -> list[Finding]:
    """All that the rules find, by split and task. ``files[split](task, item)`` names a file."""
    found: list[Finding] = []
    for split, facts in splits.items():
        for name, wanted in asked.items():
            file = _named(files[split], name)
            seen = Seen(split, name, wanted, facts.tasks.get(name, TaskFacts()), facts.images, file, fixed)
            for rule in (*RULES[wanted.target.kind], *ALWAYS):
                found += rule(seen)
    return found + [finding for name, wanted in asked.items() for finding in _new_classes(splits, name, wanted)]


def _named(files: Callable[[str, int], str], task: str) -> Callable[[int], str]:
    return lambda item: files(task, item)


# --- any kind


def something_labelled(seen: Seen) -> Iterator[Finding]:
    """A split whose labels are all ignored, or that has none."""
    facts = seen.facts
    if facts.images and not facts.valid:
        yield seen.error(
            f"in all {facts.images:,} labelled images every pixel is {_IGNORED[seen.asked.target.kind]}",
            "labels of at least one pixel of the split",
            _ADVICE_IGNORED.get(seen.asked.target.kind, "Correct the labels, or leave the task out of config.tasks."),
        )
    elif not facts.images and seen.images and seen.split == TRAIN:
        yield seen.error("no image has labels", "labels of at least one image", "Leave the task out of config.tasks.")


_IGNORED = {
    "labels": "255, which is ignored",
    "depth": "0 or not finite, which is invalid",
    "disparity": "invalid",
    "vectors": "shorter than 1/2, which is invalid",
    "mask": "negative, which is ignored",
}
_ADVICE_IGNORED = {
    "labels": "Correct the labels: are they of another numbering (such as train ids under the name of label ids), or "
    "is 255 a class? Or leave the task out of config.tasks."
}


def few_unlabelled(seen: Seen) -> Iterator[Finding]:
    """Nearly every image has labels: the rest looks forgotten."""
    missing = seen.images - seen.facts.images
    if missing and seen.facts.images >= MOSTLY * seen.images:
        yield seen.warning(
            f"{missing:,} of {seen.images:,} images have no file of the task, all others have one",
            "They add nothing to this task; add the files if they were forgotten.",
        )


# --- labels


def _two_values(seen: Seen) -> bool:
    """Whether nothing but 0 and 255 stands in the split, and both do."""
    return seen.facts.levels is not None and seen.facts.levels.seen == [0, 255]


def binary_labels(seen: Seen) -> Iterator[Finding]:
    """Two classes drawn as black and white: every pixel of the second would be ignored, and any network perfect."""
    levels = seen.facts.levels
    if levels is not None and _two_values(seen):
        yield seen.error(
            f"in all {seen.facts.images:,} label maps of the split the only values are 0 and 255, and 255 is ignored, "
            "so that class 0 alone is left",
            seen.asked.allowed,
            "Store the second class as 1.",
            int(levels.first[255]),
        )


def classes_in_range(seen: Seen) -> Iterator[Finding]:
    """A class that the network has no channel for."""
    levels = seen.facts.levels
    if levels is None:
        return
    wrong = [value for value in levels.seen if value >= seen.asked.classes and value != seen.asked.target.fill]
    if wrong:
        yield seen.error(
            f"labels of the value {first_few([seen.places(value) for value in wrong])}, but there are "
            f"{seen.asked.classes} classes",
            seen.asked.allowed,
            f"Correct the labels, or set {seen.asked.number_key}={max(wrong) + 1} if these are classes."
            if not seen.fixed
            else "Correct the labels: the classes of this data set are fixed.",
            min(int(levels.first[value]) for value in wrong),
        )


def classes_in_training(seen: Seen) -> Iterator[Finding]:
    """Classes that nothing teaches; most of a published data set's cannot be missing."""
    levels = seen.facts.levels
    if seen.split != TRAIN or levels is None or _two_values(seen) or not seen.facts.valid:
        return
    absent = [name for value, name in enumerate(seen.asked.class_names) if not levels.pixels[value]]
    if not absent:
        return
    if len(absent) == seen.asked.classes - 1:
        only = next(name for value, name in enumerate(seen.asked.class_names) if levels.pixels[value])
        found = (
            f"of {seen.asked.classes} classes {only} alone has labels, so that a network that knows no other is perfect"
        )
        yield seen.error(found, "labels of at least two classes", "Correct the labels, or leave the task out.")
        return
    found = f"{len(absent)} of {seen.asked.classes} classes have no label: {first_few(absent)}"
    if seen.fixed and 2 * len(absent) > seen.asked.classes and seen.images >= MANY:
        allowed = "most of the data set's classes"
        yield seen.error(found, allowed, "Are the labels of another numbering (train ids in place of label ids)?")
    else:
        yield seen.warning(
            found,
            "They cannot be learnt." + ("" if seen.fixed else " If these are no classes, num_classes is too large."),
        )


MANY = 50  # images; of a few of them most classes may be absent


def _new_classes(splits: Mapping[str, SplitFacts], task: str, asked: Asked) -> Iterator[Finding]:
    """Classes that are evaluated and not trained."""
    levels = {split: facts.tasks[task].levels for split, facts in splits.items() if task in facts.tasks}
    trained = levels.pop(TRAIN, None)
    for split, there in levels.items():
        if trained is not None and there is not None:
            new = [n for v, n in enumerate(asked.class_names) if there.pixels[v] and not trained.pixels[v]]
            if new:
                found = f"classes with labels here and none in training: {first_few(new)}"
                advice = "Their IoU will be 0, which lowers the mean."
                yield Finding(False, f"{split} split, task {task!r}", found, "", advice)


# --- masks


def mask_levels(seen: Seen) -> Iterator[Finding]:
    """Masks stored as 0 and 1 in 8 bits, where 1 is 255; and masks without anything positive."""
    facts, levels = seen.facts, seen.facts.levels
    if levels is None or not facts.valid:
        return
    allowed = "0..255 in a PNG, where 255 = 1, or floats in [0, 1]; a pixel is positive from 1/2 on"
    if levels.seen in ([1], [0, 1], [0, 1, 255], [1, 255]):
        values = " and ".join(map(str, levels.seen))
        yield seen.error(
            f"the only values of the whole split are {values}, of which 1 stands for {1 / 255:.3f}",
            allowed,
            "Store 1 as 255; pixels to ignore need floats (.npy), where they are negative."
            if 255 in levels.seen
            else "Store 1 as 255 (multiply by 255).",
            int(levels.first[1]),
        )
    elif not levels.pixels[POSITIVE:].any():
        greatest = max(levels.seen)
        item = int(levels.first[greatest])
        found = f"no pixel of the split is positive; the greatest value is {greatest / 255:.3f} (level {greatest})"
        advice = "Correct the masks, or leave the task out of config.tasks."
        if greatest or seen.split == TRAIN:
            yield seen.error(found, allowed, advice, item)
        else:
            yield seen.warning(found, "There is nothing to find in this split.", item)
    elif levels.pixels[POSITIVE:].sum() > MOSTLY * facts.valid:
        share = 100 * levels.pixels[POSITIVE:].sum() / facts.valid
        yield seen.warning(f"{share:.1f} % of the pixels are positive", "Are the masks inverted?")


# --- depth and vectors


def depth_in_metres(seen: Seen) -> Iterator[Finding]:
    """Millimetres, or a share of some greatest depth, stored as floats."""
    spread = seen.facts.spread
    if spread is None or not seen.asked.metres:
        return
    mean = spread.total[0] / seen.facts.valid
    if spread.high[0] > FARTHEST:
        yield seen.warning(
            f"depth up to {spread.high[0]:,.4g} m, {mean:,.4g} m on average",
            "Are these millimetres or centimetres? Floats are metres (divide by 1000 or 100); 16-bit PNGs millimetres.",
            spread.high_at[0],
        )
    elif spread.high[0] <= 1:
        yield seen.warning(
            f"no depth exceeds {spread.high[0]:.4g} m",
            "Are these shares of some greatest depth? Then multiply by it: metrics are in metres.",
            spread.high_at[0],
        )
    yield from one_value(seen)


def one_value(seen: Seen) -> Iterator[Finding]:
    """The same number everywhere."""
    spread = seen.facts.spread
    if spread is not None and spread.low == spread.high and seen.facts.valid > 1:
        yield seen.warning(f"every valid pixel is {', '.join(f'{v:.4g}' for v in spread.low)}", "Is this a map?")


def vectors_of_both_signs(seen: Seen) -> Iterator[Finding]:
    """Vectors coded as (n + 1) / 2 and stored as floats: nothing points left, up or towards the camera."""
    spread = seen.facts.spread
    if spread is not None and spread.low != spread.high and min(spread.low) >= 0:
        yield seen.warning(
            f"no component of any vector is negative; x, y, z are {_ranges(spread.low, spread.high)}",
            "Are these (n + 1) / 2? Then store 2 v - 1 as floats, or 255 v as 8-bit RGB.",
            spread.low_at[int(np.argmin(spread.low))],
        )
    else:
        yield from one_value(seen)


def vectors_that_face_the_camera(seen: Seen) -> Iterator[Finding]:
    """Vectors of other axes than the run believes: what a camera sees faces it, in the mean of many images."""
    spread, facing = seen.facts.spread, seen.asked.facing
    if spread is None or not facing or not min(spread.low) < 0:
        return
    z = spread.total[2] / seen.facts.valid
    if z * facing < -AWAY:
        axes = {-1: "opencv (x right, y down, z forward)", 1: "opengl (x right, y up, z towards the viewer)"}
        yield seen.warning(
            f"the mean of z is {z:.2f}, so that most surfaces face away from the camera in the axes {axes[facing]}",
            f"Are the axes {axes[-facing]}? Then set config.data.normals_axes={axes[-facing].split()[0]}: colours and "
            "legends are wrong otherwise; metrics are not.",
        )


def _ranges(low: Sequence[float], high: Sequence[float]) -> str:
    return ", ".join(f"{a:.2f}..{b:.2f}" for a, b in zip(low, high, strict=True))


RULES: Mapping[str, Iterable[Rule]] = {
    "labels": (binary_labels, classes_in_range, classes_in_training),
    "mask": (mask_levels,),
    "depth": (depth_in_metres,),
    "disparity": (one_value,),
    "vectors": (vectors_of_both_signs, vectors_that_face_the_camera),
}
ALWAYS: Iterable[Rule] = (something_labelled, few_unlabelled)
