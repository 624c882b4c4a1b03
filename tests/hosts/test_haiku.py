"""sKEM inside a Haiku network, as a function of parameters that Haiku makes."""

import jax
import jax.numpy as jnp
import optax
import pytest

from sgw_jax import KEM, init_state, make_train_step
from sgw_jax.etf import etf_projection
from sgw_jax.functional import knowledge_extraction
from sgw_jax.tasks import Depth

TASKS = ("bright", "red")


def test_a_haiku_network_trains(batch, loss_of, check_training):
    hk = pytest.importorskip("haiku")

    def skem(features):
        """A parameter of Haiku's for each of linen's."""
        like = jax.eval_shape(KEM(4, etf_vertices=9).init, jax.random.key(0), features)["params"]

        def parameter(path, leaf):
            name = jax.tree_util.keystr(path, simple=True, separator="_")
            return hk.get_parameter(name, leaf.shape, init=hk.initializers.VarianceScaling())

        params = jax.tree_util.tree_map_with_path(parameter, like)
        return knowledge_extraction(params, features, top_k=8, projection=etf_projection(9)).features

    def network(image):
        trunk = jax.nn.relu(hk.Conv2D(16, 4, stride=4)(image))
        features = skem({name: hk.Conv2D(16, 3, name=f"stem_{name}")(trunk) for name in TASKS})
        return {name: hk.Linear(1, name=f"head_{name}")(features[name]) for name in TASKS}

    model, optimizer = hk.without_apply_rng(hk.transform(network)), optax.adamw(3e-3)

    @jax.jit
    def step(state, batch):
        params, moments = state
        loss, slopes = jax.value_and_grad(lambda p: loss_of(model.apply(p, batch["image"]), batch))(params)
        updates, moments = optimizer.update(slopes, moments, params)
        return (optax.apply_updates(params, updates), moments), loss

    params = model.init(jax.random.key(0), batch["image"])
    check_training(step, (params, optimizer.init(params)), lambda state: state[0]["~"], step._cache_size)


def test_a_haiku_network_in_our_train_step(batch):
    hk = pytest.importorskip("haiku")
    model = hk.transform(lambda image: {"depth": hk.Linear(1)(hk.dropout(hk.next_rng_key(), 0.1, image))})
    optimizer, image = optax.adam(1e-2), batch["image"]
    state = init_state(model, optimizer, image, init=lambda key, image: {"params": model.init(key, image)})

    def apply(variables, image, *, train, rngs):
        return model.apply(variables["params"], rngs["dropout"], image)

    step = jax.jit(make_train_step(model, [Depth()], optimizer, rngs=("dropout",), apply=apply))
    losses = []
    for _ in range(4):
        state, metrics = step(state, {"image": image, "depth": 1 + jnp.abs(image[..., 0])})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert step._cache_size() == 1
