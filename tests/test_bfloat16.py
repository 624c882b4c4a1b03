"""Networks in bfloat16 on a CPU: commands keep from fusions that compute nonsense, and nonsense is refused."""

import os
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgw_jax import TASKS, MultiTaskModel, Predictor
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.host import FUSIONS, sound_fusions
from sgw_jax.interactions import NoInteraction
from sgw_jax.run import bfloat16
from sgw_jax.train import train


class Blocks(nn.Module):
    """What a stem and a head do, on as many positions as of six images."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        for _ in range(2):
            x = x + nn.relu(nn.Conv(64, (3, 3), dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x)))
        return nn.Dense(64, dtype=self.dtype)(nn.LayerNorm(dtype=self.dtype)(x))


def test_with_the_flags_of_commands_blocks_are_those_in_float32():
    """As tests/conftest.py sets them. Values below 10, rounded to 8 bits half a dozen times on their way."""
    bfloat16.check_bfloat16(jnp.bfloat16)
    x = np.random.default_rng(0).normal(size=bfloat16.SHAPE).astype(np.float32)
    variables = jax.jit(Blocks(jnp.float32).init)(jax.random.key(0), x)
    rounded = jax.jit(Blocks(jnp.bfloat16).apply)(variables, jnp.asarray(x, jnp.bfloat16))
    exact = jax.jit(Blocks(jnp.float32).apply)(variables, x)
    np.testing.assert_allclose(np.asarray(rounded, np.float32), exact, atol=6 * 10 * 2**-9)


@pytest.mark.parametrize("found", [np.inf, np.nan, 0.2])
def test_nonsense_is_refused_where_a_network_computes_in_bfloat16(monkeypatch, found, tmp_path):
    monkeypatch.setattr(bfloat16, "_error", lambda: found)
    bfloat16.check_bfloat16(jnp.float32)
    bfloat16.check_bfloat16(None)
    tasks = [TASKS["depth"]()]
    model = MultiTaskModel(tasks, nn.Module(), NoInteraction(), channels=4, dtype=jnp.bfloat16)
    said = f"bfloat16 wrongly on this CPU.*from float32 by {found}.*Add {FUSIONS}= to XLA_FLAGS.*config.dtype=float32"
    with pytest.raises(InputError, match=said):
        Predictor(model, {}, tasks, size=(8, 8))
    with pytest.raises(InputError, match=said):
        train(SimpleNamespace(model=model, settings=None, mesh=None), tmp_path / "run", None)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("version", "given", "expected"),
    [
        ("0.12.0.1", "", f"{FUSIONS}="),
        ("0.12.3", "--xla_dump_to=x", f"--xla_dump_to=x {FUSIONS}="),
        ("0.12.0", f"{FUSIONS}=LIBRARY_FUSION_TYPE_DOT", f"{FUSIONS}=LIBRARY_FUSION_TYPE_DOT"),  # the user's own choice
        ("0.11.2", "", ""),  # to which the flag is unknown
        ("0.13.0", "", ""),
    ],
)
def test_only_versions_known_to_be_wrong_get_the_flag(monkeypatch, version, given, expected):
    monkeypatch.setenv("XLA_FLAGS", given)
    monkeypatch.setattr("importlib.metadata.version", lambda _: version)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    sound_fusions()
    assert os.environ["XLA_FLAGS"] == expected
