"""Tasks: what every member of TASKS promises, and each loss and metric against its formula in NumPy float64."""

import dataclasses
import functools
import json
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from sgw_jax.etf.simplex import simplex_etf
from sgw_jax.evaluation.metrics import add_sums
from sgw_jax.tasks import TASKS, Depth, Edges, HumanParts, Normals, Saliency, SemSeg, Task, normals, task_from_dict
from sgw_jax.tasks.base import IGNORED_COLOUR, count
from sgw_jax.tasks.colours import spread_colours
from sgw_jax.tasks.mask import logit_of
from sgw_jax.tasks.thresholds import float32_at_least

SHAPE = (4, 6, 8)
PIXELS = math.prod(SHAPE)
EPS = float(np.finfo(np.float32).eps)
# Every loss and error sum adds at most PIXELS float32 terms of size O(10), each the result of fewer than 16 rounded
# operations: the relative error is at most (PIXELS + 16) eps, and cancellation inside a term adds 16 eps of 10 to each.
TOLERANCE = {"rtol": (PIXELS + 16) * EPS, "atol": 160 * EPS * PIXELS}
# Means and percentages divide such sums.
MEAN_TOLERANCE = {"rtol": 2 * (PIXELS + 16) * EPS, "atol": 200 * EPS}

# Those whose formulas stand below; the contract is for all.
REFERENCED = {
    "semseg": SemSeg(num_classes=5),
    "depth": Depth(),
    "depth with zeros": Depth(zero_is_valid=True, quantity="disparity", max_depth=8.0),
    "depth clipped": Depth(min_depth=1.5, max_depth=7.0, clip=True),
    "normals": Normals(),
    "edges": Edges(),
    "edges balanced": Edges(edge_weight=None),
    "saliency": Saliency(),
    "human_parts": HumanParts(),
}
INSTANCES = {kind: make() for kind, make in TASKS.items()} | REFERENCED


def published(tasks):
    return {f"{name}, published": dataclasses.replace(task, protocol="published") for name, task in tasks.items()}


def over(tasks):
    return pytest.mark.parametrize("task", tasks.values(), ids=tasks.keys())


every_task = over(INSTANCES)
every_protocol = over(INSTANCES | published(INSTANCES))  # where metrics matter: the protocol does not change a loss
every_formula = over(REFERENCED)
every_published_formula = over(REFERENCED | published(REFERENCED))
every_float_target = over({k: t for k, t in INSTANCES.items() if t.target["kind"] != "labels"})


@functools.cache
def compiled(task: Task, method: str):
    if method == "gradient":
        return jax.jit(jax.grad(task.loss))
    return jax.jit(getattr(task, method))


def example(task: Task, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A prediction and a target, a fifth of whose pixels, and the whole of whose last image, are ignored."""
    rng = np.random.default_rng(seed)
    prediction = rng.normal(size=(*SHAPE, task.channels)).astype(np.float32) * 2
    ignored = rng.random(SHAPE) < 0.2
    ignored[-1] = True
    kind, fill = task.target["kind"], task.target["fill"]
    if kind == "labels":
        target = rng.integers(0, task.channels, SHAPE).astype(np.int32)
    elif kind == "vectors":
        target = rng.normal(size=(*SHAPE, 3)).astype(np.float32)
        target /= np.linalg.norm(target, axis=-1, keepdims=True)
    elif kind == "mask":
        target = (rng.random(SHAPE) < 0.3).astype(np.float32)
    else:
        target = rng.uniform(0.5, 10, SHAPE).astype(np.float32)
        target[rng.random(SHAPE) < 0.1] = 0
    target[ignored] = fill
    return prediction, target


# ---------------------------------------------------------------- references, in float64, pixel by pixel


def valid_pixels(task: Task, target: np.ndarray) -> np.ndarray:
    kind = task.target["kind"]
    if kind == "labels":
        return target != 255
    if kind == "vectors":
        return np.isfinite(target).all(-1) & (target != 0).any(-1)
    if kind == "mask":
        return np.isfinite(target) & (target >= 0)
    return np.isfinite(target) & ((target >= 0) if getattr(task, "zero_is_valid", False) else (target > 0))


def pixels_of(task, prediction, target):
    """(prediction vector, target) of every valid pixel, as float64."""
    valid = valid_pixels(task, target)
    return prediction[valid].astype(np.float64), target[valid].astype(np.float64)


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def weighted_bce(x, y, w):
    return np.mean(-w * y * np.log(sigmoid(x)) - (1 - w) * (1 - y) * np.log(1 - sigmoid(x)))


def reference_loss(task, prediction, target) -> float:
    p, t = pixels_of(task, prediction, target)
    if isinstance(task, SemSeg):
        return np.mean(
            [-math.log(math.exp(x[int(c)]) / sum(math.exp(v) for v in x)) for x, c in zip(p, t, strict=True)]
        )
    if isinstance(task, Depth):
        return np.mean(np.abs(p[:, 0] - t))
    if isinstance(task, Normals):
        return np.mean([np.abs(x / math.sqrt(sum(x * x)) - g).sum() for x, g in zip(p, t, strict=True)])
    share_negative = np.mean(t < 0.5)
    w = task.edge_weight if isinstance(task, Edges) and task.edge_weight is not None else share_negative
    return weighted_bce(p[:, 0], t, w)


def reference_f(probability, truth, thresholds, beta_squared):
    best = 0.0
    for t in thresholds:
        predicted = probability >= t
        hit = np.sum(predicted & truth)
        if hit:
            precision, recall = hit / predicted.sum(), hit / truth.sum()
            best = max(best, (1 + beta_squared) * precision * recall / (beta_squared * precision + recall))
    return 100 * best


def reference_ece(confidence, right):
    """Bin by bin, from each bin's own accuracy and mean confidence."""
    number = np.minimum((confidence * 15).astype(int), 14)
    parts = [(number == b) for b in range(15) if np.any(number == b)]
    return 100 * sum(np.mean(part) * abs(np.mean(right[part]) - np.mean(confidence[part])) for part in parts)


def reference_depth(task, p, t):
    """Of pairs of depths as one population."""
    published = task.protocol == "published"
    p = np.maximum(p, 1e-9 if published else 0)
    low, high = task.min_depth, task.max_depth
    keep = (t > (-np.inf if low is None else low)) & (t < (high or np.inf))
    p, t = p[keep], t[keep]
    if task.clip:
        p = np.clip(p, low, high)
    error = (p - t)[t > 0] if published else p - t
    p, t = p[t > 0], t[t > 0]
    log_error = np.log(np.maximum(p, 1e-9 if published else 1e-3)) - np.log(t)
    ratios = np.maximum(p / t, t / np.maximum(p, 1e-30))
    return {
        "rmse": math.sqrt(np.mean(error**2)),
        "abs_err": np.mean(np.abs(error)),
        "abs_rel": np.mean(np.abs(p - t) / t),
        "sq_rel": np.mean((p - t) ** 2 / t),
        "log_rmse": math.sqrt(np.mean(log_error**2)),
        "log10": np.mean(np.abs(log_error)) / math.log(10),
        "silog": 100 * np.std(log_error),
        **{f"delta_{i}": 100 * np.mean(ratios < 1.25**i) for i in (1, 2, 3)},
    }


def reference_metrics(task, prediction, target) -> dict[str, float]:
    p, t = pixels_of(task, prediction, target)
    published = task.protocol == "published"
    if isinstance(task, SemSeg):
        chosen, iou, dice, accuracy, weighted = p.argmax(1), [], [], [], 0
        for c in range(task.num_classes):
            both, union = np.sum((chosen == c) & (t == c)), np.sum((chosen == c) | (t == c))
            if union or published:
                iou.append(100 * both / max(union, 1))
                dice.append(200 * both / max(np.sum(chosen == c) + np.sum(t == c), 1))
            if np.any(t == c):
                accuracy.append(100 * both / np.sum(t == c))
                weighted += np.mean(t == c) * 100 * both / union
        return {
            "miou": np.mean(iou),
            "pixel_accuracy": 100 * np.mean(chosen == t),
            "mean_accuracy": np.mean(accuracy),
            "frequency_weighted_iou": weighted,
            "dice": np.mean(dice),
            "ece": reference_ece((np.exp(p) / np.exp(p).sum(1, keepdims=True)).max(1), chosen == t),
        }
    if isinstance(task, Depth):
        return reference_depth(task, p[:, 0], t)
    if isinstance(task, Normals):
        cosine = [x @ g / (np.linalg.norm(x) * np.linalg.norm(g)) for x, g in zip(p, t, strict=True)]
        angle = np.degrees(np.arccos(np.clip(cosine, -1, 1)))
        return {
            "mean": angle.mean(),
            "rmse": math.sqrt(np.mean(angle**2)),
            **{f"within_{a:g}": 100 * np.mean(angle < a) for a in (5, 7.5, 11.25, 22.5, 30)},
        }
    probability, truth = sigmoid(p[:, 0]), t >= 0.5
    if isinstance(task, Saliency):
        seen = sigmoid(probability) if published else probability
        inside, union = np.sum((probability >= 0.5) & truth), np.sum((probability >= 0.5) | truth)
        return {
            "max_f": reference_f(seen, truth, np.arange(1, 20) / 20, 0.3),
            "iou": 100 * inside / union,
            "mae": np.mean(np.abs(probability - truth)),
            "ece": reference_ece(probability, truth),
        }
    w = task.edge_weight if task.edge_weight is not None else np.mean(~truth)
    return {
        "max_f": reference_f(probability, truth, np.arange(1, 100) / 100, 1.0),
        "loss": weighted_bce(probability if published else p[:, 0], t, w),
        "ece": reference_ece(probability, truth),
    }


# ---------------------------------------------------------------- the contract


@pytest.mark.parametrize("kind", TASKS)
def test_every_field_has_a_default_and_a_task_survives_json(kind):
    task = TASKS[kind]()
    assert task.kind == task.name == kind
    assert task_from_dict(json.loads(json.dumps(task.to_dict()))) == task
    changed = dataclasses.replace(task, name="other", weight=3.5, protocol="published")
    again = task_from_dict(json.loads(json.dumps(changed.to_dict())))
    assert again == changed
    assert hash(again) == hash(changed)


def test_default_weights_are_those_of_invpt():
    expected = {"semseg": 1, "depth": 1, "normals": 10, "edges": 50, "saliency": 5, "human_parts": 2}
    assert {kind: TASKS[kind]().weight for kind in expected} == expected


@every_protocol
def test_declarations_agree_with_what_the_task_does(task):
    prediction, target = example(task)
    values = task.metric_values(compiled(task, "metric_sums")(prediction, target))
    assert list(task.units) == list(values)
    assert task.metric in values
    assert list(task.directions) == list(values)
    assert task.directions[task.metric] == task.higher_is_better
    assert all(type(value) is float for value in values.values())
    assert set(task.target) == {"kind", "fill", "resample"}
    assert not valid_pixels(task, np.full_like(target, task.target["fill"])).any()


@every_formula
def test_loss_and_its_count_are_those_of_the_formula(task):
    prediction, target = example(task)
    total, number = compiled(task, "loss_terms")(prediction, target)
    assert total.dtype == jnp.float32
    assert number.dtype == jnp.int32
    expected_number = valid_pixels(task, target).sum()
    assert number == expected_number
    np.testing.assert_allclose(total, reference_loss(task, prediction, target) * expected_number, **TOLERANCE)
    np.testing.assert_array_equal(task.valid(jnp.asarray(target)), valid_pixels(task, target))


@every_published_formula
def test_metrics_are_those_of_the_formula(task):
    prediction, target = example(task)
    values = task.metric_values(compiled(task, "metric_sums")(prediction, target))
    for name, expected in reference_metrics(task, prediction, target).items():
        np.testing.assert_allclose(values[name], expected, **MEAN_TOLERANCE, err_msg=name)


@every_task
def test_a_batch_without_labels_contributes_nothing(task):
    prediction, target = example(task)
    empty = np.full_like(target, task.target["fill"])
    total, number = compiled(task, "loss_terms")(prediction, empty)
    assert (float(total), int(number), float(task.loss(prediction, empty))) == (0.0, 0, 0.0)
    np.testing.assert_array_equal(compiled(task, "gradient")(prediction, empty), 0)
    sums = compiled(task, "metric_sums")(prediction, empty)
    assert all(math.isnan(value) for value in task.metric_values(sums).values())
    # Nor do its sums change those of another batch.
    some = add_sums(None, compiled(task, "metric_sums")(prediction, target))
    jax.tree.map(np.testing.assert_array_equal, add_sums(some, sums), some)


@every_float_target
@pytest.mark.parametrize("rubbish", [np.nan, np.inf, -np.inf])
def test_what_an_ignored_pixel_holds_does_not_matter(task, rubbish):
    prediction, target = example(task)
    dirty = np.where(target == task.target["fill"], np.float32(rubbish), target)
    if task.target["kind"] == "depth":
        dirty[target == 0] = rubbish
    for method in ("loss_terms", "metric_sums", "gradient"):
        clean, other = (compiled(task, method)(prediction, t) for t in (target, dirty))
        jax.tree.map(np.testing.assert_array_equal, clean, other)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(other))


@every_task
@pytest.mark.parametrize("size", [0.0, 1e-30, 100.0])
def test_gradients_are_finite_for_extreme_predictions(task, size):
    prediction, target = example(task)
    gradient = compiled(task, "gradient")(np.sign(prediction) * np.float32(size), target)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(np.asarray(gradient)[~valid_pixels(task, target)], 0)


@every_task
def test_micro_batches_add_up_to_the_batch(task):
    prediction, target = example(task)
    parts = [(prediction[:2], target[:2]), (prediction[2:], target[2:])]  # half of the second is ignored
    whole = task.batch_statistics(jnp.asarray(target))
    added = jax.tree.map(lambda a, b: a + b, *(task.batch_statistics(jnp.asarray(t)) for _, t in parts))
    jax.tree.map(np.testing.assert_array_equal, added, whole)
    terms = [compiled(task, "loss_terms")(p, t, whole) for p, t in parts]
    total, number = compiled(task, "loss_terms")(prediction, target)
    assert sum(int(n) for _, n in terms) == number == whole["count"]
    np.testing.assert_allclose(sum(float(s) for s, _ in terms), total, **TOLERANCE)

    sums = None
    for p, t in parts:
        sums = add_sums(sums, compiled(task, "metric_sums")(p, t))
    at_once = compiled(task, "metric_sums")(prediction, target)
    for key, value in at_once.items():
        exact = np.issubdtype(value.dtype, np.integer)
        assert value.dtype == (jnp.int32 if exact else jnp.float32)
        np.testing.assert_allclose(sums[key], value, **({"rtol": 0} if exact else TOLERANCE), err_msg=key)


@pytest.mark.eight_devices
@over(
    INSTANCES
    | {
        "semseg with all": SemSeg(num_classes=5, boundary_iou=True, categories=(("a", (0, 1)), ("b", (2,)))),
        "depth by image": Depth(crop="garg", by_image=True),
    }
)
def test_sums_do_not_depend_on_where_the_pixels_lie(task):
    """Images over two devices, rows over two."""
    prediction, target = example(task)
    mesh = jax.make_mesh((2, 2), ("data", "context"), devices=jax.devices()[:4], axis_types=(AxisType.Auto,) * 2)
    lie = NamedSharding(mesh, PartitionSpec("data", "context"))
    apart = compiled(task, "metric_sums")(*(jax.device_put(array, lie) for array in (prediction, target)))
    together = compiled(task, "metric_sums")(prediction, target)
    for key, value in together.items():
        exact = np.issubdtype(value.dtype, np.integer)
        np.testing.assert_allclose(apart[key], value, **({"rtol": 0} if exact else TOLERANCE), err_msg=key)


@every_task
def test_the_order_of_pixels_does_not_matter(task):
    prediction, target = example(task)
    order = np.random.default_rng(1).permutation(PIXELS)
    shuffled = [a.reshape(PIXELS, *a.shape[3:])[order].reshape(a.shape) for a in (prediction, target)]
    before, after = (
        task.metric_values(compiled(task, "metric_sums")(*pair)) for pair in ((prediction, target), shuffled)
    )
    for name in before:
        np.testing.assert_allclose(after[name], before[name], **MEAN_TOLERANCE)
    losses = [compiled(task, "loss_terms")(*pair)[0] for pair in ((prediction, target), shuffled)]
    np.testing.assert_allclose(*losses, **TOLERANCE)


@every_published_formula
def test_the_inverse_of_the_regression_target_is_a_perfect_prediction(task):
    _, target = example(task)
    values, mask = task.regression_target(jnp.asarray(target))
    assert values.shape == (*SHAPE, task.channels)
    assert values.dtype == jnp.float32
    np.testing.assert_array_equal(mask, valid_pixels(task, target))
    prediction = task.from_regression(values)
    found = task.metric_values(compiled(task, "metric_sums")(prediction, target))
    perfect = {
        "abs_err": 0,
        "log10": 0,
        "silog": 0,
        "abs_rel": 0,
        "log_rmse": 0,
        "sq_rel": 0,
        "rmse": 0,
        "mean": 0,
        "median": 0,
    }
    for name, value in found.items():
        if name == "mae":
            assert value == pytest.approx(1e-4, rel=1e4 * 4 * EPS)  # the clipped probability
        elif name == "ece":  # of each of the other classes
            others = 1e-4 * (task.channels - 1) if isinstance(task, SemSeg) else 1e-4 / (1 - 1e-4)
            assert value == pytest.approx(100 * others / (1 + others), rel=1e4 * 4 * EPS)
        elif name == "loss":  # the clipped probability 1e-4 leaves softplus(logit(1e-4)) = 1e-4, and less with a weight
            assert value < (1e-3 if task.protocol == "exact" else 1)
        else:  # atan2 of a rounded difference of unit vectors: a few eps, in degrees
            np.testing.assert_allclose(value, perfect.get(name, 100), atol=8 * EPS * 180 / math.pi)


@every_task
def test_decoded_maps_are_drawn_and_explained(task):
    prediction, target = example(task)
    decoded = task.decode(prediction)
    if task.target["kind"] == "labels":
        assert decoded.dtype == jnp.uint8
    else:
        assert decoded.dtype == jnp.float32
    assert decoded.shape == (SHAPE if task.target["kind"] != "vectors" else (*SHAPE, 3))
    np.testing.assert_array_equal(task.decode(prediction[0]), decoded[0])  # any leading axes
    for shown in (np.asarray(decoded)[0], target[0]):
        picture = task.draw(shown, like=target[0])
        assert picture.shape == (*SHAPE[1:], 3)
        assert picture.dtype == np.uint8
    ignored = ~valid_pixels(task, target)[0]
    assert (task.draw(target[0])[ignored] == IGNORED_COLOUR).all()
    assert (task.draw(target[-1]) == IGNORED_COLOUR).all()  # nothing valid at all
    for text, colour in task.legend(target[0]):
        assert isinstance(text, str)
        assert len(colour) == 3
        assert all(type(c) is int and 0 <= c <= 255 for c in colour)


@every_task
def test_shapes_and_dtypes_at_the_door(task):
    prediction, target = example(task)
    if task.target["kind"] != "vectors":
        for method in ("loss_terms", "metric_sums"):
            plain, trailing = (compiled(task, method)(prediction, t) for t in (target, target[..., None]))
            jax.tree.map(np.testing.assert_array_equal, plain, trailing)
        jax.tree.map(
            np.testing.assert_array_equal, *(task.batch_statistics(jnp.asarray(t)) for t in (target, target[..., None]))
        )
        np.testing.assert_array_equal(*(task.regression_target(jnp.asarray(t))[0] for t in (target, target[..., None])))
    half = jnp.asarray(prediction, jnp.bfloat16)
    np.testing.assert_array_equal(task.loss(half, target), task.loss(half.astype(jnp.float32), target))
    with pytest.raises(ValueError, match=rf"{task.name}.*{task.channels} channels"):
        task.loss(jnp.zeros((*SHAPE, task.channels + 1)), target)
    with pytest.raises(ValueError, match=f"{task.name}.*target has shape"):
        task.loss(prediction, target[:, 1:])


# ---------------------------------------------------------------- segmentation


def test_an_absent_class_counts_only_in_the_published_protocol():
    labels = np.zeros((1, 1, 4), np.int32)
    labels[..., 2:] = 1
    prediction = jax.nn.one_hot(np.array([[[0, 0, 1, 0]]]), 4)
    exact, published = (SemSeg(num_classes=4, protocol=protocol) for protocol in ("exact", "published"))
    sums = exact.metric_sums(prediction, labels)
    # Class 0: 2 of 3; class 1: 1 of 2; classes 2 and 3 nowhere.
    assert exact.metric_values(sums)["miou"] == pytest.approx(100 * (2 / 3 + 1 / 2) / 2)
    assert published.metric_values(sums)["miou"] == pytest.approx(100 * (2 / 3 + 1 / 2) / 4)
    names = exact.class_names
    assert math.isnan(exact.per_class(sums)[names[2]])
    assert published.per_class(sums)[names[2]] == 0
    assert exact.per_class(sums)[names[0]] == pytest.approx(200 / 3)


def eroded(mask, width):
    """Pixels whose whole square of side 2 width + 1 is in the mask; what is outside the frame is not."""
    inside = np.zeros_like(mask)
    for y, x in np.ndindex(mask.shape):
        rows, columns = (range(c - width, c + width + 1) for c in (y, x))
        whole = min(rows) >= 0 and min(columns) >= 0 and max(rows) < len(mask) and max(columns) < mask.shape[1]
        inside[y, x] = whole and mask[np.ix_(rows, columns)].all()
    return inside


@pytest.mark.parametrize("protocol", ["exact", "published"])
@pytest.mark.parametrize("frame", [(5, 7), (60, 90)])  # widths 1 and 2
def test_boundary_iou_is_the_iou_of_each_masks_rim(protocol, frame):
    task = SemSeg(num_classes=4, boundary_iou=True, protocol=protocol)  # the last class is absent
    rng = np.random.default_rng(0)
    labels, predicted = (np.kron(rng.integers(0, 3, (2, 6, 9)), np.ones((1, 12, 12), int)) for _ in range(2))
    labels, predicted = (a[:, : frame[0], : frame[1]] for a in (labels, np.roll(np.where(predicted, labels, 0), 1, 2)))
    labels = labels.astype(np.int32)
    labels[:, 1:4, 2:5] = 255
    values = task.metric_values(task.metric_sums(jax.nn.one_hot(predicted, 4), labels.astype(np.uint8)))
    width = max(1, round(0.02 * math.hypot(*frame)))
    iou = []
    for c in range(4):
        inter = union = 0
        for truth, found in zip(labels, np.where(labels == 255, 255, predicted), strict=True):
            rims = [mask & ~eroded(mask, width) for mask in (truth == c, found == c)]
            inter, union = inter + np.sum(rims[0] & rims[1]), union + np.sum(rims[0] | rims[1])
        if union or protocol == "published":
            iou.append(100 * inter / max(union, 1))
    assert values["boundary_iou"] == pytest.approx(np.mean(iou), rel=8 * np.finfo(float).eps)
    assert list(values) == list(task.units)
    perfect = task.metric_values(task.metric_sums(jax.nn.one_hot(np.where(labels == 255, 0, labels), 4), labels))
    assert perfect["boundary_iou"] == (100 if protocol == "exact" else 25 * len(set(labels.flat) - {255}))
    empty = task.metric_values(task.metric_sums(jax.nn.one_hot(predicted, 4), np.full_like(labels, 255)))
    assert all(math.isnan(value) for value in empty.values())


@pytest.mark.parametrize("protocol", ["exact", "published"])
def test_categories_are_unions_of_classes(protocol):
    """Class 4 is in none: a pixel of it is no hit of any category; the last category is absent."""
    categories = [["flat", [0, 2]], ["object", [1]], ["nothing", [3]]]
    task = SemSeg(num_classes=5, categories=categories, protocol=protocol)
    assert task_from_dict(json.loads(json.dumps(task.to_dict()))) == task
    prediction, target = example(task)
    prediction[..., 3] = -100
    target[target == 3] = 4
    p, t = pixels_of(task, prediction, target)
    chosen, iou = p.argmax(1), []
    for _, classes in categories:
        inside = [np.isin(a, classes) for a in (chosen, t)]
        union = np.sum(inside[0] | inside[1])
        if union or protocol == "published":
            iou.append(100 * np.sum(inside[0] & inside[1]) / max(union, 1))
    values = task.metric_values(compiled(task, "metric_sums")(prediction, target))
    assert values["category_iou"] == pytest.approx(np.mean(iou), rel=8 * np.finfo(float).eps)
    assert list(values) == list(task.units)


@pytest.mark.parametrize("label", [-1, 5, 254])
def test_a_label_outside_the_classes_is_not_passed_over(label):
    task = INSTANCES["semseg"]
    prediction, target = example(task)
    target[0, 0, 0] = label
    assert math.isnan(compiled(task, "loss_terms")(prediction, target)[0])
    with pytest.raises(ValueError, match=r"1 of \d+ labelled pixels.*neither 255"):
        task.metric_values(compiled(task, "metric_sums")(prediction, target))


def test_cross_entropy_survives_logits_that_overflow_an_exponential():
    task = SemSeg(num_classes=2)
    loss = task.loss(jnp.array([[[[1000.0, 0.0]]]]), jnp.array([[[1]]]))
    assert float(loss) == 1000


def test_generated_names_and_colours():
    task = SemSeg(num_classes=3)
    assert task.class_names == ("class 0", "class 1", "class 2")
    assert HumanParts().class_names[1] == "head"
    assert HumanParts(num_classes=4).class_names[0] == "class 0"
    colours = np.array([*spread_colours(40), IGNORED_COLOUR], int)
    apart = np.abs(colours[:, None] - colours).sum(-1) + 999 * np.eye(41, dtype=int)
    assert apart.min() > 40
    assert spread_colours(40)[:13] == spread_colours(13)
    assert task.legend() == list(zip(task.class_names, task.colours, strict=True))


# ---------------------------------------------------------------- depth


def test_depth_knows_invalid_from_zero():
    target = np.array([[[0.0, 1.0, np.nan, np.inf, -1.0]]], np.float32)
    assert Depth().valid(target).tolist() == [[[False, True, False, False, False]]]
    assert Depth(zero_is_valid=True).valid(target).tolist() == [[[True, True, False, False, False]]]


def test_sky_counts_in_the_exact_error_but_not_in_the_published_one():
    target, prediction = np.array([[[0.0, 2.0]]], np.float32), np.array([[[[3.0], [2.0]]]], np.float32)
    exact, published = (Depth(zero_is_valid=True, protocol=protocol) for protocol in ("exact", "published"))
    assert exact.metric_values(exact.metric_sums(prediction, target))["rmse"] == pytest.approx(math.sqrt(4.5))
    values = published.metric_values(published.metric_sums(prediction, target))
    assert (values["rmse"], values["abs_rel"], values["delta_1"]) == (0, 0, 100)


def test_a_negative_depth_is_read_as_zero():
    target, prediction = np.array([[[2.0]]], np.float32), np.array([[[[-5.0]]]], np.float32)
    for protocol, floor in (("exact", 1e-3), ("published", 1e-9)):
        task = Depth(protocol=protocol)
        values = task.metric_values(task.metric_sums(prediction, target))
        assert values["rmse"] == pytest.approx(2, rel=1e-6)
        assert values["log_rmse"] == pytest.approx(math.log(2 / floor), rel=1e-6)
        assert float(task.loss(prediction, target)) == 7  # the loss sees the raw output


def test_delta_1_is_a_ratio_in_both_directions():
    task, ratios = Depth(), np.array([0.5, 0.79, 0.81, 1.0, 1.24, 1.26, 2.0], np.float32)  # 1 / 1.25 = 0.8
    sums = task.metric_sums(3 * ratios.reshape(1, 1, -1, 1), np.full((1, 1, 7), 3, np.float32))
    assert int(sums["near"]) == 3


def test_the_scale_invariant_error_forgives_a_factor():
    """The root magnifies the rounding of the two sums: 1e4 (mean d^2 - mean^2 d) is right to 1e4 d^2 times theirs."""
    _, target = example(Depth())
    values = Depth().metric_values(compiled(Depth(), "metric_sums")(2 * target[..., None], target))
    assert values["silog"] <= 100 * math.log(2) * math.sqrt(3 * (PIXELS + 16) * EPS)
    assert values["log_rmse"] == pytest.approx(math.log(2), rel=(PIXELS + 16) * EPS)
    assert values["log10"] == pytest.approx(math.log10(2), rel=(PIXELS + 16) * EPS)


# First and last row and column of the crops on the frames that the field uses them for.
WINDOWS = {
    ("garg", (352, 1216)): (143, 349, 43, 1172),
    ("eigen", (352, 1216)): (117, 321, 43, 1172),
    ("nyu_eigen", (480, 640)): (45, 471, 41, 601),
}


@pytest.mark.parametrize(("crop", "frame"), WINDOWS)
@pytest.mark.parametrize("by_image", [False, True])
def test_depth_is_measured_inside_the_crop(crop, frame, by_image):
    task = Depth(crop=crop, by_image=by_image)
    top, bottom, left, right = WINDOWS[crop, frame]
    inside = np.zeros((1, *frame), bool)
    inside[:, top:bottom, left:right] = True
    target = np.full((1, *frame), 2, np.float32)
    sums = compiled(task, "metric_sums")(np.where(inside, 2, 7).astype(np.float32)[..., None], target)
    assert task.metric_values(sums)["rmse"] == 0
    if not by_image:
        assert int(sums["pixels"]) == inside.sum()


@pytest.mark.parametrize("protocol", ["exact", "published"])
@pytest.mark.parametrize(
    "options", [{}, {"zero_is_valid": True, "max_depth": 8.0}, {"min_depth": 0.6, "max_depth": 9.0}]
)
def test_means_by_image_are_means_of_each_images_metrics(options, protocol):
    """The last image has no label and counts in no mean; neither does an image whose only label is 0, in a ratio."""
    task = Depth(by_image=True, protocol=protocol, **options)
    prediction, target = example(task)
    target[2] = task.target["fill"]
    target[2, 0, 0] = 0
    total = None
    for rows in (slice(0, 1), slice(1, 4)):
        total = add_sums(total, compiled(task, "metric_sums")(prediction[rows], target[rows]))
    expected = {}
    for image in range(len(target)):
        p, t = pixels_of(task, prediction[image], target[image])
        with np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for name, value in reference_depth(task, p[:, 0], t).items():
                expected.setdefault(name, []).append(value)
    for name, value in task.metric_values(total).items():
        np.testing.assert_allclose(value, np.nanmean(expected[name]), **MEAN_TOLERANCE, err_msg=name)


def test_pictures_share_the_range_of_the_other_map():
    task = Depth()
    near, far = np.full((2, 2), 1.0), np.full((2, 2), 9.0)
    like = np.array([[1.0, 9.0]])
    assert task.draw(near, like)[0, 0].sum() > task.draw(far, like)[0, 0].sum() + 300  # near is bright
    texts = [text for text, _ in task.legend(like)]
    assert texts == ["1 m", "3 m", "5 m", "7 m", "9 m"]
    assert Depth(quantity="disparity").legend(like)[0][0] == "1 px"


# ---------------------------------------------------------------- normals


def test_the_loss_of_normals_is_per_pixel():
    target = np.array([[[[0, 0, -1]]]], np.float32)
    assert float(Normals().loss(np.array([[[[5.0, 0, 0]]]], np.float32), target)) == pytest.approx(2, rel=4 * EPS)
    assert float(Normals().loss(-3 * target, target)) == pytest.approx(2, rel=4 * EPS)


@pytest.mark.parametrize("degrees", [0.01, 1.0, 90.0, 179.0, 179.99])
def test_angles_are_accurate_at_both_ends(degrees):
    radians = math.radians(degrees)
    target = np.array([[[[0, 0, -1]]]], np.float32)
    prediction = np.array([[[[math.sin(radians), 0, -math.cos(radians)]]]], np.float32) * 7
    task = Normals()
    found = task.metric_values(task.metric_sums(prediction, target))["mean"]
    # Rounded components of unit vectors move the angle by a few eps, here in degrees.
    assert found == pytest.approx(degrees, abs=8 * EPS * 180 / math.pi)


@pytest.mark.parametrize("length", [1e-30, 1e-4, 1e-3, 1.0, 1e30])
def test_the_angle_does_not_depend_on_the_lengths(length):
    """Of the prediction and of the target: 8-bit zeros, stored as 127 and 128, are vectors like any other."""
    task = Normals()
    prediction, target = example(task)
    expected = reference_metrics(task, prediction, target)
    prediction /= np.linalg.norm(prediction, axis=-1, keepdims=True)
    for lengths in ((length, 1), (1, length), (length, length)):
        scaled = [array * np.float32(s) for array, s in zip((prediction, target), lengths, strict=True)]
        values = task.metric_values(compiled(task, "metric_sums")(*scaled))
        for name, value in expected.items():
            np.testing.assert_allclose(values[name], value, **MEAN_TOLERANCE, err_msg=name)
    decoded = np.asarray(task.decode(prediction * np.float32(length)))
    np.testing.assert_allclose(np.linalg.norm(decoded.astype(np.float64), axis=-1), 1, rtol=8 * EPS)
    stored = (2 * np.array([[[[127, 128, 128]]]], np.float32) / 255 - 1).astype(np.float32)
    along = task.metric_values(task.metric_sums(np.array([[[[-1, 1, 1]]]], np.float32), stored))
    # 2 v / 255 - 1 cancels: components of 1 / 255 keep an error of eps.
    assert along["mean"] < 2 * 255 * EPS * 180 / math.pi
    zero = task.metric_values(task.metric_sums(np.zeros((1, 1, 1, 3), np.float32), stored))
    assert zero["mean"] == pytest.approx(90, rel=8 * EPS)


def test_a_surface_has_one_colour_whatever_the_axes_of_its_normals():
    """What faces right, up and the camera: x = 1, y = -1, z = -1 in OpenCV's axes, and y = 1, z = 1 in OpenGL's."""
    pointing = {"opencv": [[1, 0, 0], [0, -1, 0], [0, 0, -1]], "opengl": [[1, 0, 0], [0, 1, 0], [0, 0, 1]]}
    colours = [(255, 128, 128), (128, 255, 128), (128, 128, 255)]
    faces = ["faces right", "faces up", "faces camera"]
    for axes, vectors in pointing.items():
        task = Normals(axes=axes)
        assert [tuple(pixel) for pixel in task.draw(np.array([vectors], np.float32))[0]] == colours
        legend = dict(task.legend())
        assert [legend[name] for name in faces] == colours


@pytest.mark.parametrize("number", [1, 2, 3, 150, 151])
@pytest.mark.parametrize("spread", [0.1, 2.0, 20.0, 180.0])
def test_the_median_angle_is_right_to_a_bin(number, spread):
    """A bin is 180 (2 k + 1) / 4096^2 wide: at most 2 sqrt(180 a) / 4096 + 180 / 4096^2 at an angle a inside."""
    task = Normals()
    degrees = np.random.default_rng(number).uniform(0, spread, number)
    radians = np.radians(degrees)
    prediction = np.stack([np.sin(radians), 0 * radians, -np.cos(radians)], -1).astype(np.float32)
    prediction, target = (np.broadcast_to(a, (1, 1, number, 3)) for a in (prediction, np.array([0, 0, -1], np.float32)))
    found = task.metric_values(task.metric_sums(prediction, target))["median"]
    middle = np.sort(degrees)[number // 2]  # the greater of the two middle angles has the wider bin
    width = 180 * (2 * math.sqrt(middle / 180) / 4096 + 1 / 4096**2)
    assert abs(found - np.median(degrees)) <= width + 8 * EPS * 180 / math.pi


@pytest.mark.parametrize("counts", [normals._counts_by_scatter, normals._counts_by_products])
def test_both_ways_of_counting_bins(counts):
    """The way of TPUs too, wherever the tests run."""
    rng = np.random.default_rng(0)
    bins, valid = rng.integers(0, 4096, (3, 40, 50)).astype(np.int32), rng.random((3, 40, 50)) < 0.8
    bins[:, :10], bins[0, 0, :2] = 7, (0, 4095)
    np.testing.assert_array_equal(jax.jit(counts)(bins, valid), np.bincount(bins[valid], minlength=4096))


def test_the_median_of_a_data_set_is_that_of_the_added_histograms():
    task = Normals()
    pairs = [example(task, seed) for seed in range(3)]
    total = None
    for pair in pairs:
        total = add_sums(total, compiled(task, "metric_sums")(*pair))
    joined = [np.concatenate(arrays) for arrays in zip(*pairs, strict=True)]
    p, t = pixels_of(task, *joined)
    cosine = np.sum(p * t, -1) / np.linalg.norm(p, axis=-1) / np.linalg.norm(t, axis=-1)
    assert int(total["histogram"].sum()) == int(total["pixels"]) == len(t)
    assert task.metric_values(total)["median"] == pytest.approx(np.median(np.degrees(np.arccos(cosine))), abs=0.1)


def test_a_surface_that_faces_the_camera_is_light_blue():
    red, green, blue = Normals().draw(np.array([[[0, 0, -1]]], np.float32))[0, 0]
    assert (int(red), int(green), int(blue)) == (128, 128, 255)
    right_and_up = Normals().draw(np.array([[[1, 0, 0], [0, -1, 0]]], np.float32))[0]
    assert right_and_up.tolist() == [[255, 128, 128], [128, 255, 128]]


# ---------------------------------------------------------------- edges and saliency


def test_the_second_sigmoid_leaves_four_thresholds():
    """The derived fact: 0.05 .. 0.5 call everything positive, 0.75 .. 0.95 nothing, four lie between."""
    task = Saliency(protocol="published")
    probability = np.linspace(0.0005, 0.9995, 1000)
    prediction = np.array([logit_of(p) for p in probability], np.float32).reshape(1, 1, -1, 1)
    predicted = np.asarray(task.metric_sums(prediction, np.ones((1, 1, 1000)))["predicted"])[:-1]
    assert (predicted[:10] == 1000).all()
    assert (predicted[14:] == 0).all()
    effective = [0.2007, 0.4055, 0.6190, 0.8473]  # of p, rounded to 1e-4; no probability of the grid is that close
    assert predicted[10:14].tolist() == [int((probability >= t).sum()) for t in effective]


def test_the_protocols_of_saliency_differ():
    task = INSTANCES["saliency"]
    prediction, target = example(task)
    prediction = prediction - 3  # the best threshold is below 0.2, where the published thresholds cannot reach
    exact, published = (
        t.metric_values(compiled(t, "metric_sums")(prediction, target))
        for t in (task, dataclasses.replace(task, protocol="published"))
    )
    assert exact["max_f"] > published["max_f"]
    assert exact["iou"] == published["iou"]


@pytest.mark.parametrize("thresholds", [np.arange(1, 20) / 20, np.arange(1, 100) / 100], ids=["saliency", "edges"])
def test_thresholds_divide_neighbouring_floats(thresholds):
    """At, just below and just above every threshold, as probabilities and as logits."""
    for wide in (thresholds, [logit_of(t) for t in thresholds]):
        nearest = np.asarray(wide, np.float32)
        values = np.concatenate([np.nextafter(nearest, np.float32(side)) for side in (-np.inf, np.inf)] + [nearest])
        expected = values.astype(np.float64) >= np.asarray(wide, np.float64)[:, None]
        np.testing.assert_array_equal(values >= float32_at_least(wide)[:, None], expected)


def test_counts_equal_those_of_the_decoded_probabilities():
    task = Edges()
    prediction, target = example(task)
    sums = compiled(task, "metric_sums")(prediction, target)
    valid = valid_pixels(task, target)
    probability = np.asarray(task.decode(prediction))[valid].astype(np.float64)
    above = probability >= (np.arange(1, 100) / 100)[:, None]
    np.testing.assert_array_equal(sums["predicted"], above.sum(1))
    np.testing.assert_array_equal(sums["true_positive"], (above & (target[valid] == 1)).sum(1))


def test_the_balanced_loss_weighs_both_classes_alike():
    """At zero logits each class contributes n_pos n_neg log 2 / n^2, however rare the positive pixels are."""
    target = np.zeros((1, 10, 10), np.float32)
    target[0, 0, :5] = 1
    for task in (Saliency(), Edges(edge_weight=None)):
        assert float(task.loss(np.zeros((1, 10, 10, 1)), target)) == pytest.approx(
            2 * 0.05 * 0.95 * math.log(2), rel=(100 + 16) * EPS
        )


def test_soft_targets_are_learned_but_counted_as_hard():
    task = Edges(edge_weight=0.5)
    target = np.full((1, 1, 1), 0.25, np.float32)
    assert float(task.loss(np.zeros((1, 1, 1, 1)), target)) == pytest.approx(0.5 * math.log(2), rel=4 * EPS)
    assert int(task.batch_statistics(jnp.asarray(target))["positive"]) == 0


@pytest.mark.parametrize("task", [Edges(), Saliency()], ids=["edges", "saliency"])
def test_the_ignore_code_of_labels_is_refused_in_a_float_target(task):
    target = np.array([[[1.0, 255.0]]], np.float32)
    assert math.isnan(task.loss(np.zeros((1, 1, 2, 1)), target))
    with pytest.raises(ValueError, match="1 of 2 labelled pixels hold a target above 1"):
        task.metric_values(task.metric_sums(np.zeros((1, 1, 2, 1)), target))


def test_without_a_positive_pixel_f_is_undefined():
    target = np.zeros((1, 1, 2), np.float32)
    for protocol, check in (("exact", math.isnan), ("published", lambda f: f == 0)):
        for task in (Edges(protocol=protocol), Saliency(protocol=protocol)):
            assert check(task.metric_values(task.metric_sums(np.zeros((1, 1, 2, 1)), target))["max_f"])


def test_counts_do_not_stop_where_float32_does():
    number = 2**24 + 1
    assert int(count(jnp.ones(number, bool))) == number


# ---------------------------------------------------------------- construction


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("semseg", {"protocol": "mine"}, "protocol is 'mine'; choose one of"),
        ("depth", {"weight": -1.0}, "weight is -1.0; give a finite number"),
        ("depth", {"weight": math.nan}, "weight is nan"),
        ("normals", {"name": ""}, "non-empty string"),
        ("normals", {"axes": "opengl "}, "axes is 'opengl '; choose one of"),
        ("semseg", {"num_classes": 1}, "num_classes is 1"),
        ("semseg", {"num_classes": 256}, "num_classes is 256"),
        ("semseg", {"num_classes": 3, "class_names": ("a", "b")}, "class_names has 2 entries and num_classes is 3"),
        ("human_parts", {"colours": ((0, 0, 0),)}, "colours has 1 entries"),
        ("semseg", {"num_classes": 2, "colours": ((0, 0, 0), (0, 0, 256))}, "not three integers"),
        ("semseg", {"num_classes": 3, "categories": (("a", (0, 1)), ("b", (1,)))}, "categories hold the classes"),
        ("semseg", {"num_classes": 3, "categories": (("a", (3,)),)}, "categories hold the classes"),
        ("depth", {"quantity": "inverse"}, "quantity is 'inverse'"),
        ("depth", {"max_depth": 0.0}, "max_depth is 0.0"),
        ("depth", {"min_depth": -1.0}, "min_depth is -1.0"),
        ("depth", {"min_depth": 2.0, "max_depth": 2.0}, "min_depth is 2.0"),
        ("depth", {"clip": True, "max_depth": 2.0}, "clip needs min_depth and max_depth"),
        ("depth", {"crop": "grag"}, "crop is 'grag'; choose one of .*garg"),
        ("edges", {"edge_weight": 1.0}, "edge_weight is 1.0"),
    ],
)
def test_wrong_fields_are_named(kind, fields, message):
    with pytest.raises(ValueError, match=message):
        TASKS[kind](**fields)


def test_wrong_descriptions_are_named():
    with pytest.raises(ValueError, match=r"'semsegg'.*Did you mean 'semseg'"):
        task_from_dict({"kind": "semsegg"})
    with pytest.raises(ValueError, match=r"'depth' task does not fit.*num_classes"):
        task_from_dict({"kind": "depth", "num_classes": 3})


# ---------------------------------------------------------------- a user's own task


@dataclasses.dataclass(frozen=True)
class Albedo(Task):
    """A task from outside the package: two channels of reflectance, squared error."""

    name: str = "albedo"
    channels = 2
    metric = "mse"
    higher_is_better = False

    @property
    def target(self):
        return {"kind": "vectors", "fill": 0.0, "resample": "linear"}

    def valid(self, target):
        return jnp.any(target != 0, axis=-1)

    def _terms(self, prediction, target):
        valid = self.valid(target)
        error = jnp.sum(jnp.square(self.float32(prediction) - self.vector_target(prediction, target)), axis=-1)
        return jnp.sum(jnp.where(valid, error, 0)), count(valid)

    def loss_terms(self, prediction, target, statistics=None):
        return self._terms(prediction, target)

    def metric_sums(self, prediction, target):
        return dict(zip(("squared", "pixels"), self._terms(prediction, target), strict=True))

    def metric_values(self, sums):
        return {"mse": float(sums["squared"]) / max(int(sums["pixels"]), 1)}

    def decode(self, prediction):
        return self.float32(prediction)

    def draw(self, decoded, like=None):
        return np.zeros((*decoded.shape[:2], 3), np.uint8)


def test_a_users_own_task_needs_no_edit_of_the_package():
    task = Albedo(weight=2)
    target = np.full((1, 2, 2, 2), 0.5, np.float32)
    target[0, 0, 0] = 0
    assert float(task.loss(np.zeros_like(target), target)) == 0.5
    assert int(task.batch_statistics(target)["count"]) == 3
    assert task.metric_values(task.metric_sums(np.zeros_like(target), target)) == {"mse": 0.5}
    values, mask = task.regression_target(target)
    np.testing.assert_array_equal(values, target)
    assert int(mask.sum()) == 3
    assert task_from_dict(task.to_dict(), kinds={**TASKS, "Albedo": Albedo}) == task
    with pytest.raises(ValueError, match="Unknown kind of task 'Albedo'"):
        task_from_dict(task.to_dict())
    with pytest.raises(ValueError, match="protocol"):
        Albedo(protocol="other")


def test_a_subclass_is_not_mistaken_for_its_parent():
    @dataclasses.dataclass(frozen=True)
    class LogDepth(Depth):
        pass

    assert LogDepth().to_dict()["kind"] == "LogDepth"


def test_directions_are_those_of_the_papers():
    down = {
        "depth": {"rmse", "abs_err", "abs_rel", "sq_rel", "log_rmse", "log10", "silog"},
        "normals": {"mean", "median", "rmse"},
        "edges": {"loss", "ece"},
        "saliency": {"mae", "ece"},
        "semseg": {"ece"},
        "human_parts": {"ece"},
    }
    for kind, task in INSTANCES.items():
        if kind in TASKS:
            assert {name for name, up in task.directions.items() if not up} == down.get(kind, set()), kind
    assert Albedo().directions == {"mse": False}


def test_an_incomplete_task_says_what_is_missing():
    class Half(Task):
        pass

    with pytest.raises(TypeError, match=r"abstract.*loss_terms"):
        Half("half")


def test_dot_regression_takes_the_label_at_the_centre_of_each_cell_and_counts_pixels():
    """Cells of 3 x 4 pixels, by loops in float64; the sum is over pixels, so that sum / labelled pixels is the mean."""
    task = SemSeg(num_classes=4, dot_regression=0.7)
    rng = np.random.default_rng(0)
    features = rng.normal(size=(2, 5, 3, 6)).astype(np.float32)
    labels = np.where(rng.random((2, 15, 12)) < 0.3, 255, rng.integers(0, 4, (2, 15, 12))).astype(np.int32)
    vertices = simplex_etf(4, 6)
    expected = 0.0
    for image, row, column in np.ndindex(2, 5, 3):
        label = labels[image, 3 * row + 1, 4 * column + 2]
        if label != 255:
            f = features[image, row, column].astype(np.float64)
            expected += 0.7 * 12 * (vertices[:, label] @ f / np.linalg.norm(f) - 1) ** 2 / 2
    found = task.feature_loss_sum(jnp.asarray(features), jnp.asarray(labels))
    np.testing.assert_allclose(found, expected, rtol=30 * np.finfo(np.float32).eps)  # sums of 30 positive terms
    assert task.uses_features
    assert not SemSeg().uses_features
    with pytest.raises(ValueError, match="dot_regression is -1"):
        SemSeg(dot_regression=-1)
    with pytest.raises(ValueError, match="40 equiangular vertices need at least 39 dimensions, but dim is 6"):
        SemSeg(dot_regression=1).feature_loss_sum(jnp.asarray(features), jnp.asarray(labels))
