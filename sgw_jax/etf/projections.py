"""What sKEM may select by: the fixed simplex ETF, and the fair controls that tell what the ETF itself brings."""

from collections.abc import Callable
from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sgw_jax.etf.simplex import (
    SimplexETF,
    check_rank,
    direction,
    etf_in_program,
    fixed,
    frame_in_program,
    orthonormal_frame,
    project,
)


class Projection(Protocol):
    """Makes a projection module of K vertices: features (..., d) -> (..., some width), entries of unit variance.

    Its method ``factors`` returns (features' directions (..., d), a frame (d, some width) or None): the projection is
    their product.
    """

    def __call__(self, num_vertices: int, seed: int, *, name: str | None) -> Any: ...


def etf_projection(num_vertices: int, *, seed: int = 0) -> Callable[[Array], tuple[Array, Array]]:
    """`SimplexETF` as a function of arrays: features (..., d) -> (``sqrt(d) f / ||f||``, M (d, K)), its two factors.

    The program makes M from K and the seed, and no gradient flows into it: for hosts that are no linen modules.
    """

    def factors(features: Float[Array, "*batch dim"]) -> tuple[Array, Array]:
        frame = etf_in_program(num_vertices, features.shape[-1], seed=seed)
        return direction(features), jax.lax.stop_gradient(frame)

    return factors


class Direction(nn.Module):
    """``z = sqrt(d) f / ||f||`` alone: what the normalisation does without a frame. K and the seed are not used.

    With K = d + 1 a learned map behind an ETF can be whatever one behind this is (method: the same function class).
    """

    num_vertices: int
    seed: int = 0

    def __call__(self, features: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
        return project(*self.factors(features))

    def width(self, dim: int) -> int:
        """Of the projection of features of width ``dim``."""
        return dim

    def factors(self, features: Float[Array, "*batch dim"]) -> tuple[Array, None]:
        """(z, no frame)."""
        return direction(features), None


class OrthonormalFrame(nn.Module):
    """``z = sqrt(d) Q^T f / ||f||`` with a fixed random orthonormal Q (d, K - 1): the ETF's rank without its angles.

    Q lives in the collection ``constants``, as the ETF does.
    """

    num_vertices: int
    seed: int = 0

    def __call__(self, features: Float[Array, "*batch dim"]) -> Float[Array, "*batch rank"]:
        return project(*self.factors(features))

    def width(self, dim: int) -> int:
        """Of the projection of features of width ``dim``."""
        check_rank(self.num_vertices - 1, dim)
        return self.num_vertices - 1

    @nn.compact
    def factors(self, features: Float[Array, "*batch dim"]) -> tuple[Array, Float[Array, "dim rank"]]:
        """(``sqrt(d) f / ||f||``, Q)."""

        dim, rank, seed = features.shape[-1], self.num_vertices - 1, self.seed
        frame = fixed(
            self,
            "frame",
            lambda: orthonormal_frame(dim, rank, seed=seed),
            lambda: frame_in_program(dim, rank, seed=seed),
        )
        return direction(features), frame


class LearnedFrame(nn.Module):
    """``z = sqrt(d) W^T f / ||f||`` with a learned W (d, K - 1) that starts orthonormal: the ETF's rank, learned."""

    num_vertices: int
    seed: int = 0

    def __call__(self, features: Float[Array, "*batch dim"]) -> Float[Array, "*batch rank"]:
        return project(*self.factors(features))

    def width(self, dim: int) -> int:
        """Of the projection of features of width ``dim``."""
        check_rank(self.num_vertices - 1, dim)
        return self.num_vertices - 1

    @nn.compact
    def factors(self, features: Float[Array, "*batch dim"]) -> tuple[Array, Float[Array, "dim rank"]]:
        """(``sqrt(d) f / ||f||``, W)."""

        def start(_: Array, shape: tuple[int, int]) -> Array:
            return jnp.asarray(orthonormal_frame(*shape, seed=self.seed), jnp.float32)

        return direction(features), self.param("kernel", start, (features.shape[-1], self.num_vertices - 1))


PROJECTIONS: dict[str, Projection] = {
    "etf": SimplexETF,
    "direction": Direction,
    "orthonormal": OrthonormalFrame,
    "learned": LearnedFrame,
}


def projected_width(kind: str, num_vertices: int | None, dim: int) -> int:
    """Of features of width ``dim`` behind a projection of `PROJECTIONS`; without vertices there is none."""
    return dim if num_vertices is None else PROJECTIONS[kind](num_vertices, 0, name=None).width(dim)


def factors_of(
    kind: str, num_vertices: int | None, seed: int, learned: Float[Array, "dim rank"] | None = None
) -> Callable[[Array], tuple[Array, Array | None]] | None:
    """A projection of `PROJECTIONS` as a function of arrays (`etf_projection`); None without vertices.

    Args:
      learned: the frame of "learned".
    """
    if num_vertices is None:
        return None
    if kind == "etf":
        return etf_projection(num_vertices, seed=seed)

    def factors(features: Float[Array, "*batch dim"]) -> tuple[Array, Array | None]:
        if kind == "direction":
            return direction(features), None
        if kind == "learned":
            return direction(features), learned
        frame = frame_in_program(features.shape[-1], num_vertices - 1, seed=seed)
        return direction(features), jax.lax.stop_gradient(frame)

    return factors
