"""Boundary evaluation against brute-force matching, loops over the definitions, and cases with known answers."""

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
    assert counts.tolist() == [[best_matching(prediction, target, reach), prediction.sum(), target.sum()]]


def test_where_taking_the_nearest_first_is_not_the_greatest():
    """a - A - b - B in a row: A's nearest is b, and then a and B are left alone; the best pairs a with A, b with B."""
    prediction, target = np.zeros((1, 12)), np.zeros((1, 12), bool)
    prediction[0, [0, 4]] = 1
    target[0, [3, 7]] = True
    counts = boundary.image_counts(prediction, target, max_dist=3 / np.hypot(1, 12), thresholds=(0.5,))
    assert counts.tolist() == [[2, 2, 2]]


def test_distance_is_inclusive_and_a_share_of_the_diagonal():
    target = np.zeros((30, 40), bool)  # diagonal 50
    target[5:25, 10] = True
    for shift, reach, matched in ((5, 5.0, 20), (5, 4.99, 0), (6, 5.0, 0)):
        prediction = np.roll(target, shift, axis=1).astype(float)
        counts = boundary.image_counts(prediction, target, max_dist=reach / 50, thresholds=(0.5,))
        assert counts.tolist() == [[matched, 20, 20]]


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

    def f(matched, predicted, target):
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
    assert counts.tolist() == [[2, 2, 4]]


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
    ],
)
def test_what_does_not_fit_is_named(change, message):
    arguments = {"predictions": np.zeros((2, 4, 4)), "targets": np.zeros((2, 4, 4), bool), "max_dist": 0.01, **change}
    with pytest.raises(ValueError, match=message):
        boundary.evaluate(arguments.pop("predictions"), arguments.pop("targets"), **arguments)
