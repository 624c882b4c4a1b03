"""Weights of every Gramian method against float64 references on hard Jacobians, and properties that all must have."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import nnls

from sgw_jax.multi_objective import weights
from sgw_jax.multi_objective._pcgrad import orders
from sgw_jax.multi_objective._solvers import (
    interior_point,
    inverse,
    non_negative_qp,
    orthogonalise,
    solve_on_supports,
    supports,
)

EPS32 = float(np.finfo(np.float32).eps)
SIZE = 24  # numbers in a gradient
COUNTS = [2, 6]
ALL_COUNTS = [pytest.param(n, marks=() if n in COUNTS else pytest.mark.slow) for n in (2, 3, 5, 6, 8)]
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


def mgda_l2(matrix):
    kept = np.diag(matrix) > 0
    cosines, norms = regular(matrix[np.ix_(kept, kept)], 1e-6)
    found = np.zeros(len(matrix))
    x = exact_qp(cosines, -np.ones(len(norms)))
    found[kept] = x / x.sum() / norms
    return found


def db_mtl(matrix):
    norms = np.sqrt(np.diag(matrix))
    longest = np.max(norms / LOSSES[: len(matrix)].astype(np.float64))
    return np.where(norms > 0, longest / np.where(norms > 0, norms, 1), 0)


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


def inverse_on_span(matrix, eps=0.0):
    """Pseudo-inverse where eigenvalues of the cosines up to T roundings of float32 are zero; eps is added to others."""
    values, vectors = np.linalg.eigh(matrix)
    kept = values > len(values) * EPS32
    return vectors[:, kept] / (values[kept] + eps) @ vectors[:, kept].T, vectors[:, ~kept]


@reduced
def imtl_g(matrix, share):
    cosines, norms = regular(matrix, 0)
    inverse, null = inverse_on_span(cosines, 1e-5)
    null = null / norms[:, None] * norms.max()
    off = np.eye(len(norms)) - null @ np.linalg.pinv(null)
    found = off @ (inverse @ (off @ norms / norms) / norms)
    found = found / np.abs(found).max()
    divisor = np.sign(found.sum()) * max(abs(found.sum()), 0.05 * np.abs(found).sum())
    return found / divisor


@reduced
def config_(matrix, share):
    cosines, norms = regular(matrix, 0)
    ones = np.ones(len(norms))
    found = inverse_on_span(cosines, 1e-5)[0] @ ones
    if np.linalg.norm(found) < 1e-9:  # two opposite rows have no common direction
        return np.zeros(len(norms))
    return found * np.sum(norms * (cosines @ found + 1e-5 * found)) / (found @ ones) / norms


def aligned_mtl(matrix, jacobian):
    """On the gradients' singular vectors; the rank is that of their directions."""
    rows = jacobian.astype(np.float64)
    kept = np.diag(matrix) > 0
    rank = np.sum(np.linalg.eigvalsh(regular(matrix[np.ix_(kept, kept)], 0)[0]) > 1e-5)
    left, values, _ = np.linalg.svd(rows, full_matrices=False)
    left, values = left[:, :rank], values[:rank]
    return values[-1] * left / values @ left.T @ (kept / len(rows))


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


def gradvac(matrix, jacobian, target=0.0):
    """On the gradients themselves; in one step each pair meets once, so that one target serves all."""
    rows, order = jacobian.astype(np.float64), np.asarray(orders(KEY, len(jacobian)))
    coefficients = np.eye(len(rows))
    for i in range(len(rows)):
        for j in order[i]:
            if i == j or not rows[j].any() or not rows[i].any():
                continue
            current = coefficients[i] @ rows
            length, other = np.linalg.norm(current), np.linalg.norm(rows[j])
            cosine = np.clip(current @ rows[j] / length / other, -1, 1)
            if cosine < target:
                sides = np.sqrt(1 - target**2), np.sqrt(1 - cosine**2)
                coefficients[i, j] += length * (target * sides[1] - cosine * sides[0]) / (other * sides[0])
    return coefficients.sum(0)


LOSSES = np.array([0.5, 2.0, 1.0, 3.0, 0.1, 5.0, 1.5, 0.7], np.float32)
REFERENCES = {
    "upgrad": (weights.upgrad, upgrad, 1e-5),
    "dualproj": (weights.dualproj, dualproj, 1e-5),
    "mgda": (weights.mgda, mgda, 1e-6),
    "mgda_l2": (functools.partial(weights.mgda, normalisation="l2"), mgda_l2, 1e-6),
    "db_mtl": (lambda g, **o: weights.db_mtl(g, losses=jnp.asarray(LOSSES[: len(g)]), **o), db_mtl, 1.0),
    "nash_mtl": (weights.nash_mtl, nash, 1e-6),
    "fairgrad": (functools.partial(weights.fairgrad, alpha=2.0), fairgrad, 1e-6),
    "imtl_g": (weights.imtl_g, imtl_g, 1e-5),
    "config": (weights.config_, config_, 1e-5),
    "aligned_mtl": (weights.aligned_mtl, aligned_mtl, 1e-5),
    "pcgrad": (functools.partial(weights.pcgrad, key=KEY), pcgrad, 1.0),
    "gradvac": (lambda g, **o: weights.gradvac(g, jnp.zeros_like(g), key=KEY, **o)[0], gradvac, 1.0),
}
# Members of which properties are tested: every function of `weights`, and some with options.
MEMBERS = {name: getattr(weights, name) for name in weights.__all__}
MEMBERS |= {name: function for name, (function, _, _) in REFERENCES.items()} | {
    "cagrad_rescaled": functools.partial(weights.cagrad, c=0.8, rescale=True),
    "aligned_median": functools.partial(weights.aligned_mtl, scale="median"),
}
MEMBERS.pop("config")  # it is there as config_


@functools.cache
def found_weights(name, tasks):
    """One compilation for all Jacobians of a number of tasks, which every test below shares."""
    stacked = np.concatenate(list(families(tasks).values()))
    member = REFERENCES[name][0] if name in REFERENCES else MEMBERS[name]
    return np.asarray(jax.jit(jax.vmap(member))(gram32(stacked))), stacked


def of_families(tasks, chosen):
    """Where the Jacobians of some families are in `found_weights`."""
    return np.repeat([name in chosen for name in families(tasks)], SEEDS)


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
        matrix = gram(jacobian)
        if name == "aligned_mtl":
            # By the least eigenvalue that is kept; where one is as near to the cut as rounding, the rank is chance.
            norms = np.sqrt(np.maximum(np.diag(matrix), 1e-30))
            values = np.linalg.eigvalsh(matrix / np.outer(norms, norms))
            if np.any(np.abs(values - 1e-5) < 2 * tasks * EPS32):
                continue
            eps = values[values > 1e-5].min() ** 2
        if name in ("imtl_g", "config") and np.diag(matrix).all():
            values = np.linalg.eigvalsh(regular(matrix, 0)[0]) / (tasks * EPS32)
            if np.any((np.abs(values) > 0.25) & (values < 4)):
                continue
        arguments = (matrix, jacobian) if name in ("pcgrad", "gradvac", "aligned_mtl") else (matrix,)
        expected = reference(*arguments)
        wide = jacobian.astype(np.float64)
        sizes = np.linalg.norm(wide, axis=1)
        error = np.linalg.norm((w - expected) @ wide)
        reach = np.linalg.norm(np.abs(expected) * sizes) + np.linalg.norm(sizes) * (name in ("upgrad", "dualproj"))
        assert np.all(np.isfinite(w)), (family, w)
        limit = 8 * tasks * COSINE_ERROR / np.sqrt(eps) * reach + 1e-12 * np.linalg.norm(sizes)  # the reference's own
        assert error <= limit, (family, w, expected, error / reach)


def dependent(kind, seed):
    """Five rows of whole numbers, whose Gramian float32 holds exactly; their rank is 4, of "triple" 3."""
    jacobian = np.random.default_rng(seed).integers(-9, 10, (5, SIZE))
    if kind == "combined":
        jacobian[2] = jacobian[0] + jacobian[1]
    elif kind != "independent":
        jacobian[1] = jacobian[0]
    if kind == "triple":
        jacobian[2] = -jacobian[0]
    return jacobian.astype(np.float32)


@pytest.mark.parametrize("name", ["upgrad", "dualproj", "mgda", "mgda_l2"])
def test_dependent_rows(name):
    """As `test_against_float64`, without the Gramian's own error: d is that of two divisions, two roots and eps added,
    at most 3 roundings in each of T entries, and one more in the residual of the solution, for a row |x| of them. Then
    the same Jacobians with a row of zeros before them, and with one that the mask hides."""
    _, reference, eps = REFERENCES[name]
    jacobians = np.stack([dependent(kind, seed) for kind in ("duplicate", "combined") for seed in range(16)])
    zero = np.zeros_like(jacobians[:, :1])
    first = np.arange(6) > 0
    member = jax.jit(jax.vmap(lambda matrix, mask: REFERENCES[name][0](matrix, mask=mask), (0, None)))
    plain = member(gram32(jacobians), np.ones(5, bool))
    masked = member(gram32(np.concatenate([zero + 7, jacobians], 1)), first)
    with_zero = member(gram32(np.concatenate([zero, jacobians], 1)), np.ones(6, bool))
    cases = [(plain, 1.0), (masked[:, 1:], 1.0)]
    if name != "mgda":  # which gives a row of zeros all the weight
        cases.append((with_zero[:, 1:], 5 / 6 if name in ("upgrad", "dualproj") else 1.0))
    for found, share in cases:
        for w, jacobian in zip(np.asarray(found, np.float64), jacobians.astype(np.float64), strict=True):
            expected = share * reference(jacobian @ jacobian.T)
            sizes = np.linalg.norm(jacobian, axis=1)
            reach = np.linalg.norm(expected * sizes) + np.linalg.norm(sizes) * (name in ("upgrad", "dualproj"))
            error = np.linalg.norm((w - expected) @ jacobian)
            assert error <= 4 * 5 * EPS32 / np.sqrt(eps) * reach, error / reach


@pytest.mark.parametrize("kind", ["independent", "duplicate", "triple", "combined"])
def test_pseudo_inverses(kind):
    """ConFIG and IMTL-G as published, by NumPy's pseudo-inverse. ``eps`` and 4 roundings in each of T entries move the
    solution by their ratio to the least eigenvalue that is not zero; its uses, and IMTL-G's sum, by as much each."""
    jacobians = np.stack([dependent(kind, seed) for seed in range(16)])
    zero = np.zeros_like(jacobians[:, :1])
    matrices = gram32(np.concatenate([zero, jacobians, zero + 7], 1))
    for member, function in (("config", weights.config_), ("imtl_g", weights.imtl_g)):
        found = jax.jit(jax.vmap(lambda g, f=function: f(g, mask=np.arange(7) < 6)))(matrices)
        for w, jacobian in zip(np.asarray(found, np.float64)[:, 1:-1], jacobians.astype(np.float64), strict=True):
            norms = np.linalg.norm(jacobian, axis=1)
            unit = jacobian / norms[:, None]
            if member == "config":
                along = np.linalg.pinv(unit, rcond=1e-8) @ np.ones(5)
                expected, size = np.sum(jacobian @ along) * along / (along @ along), np.linalg.norm(norms)
            else:
                share = np.linalg.pinv(jacobian @ jacobian.T, rcond=1e-12, hermitian=True) @ norms
                expected, size = share / share.sum() @ jacobian, np.linalg.norm(share * norms) / abs(share.sum())
                if abs(share.sum()) < 0.1 * np.abs(share).sum():
                    continue  # its sum is ours to bound
            values = np.linalg.eigvalsh(unit @ unit.T)
            slack = 4 * (1e-5 + 4 * 5 * EPS32) / values[values > 1e-9].min()
            assert np.linalg.norm(w @ jacobian - expected) <= slack * max(size, np.linalg.norm(expected)), member


@pytest.mark.parametrize("noise", [3e-3, 1e-2, 1e-1])
def test_nearly_dependent_rows_follow_the_formula(noise):
    """g_2 = g_0 + g_1 and noise: the update is along it. With v and l the least eigenvector and eigenvalue of the
    cosines and k the next one, other directions are off by eps |p| / sqrt(l k) of it, by the part of p along v."""
    rng = np.random.default_rng(0)
    jacobian = rng.normal(size=(3, 40))
    jacobian[2] = jacobian[0] + jacobian[1]
    jacobian[2] += noise * np.linalg.norm(jacobian[2]) * rng.normal(size=40) / np.sqrt(40)
    jacobian = jacobian.astype(np.float32)
    wide = jacobian.astype(np.float64)
    norms = np.linalg.norm(wide, axis=1)
    values, vectors = np.linalg.eigh(wide @ wide.T / np.outer(norms, norms))
    slack = (1e-5 + 4 * 3 * EPS32) * np.sqrt(3 / (values[0] * values[1])) / abs(vectors[:, 0].sum())
    share = np.linalg.solve(wide @ wide.T, norms)
    along = share @ wide
    for member, expected in (
        (weights.imtl_g, along / share.sum()),
        (weights.config_, np.sum(wide @ along) * along / (along @ along)),
    ):
        found = np.asarray(jax.jit(member)(gram32(jacobian)), np.float64) @ wide
        error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
        assert error <= 2 * slack


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.parametrize("kind", ["pair", "triple"])
def test_the_solutions_of_all_supports_fit_dependent_rows(kind, seed):
    """CAGrad and the quadratic programs choose among them. Where A = C + eps I has a null vector of C, a solution x is
    of size |b| / eps at most; A x is off by T roundings of |x| and one of each correction's as large."""
    jacobian = dependent(kind, seed).astype(np.float64)
    matrix = regular(jacobian @ jacobian.T, 1e-6)[0].astype(np.float32)
    right = np.stack([matrix @ np.arange(1.0, 6.0), np.ones(5)]).astype(np.float32)
    found = np.asarray(jax.jit(solve_on_supports)(matrix, right), np.float64)
    off = np.where(supports(5), found @ matrix.astype(np.float64) - right[:, None], found)
    size = np.linalg.norm(found, axis=-1) + np.linalg.norm(right, axis=-1)[:, None]
    assert np.all(np.abs(off).max(-1) <= 2 * 5 * EPS32 * size)


@pytest.mark.parametrize("tasks", ALL_COUNTS)
def test_cagrad_is_optimal(tasks):
    """No reference needed: for d within the ball, min_i <g_i, d> <= w' G p + c |g_0| |g_w| for every w of the simplex;
    equality shows that both are optimal. Cosines are regularised by 1e-5, so values may differ by sqrt(1e-5) of
    |g|; the square of the length of d - g_0 is off by the error of the cosines times that of its terms."""
    found, stacked = found_weights("cagrad", tasks)
    for w, jacobian in zip(found.astype(np.float64), stacked.astype(np.float64), strict=True):
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


@pytest.mark.parametrize("short", [1e-1, 2e-3, 1e-5, 1e-6])
@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
def test_aligned_mtl_of_a_short_row(scale, short):
    """Rows of about 6 and one of ``short``: as published, on the gradients' singular vectors. T cosines, each off by
    their rounding, move the result by their ratio to the cosines' least eigenvalue."""
    jacobian = np.random.default_rng(0).normal(size=(4, 40))
    jacobian[1] *= short / np.linalg.norm(jacobian[1])
    jacobian = jacobian.astype(np.float32)
    wide = jacobian.astype(np.float64)
    left, values, right = np.linalg.svd(wide, full_matrices=False)
    common = {"min": values[-1], "median": values[2], "rmse": np.sqrt(np.mean(values**2))}[scale]
    expected = common * np.full(4, 0.25) @ left @ right
    member = jax.jit(functools.partial(weights.aligned_mtl, scale=scale))
    found = np.asarray(member(gram32(jacobian)), np.float64) @ wide
    least = np.linalg.eigvalsh(regular(wide @ wide.T, 0)[0])[0]
    assert np.linalg.norm(found - expected) <= 4 * COSINE_ERROR / least * np.linalg.norm(expected)


@pytest.mark.parametrize(("noise", "kept"), [(1e-3, False), (1e-2, True)])
def test_the_rank_of_aligned_mtl(noise, kept):
    """Nearly dependent rows: one direction is cut when the cosines' eigenvalue, about the noise squared, is below 1e-5;
    float32 cosines give one above to T of their roundings, and it the length of the update."""
    rng = np.random.default_rng(0)
    jacobian = rng.normal(size=(3, 40))
    jacobian[2] = jacobian[0] + jacobian[1]
    jacobian[2] += noise * np.linalg.norm(jacobian[2]) * rng.normal(size=40) / np.sqrt(40)
    jacobian = jacobian.astype(np.float32)
    wide = jacobian.astype(np.float64)
    least = np.linalg.eigvalsh(regular(wide @ wide.T, 0)[0])[0]
    assert (least > 1e-5) == kept
    w = np.asarray(jax.jit(weights.aligned_mtl)(gram32(jacobian)), np.float64)
    expected = aligned_mtl(wide @ wide.T, jacobian)
    error = np.linalg.norm((w - expected) @ wide) / np.linalg.norm(expected @ wide)
    assert error <= 3 * COSINE_ERROR / max(least, 1e-5)


@pytest.mark.parametrize("tasks", [2, 7, 16])
def test_orthogonalise(tasks):
    """Columns 1e6 apart: orthogonal to rounding in units of their lengths, of the singular values' lengths."""
    rng = np.random.default_rng(tasks)
    factor = (rng.normal(size=(2 * tasks, tasks)) * 10 ** np.linspace(-3, 3, tasks)).astype(np.float32)
    columns, rows = jax.jit(orthogonalise)(factor, np.eye(tasks, dtype=np.float32))
    columns, rows = np.asarray(columns, np.float64), np.asarray(rows, np.float64)
    sizes = np.linalg.norm(columns, axis=0)
    expected = np.linalg.svd(factor.astype(np.float64), compute_uv=False)
    rounding = 10 * tasks * EPS32  # each sweep turns a column T times
    np.testing.assert_allclose(np.sort(sizes)[::-1], expected, rtol=8 * rounding)
    np.testing.assert_allclose(columns.T @ columns / np.outer(sizes, sizes), np.eye(tasks), atol=2 * rounding)
    np.testing.assert_allclose(rows.T @ rows, np.eye(tasks), atol=rounding)
    np.testing.assert_allclose((factor @ rows - columns) / sizes.max(), 0, atol=rounding)


# ---- properties of every member ------------------------------------------------------------------------------------

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
    """Any order of the tasks, any scale; one call for all of it."""
    chosen = ("generic", "apart", "scaled", "tiny")
    jacobians = np.concatenate([families(4)[family] for family in chosen])
    order, factors = np.array([2, 0, 3, 1]), np.float32([1e-3, 1e3])
    matrices = gram32(jacobians)
    scaled = [matrices[:SEEDS] * factor**2 for factor in factors]
    together = np.concatenate([matrices, matrices[:, order][:, :, order], *scaled])
    found = np.asarray(jax.jit(jax.vmap(MEMBERS[name]))(together))
    assert found.shape == (len(together), 4)
    assert found.dtype == np.float32
    base, permuted, larger = np.split(found, [len(matrices), 2 * len(matrices)])
    if name not in RANDOM | BY_LOSS:  # orders and losses belong to places
        for i, jacobian in enumerate(jacobians):
            close_updates(permuted[i], base[i, order], jacobian[order], chosen[i // SEEDS])
    for factor, some in zip(factors, np.split(larger, 2), strict=True):
        for i, w in enumerate(some):
            close_updates(w / factor ** (DEGREE[name] - 1), base[i], jacobians[i], f"{factor} times as large")


@pytest.mark.parametrize("name", MEMBERS)
def test_a_masked_task_is_as_if_it_were_not_there(name):
    """Whatever its row holds; two compilations, with the masks and without the row."""
    tasks = 3 if name in RANDOM else 4  # of two tasks that are left, the order does not matter
    gone = [tasks - 1] if name in BY_LOSS else list(range(tasks))  # the others' losses would move up
    jacobians = np.repeat(families(tasks)["apart"], len(gone), 0)
    masks = np.tile(np.arange(tasks) != np.array(gone)[:, None], (SEEDS, 1))
    rest = jacobians[masks].reshape(len(masks), tasks - 1, SIZE)
    with_row, nan_row = gram32(jacobians), gram32(np.where(masks[:, :, None], jacobians, np.float32(np.nan)))
    nobody = np.zeros((1, tasks), bool)
    matrices = np.concatenate([with_row, nan_row, with_row[:1]])
    member = jax.jit(jax.vmap(lambda matrix, mask: MEMBERS[name](matrix, mask=mask)))
    found = np.asarray(member(matrices, np.concatenate([masks, masks, nobody])))
    expected = np.asarray(jax.jit(jax.vmap(MEMBERS[name]))(gram32(rest)))
    assert not found[-1].any()
    for half in np.split(found[:-1], 2):
        assert not half[~masks].any()
        for w, wanted, jacobian in zip(half[masks].reshape(expected.shape), expected, rest, strict=True):
            close_updates(w, wanted, jacobian)


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
    for tasks in COUNTS:
        chosen = of_families(tasks, ("generic", "apart", "scaled", "tiny", "opposed"))
        found, stacked = (part[chosen].astype(np.float64) for part in found_weights(name, tasks))
        for w, jacobian in zip(found, stacked, strict=True):
            norms = np.linalg.norm(jacobian, axis=1)
            along = jacobian @ (w @ jacobian) / norms
            slack = (CONFLICT_FREE[name] + tasks * COSINE_ERROR) * np.linalg.norm(w * norms)
            assert along.min() >= -4 * slack - 1e-12 * norms.max()


@pytest.mark.parametrize("name", MEMBERS)
def test_stationary_gradients_give_finite_bounded_weights(name):
    """And finite ones on all other Jacobians."""
    for tasks in (2, 5):
        found, stacked = found_weights(name, tasks)
        assert np.all(np.isfinite(found))
        chosen = of_families(tasks, ("stationary",))
        for w, jacobian in zip(found[chosen], stacked[chosen], strict=True):
            norms = np.linalg.norm(jacobian, axis=1)
            assert np.linalg.norm(w * norms) <= 2 * np.sqrt(tasks / 1e-6) * max(1.0, norms.max())


def test_gradvac_raises_cosines_to_their_targets_and_moves_these():
    jacobian = families(5)["generic"][0]
    call = jax.jit(functools.partial(weights.gradvac, key=KEY, beta=0.25))
    w, targets = call(gram32(jacobian), jnp.full((5, 5), 0.3))
    close_updates(w, gradvac(None, jacobian, target=0.3), jacobian)
    # The first that a task meets, it meets unturned: the target moves towards the cosine of the two.
    order = np.asarray(orders(KEY, 5))
    cosines = gram(jacobian) / np.outer(*2 * [np.linalg.norm(jacobian.astype(np.float64), axis=1)])
    for i in range(5):
        j = next(other for other in order[i] if other != i)
        np.testing.assert_allclose(targets[i, j], 0.75 * 0.3 + 0.25 * cosines[i, j], rtol=0, atol=COSINE_ERROR)


def test_preferences():
    jacobian = families(3)["generic"][0]
    matrix = gram32(jacobian)
    preference = np.array([1.0, 2.0, 5.0], np.float32)
    compiled = functools.cache(jax.jit)
    np.testing.assert_allclose(weights.equal(matrix, preference=preference), preference * 3 / 8, rtol=4 * EPS32)
    # Nash-MTL: <g_i, d> w_i = p_i, at any length of d.
    w = np.asarray(
        jax.jit(functools.partial(weights.nash_mtl, max_norm=None))(matrix, preference=preference), np.float64
    )
    np.testing.assert_allclose(w * (gram(jacobian) @ w), preference * 3 / 8, rtol=1e-3)
    # ConFIG and IMTL-G: cosines, and projections, in the ratio of the preferences.
    for member in (weights.config_, weights.imtl_g):
        w = np.asarray(compiled(member)(matrix, preference=preference), np.float64)
        along = gram(jacobian) @ w / np.linalg.norm(jacobian, axis=1)
        np.testing.assert_allclose(along / along[0], preference, rtol=1e-3)
    # Without conflict UPGrad and DualProj are the preference itself.
    aligned = np.abs(jacobian)
    for member in (weights.upgrad, weights.dualproj):
        found = compiled(member)(gram32(aligned), preference=preference)
        np.testing.assert_allclose(found, preference / 8, rtol=8 * EPS32)
    # MGDA: rows divided by the preferences, so their shortest combination; without conflict of rows, <g_i, d> / p_i is
    # the same for all that take part. A preference of zero takes no part.
    w = np.asarray(compiled(weights.mgda)(matrix, preference=preference), np.float64)
    share = preference * 3 / 8
    np.testing.assert_allclose(w, mgda(gram(jacobian / share[:, None])) / share, rtol=1e-3)
    none = np.array([0, 1, 1], np.float32)
    w = np.asarray(compiled(weights.mgda)(matrix, preference=none), np.float64)
    np.testing.assert_allclose(w[1:] / w[1:].sum(), mgda(gram(jacobian[1:])), rtol=1e-3)
    assert w[0] == 0
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
