"""Our aggregators beside TorchJD's, where it is right: gradients generic, conflicting, dependent and short."""

import functools

import jax
import numpy as np
import pytest

from sgw_jax.multi_objective import weights

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")]  # cvxpy
JACOBIANS = {}
RNG = np.random.default_rng(0)
for tasks in (2, 3, 5, 8):
    generic = RNG.normal(size=(tasks, 24)).astype(np.float32)
    JACOBIANS[f"generic{tasks}"] = generic
    JACOBIANS[f"apart{tasks}"] = (generic - 1.1 * generic.mean(0)).astype(np.float32)


def pairs(tasks):
    """name: (our weights, TorchJD's aggregator, tolerance relative to the longest gradient).

    Tolerances: both regularise quadratic programs, we the cosines by 1e-5, they the trace-normalised Gramian by 1e-4;
    an update moves by about the root of it. MGDA by Frank-Wolfe is 4e-3 of max |g|^2 off, so 0.1 of |g|.
    """
    import torchjd.aggregation as theirs

    aligned_median = functools.partial(weights.aligned_mtl, scale="median")
    return {
        "upgrad": (weights.upgrad, theirs.UPGrad(), 2e-2),
        "dualproj": (weights.dualproj, theirs.DualProj(), 2e-2),
        "cagrad": (weights.cagrad, theirs.CAGrad(c=0.5), 5e-3),
        "mgda": (weights.mgda, theirs.MGDA(epsilon=1e-5, max_iters=20_000), 0.1),
        "imtl_g": (weights.imtl_g, theirs.IMTLG(), 5e-3),
        "aligned_mtl": (weights.aligned_mtl, theirs.AlignedMTL(), 1e-3),
        "aligned_median": (aligned_median, theirs.AlignedMTL(scale_mode="median"), 1e-3),
        "config": (weights.config_, theirs.ConFIG(), 5e-3),
        "nash_mtl": (weights.nash_mtl, theirs.NashMTL(n_tasks=tasks), 5e-3),
    }


NAMES = ["upgrad", "dualproj", "cagrad", "mgda", "imtl_g", "aligned_mtl", "aligned_median", "config", "nash_mtl"]


# Near stationarity the sum of IMTL-G's weights is ours to bound, and TorchJD's Nash-MTL stops early: its updates on
# "apart3" and "apart5" conflict with a task, where ours solves G w = 1 / w to 1e-4 (tests/test_weights.py).
CASES = [(n, case) for n in NAMES for case in JACOBIANS if case[:5] != "apart" or n not in ("imtl_g", "nash_mtl")]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_updates_agree(name, case):
    import torch

    jacobian = JACOBIANS[case]
    function, aggregator, tolerance = pairs(len(jacobian))[name]
    found = np.asarray(jax.jit(function)(jacobian @ jacobian.T), np.float64) @ jacobian
    expected = aggregator(torch.from_numpy(jacobian)).numpy()
    size = np.linalg.norm(jacobian, axis=1).max()
    assert np.linalg.norm(found - expected) <= tolerance * max(size, np.linalg.norm(expected)), (found, expected)


# ---------------------------------------------------------------- dependent, duplicated and short rows

# Of small integers: their sums and Gramians are exact in float32, so that dependent rows are exactly so. TorchJD
# computes in float64, where it tells a direction from none.
SMALL = np.random.default_rng(1).integers(-8, 9, size=(3, 24)).astype(np.float64)
DEPENDENT = {
    "equal": np.stack([SMALL[0], SMALL[1], SMALL[0]]),
    "sum": np.stack([SMALL[0], SMALL[1], SMALL[0] + SMALL[1]]),
    "sum of four": np.stack([SMALL[0], SMALL[1], SMALL[0] + SMALL[1], SMALL[2]]),
}
ROUNDING = float(np.finfo(np.float32).eps)


def least_cosine(jacobian):
    """The least eigenvalue other than 0 of the cosines."""
    units = jacobian / np.linalg.norm(jacobian, axis=1, keepdims=True)
    values = np.linalg.eigvalsh(units @ units.T)
    return values[values > 1e-9].min()


def both(function, aggregator, jacobian):
    import torch

    gramian = (jacobian @ jacobian.T).astype(np.float32)
    return np.asarray(jax.jit(function)(gramian), np.float64) @ jacobian, aggregator(torch.from_numpy(jacobian)).numpy()


@pytest.mark.parametrize("case", DEPENDENT)
@pytest.mark.parametrize("name", ["mgda", "config", "imtl_g", "aligned_mtl"])
def test_updates_of_dependent_rows_agree(name, case):
    """Tolerances: Frank-Wolfe's k-th value, |update|^2, is within 16 max |g|^2 / k of the least. Our eps of 1e-5 on the
    cosines changes a solution by that over their least eigenvalue: in direction, length and sum. The rotations of
    Aligned-MTL, some tens, round alone.
    """
    jacobian = DEPENDENT[case]
    function, aggregator, _ = pairs(len(jacobian))[name]
    found, expected = both(function, aggregator, jacobian)
    longest = np.linalg.norm(jacobian, axis=1).max()
    size = np.linalg.norm(expected)
    tolerance = {"mgda": (16 / 20_000) ** 0.5 * longest, "aligned_mtl": 100 * ROUNDING * size}
    allowed = tolerance.get(name, 4 * 1e-5 / least_cosine(jacobian) * size)
    assert np.linalg.norm(found - expected) <= allowed, (found, expected)


@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
@pytest.mark.parametrize("shorter", [7, 13, 20])
def test_aligned_mtl_keeps_a_short_row(shorter, scale):
    """One row 2^7 to 2^20 times shorter than the others; up to 2^13 beside two that are equal too."""
    import torch
    import torchjd.aggregation as theirs

    function, aggregator = functools.partial(weights.aligned_mtl, scale=scale), theirs.AlignedMTL(scale_mode=scale)
    short = SMALL * np.array([[1], [1], [0.5**shorter]])
    for jacobian in (short, short[[0, 1, 2, 1]])[: 2 if shorter < 20 else 1]:
        found, expected = both(function, aggregator, jacobian)
        assert np.linalg.norm(found - expected) <= 100 * ROUNDING * np.linalg.norm(expected), (found, expected)
    # In float32 TorchJD takes an eigenvalue of G below 3.6e-7 of the largest for none, and the short row is lost.
    narrow = aggregator(torch.from_numpy(short.astype(np.float32))).numpy()
    lost = np.linalg.norm(narrow - both(function, aggregator, short)[1]) > 0.1 * np.linalg.norm(narrow)
    assert lost == (shorter > 10)
