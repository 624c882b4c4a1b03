"""Our metrics beside the programs that others compute them with: equal to rounding, or different as a test says.

The programs are those of the extra [parity], and cityscapesscripts and pysodmetrics, which .ci/run installs.
"""

import importlib
import math
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from sgw_jax.data_pipelines.cityscapes import Cityscapes
from sgw_jax.evaluation.saliency import image_scores
from sgw_jax.evaluation.saliency_scores import saliency_scores
from sgw_jax.sharding import make_mesh
from sgw_jax.tasks import Depth, Edges, Normals, Saliency, SemSeg
from sgw_jax.tasks.edges import THRESHOLDS as EDGE_THRESHOLDS
from sgw_jax.tasks.saliency import THRESHOLDS as SALIENCY_THRESHOLDS

pytestmark = pytest.mark.parity

SINGLE, DOUBLE = float(np.finfo(np.float32).eps), float(np.finfo(np.float64).eps)
CLASSES, SHAPE = 7, (2, 33, 47)
PIXELS = math.prod(SHAPE)


def values_of(task, prediction, target):
    return task.metric_values(jax.jit(task.metric_sums)(jnp.asarray(prediction), jnp.asarray(target)))


def tensors(*arrays):
    import torch

    return [torch.from_numpy(np.array(array)) for array in arrays]


# ---------------------------------------------------------------- segmentation


def labels_of(seed, only_predicted=False):
    """(labels, predictions, their scores): a fifth ignored, class 5 absent, 6 predicted alone or labelled alone."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 5, SHAPE)
    predicted = np.where(rng.random(SHAPE) < 0.6, labels, rng.integers(0, 5, SHAPE))
    one = predicted if only_predicted else labels
    one[rng.random(SHAPE) < 0.1] = 6
    labels[rng.random(SHAPE) < 0.2] = 255
    return labels, predicted, np.eye(CLASSES, dtype=np.float32)[predicted]


# torchmetrics divides and adds up to CLASSES shares in float32.
SHARES = (2 + CLASSES) * SINGLE
# Of a calibration error in percent: roundings of a float32 sum of differences below 1, as a random walk.
GAPS = 100 * math.sqrt(PIXELS) * SINGLE


@pytest.mark.parametrize("seed", range(3))
def test_segmentation_equals_torchmetrics(seed):
    from torchmetrics.functional import classification, segmentation

    labels, predicted, scores = labels_of(seed)
    scores = scores * np.random.default_rng(seed).uniform(0.1, 8, (*SHAPE, 1)).astype(np.float32)
    found = values_of(SemSeg(num_classes=CLASSES), scores, labels)
    share = np.exp(scores.astype(np.float64))
    share /= share.sum(-1, keepdims=True)
    options = {"num_classes": CLASSES, "ignore_index": 255}
    pair = tensors(predicted, labels)
    valid = tensors(predicted[labels != 255][None], labels[labels != 255][None])
    theirs = {
        "miou": classification.multiclass_jaccard_index(*pair, average="macro", **options),
        "frequency_weighted_iou": classification.multiclass_jaccard_index(*pair, average="weighted", **options),
        "pixel_accuracy": classification.multiclass_accuracy(*pair, average="micro", **options),
        "mean_accuracy": classification.multiclass_accuracy(*pair, average="macro", **options),
        "dice": segmentation.dice_score(*valid, CLASSES, input_format="index", aggregation_level="global"),
    }
    ece = classification.multiclass_calibration_error(*tensors(np.moveaxis(share, -1, 1), labels), n_bins=15, **options)
    assert found.pop("ece") == pytest.approx(100 * float(ece), abs=GAPS)
    assert set(theirs) == set(found)
    for name, value in theirs.items():
        assert found[name] == pytest.approx(100 * float(value), rel=SHARES), name


def test_classes_without_labels_where_torchmetrics_counts_them():
    """A class that is predicted alone is in no mean_accuracy of ours, and 0 in theirs; absent ones are in neither."""
    from torchmetrics.functional.classification import multiclass_accuracy

    labels, predicted, scores = labels_of(0, only_predicted=True)
    found = values_of(SemSeg(num_classes=CLASSES), scores, labels)["mean_accuracy"]
    theirs = multiclass_accuracy(*tensors(predicted, labels), CLASSES, average="macro", ignore_index=255)
    assert found == pytest.approx(100 * float(theirs) * 6 / 5, rel=SHARES)


def test_counts_are_pooled_where_torchmetrics_takes_means_of_images():
    """Their `segmentation.mean_iou` is one number per image; it is ours of each."""
    from torchmetrics.functional.segmentation import mean_iou

    labels, predicted, scores = labels_of(1)
    labels, predicted = (np.where(labels == 255, 0, values) for values in (labels, predicted))
    predicted[0, 5:] = labels[0, 5:]  # one image is predicted better than the other
    scores = np.eye(CLASSES, dtype=np.float32)[predicted]
    task = SemSeg(num_classes=CLASSES)
    each = mean_iou(*tensors(predicted, labels), CLASSES, input_format="index", per_class=True)
    each = [np.mean([v for v in image.tolist() if v >= 0]) for image in each]  # -1: absent
    ours = [values_of(task, scores[i : i + 1], labels[i : i + 1])["miou"] for i in range(len(labels))]
    np.testing.assert_allclose(ours, 100 * np.array(each), rtol=SHARES)
    assert values_of(task, scores, labels)["miou"] != pytest.approx(np.mean(ours), rel=1e-4)


@pytest.fixture
def cityscapes_evaluation():
    return importlib.import_module("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")


@pytest.mark.parametrize("seed", range(2))
def test_cityscapes_classes_and_categories_equal_those_of_its_scripts(seed, tmp_path, cityscapes_evaluation):
    """Label images of its ids, void and unevaluated ones among the labels; a class and a category are absent."""
    from cityscapesscripts.helpers.labels import category2labels, id2label

    evaluated = sorted(i for i, label in id2label.items() if not label.ignoreInEval)
    absent = {23, 31}  # sky, alone in its category, and train
    rng = np.random.default_rng(seed)
    truth = rng.choice([i for i in id2label if i >= 0 and i not in absent], SHAPE)
    guess = rng.choice([i for i in evaluated if i not in absent], SHAPE)
    ids = np.where((rng.random(SHAPE) < 0.6) & np.isin(truth, evaluated), truth, guess)
    files = [[], []]
    for number, images in enumerate(zip(ids, truth, strict=True)):
        for side, image in enumerate(images):
            files[side].append(str(tmp_path / f"{side}_{number}.png"))
            Image.fromarray(image.astype(np.uint8)).save(files[side][-1])
    arguments = cityscapes_evaluation.args
    arguments.evalInstLevelScore, arguments.JSONOutput, arguments.quiet = False, False, True
    theirs = cityscapes_evaluation.evaluateImgLists(*files, arguments)

    names = Cityscapes.CLASSES
    assert tuple(id2label[i].name for i in evaluated) == names
    assert tuple(id2label[i].color for i in evaluated) == Cityscapes.COLOURS
    assert dict(Cityscapes.CATEGORIES) == {
        name: tuple(label.trainId for label in labels if not label.ignoreInEval)
        for name, labels in category2labels.items()
        if name != "void"
    }
    task = SemSeg(num_classes=len(names), class_names=names, categories=Cityscapes.CATEGORIES)
    classes = np.array([id2label[i].trainId for i in range(34)])
    sums = task.metric_sums(jnp.eye(len(names))[classes[ids]], jnp.asarray(classes[truth]))
    found = task.metric_values(sums)
    tolerance = (2 + len(names)) * DOUBLE
    for name, value in task.per_class(sums).items():
        assert value == pytest.approx(100 * theirs["classScores"][name], rel=tolerance, nan_ok=True), name
    assert math.isnan(task.per_class(sums)["train"])
    assert found["miou"] == pytest.approx(100 * theirs["averageScoreClasses"], rel=tolerance)
    assert found["category_iou"] == pytest.approx(100 * theirs["averageScoreCategories"], rel=tolerance)


# ---------------------------------------------------------------- depth and normals


def depths(seed, invalid=0.3):
    rng = np.random.default_rng(seed)
    target = rng.uniform(0.5, 10, SHAPE).astype(np.float32)
    prediction = (target * np.exp(0.3 * rng.normal(size=SHAPE))).astype(np.float32)
    target[rng.random(SHAPE) < invalid] = 0
    return prediction, target


# Ours adds PIXELS terms in float32: half a rounding each, in a walk of random signs, of which six deviations.
SUMS = 3 * math.sqrt(PIXELS) * SINGLE


@pytest.mark.parametrize("seed", range(3))
def test_depth_equals_torchmetrics(seed):
    from torchmetrics.functional import regression

    prediction, target = depths(seed)
    found = values_of(Depth(), prediction[..., None], target)
    p, g = (values[target > 0].astype(np.float64) for values in (prediction, target))
    pair, logs = tensors(p, g), tensors(np.log(p), np.log(g))
    unexplained = 1 - float(regression.explained_variance(*logs))  # var(ln p - ln g) / var(ln g)
    theirs = {
        "rmse": regression.mean_squared_error(*pair, squared=False),
        "abs_err": regression.mean_absolute_error(*pair),
        "abs_rel": regression.mean_absolute_percentage_error(*pair),
        "log_rmse": math.sqrt(regression.mean_squared_log_error(*tensors(p - 1, g - 1))),  # they take 1 + p
        "log10": float(regression.mean_absolute_error(*logs)) / math.log(10),
        "silog": 100 * math.sqrt(unexplained * np.log(g).var()),
    }
    for name, value in theirs.items():
        assert found[name] == pytest.approx(float(value), rel=SUMS), name


def test_inverse_depth_of_zero_is_relative_to_nothing():
    """Pixels of g = 0 count in no abs_rel of ours; torchmetrics divides by 1.17e-6 there."""
    from torchmetrics.functional.regression import mean_absolute_error, mean_absolute_percentage_error

    prediction, target = depths(0)
    found = values_of(Depth(quantity="disparity", zero_is_valid=True), prediction[..., None], target)
    pair = tensors(prediction.ravel(), target.ravel())
    assert found["abs_err"] == pytest.approx(float(mean_absolute_error(*pair)), rel=2 * SUMS)  # theirs float32 too
    known = tensors(prediction[target > 0].astype(np.float64), target[target > 0].astype(np.float64))
    assert found["abs_rel"] == pytest.approx(float(mean_absolute_percentage_error(*known)), rel=SUMS)
    assert mean_absolute_percentage_error(*pair) > 1e5


@pytest.mark.parametrize("seed", range(2))
def test_angles_of_normals_equal_torchmetrics(seed):
    from torchmetrics.functional.regression import cosine_similarity

    rng = np.random.default_rng(seed)
    target = rng.normal(size=(*SHAPE, 3)).astype(np.float32)
    prediction = (target + 0.3 * rng.normal(size=target.shape)).astype(np.float32)  # unit vectors are not needed
    target[rng.random(SHAPE) < 0.2] = 0
    found = values_of(Normals(), prediction, target)
    seen = target.any(axis=-1)
    pair = tensors(prediction[seen].astype(np.float64), target[seen].astype(np.float64))
    angle = np.degrees(np.arccos(np.clip(cosine_similarity(*pair, reduction="none").numpy(), -1, 1)))
    # An angle in float32: a dozen roundings of a unit vector, 57 degrees each at most, beside the mean of 15.
    assert found["mean"] == pytest.approx(angle.mean(), rel=SUMS + 50 * SINGLE)
    assert found["rmse"] == pytest.approx(math.sqrt((angle**2).mean()), rel=SUMS + 50 * SINGLE)
    for limit in (5, 7.5, 11.25, 22.5, 30):
        sure = np.abs(angle - limit) > 1e-4
        off = 100 * np.mean(~sure)
        assert found[f"within_{limit:g}"] == pytest.approx(100 * np.mean(angle < limit), abs=off + 1e-9)
    middle = np.median(angle)
    assert found["median"] == pytest.approx(middle, abs=180 * (2 * 64**2 * math.sqrt(middle / 180) + 1) / 64**4)


# ---------------------------------------------------------------- masks, pooled


def logits(seed):
    """(logits, target): a tenth ignored; a logit of 0 is a probability of exactly 1/2."""
    rng = np.random.default_rng(seed)
    target = (rng.random(SHAPE) < 0.2).astype(np.float32)
    prediction = (3 * target - 2 + 1.5 * rng.normal(size=SHAPE)).astype(np.float32)
    target[rng.random(SHAPE) < 0.1] = -1
    return prediction, target


@pytest.mark.parametrize("seed", range(2))
def test_pooled_scores_of_masks_equal_torchmetrics(seed):
    from torchmetrics.functional import classification

    prediction, target = logits(seed)
    probability = 1 / (1 + np.exp(-prediction.astype(np.float64)))
    pair = tensors(probability, target.astype(np.int64))

    def best(beta, thresholds):
        found = [
            classification.binary_fbeta_score(*pair, beta, threshold=t, ignore_index=-1).item() for t in thresholds
        ]
        return 100 * max(found)

    saliency = values_of(Saliency(), prediction[..., None], target)
    assert saliency["max_f"] == pytest.approx(best(math.sqrt(0.3), SALIENCY_THRESHOLDS), rel=8 * SINGLE)
    iou = classification.binary_jaccard_index(*pair, threshold=0.5, ignore_index=-1)
    assert saliency["iou"] == pytest.approx(100 * float(iou), rel=4 * SINGLE)
    ece = classification.binary_calibration_error(*pair, n_bins=15, ignore_index=-1)
    assert saliency["ece"] == pytest.approx(100 * float(ece), abs=GAPS)
    edges = values_of(Edges(), prediction[..., None], target)
    assert edges["ece"] == saliency["ece"]
    assert edges["max_f"] == pytest.approx(best(1.0, EDGE_THRESHOLDS), rel=8 * SINGLE)


def test_a_probability_of_the_threshold_is_predicted():
    """p >= t with us, p > t with torchmetrics."""
    from torchmetrics.functional.classification import binary_jaccard_index

    prediction, target = np.zeros((1, 4, 4, 1), np.float32), np.ones((1, 4, 4), np.float32)
    assert values_of(Saliency(), prediction, target)["iou"] == 100
    half = tensors(np.full((4, 4), 0.5), np.ones((4, 4), np.int64))
    assert binary_jaccard_index(*half, threshold=0.5) == 0


# ---------------------------------------------------------------- saliency, image by image


def sod():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module("py_sod_metrics")


class PySOD:
    """What pysodmetrics finds of images that are taken as they are."""

    def __init__(self):
        names = ["MAE", "Smeasure", "Emeasure", "WeightedFmeasure", "Fmeasure"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Fmeasure's successor adds handlers, and computes the same
            self.metrics = {name: getattr(sod(), name)() for name in names}

    def step(self, prediction, target, names=None, **options):
        for name in names or self.metrics:
            self.metrics[name].step(prediction, target, **{"normalize": False, **options})
        return self

    def found(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # means of those that no step was made for
            results = [metric.get_results() for metric in self.metrics.values()]
        return {name: value for result in results for name, value in result.items()}


OBJECT = {"mae": "mae", "sm": "s_measure", "wfm": "weighted_f"}


def picture(seed, shape=(41, 58)):
    """A prediction, half of it at 8-bit levels, and two blobs whose centre is not half-way between pixels."""
    rng = np.random.default_rng(seed)
    target = np.zeros(shape, bool)
    target[8:20, 10 + seed : 30] = True
    target[25:31, 35:50] = True
    target ^= rng.random(shape) < 0.02
    prediction = np.clip(0.6 * target + 0.4 * rng.random(shape), 0, 1)
    levels = rng.random(shape) < 0.5
    prediction[levels] = np.rint(255 * prediction[levels]) / 255
    return prediction, target


# Sums of up to PIXELS terms of one sign in float64, and their spacing(1) added to divisors of 1e-3 and more.
IMAGE = 1e3 * 16 * DOUBLE


@pytest.mark.parametrize(("seed", "shape"), [(0, (41, 58)), (1, (64, 51)), (2, (37, 53)), (3, (41, 58))])
def test_images_equal_pysodmetrics(seed, shape):
    prediction, target = picture(seed, shape)
    found, theirs = image_scores(prediction, target), PySOD().step(prediction, target).found()
    for name, ours in OBJECT.items():
        assert getattr(found, ours) == pytest.approx(theirs[name], rel=IMAGE), name
    assert found.adaptive_f == pytest.approx(theirs["fm"]["adp"], rel=IMAGE)
    np.testing.assert_allclose(found.f_curve, theirs["fm"]["curve"][::-1], rtol=IMAGE)
    # The E-measure's mean is over one pixel less with them, as in its authors' program.
    share = (target.size - 1) / target.size
    assert found.adaptive_e == pytest.approx(share * theirs["em"]["adp"], rel=IMAGE)
    np.testing.assert_allclose(found.e_curve, share * theirs["em"]["curve"][::-1], rtol=IMAGE)


@pytest.mark.parametrize("seed", range(2))
def test_ignored_pixels_are_as_if_cut_out(seed):
    """pysodmetrics is handed the other pixels in a row; for the S-measure, which sees places, a frame is ignored."""
    prediction, target = picture(seed)
    ignored = np.random.default_rng(seed).random(target.shape) < 0.3
    found = image_scores(prediction, target, ignored)
    row = prediction[~ignored][None], target[~ignored][None]
    theirs = PySOD().step(*row, names=["MAE", "Emeasure", "Fmeasure"]).found()
    assert found.mae == pytest.approx(theirs["mae"], rel=IMAGE)
    assert found.adaptive_f == pytest.approx(theirs["fm"]["adp"], rel=IMAGE)
    np.testing.assert_allclose(found.f_curve, theirs["fm"]["curve"][::-1], rtol=IMAGE)
    share = (row[0].size - 1) / row[0].size
    np.testing.assert_allclose(found.e_curve, share * theirs["em"]["curve"][::-1], rtol=IMAGE)
    frame = np.ones(target.shape, bool)
    inside = np.s_[3:-5, 2:-7]
    frame[inside] = False
    theirs = PySOD().step(prediction[inside], target[inside], names=["Smeasure"]).found()
    assert image_scores(prediction, target, frame).s_measure == pytest.approx(theirs["sm"], rel=IMAGE)


@pytest.mark.parametrize("full", [False, True])
def test_masks_that_are_empty_or_full(full):
    """F of an empty mask is 0 with pysodmetrics, and with us undefined, so that it counts in no mean."""
    prediction, target = picture(0)[0], np.full((41, 58), full)
    found, theirs = image_scores(prediction, target), PySOD().step(prediction, target).found()
    assert found.mae == pytest.approx(theirs["mae"], rel=IMAGE)
    assert found.s_measure == pytest.approx(theirs["sm"], rel=IMAGE)
    share = (target.size - 1) / target.size
    np.testing.assert_allclose(found.e_curve, share * theirs["em"]["curve"][::-1], rtol=IMAGE)
    if full:
        assert found.weighted_f == pytest.approx(theirs["wfm"], rel=IMAGE)
        assert found.adaptive_f == pytest.approx(theirs["fm"]["adp"], rel=IMAGE)
        np.testing.assert_allclose(found.f_curve, theirs["fm"]["curve"][::-1], rtol=IMAGE)
    else:
        assert theirs["wfm"] == theirs["fm"]["adp"] == np.max(theirs["fm"]["curve"]) == 0
        assert math.isnan(found.weighted_f)
        assert math.isnan(found.adaptive_f)
        assert np.isnan(found.f_curve).all()


def test_a_centre_half_way_between_pixels():
    """The S-measure's centre is rounded up, as by MATLAB; pysodmetrics rounds 4.5 to the even 4, and 5.5 to 6 as we."""
    rng = np.random.default_rng(0)
    for top, same in ((4, False), (5, True)):
        target = np.zeros((13, 17), bool)
        target[top : top + 2, 6:9] = True  # centre: top + 1/2, 7
        prediction = np.clip(0.5 * target + 0.5 * rng.random(target.shape), 0, 1)
        metric = sod().Smeasure()
        down, right = top + 2, 8  # rows and columns up to the centre, which is theirs too where it is rounded up
        regions = 0.0
        for rows in (slice(None, down), slice(down, None)):
            for columns in (slice(None, right), slice(right, None)):
                part = prediction[rows, columns], target[rows, columns]
                regions += metric.ssim(*part) * part[0].size / target.size
        found = image_scores(prediction, target).s_measure
        assert found == pytest.approx((metric.object(prediction, target) + regions) / 2, rel=IMAGE)
        assert (found == pytest.approx(metric.cal_sm(prediction, target), rel=IMAGE)) == same


def test_a_centre_in_the_last_row():
    """Two of the S-measure's four parts are empty: pysodmetrics takes means of nothing, we leave them out."""
    target = np.zeros((9, 11), bool)
    target[-1, 2:5] = True
    prediction = np.clip(0.5 * target + 0.4, 0, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert math.isnan(sod().Smeasure().cal_sm(prediction, target))
    assert 0 < image_scores(prediction, target).s_measure < 1


def test_pysodmetrics_stretches_predictions():
    """By default, to [0, 1]; ours are then those of the stretched prediction, not of the prediction."""
    prediction, target = picture(0)
    saved = np.rint(20 + 100 * prediction).astype(np.uint8)
    theirs = PySOD().step(saved, 255 * target.astype(np.uint8), normalize=True).found()
    stretched = (saved - float(saved.min())) / float(saved.max() - saved.min())
    for values, same in ((stretched, True), (saved / 255, False)):
        found = image_scores(values, target)
        assert all((getattr(found, ours) == pytest.approx(theirs[n], rel=1e-3)) == same for n, ours in OBJECT.items())


class FirstChannel(nn.Module):
    """The image's first channel as the logit: predictions are then known."""

    @nn.compact
    def __call__(self, image):
        return {"saliency": image[..., :1]}


def test_a_split_equals_pysodmetrics():
    """8-bit predictions of a network; the third image has no salient pixel, and counts as F = 0 with pysodmetrics."""
    number, empty = 4, 2
    pictures = [picture(seed) for seed in range(number)]
    pictures[empty] = pictures[empty][0], np.zeros((41, 58), bool)
    probability = np.clip(np.stack([p for p, _ in pictures]), 0.01, 0.99)
    logit = np.log(probability / (1 - probability)).astype(np.float32)
    target = np.stack([g for _, g in pictures])
    batch = {"image": np.repeat(logit[..., None], 3, -1), "saliency": target[..., None].astype(np.float32)}
    mesh = make_mesh({"data": -1}, jax.devices()[:1])
    found = saliency_scores(FirstChannel(), {}, [batch], mesh, task=Saliency(protocol="published"))

    theirs = PySOD()
    levels = np.floor(np.float32(255) * np.asarray(jax.nn.sigmoid(logit))).astype(np.float64)  # as the field saves them
    for one, g in zip(levels / 255, target, strict=True):
        theirs.step(one, g)
    theirs = theirs.found()
    pixels, defined = (target[0].size - 1) / target[0].size, number / (number - 1)
    expected = {
        "image_mae": theirs["mae"],
        "s_measure": 100 * theirs["sm"],
        "weighted_f": 100 * theirs["wfm"] * defined,
        "adaptive_f": 100 * theirs["fm"]["adp"] * defined,
        "image_max_f": 100 * theirs["fm"]["curve"].max() * defined,
        "image_mean_f": 100 * theirs["fm"]["curve"].mean() * defined,
        "adaptive_e": 100 * theirs["em"]["adp"] * pixels,
        "max_e": 100 * theirs["em"]["curve"].max() * pixels,
        "mean_e": 100 * theirs["em"]["curve"].mean() * pixels,
    }
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=IMAGE), name
