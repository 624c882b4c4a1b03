"""The fixed simplex equiangular tight frame (ETF) and the projection of features onto its vertices."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sgw_jax.data_pipelines.errors import InputError


def simplex_etf(num_vertices: int, dim: int, *, seed: int = 0) -> np.ndarray:
    """Returns the vertices of a simplex ETF as columns: ``M = sqrt(K / (K - 1)) Q V^T``.

    K unit vectors in R^d whose pairwise cosines are all ``-1 / (K - 1)``, the widest equal angle possible; rank K - 1.
    V (K, K - 1) is the Helmert basis of the complement of the ones vector and Q (d, K - 1) a random orthonormal frame.
    M is built on the host in float64 from an explicit seed, so it is the same in every process and on every backend
    (across CPUs with different LAPACK kernels, equal up to rounding).

    Args:
      num_vertices: K >= 2.
      dim: d >= K - 1, the dimension of the space that the frame lives in.
      seed: of the orthonormal frame Q.

    Returns:
      float64 array (dim, num_vertices).

    Raises:
      ValueError: if K < 2, or if d < K - 1 (K points need K - 1 dimensions to be equiangular).

    Source: Papyan, Han, Donoho 2020 (definition); Yang et al. 2022, arXiv 2203.09081 (fixed, not learned).

    >>> from sgw_jax import simplex_etf
    >>> vertices = simplex_etf(num_vertices=3, dim=4)
    >>> (vertices.T @ vertices).round(6).tolist()
    [[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, -0.5, 1.0]]
    """
    check_vertices(num_vertices, dim)
    frame = orthonormal_frame(dim, num_vertices - 1, seed=seed)
    return np.sqrt(num_vertices / (num_vertices - 1)) * frame @ _helmert(num_vertices).T


def check_vertices(num_vertices: int, dim: int) -> None:
    """Raises a ValueError unless 2 <= K <= d + 1."""
    if num_vertices < 2:
        raise InputError(f"simplex_etf: num_vertices is {num_vertices}, but a simplex needs at least 2 vertices.")
    if dim < num_vertices - 1:
        raise InputError(
            f"simplex_etf: {num_vertices} equiangular vertices need at least {num_vertices - 1} dimensions, "
            f"but dim is {dim}. Use at most {dim + 1} vertices or wider features."
        )


def orthonormal_frame(dim: int, rank: int, *, seed: int = 0) -> np.ndarray:
    """Random orthonormal columns, float64 (dim, rank), from an explicit seed; ``rank`` must be in [1, dim].

    ``Q = D C P``: random signs D, the orthonormal DCT-II matrix C, ``rank`` of its columns in random order P (a
    subsampled randomised cosine transform: every entry is at most sqrt(2 / d), no feature is singled out). In closed
    form, so that a program can make it from ``dim + rank`` numbers in place of holding it (`frame_in_program`) [our
    decision; any orthonormal Q will do].
    """
    signs, columns = _draws(dim, rank, seed)
    turns = np.outer(2 * np.arange(dim) + 1, columns) % (4 * dim)  # whole numbers: cos sees one turn at most
    return signs[:, None] * np.sqrt(np.where(columns, 2, 1) / dim) * np.cos(np.pi / (2 * dim) * turns)


def frame_in_program(dim: int, rank: int, *, seed: int = 0) -> Float[Array, "dim rank"]:
    """`orthonormal_frame` in float32, made by the program that is being traced: O(dim rank) operations, and of its size
    nothing in the program's text."""
    signs, columns = _draws(dim, rank, seed)
    row = jax.lax.broadcasted_iota(jnp.int32, (dim, rank), 0)
    turns = (2 * row + 1) * jnp.asarray(columns, jnp.int32) % (4 * dim)
    scale = jnp.asarray(np.sqrt(np.where(columns, 2, 1) / dim), jnp.float32)
    angles = turns.astype(jnp.float32) * np.float32(np.pi / (2 * dim))
    return jnp.asarray(signs, jnp.float32)[:, None] * scale * jnp.cos(angles)


def etf_in_program(num_vertices: int, dim: int, *, seed: int = 0) -> Float[Array, "dim vertices"]:
    """`simplex_etf` in float32, made by the program that is being traced, as `frame_in_program`."""
    check_vertices(num_vertices, dim)
    frame = frame_in_program(dim, num_vertices - 1, seed=seed)
    shape = (num_vertices, num_vertices - 1)
    row, column = (jax.lax.broadcasted_iota(jnp.float32, shape, axis) for axis in (0, 1))
    basis = jnp.where(row <= column, 1.0, jnp.where(row == column + 1, -(column + 1), 0.0))  # `_helmert`
    basis = basis * jax.lax.rsqrt((column + 1) * (column + 2))
    scale = np.float32(np.sqrt(num_vertices / (num_vertices - 1)))
    return scale * jnp.matmul(frame, basis.T, precision="highest")


def _draws(dim: int, rank: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Signs (dim,) and columns (rank,) of the transform."""
    check_rank(rank, dim)
    rng = np.random.Generator(np.random.Philox(seed))
    return rng.choice([-1.0, 1.0], dim), rng.permutation(dim)[:rank]


def check_rank(rank: int, dim: int) -> None:
    """Raises a ValueError unless 1 <= rank <= d."""
    if not 1 <= rank <= dim:
        raise InputError(f"orthonormal_frame: the rank is {rank}; it must be in [1, {dim}], the dimension.")


def _helmert(size: int) -> np.ndarray:
    """Orthonormal basis (size, size - 1) of the vectors that sum to zero, in closed form."""
    column = np.arange(1, size)
    row = np.arange(size)[:, None]
    basis = np.where(row < column, 1.0, np.where(row == column, -column.astype(float), 0.0))
    return basis / np.sqrt(column * (column + 1.0))


class SimplexETF(nn.Module):
    """Projects features onto K fixed vertices: ``z = sqrt(d) M^T f / ||f||`` (our reading of the paper's projection).

    z holds the token's cosines with the K vertices, scaled so that the entries of a random direction start at unit
    variance (unscaled, scores and values shrink by sqrt(d) and the attention behind it is inert). M is no parameter:
    it lives in the collection ``constants``, which gradients and the optimiser never see. f = 0 gives z = 0 and a
    zero gradient; ``eps`` inside the root bounds the gradient of small f by sqrt(d / eps).

    Attributes:
      num_vertices: K, with 2 <= K <= d + 1.
      seed: of the frame; see `simplex_etf`.
      eps: added to ||f||^2.

    Call:
      features: (..., d).

    Returns:
      (..., K) in the dtype of the features; the norm is taken in float32.

    Raises:
      ValueError: fewer than 2 vertices, or more than d + 1; features that are not floating-point.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from sgw_jax import SimplexETF
    >>> etf = SimplexETF(num_vertices=5)
    >>> features = jnp.ones((2, 8))
    >>> variables = etf.init(jax.random.key(0), features)  # {"constants": ...}; no parameters
    >>> etf.apply(variables, features).shape
    (2, 5)
    """

    num_vertices: int
    seed: int = 0
    eps: float = 1e-12

    def __call__(self, features: Float[Array, "*batch dim"]) -> Float[Array, "*batch vertices"]:
        return project(*self.factors(features))

    def width(self, dim: int) -> int:
        """Of the projection of features of width ``dim``."""
        check_vertices(self.num_vertices, dim)
        return self.num_vertices

    @nn.compact
    def factors(self, features: Float[Array, "*batch dim"]) -> tuple[Array, Float[Array, "dim vertices"]]:
        """(``sqrt(d) f / ||f||``, M): their product is z. A map of z can be applied without forming z."""
        dim, seed = features.shape[-1], self.seed
        vertices = fixed(
            self,
            "vertices",
            lambda: simplex_etf(self.num_vertices, dim, seed=seed),
            lambda: etf_in_program(self.num_vertices, dim, seed=seed),
        )
        return direction(features, self.eps), vertices


def fixed(
    module: nn.Module, name: str, on_host: Callable[[], np.ndarray], in_program: Callable[[], Array]
) -> Float[Array, "..."]:
    """A constant of a module: of the collection ``constants``, where `init` puts it, or made by the program.

    Trainers that keep ``params`` alone, and transformations that do not carry the collection, need not know of it. A
    checkpoint that holds it decides. It is float32, and no gradient flows into it.
    """
    if module.is_initializing() and module.is_mutable_collection("constants"):
        module.variable("constants", name, lambda: jnp.asarray(on_host(), jnp.float32))
    kept = module.has_variable("constants", name)
    return jax.lax.stop_gradient(module.get_variable("constants", name) if kept else in_program())


def project(
    directions: Float[Array, "*batch dim"], frame: Float[Array, "dim vertices"] | None
) -> Float[Array, "*batch vertices"]:
    """The product of a projection's factors, in the dtype of the first; None is the identity."""
    return directions if frame is None else jnp.matmul(directions, frame.astype(directions.dtype))


def direction(features: Float[Array, "*batch dim"], eps: float = 1e-12) -> Float[Array, "*batch dim"]:
    """``sqrt(d) f / ||f||`` in the dtype of the features, the norm in float32; f = 0 gives 0 and a zero gradient."""
    if not jnp.issubdtype(features.dtype, jnp.floating):
        raise InputError(f"projection: the features are {features.dtype}; they must be floating-point.")
    # Only a float64 program (x64, used to check gradients) keeps more than float32 here.
    wide = jnp.promote_types(features.dtype, jnp.float32)
    squared = jnp.sum(jnp.square(features.astype(wide)), axis=-1, keepdims=True)
    # The eps alone would leave a gradient of 1e6 at f = 0, where no direction is right.
    inverse = jnp.where(squared > 0, jax.lax.rsqrt(squared + eps), 0)
    return (features.astype(wide) * (features.shape[-1] ** 0.5 * inverse)).astype(features.dtype)
