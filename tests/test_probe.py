"""The reference predictors: the constant is what it should be, the linear probe finds what is linear and only that."""

import numpy as np
import pytest

from sgw_jax.evaluation import probe
from sgw_jax.tasks import TASKS, Depth, Edges, HumanParts, Normals, Saliency, SemSeg

HEIGHT, WIDTH = 8, 12
EPS = float(np.finfo(np.float32).eps)


def batches(number=3, size=2, seed=0):
    """Depth is linear in colour and position, the rest is random with known frequencies; a tenth is ignored."""
    rng = np.random.default_rng(seed)
    shape = (size, HEIGHT, WIDTH)
    x, y = np.linspace(-1, 1, WIDTH), np.linspace(-1, 1, HEIGHT)[:, None]
    for _ in range(number):
        image = rng.normal(size=(*shape, 3)).astype(np.float32)
        depth = 20 + image @ np.array([1, -2, 0.5]) + 1.5 * x - y
        normals = np.array([0.1, -0.2, -1]) + 0.3 * rng.normal(size=(*shape, 3))
        batch = {
            "semseg": rng.choice(3, shape, p=[0.2, 0.7, 0.1]).astype(np.int32),
            "depth": depth[..., None].astype(np.float32),
            "normals": (normals / np.linalg.norm(normals, axis=-1, keepdims=True)).astype(np.float32),
            "edges": (rng.random((*shape, 1)) < 0.15).astype(np.float32),
            "saliency": (rng.random((*shape, 1)) < 0.4).astype(np.float32),
            "human_parts": rng.integers(0, 7, shape).astype(np.int32),
        }
        ignored = rng.random(shape) < 0.1
        for name, target in batch.items():
            target[ignored] = TASKS[name]().target["fill"]
        yield {"image": image, **batch}


TASK_LIST = (SemSeg(num_classes=3), Depth(), Normals(), Edges(), Saliency(), HumanParts())


def test_the_constant_is_the_mean_of_every_target():
    fitted = probe.fit(batches(), TASK_LIST, "constant", stride=1)
    everything = list(batches())
    for task in TASK_LIST:
        target = np.concatenate([b[task.name] for b in everything])
        if task.target["kind"] == "labels":
            labels = target[target != 255]
            expected = np.bincount(labels, minlength=task.channels) / labels.size
        elif task.name == "normals":
            expected = target[(target != 0).any(-1)].astype(np.float64).mean(0)
        else:
            expected = (
                target[target > 0 if task.name == "depth" else target >= 0].astype(np.float64).mean(0, keepdims=True)
            )
        # float64 sums of float32 numbers: nothing is lost but the last digits of the division.
        np.testing.assert_allclose(fitted.weights[task.name][0], expected, rtol=1e-12)


def test_the_constant_predicts_the_majority_and_the_mean():
    fitted = probe.fit(batches(), TASK_LIST, "constant", stride=1)
    found = probe.evaluate(fitted, batches(), TASK_LIST)
    everything = list(batches())
    labels = np.concatenate([b["semseg"] for b in everything])
    depth = np.concatenate([b["depth"] for b in everything]).astype(np.float64)
    depth = depth[depth > 0]
    majority = np.mean(labels[labels != 255] == 1)
    assert found["semseg"]["pixel_accuracy"] == pytest.approx(100 * majority, rel=1e-12)
    assert found["semseg"]["miou"] == pytest.approx(100 * majority / 3, rel=1e-12)
    # A float32 sum of 576 squares in [0, 100]: at most 576 roundings.
    assert found["depth"]["rmse"] == pytest.approx(depth.std(), rel=(576 + 16) * EPS)
    share = fitted.weights["saliency"][0, 0]  # everything is called salient: P = share, R = 1
    assert found["saliency"]["max_f"] == pytest.approx(100 * 1.3 * share / (0.3 * share + 1), rel=1e-9)


def test_the_linear_probe_finds_a_linear_map_and_beats_the_constant_nowhere_else():
    constant, linear = (
        probe.evaluate(probe.fit(batches(8), TASK_LIST, f, stride=1), batches(8, seed=1), TASK_LIST)
        for f in ("constant", "linear")
    )
    assert linear["depth"]["rmse"] < 32 * EPS * 20  # the rounding of a depth of 20 and of six products
    assert constant["depth"]["rmse"] > 1
    # There is nothing else to find: five more weights fitted to some 1382 pixels cost about 5 / 1382, less than 1 %.
    assert abs(linear["normals"]["mean"] - constant["normals"]["mean"]) < 1
    assert abs(linear["semseg"]["pixel_accuracy"] - constant["semseg"]["pixel_accuracy"]) < 1


def test_the_features_of_colour_and_position():
    image = next(batches(1))["image"]
    phi = probe.linear_features(image[0], (HEIGHT, WIDTH))
    assert phi.shape == (HEIGHT, WIDTH, 6)
    np.testing.assert_array_equal(phi[..., 1:4], image[0])
    assert phi[0, 0, [0, 4, 5]].tolist() == [1, -1, -1]
    assert phi[-1, 0, [0, 4, 5]].tolist() == [1, -1, 1]  # x to the right, y down
    assert phi[0, -1, [0, 4, 5]].tolist() == [1, 1, -1]
    inside = probe.linear_features(image[0], (5, 7))  # of an image in the corner of a larger canvas
    np.testing.assert_array_equal(inside[:5, :7], probe.linear_features(image[0, :5, :7], (5, 7)))


def test_a_coarser_sample_gives_the_same_linear_map():
    dense, sparse = (probe.fit(batches(8), (Depth(),), "linear", stride=s).weights["depth"] for s in (1, 4))
    # The targets were rounded to float32, half an ulp of 20; both fits average many of them.
    np.testing.assert_allclose(sparse, dense, atol=20 * EPS)


def test_a_task_without_labels_and_a_flat_image_do_not_break_the_fit():
    def flat():
        for batch in batches(2):
            yield {**batch, "image": np.zeros_like(batch["image"]), "edges": np.full_like(batch["edges"], -1)}

    fitted = probe.fit(flat(), TASK_LIST, "linear", stride=1)
    assert all(np.isfinite(w).all() for w in fitted.weights.values())
    np.testing.assert_array_equal(fitted.weights["edges"], 0)
    np.testing.assert_allclose(fitted.weights["depth"][1:4], 0, atol=1e-9)
    assert np.isnan(probe.evaluate(fitted, flat(), TASK_LIST)["edges"]["max_f"])


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"features are 'quadratic'.*'constant', 'linear'"):
        probe.fit(batches(), TASK_LIST, "quadratic")
    with pytest.raises(ValueError, match="stride is 0"):
        probe.fit(batches(), TASK_LIST, stride=0)
    with pytest.raises(ValueError, match="no batches to fit"):
        probe.fit(iter(()), TASK_LIST)
    with pytest.raises(ValueError, match="no batches to evaluate"):
        probe.evaluate(probe.Probe("constant", {}), iter(()), TASK_LIST)
