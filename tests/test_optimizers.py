"""The optimiser chain: schedules at their corners, who is decayed, who is frozen, and AdamW in NumPy float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sgw_jax.backbones.vit import ViT
from sgw_jax.interactions import KEM
from sgw_jax.model import MultiTaskModel
from sgw_jax.optimizers import decay_mask, learning_rate_schedule, learning_rates, make_optimizer
from sgw_jax.sharding import path_name
from sgw_jax.tasks import Depth

EPS32 = float(np.finfo(np.float32).eps)

DECAYS = {
    "poly": lambda x: (1 - x) ** 0.9,
    "cosine": lambda x: (1 + np.cos(np.pi * x)) / 2,
    "constant": lambda x: 1.0,
    "step": lambda x: 1.0 if x < 0.5 else 0.5,
}


@pytest.mark.parametrize("name", DECAYS)
@pytest.mark.parametrize("warmup", [0, 1, 2, 10])
def test_schedule(name, warmup):
    """The formula at every step; float32 powers and cosines are good to a few eps."""
    schedule = learning_rate_schedule(0.3, 50, warmup, name)
    for step in range(51):
        share = (step - warmup) / (50 - warmup)
        expected = 0.3 * (step + 1) / warmup if step < warmup else 0.3 * DECAYS[name](share)
        np.testing.assert_allclose(schedule(step), expected, rtol=16 * EPS32, atol=0.3 * 4 * EPS32)
    rates = learning_rates(schedule, 50)
    assert type(rates) is np.ndarray
    np.testing.assert_allclose(rates, [schedule(step) for step in range(50)], rtol=4 * EPS32, atol=0.3 * 4 * EPS32)
    if name in ("poly", "cosine"):
        assert schedule(50) == 0
        assert schedule(80) == 0  # not negative, not NaN


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "linear"}, r"'linear'; it must be one of \['constant', 'cosine', 'poly', 'step'\]"),
        ({"warmup_steps": 10}, r"warmup_steps 10 must be in \[0, total_steps = 10\)"),
        ({"warmup_steps": -1}, "warmup_steps -1"),
    ],
)
def test_schedule_errors(options, message):
    with pytest.raises(ValueError, match=message):
        learning_rate_schedule(0.1, 10, **options)


def test_optimizer_errors():
    with pytest.raises(ValueError, match=r"'lamb'; it must be one of \['adamw', 'muon', 'sgd'\]"):
        make_optimizer(0.1, name="lamb")
    with pytest.raises(ValueError, match="clip_norm is 0"):
        make_optimizer(0.1, clip_norm=0)


@pytest.mark.parametrize(
    ("option", "values", "allowed"),
    [
        ("learning_rate", (-1e-3, np.nan, np.inf), "must not be negative"),
        ("weight_decay", (-1e-3, np.nan, np.inf), "must not be negative"),
        ("backbone_scale", (-1e-3, np.nan), "must not be negative"),
        ("muon_rms", (0, -0.2, np.nan, np.inf), "must be positive"),
        ("lora_scale", (0, -0.1, np.nan, np.inf), "must be positive"),
        ("clip_norm", (-1, np.nan, np.inf), "must be positive"),
        ("b1", (-0.1, 1, 1.5, np.nan), r"must be in \[0, 1\)"),
        ("b2", (-0.1, 1, 1.5, np.nan), r"must be in \[0, 1\)"),
        ("momentum", (-0.1, 1, 5, np.nan), r"must be in \[0, 1\)"),
        ("layer_decay", (0, 1.5, np.nan), r"must be in \(0, 1\]"),
    ],
)
def test_options_out_of_range(option, values, allowed):
    for value in values:
        with pytest.raises(ValueError, match=f"optimizer: {option} is {value}; it {allowed}"):
            make_optimizer(**{"learning_rate": 0.1, option: value})


def test_decay_mask_of_a_real_model():
    """Kernels alone are decayed: no bias (the scanned ones have two axes), norm, slot, gate or embedding."""
    module = KEM(3, pre_norm=True, task_embedding=True, task_gate=True, etf_vertices=5)
    model = MultiTaskModel((Depth(),), ViT(32, 8, 4, 2, image_size=(32, 32), patch_embed="conv"), module, channels=8)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    found = {path_name(path): value for path, value in jax.tree_util.tree_leaves_with_path(decay_mask(params))}
    assert found == {name: name.split("/")[-1] == "kernel" for name in found}
    assert set(found.values()) == {True, False}
    shapes = {path_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    assert len(shapes["backbone/blocks/mlp/hidden/bias"]) == 2
    assert not decay_mask({"subkernel": 1, "kernel": {"bias": 1}})["subkernel"]


PARAMS = {
    "backbone": {"kernel": np.array([[1.0, -2.0]], np.float32), "bias": np.array([0.5], np.float32)},
    "head": {"kernel": np.array([[3.0], [0.1]], np.float32), "slots": np.array([[2.0, 1.0]], np.float32)},
    "block": {"lora": {"a": np.array([[[0.3, -1.0]]], np.float32)}},
}


def gradients(step):
    rng = np.random.default_rng(step)
    return jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32) * 3, PARAMS)


def run(optimizer, steps):
    params, state = PARAMS, optimizer.init(PARAMS)
    update = jax.jit(optimizer.update)
    for step in range(steps):
        updates, state = update(gradients(step), state, params)
        params = jax.tree.map(lambda p, u: p + u, params, updates)
    return params


def by_name(tree):
    return {path_name(path): np.asarray(x, np.float64) for path, x in jax.tree_util.tree_leaves_with_path(tree)}


def reference(
    steps, *, name="adamw", rate=0.1, decay=0.0, clip=None, scale=1.0, lora=1.0, b1=0.9, b2=0.999, momentum=0.9
):
    """The chain in float64: clip, AdamW (Loshchilov and Hutter 2019, algorithm 2) or heavy ball, decoupled decay."""
    values = by_name(PARAMS)
    first, second = ({key: np.zeros_like(x) for key, x in values.items()} for _ in range(2))
    for step in range(steps):
        grads = by_name(gradients(step))
        norm = np.sqrt(sum(np.sum(g**2) for g in grads.values()))
        shrink = 1 if clip is None else min(1, clip / norm)
        for key, gradient in grads.items():
            g = gradient * shrink
            if name == "adamw":
                first[key] = b1 * first[key] + (1 - b1) * g
                second[key] = b2 * second[key] + (1 - b2) * g**2
                corrected = second[key] / (1 - b2 ** (step + 1))
                direction = first[key] / (1 - b1 ** (step + 1)) / (np.sqrt(corrected) + 1e-8)
            else:
                first[key] = direction = momentum * first[key] + g
            direction = direction + decay * values[key] * key.endswith("kernel")
            own = scale if key.startswith("backbone") else lora if "lora" in key else 1
            values[key] = values[key] - rate * direction * own
    return values


@pytest.mark.parametrize(
    ("chain", "formula"),
    [
        ({}, {}),
        ({"weight_decay": 0.2, "clip_norm": 1.5}, {"decay": 0.2, "clip": 1.5}),
        ({"weight_decay": 0.2, "backbone_scale": 0.1}, {"decay": 0.2, "scale": 0.1}),
        ({"weight_decay": 0.2, "lora_scale": 0.1}, {"decay": 0.2, "lora": 0.1}),
        ({"b1": 0.8, "b2": 0.95}, {"b1": 0.8, "b2": 0.95}),
        ({"name": "sgd"}, {"name": "sgd"}),
        ({"name": "sgd", "momentum": 0.0, "clip_norm": 100.0}, {"name": "sgd", "momentum": 0.0}),  # never reached
    ],
)
def test_steps_match_numpy(chain, formula):
    """Five steps of about 20 float32 operations on values of size at most 5."""
    found = run(make_optimizer(0.1, **chain), 5)
    expected = reference(5, **formula)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        np.testing.assert_allclose(leaf, expected[path_name(path)], rtol=0, atol=5 * 20 * 5 * EPS32)


def orthogonalised(matrix):
    """Newton-Schulz in float64: five times X <- a X + (b A + c A^2) X with A = X X^T (Jordan et al. 2024)."""
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / np.linalg.norm(x)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def test_muon_matches_numpy():
    """A dense kernel, a scanned stack of them and a convolution, against float64; what is no kernel moves by NAdam.

    Each Newton-Schulz step may amplify a rounding error by its slope at zero, 3.44, so five by 500; sums have at most
    18 terms and entries of an update are of size 1."""
    rng = np.random.default_rng(0)
    shapes = {"dense": (4, 6), "blocks": (3, 5, 4), "conv": (3, 3, 2, 5)}
    bias = np.ones(3, np.float32)
    params = {name: {"kernel": np.ones(shape, np.float32), "bias": bias} for name, shape in shapes.items()}
    optimizer = make_optimizer(0.1, name="muon", muon_rms=0.3)
    adam = optax.chain(optax.scale_by_adam(nesterov=True), optax.scale(-0.1))
    state, adam_state, momentum = optimizer.init(params), adam.init(params), dict.fromkeys(shapes, 0.0)
    for step in (1, 2, 3):
        grads = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), params)
        updates, state = jax.jit(optimizer.update)(grads, state, params)
        adam_updates, adam_state = jax.jit(adam.update)(grads, adam_state, params)
        for name, shape in shapes.items():
            gradient = grads[name]["kernel"].astype(np.float64)
            momentum[name] = 0.95 * momentum[name] + 0.05 * gradient
            ahead = 0.95 * momentum[name] / (1 - 0.95 ** (step + 1)) + 0.05 * gradient / (1 - 0.95**step)
            matrices = ahead.reshape(*((3, 5, 4) if name == "blocks" else (1, -1, shape[-1])))
            expected = np.stack([orthogonalised(m) * 0.3 * max(m.shape) ** 0.5 for m in matrices]).reshape(shape)
            np.testing.assert_allclose(updates[name]["kernel"], -0.1 * expected, rtol=0, atol=500 * 18 * EPS32 * 0.1)
            np.testing.assert_allclose(updates[name]["bias"], adam_updates[name]["bias"], rtol=8 * EPS32)


def test_muon_leaves_kernels_without_gradient_alone():
    """A task without labels has no gradient; the orthogonal matrix nearest to zero must not be noise."""
    optimizer = make_optimizer(0.1, name="muon")
    params = {"kernel": jnp.ones((3, 4))}
    updates, _ = optimizer.update({"kernel": jnp.zeros((3, 4))}, optimizer.init(params), params)
    assert np.array_equal(updates["kernel"], np.zeros((3, 4)))


def test_backbone_scale_zero_freezes():
    found = run(make_optimizer(0.1, weight_decay=0.5, backbone_scale=0.0), 3)
    for name in ("kernel", "bias"):
        assert np.array_equal(found["backbone"][name], PARAMS["backbone"][name])
    assert not np.array_equal(found["head"]["kernel"], PARAMS["head"]["kernel"])


def test_schedule_drives_the_steps():
    """With SGD of unit gradients the parameters fall by the sum of the learning rates, the first one included."""
    schedule = learning_rate_schedule(1.0, 4, 2)
    optimizer = make_optimizer(schedule, name="sgd", momentum=0.0)
    params = {"kernel": jnp.zeros(())}
    state = optimizer.init(params)
    for _ in range(4):
        updates, state = optimizer.update({"kernel": jnp.ones(())}, state, params)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["kernel"], -(0.5 + 1 + 1 + 0.5**0.9), rtol=16 * EPS32)
