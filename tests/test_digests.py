"""Digests: the same number however an array lies, another for any change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sgw_jax.run.digests import digests, on_devices
from sgw_jax.sharding import make_mesh

RNG = np.random.default_rng(0)


def digest(array):
    return digests({"a": array})["a"]


@pytest.mark.parametrize(
    ("shape", "specs"),
    [((), [P()]), ((8,), [P("fsdp"), P(("data", "fsdp"))]), ((3, 8), [P(None, "fsdp")]), ((0, 3), [])],
)
@pytest.mark.parametrize("dtype", [np.float32, np.int32, jnp.bfloat16, np.uint8, bool])
def test_it_does_not_depend_on_where_an_array_lies(shape, specs, dtype):
    mesh = make_mesh({"data": 2, "fsdp": 4})
    values = np.asarray(jnp.asarray(3 * RNG.normal(size=shape), dtype))
    found = {digest(values), digest(jnp.asarray(values))}
    for spec in [P(), *specs]:
        placed = jax.device_put(values, NamedSharding(mesh, spec))
        # By NumPy, and by the devices as an accelerator has it.
        found |= {digest(placed), "".join(f"{word:08x}" for word in np.asarray(on_devices(placed)))}
    assert len(found) == 1


def test_words_of_eight_bytes_count_whole():
    values = RNG.normal(size=5)
    with jax.enable_x64(True):
        assert digest(values) == "".join(f"{word:08x}" for word in np.asarray(on_devices(jnp.asarray(values))))
    assert digest(values) != digest(values + np.float64(2.0**-50))


def test_every_flipped_bit_and_every_swap_is_seen():
    values = RNG.normal(size=(4, 3)).astype(np.float32)
    whole = digest(values)
    for place in np.ndindex(values.shape):
        for bit in range(32):
            flipped = values.copy()
            flipped.view(np.uint32)[place] ^= np.uint32(1 << bit)
            assert digest(flipped) != whole
    assert digest(values[::-1]) != whole
    assert digest(np.zeros_like(values)) != whole
    assert digest(np.where(values == values[0, 0], -0.0, 0.0).astype(np.float32)) != digest(np.zeros_like(values))
