"""Small dense solvers inside jit: fixed work, float32, a batch of problems at once."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

ENUMERATED = 10  # tasks up to which all supports are tried: 1,024 systems of 10 x 10


def inverse(matrix: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """Of symmetric positive definite matrices, by Gauss-Jordan without pivoting (none is needed for these).

    Unrolled over n: elementwise operations alone, which a compiler fuses, where a library call would wait.
    """
    size = matrix.shape[-1]
    left, right = matrix, jnp.broadcast_to(jnp.eye(size, dtype=matrix.dtype), matrix.shape)
    for row in range(size):
        pivot = left[..., row, row][..., None]
        scaled, other = left[..., row, :] / pivot, right[..., row, :] / pivot
        factor = left[..., :, row] * (jnp.arange(size) != row)
        left = left - factor[..., :, None] * scaled[..., None, :]
        right = right - factor[..., :, None] * other[..., None, :]
        left = left.at[..., row, :].set(scaled)
        right = right.at[..., row, :].set(other)
    return (right + jnp.swapaxes(right, -1, -2)) / 2


def solve(matrix: Float[Array, "n n"], right: Float[Array, " n"]) -> Float[Array, " n"]:
    """``matrix^-1 right``, with one step of iterative refinement."""
    inverted = inverse(matrix)
    first = jnp.matvec(inverted, right)
    return first + jnp.matvec(inverted, right - jnp.matvec(matrix, first))


def null_space(matrix: Float[Array, "n n"], eps: float) -> Float[Array, "n n"]:
    """Of cosines with ``eps`` on the diagonal: eigenvectors, and columns of zeros for the others.

    Eigenvalues up to n roundings count as zero, which is what a float32 Gramian resolves: rows that depend on each
    other up to a relative noise r have one of about r^2, known to as many roundings again. Noise below 3e-4 sqrt(n) is
    not told from none, noise of twice 5e-4 sqrt(n) is; between the two either is right.
    """
    values, vectors = eigen(matrix)
    return jnp.where(values <= eps + len(matrix) * jnp.finfo(matrix.dtype).eps, vectors, 0)


def project_out(basis: Float[Array, "n k"], vector: Float[Array, " n"]) -> Float[Array, " n"]:
    """The vector without its part in the span of orthonormal columns (or zeros)."""
    return vector - jnp.einsum("ik,jk,j->i", basis, basis, vector, precision="highest")


def solve_off(matrix: Float[Array, "n n"], null: Float[Array, "n n"], right: Float[Array, " n"]) -> Float[Array, " n"]:
    """``matrix^+ right`` where the columns of ``null`` count as the null space."""
    lifted = matrix + jnp.matmul(null, null.T, precision="highest")
    return project_out(null, solve(lifted, project_out(null, right)))


def eigen(matrix: Float[Array, "n n"]) -> tuple[Float[Array, " n"], Float[Array, "n n"]]:
    """Eigenvalues, in no order, and eigenvectors of a symmetric matrix, by Jacobi's method.

    Not a library's: beside its call, XLA on CPUs adds up a Gramian of 3e6 numbers per row to no more than 2e-3.
    """
    columns, vectors = orthogonalise(matrix, jnp.eye(len(matrix), dtype=matrix.dtype))
    return jnp.sum(vectors * columns, 0), vectors


def orthogonalise(
    factor: Float[Array, "n t"], rows: Float[Array, "m t"], sweeps: int = 10
) -> tuple[Float[Array, "n t"], Float[Array, "m t"]]:
    """``F Q`` with orthogonal columns, and ``R Q``, for some orthogonal Q: one-sided Jacobi, so F = P S Q' with S the
    columns' lengths, which come out to float32 however far apart they are, as long as F's normalised columns are apart.

    Each sweep meets every pair of columns once, t / 2 pairs at a time.
    """
    count = factor.shape[1] + factor.shape[1] % 2
    both = jnp.pad(jnp.concatenate([factor, rows]), ((0, 0), (0, count - factor.shape[1])))
    seats = [[0, *np.roll(np.arange(1, count), turn)] for turn in range(count - 1)]  # a round-robin tournament
    rounds = jnp.asarray([[row[: count // 2], row[: count // 2 - 1 : -1]] for row in seats])

    length = len(factor)

    def meet(step: int, both: Array) -> Array:
        left, right = rounds[step % len(rounds)]
        a, b = both[:, left], both[:, right]
        product = jnp.sum(a[:length] * b[:length], 0)
        slope = jnp.sum(b[:length] ** 2 - a[:length] ** 2, 0) / jnp.where(product == 0, 1, 2 * product)
        tangent = jnp.where(slope < 0, -1, 1) / (jnp.abs(slope) + jnp.hypot(1, slope))
        tangent = jnp.where(product == 0, 0, tangent)
        cosine = 1 / jnp.sqrt(1 + tangent**2)
        turned = cosine * (a - tangent * b), cosine * (tangent * a + b)
        return both.at[:, left].set(turned[0]).at[:, right].set(turned[1])

    both = jax.lax.fori_loop(0, sweeps * len(rounds), meet, both)[:, : factor.shape[1]]
    return both[:length], both[length:]


def supports(size: int) -> np.ndarray:
    """All subsets of ``size`` variables, (2^size, size) bool."""
    return np.array(list(itertools.product((False, True), repeat=size)))


def solve_on_supports(
    matrix: Float[Array, "n n"], right: Float[Array, "problems n"]
) -> Float[Array, "problems subsets n"]:
    """For every support S ``matrix_SS^-1 right_S``, zero outside S.

    Iterative refinement: dependent rows leave matrix_SS a condition of 1 / eps, which a float32 inverse meets with
    errors of some percent, up to a fifth. Each pass leaves that share of the residual; after eight it is as small as
    rounding. Where a pivot was zero, it is NaN.
    """
    chosen = supports(matrix.shape[-1])
    both = chosen[:, :, None] & chosen[:, None, :]
    inverses = jnp.where(both, inverse(jnp.where(both, matrix, jnp.eye(matrix.shape[-1], dtype=matrix.dtype))), 0)
    found = jnp.zeros((len(right), *chosen.shape), matrix.dtype)
    for _ in range(8):
        residual = right[:, None] - jnp.einsum("ij,psj->psi", matrix, found, precision="highest")
        found += jnp.einsum("sij,psj->psi", inverses, residual, precision="highest")
    return found


def violation(
    found: Float[Array, "*batch n"], gradient: Float[Array, "*batch n"], chosen: Bool[Array, "*#batch n"]
) -> Float[Array, "*batch"]:
    """How far x on a support is from x >= 0 with gradient 0 there and >= 0 elsewhere: the worst entry, inf for NaN."""
    worst = jnp.max(jnp.where(chosen, jnp.maximum(-found, jnp.abs(gradient)), jnp.maximum(-gradient, 0)), -1)
    return jnp.where(jnp.isnan(worst), jnp.inf, worst)


def non_negative_qp(matrix: Float[Array, "n n"], linear: Float[Array, "problems n"]) -> Float[Array, "problems n"]:
    """``argmin_{x >= 0} x' A x / 2 + b' x`` for each row b; A is symmetric positive definite.

    Up to `ENUMERATED` variables every support is solved and the one that satisfies the optimality conditions best
    (x >= 0, A x + b = 0 on the support and >= 0 elsewhere) is taken, which is exact; beyond, `interior_point`.
    """
    size = matrix.shape[-1]
    if size > ENUMERATED:
        return jax.vmap(lambda b: interior_point(matrix, b))(linear)
    scale = jnp.maximum(jnp.max(jnp.abs(linear), -1, keepdims=True), jnp.finfo(matrix.dtype).tiny)
    linear = linear / scale
    found = solve_on_supports(matrix, -linear)
    gradient = jnp.einsum("ij,psj->psi", matrix, found, precision="highest") + linear[:, None]
    best = jnp.argmin(violation(found, gradient, jnp.asarray(supports(size))), -1)
    return jnp.maximum(jnp.take_along_axis(found, best[:, None, None], 1)[:, 0], 0) * scale


def interior_point(matrix: Float[Array, "n n"], linear: Float[Array, " n"], iterations: int = 30) -> Float[Array, " n"]:
    """The same for one problem of any size: Mehrotra's predictor-corrector, a fixed number of iterations."""
    scale = jnp.maximum(jnp.max(jnp.abs(linear)), jnp.finfo(matrix.dtype).tiny)
    b = linear / scale
    tiny = jnp.finfo(matrix.dtype).eps ** 2

    def longest(value: Array, change: Array) -> Array:
        return jnp.minimum(1.0, 0.995 * jnp.min(jnp.where(change < 0, -value / jnp.where(change < 0, change, -1), 2.0)))

    def step(_: int, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        x, dual = carry
        residual = jnp.matvec(matrix, x) + b - dual
        average = jnp.mean(x * dual)
        inverted = inverse(matrix + jnp.diag(dual / x))

        def direction(target: Array) -> tuple[Array, Array]:
            dx = -jnp.matvec(inverted, residual + (x * dual - target) / x)
            return dx, -(x * dual - target) / x - dual / x * dx

        dx, dz = direction(jnp.zeros_like(x))
        reached = jnp.mean((x + longest(x, dx) * dx) * (dual + longest(dual, dz) * dz))
        dx, dz = direction((reached / average) ** 3 * average - dx * dz)
        length = jnp.minimum(longest(x, dx), longest(dual, dz))
        new = x + length * dx, dual + length * dz
        going = (average > tiny) & jnp.all(jnp.isfinite(new[0])) & jnp.all(jnp.isfinite(new[1]))
        return jnp.where(going, jnp.maximum(new[0], tiny), x), jnp.where(going, jnp.maximum(new[1], tiny), dual)

    start = (jnp.ones_like(b), jnp.ones_like(b))
    x, dual = jax.lax.fori_loop(0, iterations, step, start)
    return jnp.where(x > dual, x, jnp.minimum(x, jnp.sqrt(jnp.finfo(matrix.dtype).eps))) * scale


def fair_point(
    matrix: Float[Array, "n n"], gain: Float[Array, " n"], power: float, iterations: int = 30
) -> Float[Array, " n"]:
    """The positive a with ``A a = gain a^-power``: the minimum of the strictly convex ``a' A a / 2 - sum_i u_i(a_i)``.

    u is gain log a for power 1, gain a^(1 - power) / (1 - power) otherwise. Newton's method; each iteration takes the
    best of twelve step lengths, so that it descends whatever the start.
    """

    def value(a: Array) -> Array:
        utility = jnp.log(a) if power == 1 else a ** (1 - power) / (1 - power)
        return a @ jnp.matvec(matrix, a) / 2 - jnp.sum(gain * utility)

    lengths = 0.5 ** jnp.arange(12.0)

    def step(_: int, a: Array) -> Array:
        gradient = jnp.matvec(matrix, a) - gain * a**-power
        # In units of a, so that entries of any size are solved alike.
        hessian = matrix * a[:, None] * a[None, :] + jnp.diag(power * gain * a ** (1 - power))
        root = jnp.sqrt(jnp.diagonal(hessian))
        change = -jnp.matvec(inverse(hessian / root[:, None] / root[None, :]), gradient * a / root) / root
        candidates = a * (1 + lengths[:, None] * change)
        safe = jnp.all(candidates > 0, -1)
        values = jnp.where(safe, jax.vmap(value)(jnp.maximum(candidates, jnp.finfo(a.dtype).tiny)), jnp.inf)
        best = jnp.argmin(values)
        # Near the minimum the values differ by rounding alone; the full step is then the better one.
        close = jnp.all(jnp.abs(change) < 0.1)
        return jnp.where(close, candidates[0], jnp.where(jnp.isfinite(values[best]), candidates[best], a))

    start = jnp.full_like(gain, 1.0) * (gain / jnp.diagonal(matrix)) ** (1 / (1 + power))
    return jax.lax.fori_loop(0, iterations, step, start)
