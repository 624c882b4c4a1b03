"""Weights of every Gramian method against float64 references on hard Jacobians, and properties that all must have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import nnls

from sgw_jax.multi_objective import weights
from sgw_jax.multi_objective._pcgrad import orders
from sgw_jax.multi_objective._solvers import interior_point, inverse, non_negative_qp

EPS32 = float(np.finfo(np.float32).eps)
SIZE = 24  # numbers in a gradient
COUNTS = [2, 3, 5, 8]
ALL_COUNTS = [pytest.param(n, marks=() if n in COUNTS else pytest.mark.slow) for n in range(2, 9)]
SEEDS = 3
KEY = jax.random.key(3)
# Cosines are sums of 24 products in float32, divided by two norms.
COSINE_ERROR = 32 * EPS32


def families(tasks):
    """{name: (seeds, tasks, SIZE)} Jacobians in float32."""
    rng = np.random.default_rng(tasks)

    def draw():
        return rng.normal(size=(SEEDS, tasks, SIZE))

    generic = draw()
    apart = draw()
    apart -= 1.3 * apart.mean(1, keepdims=True)  # the sum points against every row
    collinear = draw()[:, :1] + 1e-3 * draw()
    duplicate = draw()
    duplicate[:, 1] = duplicate[:, 0]
    zero = draw()
    zero[:, -1] = 0
    stationary = draw()
    stationary[:, -1] = -np.einsum("st,stp->sp", rng.uniform(0.5, 1.5, (SEEDS, tasks - 1)), stationary[:, :-1])
    tiny = draw() * 1e-6 / SIZE**0.5
    scaled = draw() * 10 ** np.linspace(-3, 3, tasks)[:, None]
    opposed = draw()
    opposed[:, 1] = -opposed[:, 0] + 0.01 * opposed[:, 1]
    found = {
        "generic": generic,
        "apart": apart,
        "collinear": collinear,
        "duplicate": duplicate,
        "zero": zero,
        "stationary": stationary,
        "tiny": tiny,
        "scaled": scaled,
        "opposed": opposed,
    }
    return {name: value.astype(np.float32) for name, value in found.items()}


def gram(jacobian):
    wide = jacobian.astype(np.float64)
    return wide @ wide.T


def gram32(jacobian):
    """In float32, as the library computes it."""
    return np.einsum("...ip,...jp->...ij", jacobian, jacobian).astype(np.float32)


def regular(matrix, eps):
    """Cosines with eps on the diagonal, and norms, of the rows that are not zero."""
    norms = np.sqrt(np.diag(matrix))
    return matrix / np.outer(norms, norms) + eps * np.eye(len(norms)), norms


def reduced(function):
    """A reference for Jacobians without zero rows, for those with some: zero rows get weight 0."""

    @functools.wraps(function)
    def run(matrix, *args, **options):
        kept = np.diag(matrix) > 0
        found = np.zeros(len(matrix))
        found[kept] = function(matrix[np.ix_(kept, kept)], *args, share=kept.mean(), **options)
        return found

    return run


def exact_qp(matrix, linear):
    """argmin_{x >= 0} x' A x / 2 + b' x by SciPy's non-negative least squares on a factor of A."""
    factor = np.linalg.cholesky(matrix)
    return nnls(factor.T, -np.linalg.solve(factor, linear), maxiter=1000)[0]


@reduced
def upgrad(matrix, share):
    cosines, norms = regular(matrix, 1e-5)
    preference = share / len(norms)  # zero rows keep their part
    total = sum(
        preference * norms[i] * (np.eye(len(norms))[i] + exact_qp(cosines, cosines[i])) for i in range(len(norms))
    )
    return total / norms


@reduced
def dualproj(matrix, share):
    cosines, norms = regular(matrix, 1e-5)
    wanted = share / len(norms) * norms
    return (wanted + wanted.max() * exact_qp(cosines, cosines @ wanted / wanted.max())) / norms


def mgda(matrix):
    if np.any(np.diag(matrix) == 0):
        return (np.diag(matrix) == 0).astype(float)
    cosines, norms = regular(matrix, 1e-6)
    found = exact_qp(cosines, -norms.min() / norms) / norms
    return found / found.sum()


@reduced
def nash(matrix, share, alpha=1.0, max_norm=1.0):
    """Newton on log w in float64, from many damped steps: C a = |g|^(1/alpha - 1) a^(-1/alpha)."""
    cosines, norms = regular(matrix, 1e-6)
    gain = norms ** (1 / alpha - 1)
    a = (gain / np.diag(cosines)) ** (1 / (1 + 1 / alpha))
    for _ in range(3000):
        residual = cosines @ a - gain * a ** (-1 / alpha)
        slope = cosines + np.diag(gain / alpha * a ** (-1 / alpha - 1))
        step = np.linalg.solve(slope, residual)
        a = a - step * min(1.0, 0.5 / max(np.max(np.abs(step) / a), 1e-30))
    assert np.allclose(cosines @ a, gain * a ** (-1 / alpha), rtol=1e-8)
    length = np.sqrt(a @ cosines @ a)
    return a / norms * (min(1, max_norm / length) if max_norm else 1)


def fairgrad(matrix):
    return nash(matrix, alpha=2.0, max_norm=None)


@reduced
def imtl_g(matrix, share):
    cosines, norms = regular(matrix, 1e-5)
    found = np.linalg.solve(cosines, np.ones(len(norms))) / norms
    found = found / np.abs(found).max()
    divisor = np.sign(found.sum()) * max(abs(found.sum()), 0.05 * np.abs(found).sum())
    return found / divisor


@reduced
def config_(matrix, share):
    cosines, norms = regular(matrix, 1e-5)
    ones = np.ones(len(norms))
    found = np.linalg.solve(cosines, ones)
    return found * np.sum(norms * (cosines @ found)) / (found @ ones) / norms


@reduced
def aligned_mtl(matrix, share):
    values, vectors = np.linalg.eigh(matrix)
    kept = values > 1e-5 * values.max()
    factors = np.where(kept, np.sqrt(values[kept].min() / np.where(kept, values, 1)), 0)
    return vectors @ (factors * (vectors.T @ np.full(len(values), share / len(values))))


def pcgrad(matrix, jacobian):
    """On the gradients themselves, in the orders that the key gives."""
    rows, order = jacobian.astype(np.float64), np.asarray(orders(KEY, len(jacobian)))
    coefficients = np.eye(len(rows))
    for i in range(len(rows)):
        for j in order[i]:
            current = coefficients[i] @ rows
            if i != j and rows[j] @ rows[j] > 0 and rows[i] @ rows[i] > 0 and current @ rows[j] < 0:
                coefficients[i, j] -= current @ rows[j] / (rows[j] @ rows[j])
    return coefficients.sum(0)


def gradvac(matrix, jacobian):
    """The first step: all targets are 0; they move within the step."""
    rows, order = jacobian.astype(np.float64), np.asarray(orders(KEY, len(jacobian)))
    coefficients = np.eye(len(rows))
    for i in range(len(rows)):
        for j in order[i]:
            if i == j or not rows[j].any() or not rows[i].any():
                continue
            current = coefficients[i] @ rows
            length, other = np.linalg.norm(current), np.linalg.norm(rows[j])
            cosine = current @ rows[j] / length / other
            if cosine < 0:
                coefficients[i, j] -= length * cosine / other
    return coefficients.sum(0)


REFERENCES = {
    "upgrad": (weights.upgrad, upgrad, 1e-5),
    "dualproj": (weights.dualproj, dualproj, 1e-5),
    "mgda": (weights.mgda, mgda, 1e-6),
    "nash_mtl": (weights.nash_mtl, nash, 1e-6),
    "fairgrad": (functools.partial(weights.fairgrad, alpha=2.0), fairgrad, 1e-6),
    "imtl_g": (weights.imtl_g, imtl_g, 1e-5),
    "config": (weights.config_, config_, 1e-5),
    "aligned_mtl": (weights.aligned_mtl, aligned_mtl, 1e-5),
    "pcgrad": (functools.partial(weights.pcgrad, key=KEY), pcgrad, 1.0),
    "gradvac": (lambda g: weights.gradvac(g, jnp.zeros_like(g), key=KEY)[0], gradvac, 1.0),
}


@functools.cache
def found_weights(name, tasks):
    """One compilation for all Jacobians of a number of tasks."""
    stacked = np.concatenate(list(families(tasks).values()))
    return np.asarray(jax.jit(jax.vmap(REFERENCES[name][0]))(gram32(stacked))), stacked


@pytest.mark.parametrize("tasks", ALL_COUNTS)
@pytest.mark.parametrize("name", REFERENCES)
def test_against_float64(name, tasks):
    """The update of float32 weights beside that of the reference.

    A convex problem whose matrix A is off by d has its solution off by at most d |x| / sqrt(eps) in the norm of A, the
    length of the update, where eps is A's least eigenvalue and x is in units of the gradients' lengths; d is the error
    of the cosines, and rounding in the solver adds as much again for each of a few operations.
    """
    _, reference, eps = REFERENCES[name]
    found, jacobians = found_weights(name, tasks)
    names = [family for family in families(tasks) for _ in range(SEEDS)]
    for family, w, jacobian in zip(names, found, jacobians, strict=True):
        if name == "aligned_mtl" and family in ("stationary", "collinear", "duplicate", "scaled", "opposed"):
            continue  # the rank is a matter of rounding: see below
        matrix = gram(jacobian)
        arguments = (matrix, jacobian) if name in ("pcgrad", "gradvac") else (matrix,)
        expected = reference(*arguments)
        wide = jacobian.astype(np.float64)
        sizes = np.linalg.norm(wide, axis=1)
        error = np.linalg.norm((w - expected) @ wide)
        reach = np.linalg.norm(np.abs(expected) * sizes) + np.linalg.norm(sizes) * (name in ("upgrad", "dualproj"))
        assert np.all(np.isfinite(w)), (family, w)
        assert error <= 8 * tasks * COSINE_ERROR / np.sqrt(eps) * reach, (family, w, expected, error / reach)


@pytest.mark.parametrize("tasks", ALL_COUNTS)
def test_cagrad_is_optimal(tasks):
    """No reference needed: for d within the ball, min_i <g_i, d> <= w' G p + c |g_0| |g_w| for every w of the simplex;
    equality shows that both are optimal. Cosines are regularised by 1e-5, so values may differ by sqrt(1e-5) of
    |g|; the square of the length of d - g_0 is off by the error of the cosines times that of its terms."""
    stacked = np.concatenate(list(families(tasks).values()))
    found = np.asarray(jax.jit(jax.vmap(weights.cagrad))(gram32(stacked)), np.float64)
    for w, jacobian in zip(found, stacked.astype(np.float64), strict=True):
        assert np.all(np.isfinite(w))
        mean = np.full(tasks, 1 / tasks)
        extra = w - mean
        matrix = jacobian @ jacobian.T
        norms = np.sqrt(np.diag(matrix))
        radius = 0.5 * np.sqrt(mean @ matrix @ mean)
        assert extra.min() >= -1e-6 * np.abs(w).max()
        length = np.sqrt(max(extra @ matrix @ extra, 0))
        terms = np.linalg.norm(extra * norms)
        longer = tasks * COSINE_ERROR * (terms**2 + np.sum((mean * norms) ** 2)) / max(radius, 1e-30)
        assert length <= radius * (1 + 8 * EPS32) + longer
        if np.any(norms == 0) or extra.sum() == 0:
            continue  # <g_i, d> = 0 for the zero row, whatever d is
        share = extra / extra.sum()
        upper = share @ matrix @ mean + radius * np.sqrt(max(share @ matrix @ share, 0))
        lower = np.min(matrix @ w)
        assert lower <= upper + norms.max() * (longer + 8 * EPS32 * np.linalg.norm(w * norms))
        assert upper - lower <= norms.max() * (4 * np.sqrt(1e-5) * terms + longer)


def test_aligned_mtl_where_the_rank_is_clear():
    """Duplicate rows span one direction less: what is left is equalised, and the update is what the reference finds on
    the gradients' singular vectors."""
    rng = np.random.default_rng(0)
    jacobian = rng.normal(size=(4, SIZE)).astype(np.float32)
    jacobian[1] = jacobian[0]
    w = np.asarray(weights.aligned_mtl(gram32(jacobian)))
    left, values, right = np.linalg.svd(jacobian.astype(np.float64), full_matrices=False)
    kept = values > 1e-3 * values[0]
    assert kept.sum() == 3
    expected = values[kept].min() * np.full(4, 0.25) @ left[:, kept] @ right[kept]
    np.testing.assert_allclose(w @ jacobian, expected, atol=64 * EPS32 * values[0] / 1e-2)
    for scale, common in (("median", np.sort(values[kept])[1]), ("rmse", np.sqrt(np.mean(values[kept] ** 2)))):
        w = np.asarray(weights.aligned_mtl(gram32(jacobian), scale=scale))
        np.testing.assert_allclose(
            w @ jacobian, expected * common / values[kept].min(), atol=64 * EPS32 * values[0] / 1e-2
        )


# ---- properties of every member ------------------------------------------------------------------------------------

LOSSES = np.array([0.5, 2.0, 1.0, 3.0], np.float32)
MEMBERS = {
    **{name: function for name, (function, _, _) in REFERENCES.items() if name not in ("pcgrad", "gradvac")},
    "cagrad": weights.cagrad,
    "cagrad_rescaled": functools.partial(weights.cagrad, c=0.8, rescale=True),
    "equal": weights.equal,
    "aligned_median": functools.partial(weights.aligned_mtl, scale="median"),
    "mgda_l2": functools.partial(weights.mgda, normalisation="l2"),
    "pcgrad": functools.partial(weights.pcgrad, key=KEY),
    "gradvac": lambda g, **o: weights.gradvac(g, jnp.zeros_like(g), key=KEY, **o)[0],
    "db_mtl": lambda g, **o: weights.db_mtl(g, losses=jnp.asarray(LOSSES[: len(g)]), **o),
}
BY_LOSS = {"db_mtl"}
RANDOM = {"pcgrad", "gradvac"}
CONFLICT_FREE = {"upgrad": 1e-5, "dualproj": 1e-5, "mgda": 1e-6, "mgda_l2": 1e-6, "nash_mtl": 1e-6, "fairgrad": 1e-6}
# How the update changes when every gradient is c times as large: c to this power.
DEGREE = dict.fromkeys(MEMBERS, 1.0) | {"nash_mtl": 0.0, "fairgrad": -1 / 3, "mgda_l2": 0.0}


def close_updates(found, expected, jacobian, message=""):
    """Equal to the accuracy of weights in float32 at the least regularisation used, 1e-6."""
    wide = jacobian.astype(np.float64)
    reach = np.linalg.norm(np.abs(expected) * np.linalg.norm(wide, axis=-1)) + np.linalg.norm(wide)
    error = np.linalg.norm((np.asarray(found) - np.asarray(expected)) @ wide)
    assert error <= 16 * len(wide) * COSINE_ERROR / 1e-3 * reach, message


@pytest.mark.parametrize("name", MEMBERS)
def test_properties(name):
    member = jax.jit(MEMBERS[name])
    for family in ("generic", "apart", "scaled", "tiny"):
        for jacobian in families(4)[family]:
            matrix = gram32(jacobian)
            base = np.asarray(member(matrix))
            assert base.shape == (4,)
            assert base.dtype == np.float32
            if name not in RANDOM | BY_LOSS:  # orders and losses belong to places
                order = np.array([2, 0, 3, 1])
                permuted = member(matrix[np.ix_(order, order)])
                close_updates(permuted, base[order], jacobian[order], f"{family}: permuted")
            for factor in (1e-3, 1e3) if family == "generic" else ():
                larger = np.asarray(member(matrix * np.float32(factor**2)))
                power = DEGREE[name] - 1
                close_updates(larger / factor**power, base, jacobian, f"{family}: {factor} times as large")


@pytest.mark.parametrize("name", MEMBERS)
def test_a_masked_task_is_as_if_it_were_not_there(name):
    member = jax.jit(MEMBERS[name])
    tasks = 3 if name in RANDOM else 4  # of two tasks that are left, the order does not matter
    for jacobian in families(tasks)["apart"]:
        for gone in range(tasks):
            mask = np.arange(tasks) != gone
            if name in BY_LOSS and gone != tasks - 1:
                continue  # the others' losses would move up
            found = np.asarray(member(gram32(jacobian), mask=mask))
            assert found[gone] == 0
            close_updates(found[mask], member(gram32(jacobian[mask])), jacobian[mask], str(gone))
        nobody = np.asarray(member(gram32(jacobian), mask=np.zeros(tasks, bool)))
        assert np.array_equal(nobody, np.zeros(tasks))


@pytest.mark.parametrize("name", MEMBERS)
def test_one_task_alone_keeps_its_gradient(name):
    """w = 1; Nash-MTL's update has length 1, FairGrad's |g|^(-1/3) at alpha 2, DB-MTL's is of log L."""
    jacobian = np.random.default_rng(0).normal(size=(1, SIZE)).astype(np.float32)
    found = float(MEMBERS[name](gram32(jacobian))[0])
    length = float(np.linalg.norm(jacobian))
    expected = {"nash_mtl": 1 / length, "fairgrad": length ** (-4 / 3), "db_mtl": 1 / LOSSES[0], "mgda_l2": 1 / length}
    rescaled = 1.8 / 1.64 if name == "cagrad_rescaled" else 1.5 if name == "cagrad" else 1.0
    assert found == pytest.approx(expected.get(name, rescaled), rel=1e-4)


@pytest.mark.parametrize("name", CONFLICT_FREE)
def test_no_conflict_where_it_is_promised(name):
    """<g_i, d> >= 0 for all i, up to the regularisation: eps times the weights in units of the gradients' lengths."""
    for tasks in (2, 3, 5, 8):
        stacked = np.concatenate(
            [families(tasks)[family] for family in ("generic", "apart", "scaled", "tiny", "opposed")]
        )
        found = np.asarray(jax.jit(jax.vmap(MEMBERS[name]))(gram32(stacked)), np.float64)
        for w, jacobian in zip(found, stacked.astype(np.float64), strict=True):
            norms = np.linalg.norm(jacobian, axis=1)
            along = jacobian @ (w @ jacobian) / norms
            slack = (CONFLICT_FREE[name] + tasks * COSINE_ERROR) * np.linalg.norm(w * norms)
            assert along.min() >= -4 * slack - 1e-12 * norms.max()


@pytest.mark.parametrize("name", MEMBERS)
def test_stationary_gradients_give_finite_bounded_weights(name):
    for tasks in (2, 4):
        for jacobian in families(tasks)["stationary"]:
            w = np.asarray(MEMBERS[name](gram32(jacobian)))
            norms = np.linalg.norm(jacobian, axis=1)
            assert np.all(np.isfinite(w))
            assert np.linalg.norm(w * norms) <= 2 * np.sqrt(tasks / 1e-6) * max(1.0, norms.max())


def test_preferences():
    jacobian = families(3)["generic"][0]
    matrix = gram32(jacobian)
    preference = np.array([1.0, 2.0, 5.0], np.float32)
    np.testing.assert_allclose(weights.equal(matrix, preference=preference), preference * 3 / 8, rtol=4 * EPS32)
    # Nash-MTL: <g_i, d> w_i = p_i, at any length of d.
    w = np.asarray(weights.nash_mtl(matrix, preference=preference, max_norm=None), np.float64)
    np.testing.assert_allclose(w * (gram(jacobian) @ w), preference * 3 / 8, rtol=1e-3)
    # ConFIG and IMTL-G: cosines, and projections, in the ratio of the preferences.
    for member in (weights.config_, weights.imtl_g):
        w = np.asarray(member(matrix, preference=preference), np.float64)
        along = gram(jacobian) @ w / np.linalg.norm(jacobian, axis=1)
        np.testing.assert_allclose(along / along[0], preference, rtol=1e-3)
    # Without conflict UPGrad and DualProj are the preference itself.
    aligned = np.abs(jacobian)
    for member in (weights.upgrad, weights.dualproj):
        np.testing.assert_allclose(member(gram32(aligned), preference=preference), preference / 8, rtol=8 * EPS32)
    # A preference of zero is no vote; with the mask it is renormalised over who is there.
    found = weights.equal(matrix, preference=preference, mask=np.array([True, True, False]))
    np.testing.assert_allclose(found, np.array([2 / 3, 4 / 3, 0]), rtol=4 * EPS32)


def test_upgrad_is_linear_in_each_row():
    jacobian = families(3)["apart"][0]
    base = np.asarray(weights.upgrad(gram32(jacobian)), np.float64)
    projections = []
    for i in range(3):
        preference = np.eye(3, dtype=np.float32)[i]
        projections.append(np.asarray(weights.upgrad(gram32(jacobian), preference=preference), np.float64) / 3)
    close_updates(base, sum(projections), jacobian)
    scaled = jacobian * np.array([[10.0], [0.1], [1.0]], np.float32)
    expected = 10 * projections[0] + 0.1 * projections[1] + projections[2]
    found = np.asarray(weights.upgrad(gram32(scaled)), np.float64)
    close_updates(found * [10, 0.1, 1], expected, jacobian)


@pytest.mark.parametrize("tasks", [3, 6, 12])
def test_the_interior_point_solver(tasks):
    """Beyond ten variables, and beside the enumeration below: the quadratic's value is the least, to float32."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        factor = rng.normal(size=(tasks, tasks + 2))
        matrix = factor @ factor.T / tasks + 1e-3 * np.eye(tasks)
        linear = rng.normal(size=tasks)
        expected = exact_qp(matrix, linear)
        best = expected @ matrix @ expected / 2 + linear @ expected
        for solver in (interior_point, lambda a, b: non_negative_qp(a, b[None])[0]):
            found = np.asarray(jax.jit(solver)(matrix.astype(np.float32), linear.astype(np.float32)), np.float64)
            assert found.min() >= 0
            value = found @ matrix @ found / 2 + linear @ found
            assert value - best <= 1e-5 * max(1, abs(best))


def test_inverse():
    rng = np.random.default_rng(0)
    factor = rng.normal(size=(7, 6, 9)).astype(np.float32)
    matrix = factor @ np.swapaxes(factor, 1, 2)
    np.testing.assert_allclose(inverse(matrix) @ matrix, np.broadcast_to(np.eye(6), matrix.shape), atol=2e-3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda g: weights.upgrad(g[:1]), r"shape \(1, 3\); it must be \(tasks, tasks\)"),
        (lambda g: weights.upgrad(g, preference=np.ones(2)), r"preference has shape \(2,\); it must be \(3,\)"),
        (lambda g: weights.upgrad(g, mask=np.ones(4, bool)), r"mask has shape \(4,\); it must be \(3,\)"),
        (lambda g: weights.mgda(g, normalisation="l1"), "normalisation is 'l1'; it must be one of"),
        (lambda g: weights.mgda(g, normalisation="loss"), "'loss' needs losses"),
        (lambda g: weights.cagrad(g, c=-1), "c is -1; it must not be negative"),
        (lambda g: weights.cagrad(np.eye(11)), "11 tasks; its closed form"),
        (lambda g: weights.fairgrad(g, alpha=0), "alpha is 0; it must be positive"),
        (lambda g: weights.aligned_mtl(g, scale="max"), "scale is 'max'; it must be one of"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call(gram32(families(3)["generic"][0]))
