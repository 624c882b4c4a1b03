"""Boundary evaluation: ODS, OIS and AP by thinning and exact bipartite matching, in Python.

The field computes these with MATLAB tools (SEISM, over the BSDS benchmark); the steps here are theirs:

  1. binarise the prediction, > t strictly, at every threshold, and thin it to lines one pixel wide;
  2. match predicted with target pixels one to one, as many as possible, no two further apart than `max_dist` times the
     image's diagonal (inclusive);
  3. add up over the images, per threshold, matches M, predicted pixels N and target pixels G;
  4. precision P = M / N, recall R = M / G, F = 2 P R / (P + R), each 0 where its divisor is.

ODS is the best F of one threshold for the whole set, OIS that of a threshold per image, chosen by the image's own F,
with counts pooled over the set; AP is the mean of P over R = 0, 0.01 .. 1, linear between the measured points and 0
outside them. BSDS matches by least total distance with a penalty for leaving pixels out; here the number of matches is
the greatest possible (Hopcroft and Karp 1973), which is what is counted. Piotr Dollar's toolbox also tries thresholds
between the measured ones; we do not (our decision, as the peers report it).
"""

import collections
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Shaped
from rich.console import Console
from scipy.ndimage import distance_transform_edt
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow
from skimage.morphology import thin

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.progress import counted

HED_THRESHOLDS = (0.001, *(step / 100 for step in range(1, 100)), 0.999)  # SEISM's parameters/HED.txt

Image = tuple[np.ndarray, ...]  # prediction, target and, perhaps, what to ignore


def evaluate(
    predictions: Sequence[np.ndarray],
    targets: Sequence[np.ndarray],
    *,
    max_dist: float,
    thresholds: Sequence[float] = HED_THRESHOLDS,
    thin: bool = True,
    outline_targets: bool = False,
    ignore: Sequence[np.ndarray] | None = None,
    workers: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """ODS, OIS and AP of a set of images, which may differ in size.

    Args:
      predictions: (N, H, W) or N maps (H, W) in [0, 1], or uint8 levels v, read as v / 255 in float64 (as the field
        saves and reads them).
      targets: bool, of the same shapes.
      max_dist: greatest distance of a match, as a fraction of the image's diagonal (PASCAL-Context 0.0075, NYUD 0.011).
      thresholds: in [0, 1), at which predictions are binarised.
      thin: thin predictions and targets before matching.
      outline_targets: replace a target by the outline of its mask first, as the published NYUD evaluation does.
      ignore: bool; pixels that count neither as prediction nor as target.
      workers: processes that share the images; 0 is this one.
      console: where a progress bar is shown; None shows none.

    Returns:
      As `summarise`; all in [0, 1].

    Raises:
      ValueError: no image, different lengths or shapes, predictions outside [0, 1] or not finite, options that do not
        make sense.

    >>> import numpy as np
    >>> from sgw_jax import boundary
    >>> target = np.eye(8, dtype=bool)
    >>> found = boundary.evaluate([0.9 * target], [target], max_dist=0.1, thresholds=(0.25, 0.5))
    >>> found["ods"], found["ois"], found["images"]
    (1.0, 1.0, 1)
    """
    if len(predictions) != len(targets) or (ignore is not None and len(ignore) != len(targets)):
        raise InputError(
            f"boundary.evaluate: {len(predictions)} predictions, {len(targets)} targets"
            + ("" if ignore is None else f", {len(ignore)} ignore masks")
            + "; give one of each per image."
        )
    images: Iterable[Image] = zip(
        *([predictions, targets] if ignore is None else [predictions, targets, ignore]), strict=True
    )
    options = {"thresholds": tuple(thresholds), "thin_lines": thin, "outline_targets": outline_targets}
    counts = counts_of(images, max_dist=max_dist, workers=workers, console=console, total=len(targets), **options)
    return summarise(counts, thresholds)


def counts_of(
    images: Iterable[Image],
    *,
    max_dist: float,
    workers: int = 0,
    console: Console | None = None,
    total: int | None = None,
    **options: Any,
) -> Int[np.ndarray, "images thresholds 3"]:
    """`image_counts` of each (prediction, target[, ignore]) in order; what several processes can pool.

    Images are taken from the iterable as they are needed, at most four per worker ahead.

    Args:
      images: (prediction, target) or (prediction, target, ignore) each.
      max_dist: as of `evaluate`.
      workers: processes that share the images; 0 is this one.
      console: where a progress bar is shown; None shows none.
      total: how many images, for the bar.
      options: of `image_counts`.

    Returns:
      int64 (images, thresholds, 3).

    Raises:
      ValueError: as `image_counts`, with the image's number.

    >>> import numpy as np
    >>> from sgw_jax import boundary
    >>> target = np.eye(8, dtype=bool)
    >>> boundary.counts_of([(0.9 * target, target)], max_dist=0.1, thresholds=(0.5,)).tolist()
    [[[8, 8, 8]]]
    """
    options["max_dist"] = max_dist
    found: Iterable[np.ndarray] = _in_order(images, options, workers)
    if console is not None:
        found = counted(found, "boundaries", total, console)
    counts = list(found)
    if not counts:
        return np.zeros((0, len(options.get("thresholds", HED_THRESHOLDS)), 3), np.int64)
    return np.stack(counts)


def _in_order(images: Iterable[Image], options: dict[str, Any], workers: int) -> Iterator[np.ndarray]:
    if workers == 0:
        for number, image in enumerate(images):
            yield _numbered(number, image, options)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        waiting: collections.deque[Future] = collections.deque()
        for number, image in enumerate(images):
            waiting.append(pool.submit(_numbered, number, image, options))
            if len(waiting) > 4 * workers:
                yield waiting.popleft().result()
        for future in waiting:
            yield future.result()


def _numbered(number: int, image: Image, options: dict[str, Any]) -> np.ndarray:
    try:
        return image_counts(*image, **options)
    except InputError as error:
        raise InputError(f"boundary: image {number}: {error}") from error


def image_counts(
    prediction: Shaped[np.ndarray, "height width"],
    target: Bool[np.ndarray, "height width"],
    ignore: Bool[np.ndarray, "height width"] | None = None,
    *,
    max_dist: float,
    thresholds: Sequence[float] = HED_THRESHOLDS,
    thin_lines: bool = True,
    outline_targets: bool = False,
) -> Int[np.ndarray, "thresholds 3"]:
    """Per threshold: matched pixels, predicted pixels, target pixels.

    Args:
      prediction: in [0, 1], or uint8 levels.
      target: bool.
      ignore: bool; pixels that count neither as prediction nor as target.
      max_dist: as of `evaluate`, and so are the others.
      thresholds: in [0, 1).
      thin_lines: thin predictions and targets before matching.
      outline_targets: replace the target by the outline of its mask first.

    Returns:
      int64 (thresholds, 3).

    Raises:
      ValueError: different shapes, predictions outside [0, 1] or not finite, options that do not make sense.

    >>> import numpy as np
    >>> from sgw_jax import boundary
    >>> target = np.eye(8, dtype=bool)
    >>> boundary.image_counts(0.9 * target, target, max_dist=0.1, thresholds=(0.5, 0.95)).tolist()
    [[8, 8, 8], [0, 0, 8]]
    """
    prediction, target = _checked(prediction, target, ignore, max_dist, thresholds)
    if outline_targets:
        target = outline(target)
    if ignore is not None:
        target = target & ~ignore
    lines = thin if thin_lines else (lambda mask: mask)
    target = lines(target)
    reach = max_dist * np.hypot(*target.shape)
    matcher = _Matcher(target, reach)
    counts = np.zeros((len(thresholds), 3), np.int64)
    counts[:, 2] = np.count_nonzero(target)
    # The binary maps of rising thresholds are nested: as many pixels means the same pixels.
    known: dict[int, tuple[int, int]] = {0: (0, 0)}
    for place, threshold in enumerate(thresholds):
        mask = prediction > threshold
        if ignore is not None:
            mask &= ~ignore
        size = int(np.count_nonzero(mask))
        if size not in known:
            mask = lines(mask)
            known[size] = matcher(mask), int(np.count_nonzero(mask))
        counts[place, :2] = known[size]
    return counts


def _checked(
    prediction: np.ndarray, target: np.ndarray, ignore: np.ndarray | None, max_dist: float, thresholds: Sequence[float]
) -> tuple[np.ndarray, np.ndarray]:
    shapes = [np.shape(a) for a in (prediction, target, ignore) if a is not None]
    if len(shapes[0]) != 2 or len(set(shapes)) > 1 or 0 in shapes[0]:
        raise InputError(f"prediction, target and ignore have shapes {shapes}; give equal ones, (height, width).")
    if not 0 <= max_dist < 1:
        raise InputError(f"max_dist is {max_dist}; give a fraction of the diagonal, in [0, 1).")
    if not len(thresholds) or not all(0 <= t < 1 for t in thresholds):
        raise InputError(f"thresholds are {thresholds}; give at least one, all in [0, 1).")
    if np.dtype(np.asarray(target).dtype) != np.bool_:
        raise InputError(f"target is {np.asarray(target).dtype}; give bool.")
    if prediction.dtype == np.uint8:
        prediction = prediction / 255
    prediction = np.asarray(prediction, np.float64)
    if not (np.all(prediction >= 0) and np.all(prediction <= 1)):
        raise InputError("the prediction holds values outside [0, 1] or that are not numbers; give probabilities.")
    return prediction, np.asarray(target)


def outline(mask: Bool[np.ndarray, "height width"]) -> Bool[np.ndarray, "height width"]:
    """seg2bmap: true where a pixel differs from its east, south or south-east neighbour.

    Outside the image the nearest pixel counts: in the last row only east differs, in the last column only south.

    Args:
      mask: bool (height, width).

    Returns:
      bool (height, width).

    >>> import numpy as np
    >>> from sgw_jax import boundary
    >>> boundary.outline(np.array([[False, True, True]])).tolist()
    [[True, False, False]]
    """
    padded = np.pad(mask, ((0, 1), (0, 1)), mode="edge")
    east, south, both = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    return (mask != east) | (mask != south) | (mask != both)


class _Matcher:
    """The most one-to-one pairs of a prediction's pixels with the target's, none further apart than reach."""

    def __init__(self, target: Bool[np.ndarray, "height width"], reach: float):
        self._margin = int(reach)
        self._near = distance_transform_edt(~target) <= reach if target.any() else np.zeros_like(target)
        self._size = int(np.count_nonzero(target))
        # Number of the target pixel at each place, -1 elsewhere, with room for every offset.
        self._number = np.full([length + 2 * self._margin for length in target.shape], -1)
        inside = self._number[self._margin : self._margin + target.shape[0], self._margin :][:, : target.shape[1]]
        inside[target] = np.arange(self._size)
        steps = range(-self._margin, self._margin + 1)
        self._offsets = np.array([(y, x) for y, x in itertools.product(steps, steps) if y * y + x * x <= reach * reach])

    def __call__(self, prediction: Bool[np.ndarray, "height width"]) -> int:
        rows, columns = np.nonzero(prediction & self._near)  # the others have no partner
        if not len(rows):
            return 0
        y = rows[:, None] + self._margin + self._offsets[None, :, 0]
        x = columns[:, None] + self._margin + self._offsets[None, :, 1]
        partners = self._number[y, x]
        which, offset = np.nonzero(partners >= 0)
        # As a flow of ones from a source through the pixels to a sink: Dinic's algorithm is then Hopcroft and Karp's,
        # and SciPy's is up to hundreds of times faster here than its `maximum_bipartite_matching`.
        count, sink = len(rows), len(rows) + self._size + 1
        start = np.concatenate([np.zeros(count, int), 1 + which, 1 + count + np.arange(self._size)])
        end = np.concatenate([1 + np.arange(count), 1 + count + partners[which, offset], np.full(self._size, sink)])
        capacity = np.ones(len(start), np.int32)
        graph = csr_array((capacity, (start.astype(np.int32), end.astype(np.int32))), shape=(sink + 1, sink + 1))
        return int(maximum_flow(graph, 0, sink, method="dinic").flow_value)


def summarise(
    counts: Int[np.ndarray, "images thresholds 3"], thresholds: Sequence[float] = HED_THRESHOLDS
) -> dict[str, Any]:
    """ODS, OIS and AP from counts. An image without counts changes nothing.

    Args:
      counts: as of `counts_of`, (images, thresholds, 3).
      thresholds: those that were counted at.

    Returns:
      {"ods", "ods_threshold", "ods_precision", "ods_recall", "ois", "ap", "images", "precision", "recall"}: numbers in
      [0, 1], and lists over the thresholds.

    Raises:
      ValueError: no image.

    >>> import numpy as np
    >>> from sgw_jax import boundary
    >>> boundary.summarise(np.array([[[3, 4, 4]]]), thresholds=(0.5,))["ods"]
    0.75
    """
    if not len(counts):
        raise InputError("boundary: there are no images, so there is nothing to summarise.")
    precision, recall, f = _scores(counts.sum(axis=0))
    best = int(np.argmax(f))
    of_image = np.argmax(_scores(counts)[2], axis=1)
    _, _, ois = _scores(counts[np.arange(len(counts)), of_image].sum(axis=0))
    return {
        "ods": float(f[best]),
        "ods_threshold": float(thresholds[best]),
        "ods_precision": float(precision[best]),
        "ods_recall": float(recall[best]),
        "ois": float(ois),
        "ap": _average_precision(precision, recall),
        "images": len(counts),
        "precision": precision.tolist(),
        "recall": recall.tolist(),
    }


def _scores(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    matched, predicted, target = np.moveaxis(counts.astype(np.float64), -1, 0)
    precision, recall = matched / np.maximum(predicted, 1), matched / np.maximum(target, 1)
    # F = 2 M / (N + G): the same number, without a division by zero where nothing matches.
    return precision, recall, 2 * matched / np.maximum(predicted + target, 1)


def _average_precision(precision: np.ndarray, recall: np.ndarray) -> float:
    """Of equal recalls the best precision counts (our decision; the toolbox takes the first or last it meets)."""
    points = np.unique(recall)
    best = np.array([precision[recall == point].max() for point in points])
    return float(np.sum(np.interp(np.arange(101) / 100, points, best, left=0, right=0)) / 100)
