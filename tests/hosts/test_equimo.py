"""sKEM behind a vision transformer of Equimo, its parameters a field of an Equinox module."""

import jax
import jax.numpy as jnp
import optax
import pytest

from sgw_jax import KEM
from sgw_jax.etf import etf_projection
from sgw_jax.functional import knowledge_extraction

TASKS = ("bright", "red")


def test_an_equimo_network_trains(batch, loss_of, check_training):
    eqx = pytest.importorskip("equinox")
    VisionTransformer = pytest.importorskip("equimo.models.vit").VisionTransformer

    class Network(eqx.Module):
        trunk: eqx.Module
        stems: dict
        kem: dict  # by linen's names
        heads: dict

        def __init__(self, key):
            keys = iter(jax.random.split(key, 6))
            self.trunk = VisionTransformer(16, 3, 16, 4, 2, [2], num_classes=0, reg_tokens=0, key=next(keys))
            self.stems = {name: eqx.nn.Linear(16, 16, key=next(keys)) for name in TASKS}
            features = dict.fromkeys(TASKS, jnp.zeros((1, 4, 4, 16)))
            self.kem = KEM(4, etf_vertices=9).init(next(keys), features)["params"]
            self.heads = {name: eqx.nn.Linear(16, 1, key=next(keys)) for name in TASKS}

        def __call__(self, image, key):
            def trunk(image, key):
                return self.trunk.forward_features(image.transpose(2, 0, 1), key)["x_norm_patchtokens"]

            tokens = jax.vmap(trunk)(image, jax.random.split(key, len(image))).reshape(-1, 4, 4, 16)
            features = {name: pointwise(self.stems[name])(tokens) for name in TASKS}
            mixed = knowledge_extraction(self.kem, features, top_k=8, projection=etf_projection(9)).features
            return {name: pointwise(self.heads[name])(mixed[name]) for name in TASKS}

    def pointwise(layer):
        return jax.vmap(jax.vmap(jax.vmap(layer)))

    params, static = eqx.partition(Network(jax.random.key(0)), eqx.is_inexact_array)
    optimizer, compiled = optax.adamw(1e-2), []

    @eqx.filter_jit
    def step(state, batch):
        compiled.append(1)
        params, moments = state

        def loss(params):
            return loss_of(eqx.combine(params, static)(batch["image"], jax.random.key(1)), batch)

        value, slopes = eqx.filter_value_and_grad(loss)(params)
        updates, moments = optimizer.update(slopes, moments, params)
        return (eqx.apply_updates(params, updates), moments), value

    check_training(step, (params, optimizer.init(params)), lambda state: state[0].kem, lambda: len(compiled))
