"""Boundary evaluation against brute-force matching, loops over the definitions, and cases with known answers."""

import itertools

import numpy as np
import pytest

from sgw_jax.evaluation import boundary

THRESHOLDS = (0.1, 0.4, 0.7)


def best_matching(prediction, target, reach):
    """The size of a maximum matching by augmenting paths over the full distance table."""
    ours, theirs = np.argwhere(prediction), np.argwhere(target)
    near = [[j for j, t in enumerate(theirs) if np.hypot(*(p - t)) <= reach] for p in ours]
    owner: dict[int, int] = {}

    def augment(i, seen):
        for j in near[i]:
            if j not in seen:
                seen.add(j)
                if j not in owner or augment(owner[j], seen):
                    owner[j] = i
                    return True
        return False

    return sum(augment(i, set()) for i in range(len(ours)))


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("reach", [1.0, 2.3, 4.0])
def test_the_matching_is_the_greatest(seed, reach):
    rng = np.random.default_rng(seed)
    prediction, target = rng.random((2, 9, 12)) < 0.25
    counts = boundary.image_counts(
        prediction.astype(float), target, max_dist=reach / 15, thresholds=(0.5,), thin_lines=False
    )  # the diagonal of 9 x 12 is 15
    most = best_matching(prediction, target, reach)
    assert counts.tolist() == [[most, prediction.sum(), most, target.sum()]]


def test_where_taking_the_nearest_first_is_not_the_greatest():
    """a - A - b - B in a row: A's nearest is b, and then a and B are left alone; the best pairs a with A, b with B."""
    prediction, target = np.zeros((1, 12)), np.zeros((1, 12), bool)
    prediction[0, [0, 4]] = 1
    target[0, [3, 7]] = True
    counts = boundary.image_counts(prediction, target, max_dist=3 / np.hypot(1, 12), thresholds=(0.5,))
    assert counts.tolist() == [[2, 2, 2, 2]]


def test_distance_is_inclusive_and_a_share_of_the_diagonal():
    target = np.zeros((30, 40), bool)  # diagonal 50
    target[5:25, 10] = True
    for shift, reach, matched in ((5, 5.0, 20), (5, 4.99, 0), (6, 5.0, 0)):
        prediction = np.roll(target, shift, axis=1).astype(float)
        counts = boundary.image_counts(prediction, target, max_dist=reach / 50, thresholds=(0.5,))
        assert counts.tolist() == [[matched, 20, matched, 20]]


def test_a_perfect_prediction_scores_one_and_an_empty_one_zero():
    target = np.zeros((3, 20, 20), bool)
    target[:, 10, 2:18] = True
    perfect = boundary.evaluate(target.astype(float), target, max_dist=0.01)
    assert [perfect[name] for name in ("ods", "ois", "images")] == [1, 1, 3]
    # One point, recall 1 and precision 1: the curve has no other, and the toolbox gives it one of 101 places.
    assert perfect["ap"] == pytest.approx(0.01)
    empty = boundary.evaluate(np.zeros(target.shape), target, max_dist=0.01)
    nothing = boundary.evaluate(np.zeros(target.shape), np.zeros_like(target), max_dist=0.01)
    assert (
        [empty[name] for name in ("ods", "ois", "ap")] == [nothing[name] for name in ("ods", "ois", "ap")] == [0, 0, 0]
    )


def outlined_by_loop(mask):
    height, width = mask.shape
    found = np.zeros_like(mask)
    for y, x in np.ndindex(height, width):
        if y < height - 1 and x < width - 1:
            found[y, x] = len({mask[y, x], mask[y, x + 1], mask[y + 1, x], mask[y + 1, x + 1]}) > 1
        elif x < width - 1:
            found[y, x] = mask[y, x] != mask[y, x + 1]
        elif y < height - 1:
            found[y, x] = mask[y, x] != mask[y + 1, x]
    return found


@pytest.mark.parametrize("shape", [(7, 9), (1, 5), (5, 1), (1, 1)])
def test_outline_is_seg2bmap(shape):
    mask = np.random.default_rng(0).random(shape) < 0.5
    np.testing.assert_array_equal(boundary.outline(mask), outlined_by_loop(mask))


def smooth_images(count=4):
    rng = np.random.default_rng(1)
    prediction = rng.random((count, 24, 32)).round(2)
    return prediction, rng.random((count, 24, 32)) < 0.08


def test_scores_are_their_definitions():
    """Counts by image and threshold from `image_counts`, everything after that in loops."""
    predictions, targets = smooth_images()
    counts = np.stack(
        [
            boundary.image_counts(p, t, max_dist=0.04, thresholds=THRESHOLDS)
            for p, t in zip(predictions, targets, strict=True)
        ]
    )
    found = boundary.evaluate(predictions, targets, max_dist=0.04, thresholds=THRESHOLDS)

    def f(matched, predicted, _, target):
        precision, recall = matched / predicted, matched / target
        return 2 * precision * recall / (precision + recall)

    pooled = [f(*counts[:, k].sum(axis=0)) for k in range(3)]
    assert found["ods"] == pytest.approx(max(pooled), rel=1e-12)
    assert found["ods_threshold"] == THRESHOLDS[int(np.argmax(pooled))]
    own = sum(max(image, key=lambda row: f(*row)) for image in counts)
    assert found["ois"] == pytest.approx(f(*own), rel=1e-12)
    order = np.argsort(found["recall"])
    recall, precision = np.array(found["recall"])[order], np.array(found["precision"])[order]
    area = 0.0
    for place in range(101):
        at = place / 100
        if recall[0] <= at <= recall[-1]:
            area += np.interp(at, recall, precision) / 100
    assert found["ap"] == pytest.approx(area, rel=1e-12)


def test_thresholds_are_strict_and_levels_are_read_in_float64():
    target = np.ones((1, 4), bool)
    levels = np.array([[51, 52, 102, 50]], np.uint8)  # 51 / 255 is 0.2 exactly in float64, and more in float32
    counts = boundary.image_counts(levels, target, max_dist=0.0, thresholds=(0.2,), thin_lines=False)
    assert counts.tolist() == [[2, 2, 2, 4]]


def test_ignored_pixels_are_neither_predicted_nor_missed():
    predictions, targets = smooth_images(1)
    ignore = np.zeros(targets[0].shape, bool)
    ignore[:, :16] = True
    options = {"max_dist": 0.0, "thresholds": THRESHOLDS, "thin_lines": False}
    found = boundary.image_counts(predictions[0], targets[0], ignore, **options)
    right = boundary.image_counts(predictions[0][:, 16:], targets[0][:, 16:], **options)
    np.testing.assert_array_equal(found, right)


def test_images_of_several_sizes_and_several_processes():
    predictions, targets = smooth_images()
    sizes = [(24, 32), (20, 20), (24, 10), (5, 32)]
    predictions = [p[:h, :w] for p, (h, w) in zip(predictions, sizes, strict=True)]
    targets = [t[:h, :w] for t, (h, w) in zip(targets, sizes, strict=True)]
    one = boundary.evaluate(predictions, targets, max_dist=0.05, thresholds=THRESHOLDS)
    assert boundary.evaluate(predictions, targets, max_dist=0.05, thresholds=THRESHOLDS, workers=2) == one


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"predictions": np.full((2, 4, 4), 1.5)}, "image 0: the prediction holds values outside"),
        ({"predictions": np.full((2, 4, 4), np.nan)}, "or that are not numbers"),
        ({"predictions": np.zeros((3, 4, 4))}, "3 predictions, 2 targets"),
        ({"predictions": np.zeros((2, 4, 5))}, r"shapes \[\(4, 5\), \(4, 4\)\]"),
        ({"targets": np.zeros((2, 4, 4))}, "target is float64; give bool"),
        ({"max_dist": 1.5}, r"max_dist is 1.5; give a fraction"),
        ({"thresholds": (1.0,)}, r"thresholds are \(1.0,\)"),
        ({"predictions": [], "targets": []}, "there are no images"),
        ({"thin": "targets"}, "thin is 'targets'; give True, False or"),
        ({"program": "bsds"}, "program is 'bsds'; give one of"),
        ({"targets": np.zeros((2, 3, 4, 5), bool)}, r"shapes \[\(4, 4\), \(4, 5\)\]"),
        ({"targets": np.zeros((2, 0, 4, 4), bool)}, r"shapes \[\(4, 4\), \(0, 4, 4\)\]"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = {"predictions": np.zeros((2, 4, 4)), "targets": np.zeros((2, 4, 4), bool), "max_dist": 0.01, **change}
    with pytest.raises(ValueError, match=message):
        boundary.evaluate(arguments.pop("predictions"), arguments.pop("targets"), **arguments)


def pairs(prediction, target, reach):
    """A maximum matching by augmenting paths, as {target: prediction}."""
    ours, theirs = np.argwhere(prediction), np.argwhere(target)
    near = [[j for j, t in enumerate(theirs) if np.hypot(*(p - t)) <= reach] for p in ours]
    owner: dict[int, int] = {}

    def augment(i, seen):
        for j in set(near[i]) - seen:
            seen.add(j)
            if j not in owner or augment(owner[j], seen):
                owner[j] = i
                return True
        return False

    for i in range(len(ours)):
        augment(i, set())
    return owner


@pytest.mark.parametrize("seed", range(6))
def test_several_annotators(seed):
    """Recall is over the pixels of all; a predicted pixel is right if it matches any, as many as one can have."""
    rng = np.random.default_rng(seed)
    prediction, reach = rng.random((5, 12)) < 0.3, 2.0
    targets = rng.random((3, 5, 12)) < 0.08
    options = {"max_dist": reach / 13, "thresholds": (0.5,), "thin_lines": False}  # the diagonal of 5 x 12 is 13
    ((right, predicted, found, target),) = boundary.image_counts(prediction.astype(float), targets, **options).tolist()
    matchings = [pairs(prediction, one, reach) for one in targets]
    assert (predicted, target) == (prediction.sum(), targets.sum())
    assert found == sum(len(matching) for matching in matchings)
    # No fewer than some matchings cover together, no more than lie in reach. The next test has the exact number.
    reachable = [
        any(np.hypot(*(p - t)) <= reach for t in np.argwhere(targets.any(axis=0))) for p in np.argwhere(prediction)
    ]
    assert len(set().union(*(matching.values() for matching in matchings))) <= right <= min(sum(reachable), found)
    as_lists = boundary.image_counts(prediction.astype(float), list(targets), **options)
    assert as_lists.tolist() == [[right, predicted, found, target]]


def test_matches_of_several_annotators_are_the_most_together():
    """Every choice of one maximum matching per annotator, by brute force; the greatest union is what is counted."""
    rng = np.random.default_rng(3)
    for _ in range(20):
        prediction, targets = rng.random((1, 7)) < 0.7, rng.random((2, 1, 7)) < 0.4
        ours = np.flatnonzero(prediction)
        covers = []
        for target in targets:
            theirs = np.flatnonzero(target)
            sizes = {}
            for partner in itertools.product([None, *theirs], repeat=len(ours)):
                taken = [t for t in partner if t is not None]
                if len(set(taken)) == len(taken) and all(
                    t is None or abs(t - o) <= 1 for o, t in zip(ours, partner, strict=True)
                ):
                    cover = frozenset(o for o, t in zip(ours, partner, strict=True) if t is not None)
                    sizes.setdefault(len(cover), set()).add(cover)
            covers.append(sizes[max(sizes)])
        most = max(len(a | b) for a, b in itertools.product(*covers))
        counts = boundary.image_counts(
            prediction.astype(float), targets, max_dist=1 / np.hypot(1, 7), thresholds=(0.5,), thin_lines=False
        )
        assert counts[0, 0] == most


def test_annotators_that_agree_score_as_one():
    predictions, targets = smooth_images()
    options = {"max_dist": 0.03, "thresholds": THRESHOLDS}
    one = boundary.evaluate(predictions, targets, **options)
    twice = boundary.evaluate(predictions, np.stack([targets, targets], axis=1), **options)
    # One matching with both may cover pixels that either alone leaves out; what each finds is the same.
    assert twice["recall"] == one["recall"]
    assert all(b >= a for a, b in zip(one["precision"], twice["precision"], strict=True))
    exact = {"max_dist": 0.0, "thresholds": THRESHOLDS, "thin": False}
    assert boundary.evaluate(predictions, targets[:, None], **exact) == boundary.evaluate(predictions, targets, **exact)
    both = boundary.evaluate(predictions, [[t, t] for t in targets], **exact)
    assert both == boundary.evaluate(predictions, targets, **exact)


def test_precision_where_nothing_is_predicted():
    """The highest threshold finds nothing: SEISM gives it precision 1, BSDS 0; recall 0 either way."""
    counts = np.array([[[6, 10, 6, 10], [3, 4, 3, 10], [0, 0, 0, 10]]])
    found = {program: boundary.summarise(counts, THRESHOLDS, program) for program in boundary.PROGRAMS}
    assert [found[program]["precision"][2] for program in ("ours", "seism", "edges")] == [0, 1, 0]
    # Precision at recall 0.6, 0.3 and 0, linear between, at 61 of the 101 places; none beyond 0.6.
    for program, empty in (("ours", 0), ("seism", 1), ("edges", 0)):
        curve = [np.interp(k / 100, [0, 0.3, 0.6], [empty, 0.75, 0.6]) for k in range(61)]
        assert found[program]["ap"] == pytest.approx(sum(curve) / 100, rel=1e-12)
    # No target either: SEISM calls recall 1 and precision 0 where something is predicted.
    nothing = boundary.summarise(np.array([[[0, 5, 0, 0], [0, 0, 0, 0]]]), (0.1, 0.5), "seism")
    assert (nothing["precision"], nothing["recall"], nothing["ods"]) == ([0, 1], [1, 0], 0)


def test_points_of_equal_recall_and_single_points():
    counts = np.array([[[4, 10, 4, 8], [4, 5, 4, 8], [2, 2, 2, 8]]])
    for program, at_half in (("ours", 0.8), ("seism", 0.4), ("edges", 0.4)):
        curve = [np.interp(k / 100, [0.25, 0.5], [1, at_half]) for k in range(25, 51)]
        assert boundary.summarise(counts, THRESHOLDS, program)["ap"] == pytest.approx(sum(curve) / 100, rel=1e-12)
    single = np.array([[[4, 5, 4, 8]]])
    found = [boundary.summarise(single, (0.5,), program)["ap"] for program in ("ours", "seism", "edges")]
    assert found == [pytest.approx(0.008), 0, 0]  # one of 101 places, divided by 100


def test_recall_at_half_precision():
    def r50(counts, program="ours"):
        return boundary.summarise(np.array([counts]), THRESHOLDS[: len(counts)], program)["r50"]

    # Precision 0.4 at recall 0.8 and 0.6 at 0.6: half way.
    assert r50([[8, 20, 8, 10], [6, 10, 6, 10]]) == pytest.approx(0.7)
    assert r50([[8, 10, 8, 10], [6, 6, 6, 10]]) == 0.8  # always above: the recall of the least precision
    assert r50([[4, 10, 4, 10]]) == 0  # never
    # A threshold that predicts nothing is no measurement to us; to the toolbox it is precision 0 at recall 0.
    empty = [[9, 10, 9, 10], [0, 0, 0, 10]]
    assert r50(empty) == 0.9
    assert r50(empty, "edges") == pytest.approx(0.9 * 0.5 / 0.9)
    assert r50(empty, "seism") == 0.9


def test_ods_between_thresholds():
    """The toolbox tries a hundred places from each threshold to the next, in loops here."""
    rng = np.random.default_rng(5)
    predicted = np.array([90, 50, 20])
    right = (predicted * rng.random(3)).astype(int)
    counts = np.stack([right, predicted, right, np.full(3, 60)], axis=1)[None]
    found = boundary.summarise(counts, THRESHOLDS, "edges")
    best = (0.0, 0.0, 0.0, 0.0)
    for k in range(1, 3):
        for step in range(100):
            a = step / 99
            p, r, t = (
                a * values[k] + (1 - a) * values[k - 1]
                for values in (right / predicted, right / 60, np.array(THRESHOLDS))
            )
            best = max(best, (2 * p * r / (p + r), t, p, r))
    names = ("ods", "ods_threshold", "ods_precision", "ods_recall")
    assert [found[name] for name in names] == pytest.approx(list(best), rel=1e-12)
    assert found["ods"] >= boundary.summarise(counts, THRESHOLDS)["ods"] * (1 - 1e-12)


def test_the_threshold_itself_and_what_is_thinned():
    target = np.ones((3, 5), bool)
    levels = np.tile(np.array([51, 52, 0, 50, 51], np.uint8), (3, 1))
    options = {"max_dist": 0.0, "thin_lines": False}
    strict = boundary.image_counts(levels, target, thresholds=(0, 0.2), **options)
    inclusive = boundary.image_counts(levels, target, thresholds=(0, 0.2), inclusive=True, **options)
    assert strict[:, 1].tolist() == [12, 3]
    assert inclusive[:, 1].tolist() == [12, 9]  # 0 is never predicted
    counts = boundary.image_counts(levels, target, thresholds=(0.2,), max_dist=0.0, thin_lines="predictions")
    assert counts[0, 3] == 15
    assert boundary.image_counts(levels, target, thresholds=(0.2,), max_dist=0.0)[0, 3] < 15
