"""Backbones: what every member of BACKBONES promises, by shapes alone, with the options of the configuration."""

import jax
import jax.numpy as jnp
import pytest

from sgw_jax.backbones import BACKBONES
from sgw_jax.configs.base import get_config

STRIDES = (4, 8, 16, 32)


def made(name, size, dtype=jnp.float32):
    options = {key: value for key, value in get_config().backbones[name].items() if value is not None}
    return BACKBONES[name](image_size=size, dtype=dtype, **options)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("name", BACKBONES)
def test_contract(name, dtype):
    """A map for each stride, in the dtype asked for; parameters are float32, and there is nothing else to carry."""
    size = (70, 121)  # a multiple of no patch, window or stride
    maps, variables = jax.eval_shape(
        made(name, size, dtype).init_with_output, jax.random.key(0), jnp.zeros((2, *size, 3))
    )
    assert set(STRIDES) <= set(maps)
    for stride in STRIDES:
        assert maps[stride].shape[:3] == (2, -(-size[0] // stride), -(-size[1] // stride))
        assert maps[stride].dtype == dtype
    assert set(variables) == {"params"}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("name", BACKBONES)
def test_training_needs_no_more_than_drop_path(name):
    model = made(name, (64, 64))
    image = jnp.zeros((2, 64, 64, 3))

    def loss(params, key):
        maps = model.apply({"params": params}, image, train=True, rngs={"drop_path": key})
        return sum(jnp.sum(value) for value in maps.values())

    params = jax.eval_shape(model.init, jax.random.key(0), image)["params"]
    gradient = jax.eval_shape(jax.grad(loss), params, jax.eval_shape(lambda: jax.random.key(0)))
    assert jax.tree.map(jnp.shape, gradient) == jax.tree.map(jnp.shape, params)
