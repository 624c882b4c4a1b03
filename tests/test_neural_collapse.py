"""Neural collapse, the dot-regression loss and the overlap of selections against loops over NumPy float64."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgw_jax.etf.neural_collapse import (
    class_means,
    collapse_sums,
    collapse_values,
    disagreement_sums,
    dot_regression_loss,
)
from sgw_jax.etf.simplex import simplex_etf
from sgw_jax.evaluation.metrics import add_all
from sgw_jax.evaluation.selection import jaccard, selection_between_images, selection_overlap
from sgw_jax.sharding import batch_sharding, make_mesh

EPS32 = float(np.finfo(np.float32).eps)
NC2 = ("nc2_equinorm", "nc2_equiangularity", "nc2_max_angle")
sums_of = jax.jit(collapse_sums, static_argnums=2)
differ_of, loss_of = jax.jit(disagreement_sums), jax.jit(dot_regression_loss)
overlap_of, between_of = jax.jit(selection_overlap), jax.jit(selection_between_images)


def blobs(classes=4, dim=6, samples=120, offset=0.0, within=0.5, seed=0, collapsed=False):
    """float32 features (2, samples / 2, d) around class means, unequal class counts, some labels 255."""
    rng = np.random.default_rng(seed)
    means = 3 * simplex_etf(classes, dim).T if collapsed else rng.normal(size=(classes, dim))
    labels = rng.choice(classes, size=samples, p=np.arange(1, classes + 1) / sum(range(1, classes + 1)))
    labels[:classes] = np.arange(classes)
    features = (offset + means[labels] + within * rng.normal(size=(samples, dim))).astype(np.float32)
    labels[-7:] = 255
    return features.reshape(2, -1, dim), labels.reshape(2, -1)


def two_passes(features, labels, classes, batches=1):
    def all_batches(centres):
        parts = zip(np.array_split(features, batches), np.array_split(labels, batches), strict=True)
        return add_all(sums_of(f, y, classes, centres) for f, y in parts)

    return all_batches(class_means(all_batches(None)))


def reference(features, labels, classifier=None):
    """NC1..NC3 by the definitions, sample by sample, and the class means and Sigma_W, Sigma_B^+."""
    features = np.asarray(features, np.float64).reshape(-1, features.shape[-1])
    labels = np.asarray(labels).reshape(-1)
    present = [c for c in range(255) if np.any(labels == c)]
    mean = {c: np.mean(features[labels == c], axis=0) for c in present}
    centre = sum(mean.values()) / len(present)
    within = np.zeros((features.shape[-1],) * 2)
    for feature, label in zip(features, labels, strict=True):
        if label != 255:
            within += np.outer(feature - mean[label], feature - mean[label]) / np.sum(labels != 255)
    between = sum(np.outer(m - centre, m - centre) for m in mean.values()) / len(present)
    inverse = np.linalg.pinv(between, rcond=1e-9, hermitian=True)
    norms = [np.linalg.norm(mean[c] - centre) for c in present]
    pairs = itertools.combinations(present, 2)
    cosines = [
        (mean[a] - centre) @ (mean[b] - centre) / (np.linalg.norm(mean[a] - centre) * np.linalg.norm(mean[b] - centre))
        for a, b in pairs
    ]
    values = {
        "nc1": np.trace(within @ inverse) / len(present),
        "nc2_equinorm": np.std(norms) / np.mean(norms),
        "nc2_equiangularity": np.std(cosines),
        "nc2_max_angle": np.mean([abs(cosine + 1 / (len(present) - 1)) for cosine in cosines]),
    }
    if classifier is not None:
        rows = np.stack([classifier[c] for c in present])
        centred = np.stack([mean[c] - centre for c in present])
        values["nc3"] = np.linalg.norm(rows / np.linalg.norm(rows) - centred / np.linalg.norm(centred))
    return values, mean, within, inverse


def bounds(features, labels, within, inverse, classes):
    """Errors to first order when every sum over the n samples is off by n eps32 of the sum of its absolute terms.

    Sigma_W is off by g tr(Sigma_W), g = (n + 4) eps32, in norm, and a centred mean relative to the smallest singular
    value of M / sqrt(K) by r = g sqrt(K n / n_min tr(Sigma_W) tr(Sigma_B^+)) (Cauchy-Schwarz; the K classes may have
    one error each). A pseudo-inverse moves by at most three times what its matrix does, which is 2 r; norms and cosines
    move by 2 r per vector. The roundings of the data themselves are in the reference too.
    """
    labels = labels[labels != 255]
    g = (labels.size + 4) * EPS32
    spread = np.trace(within) * np.trace(inverse)
    fewest = min(np.sum(labels == c) for c in np.unique(labels))
    r = g * np.sqrt(classes * labels.size / fewest * spread)
    return {"nc1": spread / classes * (g + 6 * r), **dict.fromkeys((*NC2, "nc3"), 4 * r)}


def assert_close(found, expected, bound):
    for name, value in expected.items():
        assert abs(found[name] - value) <= bound[name], (name, found[name], value, bound[name])


@pytest.mark.parametrize(("classes", "dim"), [(2, 1), (4, 6), (7, 6), (5, 3)])  # K > d + 1 too: rank d
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_values_against_the_definitions(classes, dim, offset):
    features, labels = blobs(classes, dim, offset=offset)
    classifier = np.random.default_rng(1).normal(size=(classes, dim))
    expected, mean, within, inverse = reference(features, labels, classifier)
    sums = two_passes(features, labels, classes)
    assert_close(collapse_values(sums, classifier), expected, bounds(features, labels, within, inverse, classes))
    g = (labels.size + 4) * EPS32
    for label, value in mean.items():
        np.testing.assert_allclose(class_means(sums)[label], value, rtol=0, atol=g * np.ptp(features))


def test_a_far_and_nearly_collapsed_set_needs_the_class_means_as_centres():
    """Features at 1e3 whose classes scatter by 1e-2 around means at distance 3. About the class means NC1 is right to
    its bound. About one common point the relative error may reach eps32 times total / within variance (1e5), about the
    origin eps32 * 1e10: there nothing is left of it."""
    features, labels = blobs(offset=1e3, within=1e-2, collapsed=True)
    expected, _, within, inverse = reference(features, labels)
    bound = bounds(features, labels, within, inverse, 4)
    assert expected["nc1"] < 1e-4
    assert_close(collapse_values(two_passes(features, labels, 4)), expected, bound)

    middle = np.mean(features, axis=(0, 1))
    common = collapse_values(sums_of(features, labels, 4, middle))["nc1"]
    deviation = np.sum(np.var(features.reshape(-1, 6), axis=0, dtype=np.float64)) * np.trace(inverse) / 4
    assert abs(common - expected["nc1"]) <= 2 * bound["nc1"] + 2 * (labels.size + 4) * EPS32 * deviation
    assert abs(collapse_values(sums_of(features, labels, 4, None))["nc1"] - expected["nc1"]) > expected["nc1"]


@pytest.mark.parametrize(("classes", "dim"), [(2, 1), (5, 8), (9, 8)])
@pytest.mark.parametrize("offset", [0.0, 10.0])
def test_perfect_collapse_is_zero(classes, dim, offset):
    """Every feature at its vertex (unequal counts), a classifier of the vertices. What is left is that a coordinate of
    the data, at most 3 + offset, was rounded to eps32 / 2 of itself: relative to the norm 3 of a centred mean,
    sqrt(d) (1 + offset / 3) eps32 with the mean taken off; twice that for a cosine, sqrt(K) times for nc3."""
    features, labels = blobs(classes, dim, offset=offset, within=0.0, collapsed=True)
    sums = two_passes(features, labels, classes, batches=2)
    vertices = simplex_etf(classes, dim)
    differ = differ_of(features, labels, np.where(labels == 255, 0, labels), class_means(sums))
    found = collapse_values(sums, 7 * vertices.T, differ)
    off = np.sqrt(dim) * (1 + offset / 3) * EPS32
    assert found["nc4"] == 0
    assert found["nc1"] <= (classes * off) ** 2
    assert all(found[name] <= 2 * off for name in NC2)
    assert found["nc3"] <= np.sqrt(classes) * off
    assert collapse_values(sums, -vertices.T)["nc3"] == pytest.approx(2)


@pytest.mark.eight_devices
def test_sums_add_over_batches_order_and_devices():
    features, labels = blobs(samples=160)
    features, labels = features.reshape(8, -1, 6), labels.reshape(8, -1)
    expected, mean, within, inverse = reference(features, labels)
    bound = bounds(features, labels, within, inverse, 4)
    centres = np.stack([mean[c] for c in range(4)])
    whole = jax.device_get(sums_of(features, labels, 4, centres))
    parts = add_all(sums_of(features[i : i + 1], labels[i : i + 1], 4, centres) for i in reversed(range(8)))
    on_devices = jax.device_put((features, labels), batch_sharding(make_mesh({"data": 8})))
    spread = jax.device_get(sums_of(*on_devices, 4, centres))
    for sums in (whole, parts, spread):
        assert np.array_equal(sums["counts"], [np.sum(labels == c) for c in range(4)])
        assert_close(collapse_values(sums), expected, bound)
    differ = differ_of(features, labels, labels % 2, centres)
    by_part = add_all(differ_of(f, y, y % 2, centres) for f, y in zip(features, labels, strict=True))
    assert by_part == jax.device_get(differ)


def test_absent_classes_are_left_out():
    """Class 2 of 5 does not occur: the values are those of the other four, and it is nobody's nearest mean."""
    features, labels = blobs()
    gap = np.where((labels >= 2) & (labels < 255), labels + 1, labels)
    classifier = np.random.default_rng(1).normal(size=(5, 6))
    sums, dense = two_passes(features, gap, 5), two_passes(features, labels, 4)
    assert np.all(np.isnan(class_means(sums)[2]))
    assert collapse_values(sums, classifier) == pytest.approx(collapse_values(dense, np.delete(classifier, 2, axis=0)))
    differ = differ_of(features, gap, np.full_like(gap, 2), class_means(sums))
    assert differ["differ"] == differ["count"] == np.sum(labels != 255)


def test_ignored_samples_do_not_count():
    features, labels = blobs()
    poisoned = np.where((labels == 255)[..., None], np.nan, features)
    expected = jax.device_get(sums_of(features, labels, 4))
    found = jax.device_get(sums_of(poisoned, labels.astype(np.uint8), 4))
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    means = class_means(expected)
    assert differ_of(poisoned, labels, labels, means)["count"] == np.sum(labels != 255)


def test_nearest_class_mean():
    """Against a loop, on features far from the origin. The middle of the means is rounded to 1e3 eps32 there, which
    moves a difference of squared distances by less than 1e-2; samples nearer to a boundary are left out."""
    features, labels = blobs(offset=1e3, within=2.0)
    _, mean, *_ = reference(features, labels)
    predictions = np.random.default_rng(2).integers(0, 4, size=labels.shape)
    differ = 0
    for i in np.ndindex(labels.shape):
        squared = [np.sum((features[i] - mean[c]) ** 2) for c in range(4)]
        nearest, next_one = np.sort(squared)[:2]
        if next_one - nearest < 1e-2:
            labels[i] = 255
        if labels[i] != 255:
            differ += int(np.argmin(squared)) != predictions[i]
    assert np.sum(labels != 255) > 100
    found = differ_of(features, labels, predictions, np.stack([mean[c] for c in range(4)]))
    assert found["differ"] == differ
    sums = two_passes(features, labels, 4)
    assert collapse_values(sums, disagreement=found)["nc4"] == differ / np.sum(labels != 255)


def test_what_is_undefined_is_none_and_what_is_not_finite_is_nan():
    features, labels = blobs()
    nothing = np.full_like(labels, 255)
    empty = collapse_values(two_passes(features, nothing, 4), np.ones((4, 6)), {"differ": 0, "count": 0})
    assert set(empty) == {"nc1", *NC2, "nc3", "nc4"}
    assert set(empty.values()) == {None}
    single = collapse_values(two_passes(features, np.where(labels == 255, 255, 1), 4), np.ones((4, 6)))
    assert set(single.values()) == {None}
    for bad in (np.nan, np.inf):
        diverged = features.copy()
        diverged[0, 0, 0] = bad
        values = collapse_values(jax.device_get(sums_of(diverged, labels, 4)), np.ones((4, 6)))
        assert values.pop("nc4") is None
        assert all(np.isnan(value) for value in values.values())


def test_float64_is_kept():
    features, labels = blobs(offset=1.0)
    with jax.enable_x64(True):
        sums = jax.device_get(collapse_sums(features.astype(np.float64), labels, 4))
        assert sums["scatter"].dtype == np.float64
        expected = reference(features, labels)[0]
        assert all(collapse_values(sums)[name] == pytest.approx(expected[name], rel=1e-9) for name in expected)


@pytest.mark.parametrize(
    ("features", "labels", "options", "message"),
    [
        ((2, 4, 6), (2, 8), {}, r"features have shape \(2, 4, 6\) and labels \(2, 8\)"),
        ((4, 6), (4,), {"num_classes": 256}, r"num_classes is 256.*\[2, 255\]"),
        ((4, 6), (4,), {"num_classes": 1}, "num_classes is 1"),
        ((4, 6), (4,), {"centres": np.zeros((6, 3))}, r"centres have shape \(6, 3\); give \(3, 6\)"),
    ],
)
def test_what_does_not_fit_is_refused(features, labels, options, message):
    with pytest.raises(ValueError, match=message):
        collapse_sums(jnp.zeros(features), jnp.zeros(labels, int), **{"num_classes": 3, **options})


def test_stray_labels_and_wrong_classifiers_are_refused():
    features, labels = blobs()
    with pytest.raises(ValueError, match=r"113 labels are neither 255.*\[0, 3\)"):
        collapse_values(jax.device_get(sums_of(features, labels, 3)))
    with pytest.raises(ValueError, match=r"classifier has shape \(6, 4\); give \(4, 6\)"):
        collapse_values(jax.device_get(sums_of(features, labels, 4)), np.zeros((6, 4)))
    with pytest.raises(ValueError, match=r"means have shape \(4, 5\); give \(classes, 6\)"):
        disagreement_sums(features, labels, labels, np.zeros((4, 5)))
    with pytest.raises(ValueError, match="predictions have shape"):
        disagreement_sums(features, labels, labels[0], np.zeros((4, 6)))


def dot_regression(features, labels, vertices):
    """Yang et al.'s L_DR(h, W) of unit-length features and vertices, E_H = E_W = 1, summed over the labelled ones."""
    total = 0.0
    for feature, label in zip(np.reshape(features, (-1, features.shape[-1])), np.ravel(labels), strict=True):
        if label != 255:
            unit = feature.astype(np.float64) / np.linalg.norm(feature.astype(np.float64))
            total += 0.5 * (vertices[:, label] @ unit - 1) ** 2
    return total


def test_dot_regression_loss():
    """A sample's loss is at most 2 and right to 2 (d + 8) eps32: a cosine is a sum of d products of size at most 1, and
    the loss changes by at most twice as much; n of them are summed."""
    features, labels = blobs()
    vertices = simplex_etf(4, 6)
    total, number = loss_of(features, labels, vertices)
    assert (total.dtype, number.dtype) == (jnp.float32, jnp.int32)
    assert number == np.sum(labels != 255)
    bound = labels.size * (2 * (6 + 8) + 2 * labels.size) * EPS32
    assert abs(total - dot_regression(features, labels, vertices)) <= bound
    at_vertices, _ = loss_of(5 * vertices.T, jnp.arange(4), vertices)
    assert at_vertices <= 4 * (14 * EPS32) ** 2
    assert np.isnan(loss_of(features, np.where(labels == 3, 4, labels), vertices)[0])
    assert loss_of(features, np.full_like(labels, 255), vertices) == (0, 0)


def test_gradient_of_the_loss():
    """Central differences in float64, step h = 1e-5: truncation h^2 and rounding eps64 / h are both below 1e-9 here."""
    rng = np.random.default_rng(0)
    features, labels, vertices = rng.normal(size=(5, 4)) + 0.5, np.array([0, 2, 255, 4, 1]), simplex_etf(5, 4)
    with jax.enable_x64(True):
        gradient = np.asarray(jax.grad(lambda f: loss_of(f, labels, vertices)[0])(jnp.asarray(features)))
    numeric = np.zeros_like(features)
    for i in np.ndindex(features.shape):
        step = np.zeros_like(features)
        step[i] = 1e-5
        up, down = (dot_regression(features + sign * step, labels, vertices) for sign in (1, -1))
        numeric[i] = (up - down) / 2e-5
    np.testing.assert_allclose(gradient, numeric, rtol=0, atol=1e-8)


def test_no_gradient_from_zero_and_ignored_features_nor_to_the_vertices():
    features = jnp.asarray([[0.0, 0, 0, 0], [np.nan, np.inf, 1, 2], [1, 2, 3, 4]])
    labels = jnp.asarray([1, 255, 2])
    (total, count), pull = jax.vjp(lambda f, m: loss_of(f, labels, m), features, simplex_etf(4, 4))
    gradient, to_vertices = pull((jnp.ones(()), np.zeros((), jax.dtypes.float0)))
    assert np.isfinite(total)
    assert count == 2
    assert np.all(gradient[:2] == 0)
    assert np.all(np.isfinite(gradient[2]))
    assert np.any(gradient[2] != 0)
    assert np.all(to_vertices == 0)
    assert loss_of(features[:1], labels[:1], simplex_etf(4, 4))[0] == 0.5


@pytest.mark.parametrize("shape", [(5, 3), (4, 6), (4, 1), (4,)])
def test_vertices_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"vertices have shape .* give simplex_etf\(classes, 4\)"):
        dot_regression_loss(jnp.ones((2, 4)), jnp.zeros(2, int), jnp.ones(shape))


def selections(rng, *shape, tokens, kept):
    return np.stack([rng.permutation(tokens)[:kept] for _ in range(int(np.prod(shape)))]).reshape(*shape, kept)


def overlap(first, second):
    a, b = set(first.tolist()), set(second.tolist())
    return len(a & b) / len(a | b)


def test_selection_overlap():
    rng = np.random.default_rng(0)
    clean, noisy = (selections(rng, 3, 2, 4, tokens=12, kept=5) for _ in range(2))
    found = overlap_of(clean, noisy)
    expected = [np.mean([overlap(clean[b, h, s], noisy[b, h, s]) for h, s in np.ndindex(2, 4)]) for b in range(3)]
    np.testing.assert_allclose(found, expected, rtol=10 * EPS32)  # eight quotients, seven sums
    assert np.array_equal(overlap_of(clean, rng.permuted(clean, axis=-1)), np.ones(3))
    assert np.array_equal(overlap_of(clean, clean + 12), np.zeros(3))
    assert jaccard(jnp.arange(3), jnp.arange(1, 6)) == np.float32(2 / 6)  # sets of different sizes
    with pytest.raises(ValueError, match=r"shapes \(3, 2, 4, 5\) and \(3, 2, 4, 4\)"):
        selection_overlap(clean, clean[..., :4])


def test_selection_between_images():
    rng = np.random.default_rng(0)
    index = selections(rng, 4, 2, 3, tokens=12, kept=5)
    pairs = list(itertools.permutations(range(4), 2))
    expected = {p: np.mean([overlap(index[p[0], h, s], index[p[1], h, s]) for h, s in np.ndindex(2, 3)]) for p in pairs}
    total, count = between_of(index)
    assert count == 12
    np.testing.assert_allclose(total, sum(expected.values()), rtol=20 * EPS32)  # six quotients, 5 + 11 sums
    total, count = between_of(index, jnp.asarray([True, False, True, False]))
    assert count == 2
    np.testing.assert_allclose(total, expected[0, 2] + expected[2, 0], rtol=20 * EPS32)
    assert between_of(index[:1]) == (0, 0)
    assert np.divide(*between_of(np.repeat(index[:1], 3, axis=0))) == 1
