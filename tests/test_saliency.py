"""Saliency measures of an image: each against its formula pixel by pixel in float64; of a split: means over images."""

import math

import flax.linen as nn
import jax
import numpy as np
import pytest

from sgw_jax.evaluation.saliency import image_scores
from sgw_jax.evaluation.saliency_scores import SCORES, saliency_scores
from sgw_jax.report.results import describe
from sgw_jax.sharding import make_mesh
from sgw_jax.tasks import Saliency

TINY = 64 * np.finfo(np.float64).eps * 1e3  # sums of a thousand positive terms of a few dozen rounded operations each


def example(seed=0, shape=(18, 25), ignored=True):
    """A prediction with ties at 8-bit levels, an object and, perhaps, ignored pixels."""
    rng = np.random.default_rng(seed)
    target = np.zeros(shape, bool)
    target[4:12, 6 : 15 + seed] = True
    target ^= rng.random(shape) < 0.05
    prediction = np.clip(0.6 * target + 0.4 * rng.random(shape), 0, 1)
    levels = rng.random(shape) < 0.5
    prediction[levels] = np.round(255 * prediction[levels]) / 255
    return prediction, target, (rng.random(shape) < 0.1) & ignored


def f_of(predicted, g):
    hits = np.sum(predicted & g)
    if not hits:
        return 0.0
    precision, recall = hits / predicted.sum(), hits / g.sum()
    return 1.3 * precision * recall / (0.3 * precision + recall)


def e_of(predicted, g):
    if not g.any():
        return np.mean(~predicted)
    if g.all():
        return np.mean(predicted)
    total = 0.0
    for f, t in zip(predicted, g, strict=True):
        a, b = f - predicted.mean(), t - g.mean()
        total += (1 + 2 * a * b / (a * a + b * b)) ** 2 / 4
    return total / len(g)


CASES = [(0, True), (1, False), (2, True)]


@pytest.mark.parametrize(("seed", "ignored"), CASES)
def test_curves_and_adaptive_scores_are_those_of_every_threshold(seed, ignored):
    prediction, target, ignore = example(seed, ignored=ignored)
    found = image_scores(prediction, target, ignore)
    p, g = prediction[~ignore], target[~ignore]
    assert found.mae == pytest.approx(np.mean([abs(a - b) for a, b in zip(p, g, strict=True)]), rel=TINY)
    np.testing.assert_allclose(found.f_curve, [f_of(p >= level / 255, g) for level in range(256)], rtol=TINY)
    np.testing.assert_allclose(found.e_curve, [e_of(p >= level / 255, g) for level in range(256)], rtol=TINY)
    threshold = min(1, 2 * p.mean())
    assert found.adaptive_f == pytest.approx(f_of(p >= threshold, g), rel=TINY)
    assert found.adaptive_e == pytest.approx(e_of(p >= threshold, g), rel=TINY)


def reference_s(prediction, target, ignore):
    """Four blocks cut by hand around the centre in one-based coordinates, rounded half up."""
    kept = [(y, x) for y, x in np.ndindex(target.shape) if not ignore[y, x]]
    salient = [c for c in kept if target[c]]
    inside = [prediction[c] for c in salient]
    outside = [1 - prediction[c] for c in kept if not target[c]]

    def likeness(values):
        mean = sum(values) / len(values)
        deviation = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
        return 2 * mean / (mean * mean + 1 + deviation)

    mu = len(inside) / len(kept)
    objects = mu * likeness(inside) + (1 - mu) * likeness(outside)
    centre = [math.floor(sum(c[axis] + 1 for c in salient) / len(salient) + 0.5) for axis in (0, 1)]
    regions = 0.0
    for lower in (False, True):
        for right in (False, True):
            block = [c for c in kept if (c[0] + 1 > centre[0]) == lower and (c[1] + 1 > centre[1]) == right]
            if block:
                x, y = np.array([prediction[c] for c in block]), np.array([float(target[c]) for c in block])
                cov = np.cov(x, y) if len(block) > 1 else np.zeros((2, 2))
                a = 4 * x.mean() * y.mean() * cov[0, 1]
                b = (x.mean() ** 2 + y.mean() ** 2) * (cov[0, 0] + cov[1, 1])
                regions += len(block) / len(kept) * (a / b if a else float(b == 0))
    return max(0, (objects + regions) / 2)


@pytest.mark.parametrize(("seed", "ignored"), CASES)
def test_the_s_measure_is_that_of_the_formula(seed, ignored):
    prediction, target, ignore = example(seed, ignored=ignored)
    found = image_scores(prediction, target, ignore).s_measure
    assert found == pytest.approx(reference_s(prediction, target, ignore), rel=1e3 * TINY)  # covariances cancel
    assert 0.5 < found < 1


@pytest.mark.parametrize("ignored", [False, True])
def test_the_weighted_f_is_that_of_the_formula(ignored):
    """A band from edge to edge: its nearest pixel is in the same row, and no two are equally near."""
    rng = np.random.default_rng(0)
    shape, left, right = (12, 30), 10, 17
    target = np.zeros(shape, bool)
    target[:, left:right] = True
    prediction = rng.random(shape)
    ignore = np.zeros(shape, bool)
    ignore[:, 22:] = ignored
    error = np.where(ignore, 0, np.abs(prediction - target))
    spread = np.array([[error[y, min(max(x, left), right - 1)] for x in range(30)] for y in range(12)])
    kernel = {(i, j): math.exp(-(i * i + j * j) / 50) for i in range(-3, 4) for j in range(-3, 4)}
    whole = sum(kernel.values())
    missed = wrong = 0.0
    for y, x in np.ndindex(shape):
        if target[y, x]:
            near = [
                w / whole * spread[y + i, x + j] for (i, j), w in kernel.items() if 0 <= y + i < 12 and 0 <= x + j < 30
            ]
            missed += min(error[y, x], sum(near))
        else:
            distance = left - x if x < left else x - right + 1
            wrong += error[y, x] * (2 - 0.5 ** (distance / 5))
    number = target.sum()
    recall, precision = 1 - missed / number, (number - missed) / (number - missed + wrong)
    expected = 2 * recall * precision / (recall + precision)
    assert image_scores(prediction, target, ignore).weighted_f == pytest.approx(expected, rel=TINY)


def test_the_best_and_the_worst_prediction():
    """An object away from the frame's edge, where the Gaussian would see beyond it."""
    target, ignore = np.zeros((18, 25), bool), example()[2]
    target[4:12, 6:15] = True
    best = image_scores(target.astype(float), target, ignore)
    assert (best.mae, best.s_measure, best.adaptive_f) == (0, pytest.approx(1), pytest.approx(1))
    assert (best.weighted_f, best.adaptive_e) == (pytest.approx(1, rel=TINY), pytest.approx(1, rel=TINY))
    np.testing.assert_allclose(best.f_curve[1:], 1)
    worst = image_scores((~target).astype(float), target, ignore)
    assert (worst.mae, worst.adaptive_f, worst.weighted_f) == (1, 0, pytest.approx(0, abs=TINY))
    assert worst.adaptive_e == pytest.approx(0, abs=TINY)
    assert worst.s_measure == 0


@pytest.mark.parametrize("level", [0.0, 0.25, 1.0])
def test_targets_that_are_empty_or_full(level):
    """And predictions that are constant."""
    prediction = np.full((4, 5), level)
    empty = image_scores(prediction, np.zeros((4, 5), bool))
    assert (empty.mae, empty.s_measure) == (level, 1 - level)
    assert math.isnan(empty.adaptive_f)
    assert math.isnan(empty.weighted_f)
    assert np.isnan(empty.f_curve).all()
    np.testing.assert_array_equal(empty.e_curve, np.arange(256) / 255 > level)
    full = image_scores(prediction, np.ones((4, 5), bool))
    assert (full.mae, full.s_measure) == (1 - level, level)
    np.testing.assert_array_equal(full.f_curve, np.arange(256) / 255 <= level)
    mixed = image_scores(prediction, np.eye(4, 5, dtype=bool))
    assert all(np.isfinite(value).all() for value in mixed)


def test_a_single_salient_pixel_has_no_deviation():
    target = np.zeros((3, 4), bool)
    target[2, 3] = True  # the last: three of the four parts are empty
    scores = image_scores(np.where(target, 0.5, 0.0), target)
    assert scores.s_measure == pytest.approx(
        (1 / 12 * 1 / 1.25 + 11 / 12 + reference_region(np.where(target, 0.5, 0.0), target)) / 2, rel=TINY
    )


def reference_region(prediction, target):
    x, y = prediction.ravel(), target.ravel().astype(float)
    cov = np.cov(x, y)
    return 4 * x.mean() * y.mean() * cov[0, 1] / ((x.mean() ** 2 + y.mean() ** 2) * (cov[0, 0] + cov[1, 1]))


# ---------------------------------------------------------------- a split

SIZE, BATCH, LENGTH = (24, 32), 4, 6


class FirstChannel(nn.Module):
    """The image's first channel as the logit: predictions are then known."""

    @nn.compact
    def __call__(self, image):
        return {"saliency": image[..., :1]}


@pytest.fixture(scope="module")
def split():
    """(batches as the loader yields them, [(probability, target, ignored)] in the frames of the labels)."""
    images, targets, originals = [], [], []
    rng = np.random.default_rng(0)
    for i in range(LENGTH):
        frame = (24 - 2 * i, 20 + i)
        logit = rng.normal(size=frame).astype(np.float32) * 3
        target = (rng.random(frame) < 0.3).astype(np.float32) * (i != 2)  # one without a salient pixel
        target[rng.random(frame) < 0.05] = -1
        target[0, 0] = target[-1, -1] = i != 2  # labelled corners: the frame of the labels is the image
        image, padded = np.zeros((*SIZE, 3), np.float32), np.full((*SIZE, 1), -1, np.float32)
        top = left = i
        image[top : top + frame[0], left : left + frame[1], 0] = logit
        padded[top : top + frame[0], left : left + frame[1], 0] = target
        images.append(image)
        targets.append(padded)
        originals.append((np.asarray(jax.nn.sigmoid(logit)).astype(np.float64), target > 0.5, target < 0))
    for _ in range(-LENGTH % BATCH):
        images.append(np.ones((*SIZE, 3), np.float32))
        targets.append(np.ones((*SIZE, 1), np.float32))
    item = np.where(np.arange(len(images)) < LENGTH, np.arange(len(images)), -1).astype(np.int32)
    arrays = {"image": np.stack(images), "saliency": np.stack(targets), "item": item}
    batches = [{n: a[i : i + BATCH] for n, a in arrays.items()} for i in range(0, len(images), BATCH)]
    return batches, originals


@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("published", [False, True])
def test_scores_of_a_split_are_means_over_its_images(split, devices, published):
    batches, originals = split
    mesh = make_mesh({"data": -1}, jax.devices()[:devices])
    task = Saliency(protocol="published" if published else "exact")
    found = saliency_scores(FirstChannel(), {}, batches, mesh, task=task)
    each = [
        image_scores(np.floor(np.float32(255) * p.astype(np.float32)) / np.float64(255) if published else p, g, i)
        for p, g, i in originals
    ]
    f = np.nanmean([s.f_curve for s in each], axis=0)
    e = np.mean([s.e_curve for s in each], axis=0)
    expected = {
        "image_mae": np.mean([s.mae for s in each]),
        "s_measure": 100 * np.mean([s.s_measure for s in each]),
        "weighted_f": 100 * np.nanmean([s.weighted_f for s in each]),
        "adaptive_f": 100 * np.nanmean([s.adaptive_f for s in each]),
        "image_max_f": 100 * f.max(),
        "image_mean_f": 100 * f.mean(),
        "adaptive_e": 100 * np.mean([s.adaptive_e for s in each]),
        "max_e": 100 * e.max(),
        "mean_e": 100 * e.mean(),
    }
    assert list(found) == list(SCORES) == list(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=TINY), name


def test_a_split_without_labels_has_no_scores(split):
    batches, _ = split
    bare = [{**batch, "saliency": np.full_like(batch["saliency"], -1)} for batch in batches]
    found = saliency_scores(FirstChannel(), {}, bare, make_mesh({"data": -1}, jax.devices()[:1]), task=Saliency())
    assert all(math.isnan(value) for value in found.values())


def test_what_is_measured_on_the_host_is_described():
    """Units and directions cover every metric that a record can hold."""
    task = Saliency(image_scores=True)
    metrics = dict.fromkeys([*task.units, *SCORES], 0.5)
    described = describe(task, metrics)
    assert list(described.units) == list(described.directions) == list(metrics)
    assert {name for name, up in described.directions.items() if not up} == {"mae", "ece", "image_mae"}
    assert list(describe(task, dict.fromkeys(task.units, 0.5)).units) == list(task.units)
