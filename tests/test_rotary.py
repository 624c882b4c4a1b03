"""Rotary positions: as complex numbers, and what attention sees of them."""

import jax
import jax.numpy as jnp
import numpy as np

from sgw_jax.layers.attention import SelfAttention
from sgw_jax.layers.rotary import rotate, rotation_of_grid

EPS32 = float(np.finfo(np.float32).eps)


def test_a_rotation_is_a_product_of_complex_numbers():
    """Entries i and i + dim / 2 are real and imaginary part; angles in float64. They reach 2 pi, in float32."""
    rows, columns, dim, theta = 3, 5, 8, 100.0
    y, x = ((np.arange(length) + 0.5) / length * 2 - 1 for length in (rows, columns))
    periods = theta ** (np.arange(dim // 4) * 4 / dim)
    angles = [[*(2 * np.pi * y[i] / periods), *(2 * np.pi * x[j] / periods)] for i, j in np.ndindex(rows, columns)]
    tokens = np.random.default_rng(0).normal(size=(2, 1 + rows * columns, 2, dim)).astype(np.float32)
    turned = (tokens[..., : dim // 2] + 1j * tokens[..., dim // 2 :])[:, 1:] * np.exp(1j * np.asarray(angles))[:, None]
    found = rotate(tokens, rotation_of_grid(rows, columns, dim, theta))
    np.testing.assert_array_equal(found[:, 0], tokens[:, 0])  # it has no place in the image
    expected = np.concatenate([turned.real, turned.imag], -1)
    np.testing.assert_allclose(found[:, 1:], expected, rtol=0, atol=4 * 2 * np.pi * 8 * EPS32)


def test_half_precision_is_rotated_in_float32():
    tokens = np.random.default_rng(0).normal(size=(1, 6, 1, 4)).astype(np.float32)
    rotation = rotation_of_grid(2, 3, 4, 100.0)
    half = jnp.asarray(tokens, jnp.bfloat16)
    found = rotate(half, rotation)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, rotate(half.astype(jnp.float32), rotation).astype(jnp.bfloat16))


def test_attention_in_chunks_is_rotated_too():
    """And a bias of queries and values alone is that of all three with zeros for the keys."""
    tokens = np.random.default_rng(1).normal(size=(1, 13, 8)).astype(np.float32)
    rotation = rotation_of_grid(3, 4, 4, 100.0)
    module = SelfAttention(2, qkv_bias="query_value")
    variables = jax.jit(module.init)(jax.random.key(0), tokens, rotation)["params"]
    bias = variables["query_value_bias"] = jnp.asarray(np.random.default_rng(2).normal(size=(2, 8)), jnp.float32)
    found = jax.jit(module.apply)({"params": variables}, tokens, rotation)
    # A sum of 8 products, a softmax over 13 and its product: below 64 roundings of numbers of size 8.
    close = {"rtol": 0, "atol": 64 * 8 * EPS32}
    np.testing.assert_allclose(
        jax.jit(module.clone(chunk=5).apply)({"params": variables}, tokens, rotation), found, **close
    )
    assert np.abs(jax.jit(module.apply)({"params": variables}, tokens) - found).max() > 1e-2
    joint = {"kernel": variables["query_key_value"]["kernel"], "bias": jnp.concatenate([bias[0], 0 * bias[0], bias[1]])}
    variables = {"output": variables["output"], "query_key_value": joint}
    plain = jax.jit(SelfAttention(2).apply)({"params": variables}, tokens, rotation)
    np.testing.assert_allclose(plain, found, **close)
