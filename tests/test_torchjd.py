"""Our aggregators beside TorchJD's, where TorchJD is right: generic and conflicting gradients of ordinary size."""

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
