"""Boundary evaluation: ODS, OIS, AP and R50 by thinning and exact bipartite matching, in Python.

The field computes these with MATLAB tools (SEISM, over the BSDS benchmark); the steps here are theirs:

  1. if asked for, suppress in the prediction what is no crest of a ridge (suppression.py);
  2. binarise it, > t strictly (or >= t), at every threshold, and thin it to lines one pixel wide;
  3. match predicted with target pixels one to one, as many as possible, no two further apart than `max_dist` times the
     image's diagonal (inclusive), annotator by annotator;
  4. add up over the images, per threshold, the predicted pixels N and, of these, those that match any annotator, Mp;
     the target pixels of all annotators G and, of these, those matched, Mr (with one annotator, Mp = Mr);
  5. precision P = Mp / N, recall R = Mr / G, F = 2 P R / (P + R).

ODS is the best F of one threshold for the whole set, OIS that of a threshold per image, chosen by the image's own F,
with counts pooled over the set; AP is the mean of P over R = 0, 0.01 .. 1, linear between the measured points and 0
outside them; R50 is R where P is 1/2. BSDS matches by least total distance with a penalty for leaving pixels out; here
the number of matches is the greatest possible (Hopcroft and Karp 1973), which is what is counted: Mp too, as one
matching with the pixels of all annotators together, each of which may be matched once, so that P is the highest that
any matchings give.

What remains open, a `program` settles as a published one does:

                            ours                       seism                      edges (Dollar's edgesEvalDir)
  nothing is predicted      P = 0                      P = 1                      P = 0
  no target pixel           R = 0                      R = 1                      R = 0
  equal R (AP, R50)         the best P counts          the first threshold's      the first threshold's
  a single R                one place of AP's 101      AP = 0                     AP = 0
  ODS                       of the thresholds          of the thresholds          also of P, R linear between them
  R50                       of what predicts anything  of all                     of all
  an image's best F (OIS)   exact                      rounded to six decimals    exact
"""

import collections
import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Int, Shaped
from rich.console import Console
from scipy.ndimage import distance_transform_edt
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow
from skimage.morphology import thin

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.progress import counted
from sgw_jax.evaluation.suppression import suppress as suppress

HED_THRESHOLDS = (0.001, *(step / 100 for step in range(1, 100)), 0.999)  # SEISM's parameters/HED.txt

PROGRAMS = ("ours", "seism", "edges")

Target = np.ndarray | Sequence[np.ndarray]  # bool: (height, width), or one such map per annotator
Image = tuple[Any, ...]  # prediction, target and, perhaps, what to ignore
Thin = bool | Literal["predictions"]


def evaluate(
    predictions: Sequence[np.ndarray],
    targets: Sequence[Target],
    *,
    max_dist: float,
    thresholds: Sequence[float] = HED_THRESHOLDS,
    thin: Thin = True,
    suppress: bool = False,
    inclusive: bool = False,
    program: str = "ours",
    outline_targets: bool = False,
    ignore: Sequence[np.ndarray] | None = None,
    workers: int = 0,
    console: Console | None = None,
) -> dict[str, Any]:
    """ODS, OIS, AP and R50 of a set of images, which may differ in size.

    Args:
      predictions: (N, H, W) or N maps (H, W) in [0, 1], or uint8 levels v, read as v / 255 in float64 (as the field
        saves and reads them).
      targets: bool, of the same shapes; several annotators' as (N, A, H, W), or N lists of maps (H, W).
      thresholds: in [0, 1), at which predictions are binarised.
      max_dist: greatest distance of a match, as a fraction of the image's diagonal (PASCAL-Context 0.0075, NYUD 0.011).
      thin: thin predictions and targets before matching; "predictions": these alone, as the BSDS benchmark does.
      suppress: suppress what is no crest of a ridge first, see `suppress`.
      inclusive: a pixel is predicted from the threshold on (>=), in place of above it (>).
      program: whose conventions are followed where nothing is predicted and between thresholds: "ours", "seism" or
        "edges", see above.
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
    options = {
        "thresholds": tuple(thresholds),
        "thin_lines": thin,
        "suppressed": suppress,
        "inclusive": inclusive,
        "outline_targets": outline_targets,
    }
    counts = counts_of(images, max_dist=max_dist, workers=workers, console=console, total=len(targets), **options)
    return summarise(counts, thresholds, program)


def counts_of(
    images: Iterable[Image],
    *,
    max_dist: float,
    workers: int = 0,
    console: Console | None = None,
    total: int | None = None,
    **options: Any,
) -> Int[np.ndarray, "images thresholds 4"]:
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
      int64 (images, thresholds, 4).

    Raises:
      ValueError: as `image_counts`, with the image's number.

    >>> import numpy as np
    >>> from sgw_jax import boundary
    >>> target = np.eye(8, dtype=bool)
    >>> boundary.counts_of([(0.9 * target, target)], max_dist=0.1, thresholds=(0.5,)).tolist()
    [[[8, 8, 8, 8]]]
    """
    options["max_dist"] = max_dist
    found: Iterable[np.ndarray] = _in_order(images, options, workers)
    if console is not None:
        found = counted(found, "boundaries", total, console)
    counts = list(found)
    if not counts:
        return np.zeros((0, len(options.get("thresholds", HED_THRESHOLDS)), 4), np.int64)
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
    target: Target,
    ignore: Bool[np.ndarray, "height width"] | None = None,
    *,
    max_dist: float,
    thresholds: Sequence[float] = HED_THRESHOLDS,
    thin_lines: Thin = True,
    suppressed: bool = False,
    inclusive: bool = False,
    outline_targets: bool = False,
) -> Int[np.ndarray, "thresholds 4"]:
    """Per threshold Mp, N, Mr, G: predicted pixels matched and in all, target pixels matched and in all.

    Args:
      prediction: in [0, 1], or uint8 levels.
      target: bool, or several annotators'.
      ignore: bool; pixels that count neither as prediction nor as target.
      max_dist: as of `evaluate`, and so are the others.
      thresholds: in [0, 1).
      thin_lines: thin predictions and targets before matching; "predictions": these alone.
      suppressed: suppress what is no crest of a ridge first.
      inclusive: a pixel is predicted from the threshold on, in place of above it.
      outline_targets: replace the target by the outline of its mask first.

    Returns:
      int64 (thresholds, 4).

    Raises:
      ValueError: different shapes, predictions outside [0, 1] or not finite, options that do not make sense.

    >>> import numpy as np
    >>> from sgw_jax import boundary
    >>> target = np.eye(8, dtype=bool)
    >>> boundary.image_counts(0.9 * target, target, max_dist=0.1, thresholds=(0.5, 0.95)).tolist()
    [[8, 8, 8, 8], [0, 0, 0, 8]]
    """
    prediction, targets = _checked(prediction, target, ignore, max_dist, thresholds, thin_lines)
    if suppressed:
        prediction = suppress(prediction)
    if outline_targets:
        targets = [outline(one) for one in targets]
    if ignore is not None:
        targets = [one & ~ignore for one in targets]
    if thin_lines is True:
        targets = [thin(one) for one in targets]
    matcher = _Matcher(np.stack(targets), max_dist * np.hypot(*prediction.shape))
    counts = np.zeros((len(thresholds), 4), np.int64)
    counts[:, 3] = np.count_nonzero(targets)
    # The binary maps of rising thresholds are nested: as many pixels means the same pixels.
    known: dict[int, tuple[int, int, int]] = {0: (0, 0, 0)}
    for place, threshold in enumerate(thresholds):
        mask = _above(prediction, threshold, inclusive)
        if ignore is not None:
            mask &= ~ignore
        size = int(np.count_nonzero(mask))
        if size not in known:
            mask = thin(mask) if thin_lines else mask
            right, found = matcher(mask)
            known[size] = right, int(np.count_nonzero(mask)), found
        counts[place, :3] = known[size]
    return counts


def _above(prediction: np.ndarray, threshold: float, inclusive: bool) -> np.ndarray:
    level = prediction.dtype.type(threshold)  # what is suppressed is float32, and level 51 is then 0.2 all the same
    return prediction >= max(level, np.finfo(np.float64).eps) if inclusive else prediction > level


def _checked(
    prediction: np.ndarray,
    target: Target,
    ignore: np.ndarray | None,
    max_dist: float,
    thresholds: Sequence[float],
    thin_lines: Thin,
) -> tuple[np.ndarray, list[np.ndarray]]:
    several = len(target) > 0 and np.ndim(target[0]) == 2  # maps, one per annotator
    targets = [np.asarray(one) for one in (target if several else [target])]
    shapes = list(dict.fromkeys(np.shape(a) for a in (prediction, *targets, ignore) if a is not None))
    if len(shapes[0]) != 2 or len(shapes) > 1 or 0 in shapes[0]:
        raise InputError(f"prediction, target and ignore have shapes {shapes}; give equal ones, (height, width).")
    if not 0 <= max_dist < 1:
        raise InputError(f"max_dist is {max_dist}; give a fraction of the diagonal, in [0, 1).")
    if not len(thresholds) or not all(0 <= t < 1 for t in thresholds):
        raise InputError(f"thresholds are {thresholds}; give at least one, all in [0, 1).")
    if thin_lines not in (True, False, "predictions"):
        raise InputError(f'thin is {thin_lines!r}; give True, False or "predictions".')
    for one in targets:
        if one.dtype != np.bool_:
            raise InputError(f"target is {one.dtype}; give bool.")
    if prediction.dtype == np.uint8:
        prediction = prediction / 255
    prediction = np.asarray(prediction, np.float64)
    if not (np.all(prediction >= 0) and np.all(prediction <= 1)):
        raise InputError("the prediction holds values outside [0, 1] or that are not numbers; give probabilities.")
    return prediction, targets


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
    """The most one-to-one pairs of a prediction's pixels with those of the targets, none further apart than reach."""

    def __init__(self, targets: Bool[np.ndarray, "annotators height width"], reach: float):
        self._margin = int(reach)
        anywhere = targets.any(axis=0)
        self._near = distance_transform_edt(~anywhere) <= reach if anywhere.any() else anywhere
        sizes = [int(np.count_nonzero(target)) for target in targets]
        self._ends = np.cumsum([0, *sizes])
        # Number of the target pixel at each place, -1 elsewhere, with room for every offset.
        room = ((0, 0), (self._margin, self._margin), (self._margin, self._margin))
        self._number = np.full(targets.shape, -1)
        self._number[targets] = np.arange(sum(sizes))
        self._number = np.pad(self._number, room, constant_values=-1)
        steps = range(-self._margin, self._margin + 1)
        self._offsets = np.array([(y, x) for y, x in itertools.product(steps, steps) if y * y + x * x <= reach * reach])

    def __call__(self, prediction: Bool[np.ndarray, "height width"]) -> tuple[int, int]:
        """(predicted pixels that match any target, matched pixels of all targets)."""
        rows, columns = np.nonzero(prediction & self._near)  # the others have no partner
        if not len(rows):
            return 0, 0
        y = rows[:, None] + self._margin + self._offsets[None, :, 0]
        x = columns[:, None] + self._margin + self._offsets[None, :, 1]
        pairs = []
        for number in self._number:
            partners = number[y, x]
            which, offset = np.nonzero(partners >= 0)
            pairs.append((which, partners[which, offset]))
        found = [
            _matched(len(rows), which, partner - first, last - first)
            for (which, partner), first, last in zip(pairs, self._ends[:-1], self._ends[1:], strict=True)
        ]
        if len(pairs) == 1:
            return found[0], found[0]
        # The most pixels that one matching per annotator can cover together are those of one matching with all of
        # their pixels: it splits into one each, and each can be completed without giving up a pixel that it covers.
        which, partner = (np.concatenate(part) for part in zip(*pairs, strict=True))
        return _matched(len(rows), which, partner, self._ends[-1]), sum(found)


def _matched(count: int, which: np.ndarray, partner: np.ndarray, size: int) -> int:
    """The greatest matching of `count` with `size` things, of pairs (which, partner)."""
    # As a flow of ones from a source through the pixels to a sink: Dinic's algorithm is then Hopcroft and Karp's,
    # and SciPy's is up to hundreds of times faster here than its `maximum_bipartite_matching`.
    sink = count + size + 1
    start = np.concatenate([np.zeros(count, int), 1 + which, 1 + count + np.arange(size)])
    end = np.concatenate([1 + np.arange(count), 1 + count + partner, np.full(size, sink)])
    capacity = np.ones(len(start), np.int32)
    graph = csr_array((capacity, (start.astype(np.int32), end.astype(np.int32))), shape=(sink + 1, sink + 1))
    return int(maximum_flow(graph, 0, sink, method="dinic").flow_value)


def summarise(
    counts: Int[np.ndarray, "images thresholds 4"],
    thresholds: Sequence[float] = HED_THRESHOLDS,
    program: str = "ours",
) -> dict[str, Any]:
    """ODS, OIS, AP and R50 from counts. An image without counts changes nothing.

    Args:
      counts: as of `counts_of`, (images, thresholds, 4).
      thresholds: those that were counted at.
      program: whose conventions are followed, see `evaluate`.

    Returns:
      {"ods", "ods_threshold", "ods_precision", "ods_recall", "ois", "ap", "r50", "images", "precision", "recall"}:
      numbers in [0, 1], and lists over the thresholds.

    Raises:
      ValueError: no image, or no such program.

    >>> import numpy as np
    >>> from sgw_jax import boundary
    >>> boundary.summarise(np.array([[[3, 4, 3, 4]]]), thresholds=(0.5,))["ods"]
    0.75
    """
    if program not in PROGRAMS:
        raise InputError(f"boundary: program is {program!r}; give one of {PROGRAMS}.")
    if not len(counts):
        raise InputError("boundary: there are no images, so there is nothing to summarise.")
    pooled = counts.sum(axis=0)
    precision, recall, f = _scores(pooled, program)
    of_image = _scores(counts, program)[2]
    if program == "seism":
        of_image = np.round(of_image, 6)  # its files of images' scores have six decimals; of equal ones the first
    of_image = np.argmax(of_image, axis=1)
    _, _, ois = _scores(counts[np.arange(len(counts)), of_image].sum(axis=0), program)
    predicting = pooled[:, 1] > 0 if program == "ours" else np.ones(len(pooled), bool)
    return {
        **_best(precision, recall, f, np.asarray(thresholds, np.float64), program),
        "ois": float(ois),
        "ap": _average_precision(*_points(precision, recall, program), program),
        "r50": _recall_at_half(*_points(precision[predicting], recall[predicting], program)),
        "images": len(counts),
        "precision": precision.tolist(),
        "recall": recall.tolist(),
    }


def _scores(counts: np.ndarray, program: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    right, predicted, found, target = np.moveaxis(counts.astype(np.float64), -1, 0)
    precision, recall = right / np.maximum(predicted, 1), found / np.maximum(target, 1)
    if program == "seism":
        recall = np.where((target == 0) & (predicted > 0), 1, recall)
        precision = np.where(predicted == 0, 1, precision)
    # The same number as 2 P R / (P + R), without a division by zero where nothing matches.
    return precision, recall, 2 * right * found / np.maximum(right * target + found * predicted, 1)


def _best(
    precision: np.ndarray, recall: np.ndarray, f: np.ndarray, thresholds: np.ndarray, program: str
) -> dict[str, float]:
    if program == "edges" and len(thresholds) > 1:  # a hundred places from each threshold to the next
        share = np.linspace(0, 1, 100)
        precision, recall, thresholds = (
            (values[1:, None] * share + values[:-1, None] * (1 - share)).ravel()
            for values in (precision, recall, thresholds)
        )
        f = 2 * precision * recall / np.maximum(precision + recall, np.finfo(np.float64).eps)
    best = int(np.argmax(f))
    names = ("ods", "ods_threshold", "ods_precision", "ods_recall")
    return {name: float(values[best]) for name, values in zip(names, (f, thresholds, precision, recall), strict=True)}


def _points(precision: np.ndarray, recall: np.ndarray, program: str) -> tuple[np.ndarray, np.ndarray]:
    """The curve by rising recall: (recalls, the precision that counts at each)."""
    recalls, first = np.unique(recall, return_index=True)
    if program != "ours":
        return recalls, precision[first]
    return recalls, np.array([precision[recall == one].max() for one in recalls])


def _average_precision(recall: np.ndarray, precision: np.ndarray, program: str) -> float:
    if program != "ours" and len(recall) < 2:
        return 0.0
    return float(np.sum(np.interp(np.arange(101) / 100, recall, precision, left=0, right=0)) / 100)


def _recall_at_half(recall: np.ndarray, precision: np.ndarray) -> float:
    """Linear between neighbours in precision, of equal ones the greatest recall; at the least if all are above 1/2.

    0 where no precision reaches 1/2 (the toolbox: not a number).
    """
    if not len(precision) or precision.max() < 0.5:
        return 0.0
    points, last = np.unique(precision[::-1], return_index=True)
    return float(np.interp(0.5, points, recall[::-1][last]))
