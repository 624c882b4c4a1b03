"""sKEM behind a Flax vision transformer of transformers, whose trainers keep ``params`` alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax.training.train_state import TrainState

from sgw_jax import KEM

TASKS = ("bright", "red")


def test_a_flax_vit_trains(batch, loss_of, check_training):
    transformers = pytest.importorskip("transformers", exc_type=ImportError)
    if not hasattr(transformers, "FlaxViTModel"):
        pytest.skip("transformers has no Flax models from version 5 on")
    from transformers.models.vit.modeling_flax_vit import FlaxViTModule

    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.ViTConfig(16, image_size=16, patch_size=4, **sizes)

    class Network(nn.Module):
        @nn.compact
        def __call__(self, image, deterministic):
            tokens = FlaxViTModule(config, add_pooling_layer=False)(image, deterministic=deterministic)[0]
            maps = tokens[:, 1:].reshape(-1, 4, 4, 16)
            features = {name: nn.Dense(16, name=f"stem_{name}")(maps) for name in TASKS}
            features = KEM(4, top_k=8, etf_vertices=9, name="kem")(features)
            return {name: nn.Dense(1, name=f"head_{name}")(features[name]) for name in TASKS}

    model = Network()
    params = model.init(jax.random.key(0), batch["image"], True)["params"]
    state = TrainState.create(apply_fn=model.apply, params=params, tx=optax.adamw(1e-2))

    @jax.jit
    def step(state, batch):
        rngs = {"dropout": jax.random.fold_in(jax.random.key(0), state.step)}

        def loss(params):
            return loss_of(state.apply_fn({"params": params}, batch["image"], False, rngs=rngs), batch)

        value, slopes = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=slopes), value

    state = state.replace(step=jnp.int32(0))  # Flax's Python 0 would be another program
    check_training(step, state, lambda state: state.params["kem"], step._cache_size)
