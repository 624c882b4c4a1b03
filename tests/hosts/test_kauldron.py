"""sKEM behind a vision transformer of Kauldron, whose train step is ``mutable=True`` and keeps what comes back."""

import importlib.machinery
import importlib.util
import sys
import types

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from sgw_jax import KEM

TASKS = ("bright", "red")

# What Kauldron imports for data, summaries and notebooks, a gigabyte and more; its train step uses nothing of it.
UNUSED = ("tensorflow", "clu.metric_writers", "pandas", "mediapy", "IPython")


class Anything(type):
    """Of classes all of whose attributes are such classes."""

    def __getattr__(cls, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything(name, (), {})


class Empty(types.ModuleType):
    """A module in which every name is such a class."""

    def __init__(self, name):
        super().__init__(name)
        self.__path__, self.__spec__ = [], importlib.machinery.ModuleSpec(name, None)

    def __getattr__(self, name):
        return getattr(Anything("Any", (), {}), name)


@pytest.fixture
def kd(monkeypatch):
    if importlib.util.find_spec("kauldron") is None:
        pytest.skip("kauldron is not installed")
    for name in UNUSED:
        monkeypatch.setitem(sys.modules, name, Empty(name))
    from kauldron import kd

    return kd


def test_a_kauldron_train_step(kd, batch, check_training):
    class Network(nn.Module):
        trunk: nn.Module
        image: kd.kontext.Key = "batch.image"

        @nn.compact
        def __call__(self, image):
            tokens = self.trunk(image).reshape(-1, 4, 4, 16)
            features = {name: nn.Dense(16, name=f"stem_{name}")(tokens) for name in TASKS}
            features = KEM(4, top_k=8, etf_vertices=9, name="kem")(features)
            return {name: nn.Dense(1, name=f"head_{name}")(features[name]) for name in TASKS}

    trunk = kd.nn.VitEncoder.from_spec(patch_size=4, hidden_size=16, num_layers=1, num_heads=2, mlp_size=32)
    losses = {name: kd.losses.L2(preds=f"preds.{name}", targets=f"batch.{name}") for name in TASKS}
    train_step = kd.train.TrainStep(
        model=Network(trunk),
        optimizer=optax.adamw(1e-2, weight_decay=0.1),
        rng_streams=kd.train.RngStreams(seed=0),
        sharding=kd.sharding.ShardingStrategy(),
        init_transform=kd.ckpts.NoopTransform(),
        aux=kd.train.Auxiliaries(losses=losses, metrics={}, summaries={}),
    )
    state = train_step.init({name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in batch.items()})
    frame = jax.tree.map(np.array, state.collections)
    assert jax.tree.map(np.shape, frame) == {"constants": {"kem": {"etf": {"vertices": (16, 9)}}}}

    def step(state, batch):
        state, aux = train_step.step(state, batch, return_losses=True)
        return state, sum(aux.compute().loss_values.values())

    after = check_training(step, state, lambda state: state.params["kem"], kd.train.TrainStep.step._cache_size)
    jax.tree.map(np.testing.assert_array_equal, after.collections, frame)
