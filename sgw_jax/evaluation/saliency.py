"""Saliency measures of single images, in NumPy: F by thresholds, weighted F, S-measure, E-measure, absolute error.

Each takes an image's prediction in [0, 1], its binary target and, perhaps, pixels to ignore; a data set's value is the
mean over its images. Predictions are taken as they are: many tools stretch each to [0, 1] first, which hides a network
that is never sure. Ignored pixels enter no mean, count and moment.

  F        (1 + b) P R / (b P + R), b = 0.3, of p >= t; 0 without a hit (Achanta et al. 2009). Undefined without a
           salient pixel: such an image counts in no mean of F, nor of the weighted F.
  adaptive of p >= min(1, twice the mean of p).
  curves   of p >= t at t = 0, 1/255 .. 1; means of curves over the images come first, their maximum and mean after.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float
from scipy.ndimage import correlate, distance_transform_edt

BETA_SQUARED = 0.3
LEVELS = 255
ALPHA = 0.5  # of the S-measure: the share of its object part
WINDOW, SIGMA = 7, 5.0  # of the weighted F's Gaussian
HALVED_AT = 5.0  # pixels from the object at which the weighted F charges a false positive half more

Map = Float[np.ndarray, "height width"]
Mask = Bool[np.ndarray, "height width"]


class ImageScores(NamedTuple):
    """The measures of one image, in [0, 1]; F's are NaN without a salient pixel."""

    mae: float
    adaptive_f: float
    weighted_f: float
    s_measure: float
    adaptive_e: float
    f_curve: Float[np.ndarray, "256"]
    e_curve: Float[np.ndarray, "256"]


def image_scores(prediction: Map, target: Mask, ignored: Mask | None = None) -> ImageScores:
    """All measures of an image with at least one pixel that is not ignored."""
    prediction = np.asarray(prediction, np.float64)
    counted = np.ones(target.shape, bool) if ignored is None else ~ignored
    p, g = prediction[counted], target[counted]
    thresholds = np.arange(LEVELS + 1) / LEVELS
    f_curve, e_curve = _f_and_e(p, g, thresholds)
    adaptive_f, adaptive_e = _f_and_e(p, g, np.array([min(1.0, 2 * p.mean())]))
    return ImageScores(
        mae=float(np.abs(p - g).mean()),
        adaptive_f=float(adaptive_f[0]),
        weighted_f=weighted_f(prediction, target, counted),
        s_measure=s_measure(prediction, target, counted),
        adaptive_e=float(adaptive_e[0]),
        f_curve=f_curve,
        e_curve=e_curve,
    )


def _f_and_e(p: np.ndarray, g: np.ndarray, thresholds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """F and the E-measure of p >= t for ascending thresholds."""
    above = np.searchsorted(thresholds, p, side="right")  # how many thresholds each pixel reaches

    def reached(numbers: np.ndarray) -> np.ndarray:
        counts = np.bincount(numbers, minlength=len(thresholds) + 1)
        return np.cumsum(counts[::-1])[::-1][1:].astype(np.float64)

    hits, predicted = reached(above[g]), reached(above)
    positive, number = float(g.sum()), float(g.size)
    f = (1 + BETA_SQUARED) * hits / (BETA_SQUARED * positive + predicted) if positive else np.full(len(hits), np.nan)
    return f, _e_measure(hits, predicted, positive, number)


def _e_measure(hits: np.ndarray, predicted: np.ndarray, positive: float, number: float) -> np.ndarray:
    """The mean over the pixels of (1 + x)^2 / 4, x = 2 a b / (a^2 + b^2), a and b the maps less their means (Fan et al.
    2018, eq. 3 to 5); of a target that is empty or full, the share of the pixels where the prediction is the same.

    The authors' program divides by one pixel less than there are.
    """
    if positive in (0, number):
        return (predicted if positive else number - predicted) / number
    total = np.zeros(len(hits))
    both = {(1, 1): hits, (1, 0): predicted - hits, (0, 1): positive - hits}
    both[0, 0] = number - predicted - positive + hits
    for (found, true), pixels in both.items():
        a, b = found - predicted / number, true - positive / number
        total += pixels * (1 + 2 * a * b / (a**2 + b**2)) ** 2 / 4
    return total / number


def weighted_f(prediction: Map, target: Mask, counted: Mask) -> float:
    """F, b = 1, of errors weighted by where they lie (Margolin et al. 2014); NaN without a salient pixel.

    With E = |p - g|: a background pixel's error is first replaced by that of the nearest salient one and a Gaussian of
    7 x 7 taken; where this is less than a salient pixel's own error, it is taken instead: a hole that neighbours fill
    is forgiven. Background errors count 2 - exp(ln(1/2) d / 5) fold at the distance d from the object.
    """
    truth = target & counted
    if not truth.any():
        return float("nan")
    error = np.where(counted, np.abs(prediction - target), 0)
    distance, (rows, columns) = distance_transform_edt(~truth, return_indices=True)
    offsets = np.arange(WINDOW) - WINDOW // 2
    gaussian = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * SIGMA**2))
    smooth = correlate(error[rows, columns], gaussian / gaussian.sum(), mode="constant")
    weighted = np.where(truth, np.minimum(error, smooth), error * (2 - np.exp(np.log(0.5) / HALVED_AT * distance)))
    missed, found_wrongly = weighted[truth].sum(), weighted[~truth].sum()
    hits = truth.sum() - missed
    recall, precision = hits / truth.sum(), hits / max(hits + found_wrongly, np.finfo(float).tiny)
    return float(2 * recall * precision / max(recall + precision, np.finfo(float).tiny))


def s_measure(prediction: Map, target: Mask, counted: Mask) -> float:
    """Structural similarity, half of the object and half of the regions, at least 0 (Fan et al. 2017); of a target that
    is empty or full, how empty or full the prediction is."""
    p, g = prediction[counted], target[counted]
    share = g.mean()
    if share in (0, 1):
        return float(p.mean() if share else 1 - p.mean())
    objects = share * _likeness(p[g]) + (1 - share) * _likeness(1 - p[~g])
    return float(max(0.0, ALPHA * objects + (1 - ALPHA) * _regions(prediction, target, counted)))


def _likeness(values: np.ndarray) -> float:
    """2 m / (m^2 + 1 + s) of the mean and the deviation of what should be 1 (eq. 4, with lambda = 1/2)."""
    mean = values.mean()
    return float(2 * mean / (mean**2 + 1 + _deviation(values)))


def _deviation(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0


def _regions(prediction: Map, target: Mask, counted: Mask) -> float:
    """The similarity of the four parts into which the object's centre divides the frame, weighted by their pixels."""
    rows, columns = np.nonzero(target & counted)
    below, right = (int(np.floor(places.mean() + 1.5)) for places in (rows, columns))  # the centre's line belongs above
    total = 0.0
    for vertical in (slice(None, below), slice(below, None)):
        for horizontal in (slice(None, right), slice(right, None)):
            inside = counted[vertical, horizontal]
            if inside.any():
                parts = (values[vertical, horizontal][inside].astype(np.float64) for values in (prediction, target))
                total += inside.sum() * _similarity(*parts)
    return float(total / counted.sum())


def _similarity(x: np.ndarray, y: np.ndarray) -> float:
    """4 mx my sxy / ((mx^2 + my^2) (sx^2 + sy^2)); of 0/0 1: two constant maps, one at least of zeros."""
    freedom = max(len(x) - 1, 1)
    dx, dy = x - x.mean(), y - y.mean()
    numerator = 4 * x.mean() * y.mean() * (dx @ dy) / freedom
    denominator = (x.mean() ** 2 + y.mean() ** 2) * (dx @ dx + dy @ dy) / freedom
    if numerator:
        return float(numerator / denominator)
    return 0.0 if denominator else 1.0
