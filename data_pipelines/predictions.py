"""Predictions of a split as files, anybody's, read beside the source's items and checked.

    DIR/<task>/<name>.png .npy .npz    one file per image and task, or
    DIR/<name>.npz                     one per image with an array of each task's name, as `sgw-jax predict` writes

<name> is the item's id where the source has `ids` (Cityscapes: <city>/<id>), or the stem of its image's file; a source
without ids (scenes, prepared sets) counts its items: 0, 1, ... All maps are decoded: what may be in a file follows from
the kind of the task's target, and its size must be the labels'.

    labels     .png 8-bit grey or palette, the class | integers (H, W) | floats (H, W, classes), logits or probabilities
    depth      .png 16-bit grey, millimetres | floats (H, W), metres
    disparity  floats (H, W), in the labels' unit
    vectors    .png 8-bit RGB, 2 v / 255 - 1, axes as the labels' | floats (H, W, 3); any length, zero is no direction
    mask       .png 8-bit grey, v / 255 | floats (H, W) in [0, 1]

Arrays stand in .npy, or in .npz alone or under the task's name; (H, W, 1) is read as (H, W).
"""

import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from sgw_jax.data_pipelines import readers
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.loader import Source, read_example
from sgw_jax.data_pipelines.readers import WrongFileError
from sgw_jax.data_pipelines.transforms import Example, Target, eval_example

ARRAYS = (".npy", ".npz")
SUFFIXES = {
    "labels": (".png", *ARRAYS),
    "depth": (".png", *ARRAYS),
    "disparity": ARRAYS,
    "vectors": (".png", *ARRAYS),
    "mask": (".png", *ARRAYS),
}


class Predictions:
    """The predictions of a source's items, for every task of `targets`.

    Raises ValueError when constructed unless every item has one file of every task and every file is one of an item;
    when an item is read, for a file that is damaged, not of the form above or of another size than the labels.

    Args:
      directory: DIR above.
      source: whose items were predicted.
      targets: by task.
      channels: width of each task's raw prediction; of labels the number of classes.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        source: Source,
        targets: Mapping[str, Target],
        channels: Mapping[str, int],
    ) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise InputError(f"{self.directory}: no such directory; give the directory of the predictions")
        self.source, self.targets, self.channels = source, dict(targets), dict(channels)
        names = [item_names(source, index) for index in range(len(source))]
        files: dict[Path, list[Path]] = {}  # of a folder; tasks may share one
        self._files: dict[str, list[Path]] = {}
        for task, target in self.targets.items():
            folder = self.directory / task
            suffixes = SUFFIXES[target.kind]
            if not folder.is_dir():
                folder, suffixes = self.directory, (".npz",)
                if not any(path.suffix == ".npz" for path in folder.iterdir()):
                    there = sorted(path.name for path in folder.iterdir() if path.is_dir())
                    raise InputError(
                        f"{folder} has no folder {task!r} and no .npz of all tasks; its folders: "
                        f"{readers.first_few(there) or 'none'}; leave out of config.tasks what was not predicted"
                    )
            if folder not in files:
                files[folder] = _find(folder, names, suffixes, deep=folder != self.directory)
            self._files[task] = files[folder]

    def __len__(self) -> int:
        return len(self.source)

    def pair(self, index: int, tasks: Sequence[str]) -> tuple[dict[str, np.ndarray], Example]:
        """(maps by task, labels as evaluation has them) of an item, at the labels' own size.

        Maps: labels uint8 (H, W) or scores float32 (H, W, classes); masks float32 or, from a picture, uint8; all else
        float32.
        """
        wanted = {task: self.targets[task] for task in tasks}
        labels = read_example(self.source, index, lambda raw: eval_example(raw, wanted, raw["image"].shape[:2]))
        return {task: self._map(index, task, labels["image"].shape[:2]) for task in tasks}, labels

    def pairs(self, tasks: Sequence[str], threads: int = 2) -> Iterator[tuple[dict[str, np.ndarray], Example]]:
        """`pair` of every item in order, read by threads, few items ahead."""
        with ThreadPoolExecutor(max(threads, 1)) as pool:
            waiting: deque[Future[tuple[dict[str, np.ndarray], Example]]] = deque()
            try:
                for index in range(len(self)):
                    waiting.append(pool.submit(self.pair, index, tasks))
                    if len(waiting) > 2 * threads:
                        yield waiting.popleft().result()
                while waiting:
                    yield waiting.popleft().result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _map(self, index: int, task: str, size: tuple[int, ...]) -> np.ndarray:
        path, kind = self._files[task][index], self.targets[task].kind
        what = f"prediction of task {task!r} ({kind})"
        alone = path.parent != self.directory

        def reader(path: Path) -> np.ndarray:
            if path.suffix == ".png":
                return _PICTURES[kind](path, self.channels[task])
            return _ARRAYS[kind](_load(path, task, alone), self.channels[task])

        values = readers.read(path, what, reader)
        if values.shape[:2] != size:
            raise InputError(
                f"{path}, {what}: it is {values.shape[0]} x {values.shape[1]} (height x width); "
                f"allowed: its labels' {size[0]} x {size[1]}"
            )
        return values


def item_names(source: Any, index: int) -> tuple[str, ...]:
    """What an item's predictions may be called: its id, or its image's stem; its number where a source has no ids."""
    if not hasattr(source, "ids"):
        return (str(index),)
    files = (Path(source.file_of(index)).stem,) if hasattr(source, "file_of") else ()
    return tuple(dict.fromkeys((source.ids[index], *files)))


def _find(folder: Path, names: Sequence[tuple[str, ...]], suffixes: tuple[str, ...], deep: bool) -> list[Path]:
    """The file of each item; raises unless there is one of each and no other with these suffixes."""
    there: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*") if deep else folder.iterdir()):
        if path.suffix in SUFFIXES["labels"] and (deep or path.suffix in suffixes) and not path.name.startswith("."):
            there.setdefault(path.relative_to(folder).with_suffix("").as_posix(), []).append(path)
    found, missing = [], []
    for allowed in names:
        files = [path for name in allowed for path in there.pop(name, [])]
        if len(files) > 1:
            raise InputError(
                f"{folder} has {' and '.join(path.name for path in files)} for one image; keep one of them"
            )
        if files and files[0].suffix not in suffixes:
            raise InputError(f"{files[0]} cannot be the prediction here; allowed: {', '.join(suffixes)}")
        found += files
        missing += [] if files else [allowed[0]]
    form = f"one file per image, {names[0][0]} with one of {', '.join(suffixes)} for the first"
    if missing:
        raise InputError(
            f"{folder} lacks {len(missing)} of the split's {len(names)} images: {readers.first_few(missing)}; "
            f"allowed: {form}"
        )
    if extra := [path.name for files in there.values() for path in files]:
        raise InputError(
            f"{folder} holds {len(extra)} files of no image of the split: {readers.first_few(extra)}; allowed: {form}; "
            "move the others away, or give the split they belong to"
        )
    return found


def _load(path: Path, task: str, alone: bool) -> np.ndarray:
    """The array of the task's name; in a file of the task `alone` its only array too."""
    stored = np.load(path, allow_pickle=False)
    if isinstance(stored, np.ndarray):
        return stored
    with stored as arrays:
        if task in arrays:
            return arrays[task]
        if alone and len(arrays.files) == 1:
            return arrays[arrays.files[0]]
        raise WrongFileError(
            f"an archive of the arrays {readers.first_few(arrays.files) or 'none'}",
            f"an array {task!r}" + (", or one array alone" if alone else ""),
        )


# --- arrays and pictures of each kind


def _classes(labels: np.ndarray, number: int) -> np.ndarray:
    wrong = np.unique(labels[(labels < 0) | (labels >= number)])
    if wrong.size:
        raise WrongFileError(
            f"a label map with the values {readers.first_few(wrong.tolist())}",
            f"the classes 0..{number - 1} at every pixel, for a prediction ignores none",
        )
    return labels.astype(np.uint8)


def _labels(values: np.ndarray, number: int) -> np.ndarray:
    if values.dtype.kind in "iu" and values.ndim - (values.shape[2:] == (1,)) == 2:
        return _classes(readers.checked_array(values, kinds="iu"), number)
    if values.dtype.kind == "f" and values.ndim == 3 and values.shape[2] == number:
        return _finite(values)
    raise WrongFileError(
        f"an array {values.dtype} {values.shape}", f"integers (H, W), or floats (H, W, {number}) of {number} classes"
    )


def _finite(values: np.ndarray) -> np.ndarray:
    if not np.isfinite(values).all():
        raise WrongFileError("an array with values that are not finite", "a finite number at every pixel")
    return values.astype(np.float32)


def _mask(values: np.ndarray, number: int) -> np.ndarray:
    values = _finite(readers.checked_array(values))
    if not ((values >= 0) & (values <= 1)).all():
        raise WrongFileError(
            f"an array with values from {values.min():.6g} to {values.max():.6g}", "probabilities in [0, 1], no logits"
        )
    return values


_ARRAYS: dict[str, Callable[[np.ndarray, int], np.ndarray]] = {
    "labels": _labels,
    "depth": lambda values, _: _finite(readers.checked_array(values)),
    "disparity": lambda values, _: _finite(readers.checked_array(values)),
    "vectors": lambda values, _: _finite(readers.checked_array(values, (3,))),
    "mask": _mask,
}
_PICTURES: dict[str, Callable[[Path, int], np.ndarray]] = {
    "labels": lambda path, number: _classes(readers.read_labels(path), number),
    "depth": lambda path, _: readers.read_millimetres(path),
    "vectors": lambda path, _: readers.read_byte_vectors(path),
    "mask": lambda path, _: readers.read_picture(path, ("L",), "an 8-bit grey PNG, 255 = 1, or .npy, .npz floats"),
}
