"""The simplex ETF against its definition, and the projection against NumPy in float64."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgw_jax.etf.projections import PROJECTIONS
from sgw_jax.etf.simplex import SimplexETF, simplex_etf
from sgw_jax.nnx import SimplexETF as NnxSimplexETF

EPS32 = float(np.finfo(np.float32).eps)
EPS64 = float(np.finfo(np.float64).eps)
SHAPES = [(2, 1), (2, 8), (3, 2), (5, 8), (8, 8), (9, 8), (65, 64), (64, 96)]  # (K, d), K = d + 1 among them


@pytest.mark.parametrize(("vertices", "dim"), SHAPES)
def test_definition(vertices, dim):
    """Unit columns at pairwise cosine -1 / (K - 1), rank K - 1, sum zero. An entry of M^T M adds d products of entries
    of two (d, K) factors, each orthonormal to a few eps: 8 (d + K) eps bounds all of it."""
    frame = simplex_etf(vertices, dim)
    bound = 8 * (dim + vertices) * EPS64
    gram = np.full((vertices, vertices), -1 / (vertices - 1))
    np.fill_diagonal(gram, 1)
    assert frame.shape == (dim, vertices)
    assert frame.dtype == np.float64
    np.testing.assert_allclose(frame.T @ frame, gram, rtol=0, atol=bound)
    np.testing.assert_allclose(frame.sum(axis=1), 0, atol=bound)
    singular = np.linalg.svd(frame, compute_uv=False)
    assert np.sum(singular > 1e-6) == vertices - 1
    # A tight frame: M M^T = K / (K - 1) times a projector, so that all non-zero singular values are equal.
    np.testing.assert_allclose(singular[: vertices - 1] ** 2, vertices / (vertices - 1), rtol=bound)


@pytest.mark.parametrize(
    ("vertices", "dim", "message"), [(1, 4, "at least 2"), (0, 4, "at least 2"), (6, 4, "at least 5 dimensions")]
)
def test_impossible_frames_are_refused(vertices, dim, message):
    with pytest.raises(ValueError, match=message):
        simplex_etf(vertices, dim)


def test_seed_decides_and_processes_agree():
    here = simplex_etf(5, 7, seed=3)
    assert np.array_equal(here, simplex_etf(5, 7, seed=3))
    assert not np.allclose(here, simplex_etf(5, 7, seed=4))
    code = "import sys, sgw_jax.etf; sys.stdout.buffer.write(sgw_jax.etf.simplex_etf(5, 7, seed=3).tobytes())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout
    assert other == here.tobytes()


def projection(features, vertices, seed=0, eps=1e-12):
    """z = sqrt(d) M^T f / ||f|| in float64."""
    features = np.asarray(features, np.float64)
    norm = np.sqrt(np.sum(features**2, axis=-1, keepdims=True) + eps)
    return np.sqrt(features.shape[-1]) * (features / norm) @ simplex_etf(vertices, features.shape[-1], seed=seed)


@pytest.mark.parametrize(("vertices", "dim"), [(2, 1), (5, 8), (9, 8)])
def test_projection_values(vertices, dim):
    """An entry is a sum of d products of size at most 1, times sqrt(d), of factors with relative errors of a few eps:
    (d + 8) sqrt(d) eps."""
    features = np.random.default_rng(0).normal(size=(3, 4, dim)).astype(np.float32) * 7
    module = SimplexETF(vertices, seed=2)
    variables = module.init(jax.random.key(0), features)
    output = module.apply(variables, features)
    assert output.dtype == jnp.float32
    bound = (dim + 8) * np.sqrt(dim) * EPS32
    np.testing.assert_allclose(output, projection(features, vertices, seed=2), rtol=0, atol=bound)
    np.testing.assert_allclose(output.sum(axis=-1), 0, atol=vertices * bound)  # the vertices sum to zero


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_whole_numbers_are_refused_rather_than_rounded(kind):
    """Cosines in an integer type would be -1, 0 and 1."""
    features = jnp.arange(24).reshape(3, 8)
    with pytest.raises(ValueError, match="the features are int32; they must be floating-point"):
        jax.eval_shape(PROJECTIONS[kind](5).init, jax.random.key(0), features)
    with pytest.raises(ValueError, match="the features are int32; they must be floating-point"):
        jax.eval_shape(NnxSimplexETF(5), features)


def test_the_frame_is_a_constant_not_a_parameter():
    variables = SimplexETF(5).init(jax.random.key(0), jnp.ones((2, 8)))
    assert set(variables) == {"constants"}
    other = SimplexETF(5).init(jax.random.key(1), jnp.ones((2, 8)))
    assert np.array_equal(variables["constants"]["vertices"], other["constants"]["vertices"])  # its seed is its own
    np.testing.assert_array_equal(variables["constants"]["vertices"], simplex_etf(5, 8).astype(np.float32))


def test_zero_features_give_zero_and_zero_gradient():
    module = SimplexETF(5)
    features = jnp.stack([jnp.zeros(8), jnp.arange(8.0)])
    variables = module.init(jax.random.key(0), features)
    value, pull = jax.vjp(lambda f: module.apply(variables, f), features)
    (gradient,) = pull(jnp.ones_like(value).at[:, 0].set(3.0))  # equal weights would cancel: the vertices sum to zero
    assert np.array_equal(value[0], np.zeros(5))
    assert np.array_equal(gradient[0], np.zeros(8))
    assert np.all(np.isfinite(gradient[1]))
    assert np.any(gradient[1] != 0)


def test_entries_of_random_directions_have_unit_variance():
    """z_k^2 has mean 1 and variance below 2 for directions uniform on the sphere; n independent tokens estimate the
    mean to sqrt(2 / n), and five standard errors are allowed."""
    features = np.random.default_rng(1).normal(size=(4000, 16)).astype(np.float32)
    module = SimplexETF(9)
    output = np.asarray(module.apply(module.init(jax.random.key(0), features), features), np.float64)
    np.testing.assert_allclose(np.mean(output**2, axis=0), 1, atol=5 * np.sqrt(2 / 4000))


def test_bfloat16():
    """Direction and vertices are rounded to bfloat16 (unit roundoff 2^-8 each), the product once more: with entries
    |M^T direction| <= sqrt(d) the error is at most 3 2^-8 times sum |direction_i M_ik| <= sqrt(d)."""
    features = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)), jnp.bfloat16)
    module = SimplexETF(5)
    output = module.apply(module.init(jax.random.key(0), features), features)
    assert output.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(output, np.float64), projection(np.asarray(features), 5), rtol=0, atol=3.1 * 2**-8 * np.sqrt(8)
    )


def test_float64_is_kept():
    with jax.enable_x64(True):
        features = jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)))
        module = SimplexETF(5)
        variables = module.init(jax.random.key(0), features)
        output = module.apply(variables, features)
        frame = np.asarray(variables["constants"]["vertices"], np.float64)
        norm = np.sqrt(np.sum(np.asarray(features) ** 2, axis=-1, keepdims=True) + 1e-12)
        assert output.dtype == jnp.float64
        np.testing.assert_allclose(output, np.sqrt(8) * (np.asarray(features) / norm) @ frame, rtol=0, atol=64 * EPS64)
