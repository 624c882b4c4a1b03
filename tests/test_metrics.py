"""Metrics of a data set: sums added on the host stay exact; delta_m has the right sign and refuses bad baselines."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from sgw_jax.evaluation.metrics import add_sums, delta_m, mean_gain
from sgw_jax.tasks import Depth, Edges, SemSeg

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
