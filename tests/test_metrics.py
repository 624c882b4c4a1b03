"""Metrics of a data set: sums added on the host stay exact; delta_m has the right sign and refuses bad baselines."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from sgw_jax.evaluation.metrics import add_sums, delta_m, delta_m_of_all, mean_gain, mean_ranks
from sgw_jax.tasks import Depth, Edges, Normals, SemSeg

TASKS = (SemSeg(), Depth(), Edges(name="contours"))
BASELINES = {"semseg": {"miou": 50.0}, "depth": {"rmse": 0.5}, "contours": {"max_f": 80.0}}


def with_value(task: str, metric: str, value: float) -> dict[str, dict[str, float]]:
    return {**BASELINES, task: {metric: value}}


def test_counts_do_not_overflow_and_errors_do_not_stall():
    batch = {"depth": {"pixels": jnp.int32(2**30), "squared": jnp.float32(2**24)}, "near": jnp.ones(2, jnp.int32)}
    total = None
    for _ in range(4):
        total = add_sums(total, batch)
    total = add_sums(
        total, {"depth": {"pixels": jnp.int32(1), "squared": jnp.float32(1)}, "near": jnp.zeros(2, jnp.int32)}
    )
    assert total["depth"]["pixels"] == 2**32 + 1  # int32 would have wrapped
    assert total["depth"]["squared"] == 2**26 + 1  # float32 would have lost the 1
    assert (total["depth"]["pixels"].dtype, total["depth"]["squared"].dtype) == (np.int64, np.float64)
    assert total["near"].tolist() == [4, 4]


def test_adding_changes_neither_argument():
    first = add_sums(None, {"n": np.ones(2, np.int32)})
    add_sums(first, {"n": np.ones(2, np.int32)})
    assert first["n"].tolist() == [1, 1]


def test_sums_that_do_not_match_are_refused():
    total = add_sums(None, {"n": np.zeros(3, np.int32)})
    with pytest.raises(ValueError, match="cannot be added to sums of structure"):
        add_sums(total, {"m": np.zeros(3, np.int32)})
    with pytest.raises(ValueError, match=r"shape \(1,\) cannot be added to sums of shape \(3,\)"):
        add_sums(total, {"n": np.zeros(1, np.int32)})


def test_delta_m_of_the_baselines_is_zero():
    assert delta_m(BASELINES, BASELINES, TASKS) == 0


@pytest.mark.parametrize(
    ("task", "metric", "value", "gain"),
    [
        ("semseg", "miou", 60.0, 20.0),  # higher is better
        ("semseg", "miou", 45.0, -10.0),
        ("depth", "rmse", 0.6, -20.0),  # lower is better
        ("depth", "rmse", 0.25, 50.0),
        ("contours", "max_f", 88.0, 10.0),  # found by the task's name, not its kind
    ],
)
def test_a_positive_delta_m_is_an_improvement(task, metric, value, gain):
    assert delta_m(with_value(task, metric, value), BASELINES, TASKS) == pytest.approx(gain / 3, rel=1e-12)


def test_delta_m_ignores_other_metrics_and_the_order_of_tasks():
    results = {"semseg": {"miou": 55.0, "pixel_accuracy": 1.0}, "depth": {"rmse": 0.55}, "contours": {"max_f": 80.0}}
    assert delta_m(results, BASELINES, TASKS) == delta_m(results, BASELINES, TASKS[::-1]) == pytest.approx(0, abs=1e-12)
    assert delta_m(results, BASELINES, TASKS[:1]) == pytest.approx(10, rel=1e-12)


def test_a_result_that_could_not_be_measured_shows():
    assert math.isnan(delta_m(with_value("depth", "rmse", math.nan), BASELINES, TASKS))


@pytest.mark.parametrize("baseline", [0.0, math.nan, math.inf])
def test_a_useless_baseline_is_refused(baseline):
    with pytest.raises(ValueError, match=r"baseline of task 'depth' has rmse = "):
        delta_m(BASELINES, with_value("depth", "rmse", baseline), TASKS)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="results have no task 'depth'"):
        delta_m({"semseg": {"miou": 1.0}}, BASELINES, TASKS)
    with pytest.raises(ValueError, match="baselines have no task 'semseg'"):
        delta_m(BASELINES, {}, TASKS)
    with pytest.raises(ValueError, match="baselines of task 'depth' have no 'rmse'"):
        delta_m(BASELINES, with_value("depth", "abs_rel", 1.0), TASKS)
    with pytest.raises(ValueError, match="there are no tasks"):
        delta_m(BASELINES, BASELINES, ())


@pytest.mark.parametrize("baseline", [0.0, math.nan, math.inf])
def test_the_mean_gain_is_delta_m_where_it_is_defined(baseline):
    results = with_value("semseg", "miou", 44.0)
    assert mean_gain(results, BASELINES, TASKS) == delta_m(results, BASELINES, TASKS)
    without = [task for task in TASKS if task.name != "depth"]
    there = with_value("depth", "rmse", baseline)
    assert mean_gain(results, there, TASKS) == delta_m(results, there, without)
    assert math.isnan(mean_gain(results, there, [task for task in TASKS if task.name == "depth"]))


MTAN = {
    "semseg": ("miou", "pixel_accuracy"),
    "depth": ("abs_err", "abs_rel"),
    "normals": ("mean", "median", "within_11.25", "within_22.5", "within_30"),
}
MTAN_TASKS = (SemSeg(num_classes=13), Depth(), Normals())
LOWER = {"abs_err", "abs_rel", "mean", "median"}


def values_of(seed):
    rng = np.random.default_rng(seed)
    return {task: {name: float(rng.uniform(1, 50)) for name in names} for task, names in MTAN.items()}


def test_delta_m_of_all_is_the_mean_over_tasks_of_the_mean_over_metrics():
    results, baselines = values_of(0), values_of(1)
    by_task = [
        np.mean([(-1) ** (n in LOWER) * (results[t][n] - baselines[t][n]) / baselines[t][n] for n in names])
        for t, names in MTAN.items()
    ]
    found = delta_m_of_all(results, baselines, MTAN_TASKS, MTAN)
    assert found == pytest.approx(100 * np.mean(by_task), rel=1e-12)
    headlines = {task.name: (task.metric,) for task in TASKS}
    better = with_value("depth", "rmse", 0.25)
    assert delta_m_of_all(better, BASELINES, TASKS, headlines) == delta_m(better, BASELINES, TASKS)
    contours = {"contours": {"max_f": 88.0, "loss": 0.5}}, {"contours": {"max_f": 80.0, "loss": 1.0}}
    assert delta_m_of_all(*contours, TASKS[2:]) == pytest.approx((10 + 50) / 2, rel=1e-12)  # all by default
    assert math.isnan(delta_m_of_all(with_value("depth", "rmse", math.nan), BASELINES, TASKS, headlines))


def test_mean_ranks_by_sorting():
    methods = {name: values_of(seed) for seed, name in enumerate(("one", "two", "three", "four"))}
    expected = {name: [] for name in methods}
    for task, names in MTAN.items():
        for name in names:
            order = sorted(methods, key=lambda m: methods[m][task][name], reverse=name not in LOWER)
            for rank, method in enumerate(order, 1):
                expected[method].append(rank)
    found = mean_ranks(methods, MTAN_TASKS, MTAN)
    assert found == {name: pytest.approx(np.mean(ranks), rel=1e-12) for name, ranks in expected.items()}
    assert sum(found.values()) == pytest.approx(4 * 5 / 2)


def test_ties_share_their_ranks_and_nan_is_last():
    depth = (Depth(),)
    methods = {name: {"depth": {"rmse": value}} for name, value in zip("abcd", (0.5, 0.4, 0.5, math.nan), strict=True)}
    found = mean_ranks(methods, depth)
    assert {name: found[name] for name in "abc"} == {"a": 2.5, "b": 1, "c": 2.5}
    assert math.isnan(found["d"])


def test_what_cannot_be_ranked_is_named():
    with pytest.raises(ValueError, match="mean_ranks: there are no methods"):
        mean_ranks({}, TASKS)
    with pytest.raises(ValueError, match="mean_ranks: there are no tasks"):
        mean_ranks({"a": BASELINES}, ())
    with pytest.raises(ValueError, match="mean_ranks: a of task 'depth' have no 'rmse'"):
        mean_ranks({"a": {"depth": {}}}, (Depth(),))
    with pytest.raises(ValueError, match=r"'depth' does not say whether a larger 'beauty' is better.*'rmse'"):
        delta_m_of_all(BASELINES, BASELINES, TASKS[1:2], {"depth": ["beauty"]})
    with pytest.raises(ValueError, match="metrics name none of task 'depth'"):
        delta_m_of_all(BASELINES, BASELINES, TASKS[1:2], {})
    with pytest.raises(ValueError, match="delta_m_of_all: the baseline of task 'depth' has rmse = 0"):
        delta_m_of_all(BASELINES, with_value("depth", "rmse", 0.0), TASKS[1:2], {"depth": ["rmse"]})
