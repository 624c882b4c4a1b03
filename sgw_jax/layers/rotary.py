"""Rotary position embedding (RoPE, Su et al. 2021) of patches in a plane, as in DINOv3."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def rotation_of_grid(rows: int, columns: int, dim: int, theta: float) -> Float[Array, "2 patches half"]:
    """Cosines and sines of the angles by which the patches of a ``rows x columns`` grid rotate, in float32.

    A patch whose centre lies at (y, x) in [-1, 1]^2 has the angles ``2 pi y / theta^(4 j / dim)`` and the same of x, j
    = 0 ... dim / 4 - 1: coordinates are relative to the image, so that grids of any size have the same range of
    angles. ``dim``, the width of a head, must be a multiple of 4.
    """
    frequency = 2 * jnp.pi / theta ** (jnp.arange(dim // 4, dtype=jnp.float32) * 4 / dim)
    y, x = (2 * (jnp.arange(length, dtype=jnp.float32) + 0.5) / length - 1 for length in (rows, columns))
    angles = jnp.stack(jnp.meshgrid(y, x, indexing="ij"), -1)[..., None] * frequency
    angles = angles.reshape(rows * columns, dim // 2)
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(
    tokens: Float[Array, "batch tokens heads dim"], rotation: Float[Array, "2 patches half"]
) -> Float[Array, "batch tokens heads dim"]:
    """Turns entries i and i + dim / 2 of every head of the last ``patches`` tokens by their i-th angle, in float32.

    Tokens before them, which have no place in the image, stay as they are.
    """
    first, patches = jnp.split(tokens, [tokens.shape[1] - rotation.shape[1]], axis=1)
    cosine, sine = rotation[:, :, None]
    left, right = jnp.split(patches.astype(jnp.promote_types(tokens.dtype, jnp.float32)), 2, axis=-1)
    turned = jnp.concatenate([left * cosine - right * sine, right * cosine + left * sine], -1)
    return jnp.concatenate([first, turned.astype(tokens.dtype)], axis=1)
