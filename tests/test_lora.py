"""LoRA: the formula in NumPy and in PEFT, a start that is the network itself, factors alone, merged and refused."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from sgw_jax.backbones.adapters import factors_of, load_factors, merged, save_factors
from sgw_jax.backbones.convnext import ConvNeXt
from sgw_jax.backbones.freezing import Freezing
from sgw_jax.backbones.swin import Swin
from sgw_jax.backbones.vit import ViT
from sgw_jax.differentiate import flat
from sgw_jax.interactions import NoInteraction
from sgw_jax.layers.lora import LoRA
from sgw_jax.model import MultiTaskModel
from sgw_jax.optimizers import make_optimizer
from sgw_jax.tasks import Depth
from sgw_jax.train_step import init_state, make_train_step

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})
EPS32 = float(np.finfo(np.float32).eps)
SIZE = (32, 32)
MLP = ("mlp/hidden", "mlp/output")
MATRICES = ("attention/output", "attention/query_key_value", *MLP)
VIT = ViT(8, 8, 4, 2, 2.0, SIZE, class_token=True, layer_scale=0.1, remat="full")
# Backbone, its stacks of blocks, the matrices of a block.
BACKBONES = {
    "vit": (VIT, ("blocks",), MATRICES),
    "dinov3": (
        VIT.clone(registers=2, rope_theta=100.0, gated=True, qkv_bias="query_value"),
        ("blocks",),
        (*MATRICES, "mlp/gate"),
    ),
    "swin": (
        Swin(4, (2, 2, 2, 2), (1, 1, 1, 1), window_size=2),
        [f"stage{stage}/{kind}" for stage in (1, 2, 3, 4) for kind in ("regular", "shifted")],
        MATRICES,
    ),
    "convnext": (ConvNeXt(4, (1, 1, 2, 1), remat="full"), [f"stage{stage}" for stage in (1, 2, 3, 4)], MLP),
}


class Part(nn.Module):
    """Two maps, of which the first is three side by side."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(6, name="output")(nn.tanh(nn.Dense(24, name="query_key_value")(x)))


class Host(nn.Module):
    """A part by the name of a target, and a map of another name."""

    part: str = "attention"

    @nn.compact
    def __call__(self, x):
        return Part(name=self.part)(nn.Dense(8, name="other")(x))


def drawn(tree, rng):
    """Every factor drawn, so that LoRA says something."""
    return {
        key: drawn(value, rng)
        if isinstance(value, dict) and key != "lora"
        else jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), value)
        if key == "lora"
        else value
        for key, value in tree.items()
    }


def host(lora, seed=0):
    """(parameters with drawn factors, inputs, outputs)."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(2, 5, 7)).astype(np.float32)
    with lora.adapting():
        params = drawn(Host().init(jax.random.key(seed), x)["params"], rng)
        return params, x, Host().apply({"params": params}, x)


def reference(params, x, scale):
    """``x W + b + scale (x A) B`` of every map in float64."""
    params = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def linear(layer, x):
        y = x @ layer["kernel"] + layer["bias"]
        if "lora" not in layer:
            return y
        updates = [x @ a @ b for a, b in zip(layer["lora"]["a"], layer["lora"]["b"], strict=True)]
        return y + scale * np.concatenate(updates, axis=-1)

    part = params["attention"]
    hidden = np.tanh(linear(part["query_key_value"], linear(params["other"], x)))
    return linear(part["output"], hidden)


def test_the_formula():
    """alpha / rank = 2.5; sums of at most 24 float32 terms of size 10 and less, twice."""
    params, x, found = host(LoRA(2, 5.0, ("attention",)))
    assert set(params["other"]) == {"kernel", "bias"}
    assert jax.tree.map(jnp.shape, params["attention"]["query_key_value"]["lora"]) == {"a": (3, 8, 2), "b": (3, 2, 8)}
    expected = reference(params, x, 2.5)
    np.testing.assert_allclose(found, expected, rtol=0, atol=24 * 10 * 10 * EPS32)
    plain = jax.tree.map(lambda leaf: leaf, merged(params, LoRA(2, 5.0)))
    assert factors_of(plain) == {}
    np.testing.assert_allclose(Host().apply({"params": plain}, x), expected, rtol=0, atol=24 * 10 * 10 * EPS32)


def test_merging_stacks():
    """A leading axis of blocks is that of every factor: block by block the same."""
    lora, rng = LoRA(2, 3.0), np.random.default_rng(0)
    stacked = {
        "kernel": rng.normal(size=(4, 5, 6)),
        "lora": {"a": rng.normal(size=(4, 1, 5, 2)), "b": rng.normal(size=(4, 1, 2, 6))},
    }
    whole = merged({"blocks": stacked}, lora)["blocks"]["kernel"]
    for i in range(4):
        one = merged(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), lora)["kernel"]
        np.testing.assert_allclose(whole[i], one, rtol=0, atol=32 * EPS32)


def test_the_start_is_the_network_itself():
    """Bit for bit, operation by operation, with the parameters that it has without LoRA."""
    lora, x = LoRA(2, 4.0), np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)
    plain = Host().init(jax.random.key(0), x)["params"]
    with lora.adapting():
        adapted = Host().init(jax.random.key(0), x)["params"]
        found = Host().apply({"params": adapted}, x)
    jax.tree.map(np.testing.assert_array_equal, merged(adapted, lora), plain)
    np.testing.assert_array_equal(found, Host().apply({"params": plain}, x))
    for path, leaf in factors_of(adapted).items():
        bound = leaf.shape[-2] ** -0.5 if path.endswith("/a") else 0.0
        assert 0.5 * bound <= np.abs(leaf).max() <= bound, path


@pytest.mark.parametrize(
    "name", ["vit", *(pytest.param(name, marks=pytest.mark.slow) for name in BACKBONES if name != "vit")]
)
def test_every_family_of_backbones(name):
    """Inside scans and rematerialised blocks, the matrices of the targets are adapted and no other; the network is that
    of the merged matrices, but for the order of sums: of at most 64 terms, in 30 products one behind another."""
    (backbone, blocks, matrices), lora, rng = BACKBONES[name], LoRA(1, 1.0), np.random.default_rng(0)
    image = rng.normal(size=(1, *SIZE, 3)).astype(np.float32)
    with lora.adapting():
        shapes = jax.eval_shape(lambda key: backbone.init(key, image), jax.random.key(0))["params"]
        assert set(factors_of(shapes)) == {
            f"{block}/{matrix}/lora/{side}" for block in blocks for matrix in matrices for side in "ab"
        }
        params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes)
        found = jit(lambda v, x: backbone.apply(v, x))({"params": params}, image)
    expected = jit(backbone.apply)({"params": merged(params, lora)}, image)
    without = {path: leaf for path, leaf in flat(params).items() if "/lora/" not in path}
    before = jit(backbone.apply)({"params": unflatten_dict(without, sep="/")}, image)
    for stride, value in found.items():
        size = np.abs(expected[stride]).max()
        np.testing.assert_allclose(value, expected[stride], rtol=0, atol=64 * 30 * EPS32 * size)
        assert np.abs(before[stride] - value).max() > 1e-2 * size, stride


def test_training_moves_the_factors_alone():
    """One step: of the backbone only LoRA's factors above the lowest frozen layers, and what the model adds, learn."""
    lora, optimizer = LoRA(2, 4.0), make_optimizer(0.1, weight_decay=0.1)
    backbone = BACKBONES["vit"][0].clone(frozen_layers=1, drop_path=0.2)
    model = MultiTaskModel((Depth(),), backbone, NoInteraction(), channels=8, stride=8, lora=lora)
    freezing = Freezing(1, pretrained=True)
    rng = np.random.default_rng(0)
    batch = {"image": rng.normal(size=(2, *SIZE, 3)).astype(np.float32), "depth": np.ones((2, *SIZE, 1), np.float32)}
    state = jit(lambda x: init_state(model, optimizer, x, trained=freezing, ema=True))(batch["image"])
    step = jit(make_train_step(model, (Depth(),), optimizer, trained=freezing, ema_decay=0.9))
    new, _ = step(state, batch)
    assert all("lora" in path or "pyramid" in path for path in flat(new.ema["backbone"]))
    for path, leaf in flat(new.params).items():
        moved = np.asarray(leaf != flat(state.params)[path])
        if "/lora/a" in path:  # its gradient is B's, which starts at zero
            assert not moved.any()
        elif "/lora/b" in path:
            assert not moved[0].any()
            assert moved[1:].any(axis=(1, 2, 3)).all(), path
        elif path.startswith("backbone/") and "pyramid" not in path:
            assert not moved.any(), path
    later, _ = step(new, batch)
    a = "backbone/blocks/mlp/hidden/lora/a"
    assert np.any(flat(later.params)[a][1:] != flat(new.params)[a][1:])


def test_factors_saved_alone(tmp_path):
    """They come back with what they were trained with, into a network without them, and fit no other."""
    lora = LoRA(2, 5.0, ("attention",))
    params, x, found = host(lora)
    save_factors(tmp_path / "factors.safetensors", params, lora)
    plain = Host().init(jax.random.key(0), x)["params"]
    loaded, again = load_factors(tmp_path / "factors.safetensors", plain)
    assert again == lora
    assert "lora" not in plain["attention"]["output"]
    with again.adapting():
        np.testing.assert_array_equal(Host().apply({"params": loaded}, x), found)
    plain["attention"]["output"]["kernel"] = np.zeros((9, 6), np.float32)
    with pytest.raises(ValueError, match=r"attention/output/lora/a of shape .* fits no kernel"):
        load_factors(tmp_path / "factors.safetensors", plain)
    (tmp_path / "cut").write_bytes((tmp_path / "factors.safetensors").read_bytes()[:100])
    for name in ("cut", "absent"):
        with pytest.raises(ValueError, match=rf"{name} is no file of LoRA's factors"):
            load_factors(tmp_path / name, plain)
    with pytest.raises(ValueError, match="hold no LoRA"):
        save_factors(tmp_path / "none", plain, lora)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0, "alpha": 1.0}, r"lora\.rank is 0; it must be at least 1"),
        ({"rank": 1, "alpha": 0.0}, r"lora\.alpha is 0\.0; it must be positive"),
        ({"rank": 1, "alpha": 1.0, "targets": ("norm",)}, r"targets are \('norm',\); they must be at least one of"),
        ({"rank": 1, "alpha": 1.0, "targets": ()}, r"targets are \(\)"),
        ({"rank": 7, "alpha": 1.0}, "rank is 7, but attention/output maps 24 channels to 6; it must be at most 6"),
        ({"rank": 1, "alpha": 1.0, "targets": ("mlp",)}, r"no such matrices; it has \['attention'\]"),
    ],
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        host(LoRA(**options))


@pytest.mark.parity
def test_equals_peft():
    """The same matrices in PEFT: W + (alpha / r) B A in its layout, outputs and gradients of A and B."""
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")

    class Separate(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.other = torch.nn.Linear(7, 8)
            self.parts = torch.nn.ModuleList([torch.nn.Linear(8, 8) for _ in range(3)])
            self.output = torch.nn.Linear(24, 6)

        def forward(self, x):
            x = self.other(x)
            return self.output(torch.tanh(torch.cat([part(x) for part in self.parts], dim=-1)))

    lora = LoRA(2, 5.0, ("attention",))
    params, x, found = host(lora)
    config = peft.LoraConfig(r=2, lora_alpha=5, lora_dropout=0.0, target_modules=["output", "0", "1", "2"])
    theirs = peft.get_peft_model(Separate(), config)
    base, part = theirs.base_model.model, params["attention"]

    def put(target, value):
        with torch.no_grad():
            target.copy_(torch.tensor(np.asarray(value)))

    def fill(layer, kernel, bias, a, b):
        put(layer.base_layer.weight, kernel.T)
        put(layer.base_layer.bias, bias)
        put(layer.lora_A["default"].weight, a.T)
        put(layer.lora_B["default"].weight, b.T)

    put(base.other.weight, params["other"]["kernel"].T)
    put(base.other.bias, params["other"]["bias"])
    joined = part["query_key_value"]
    for i, layer in enumerate(base.parts):
        columns = slice(8 * i, 8 * i + 8)
        fill(
            layer, joined["kernel"][:, columns], joined["bias"][columns], joined["lora"]["a"][i], joined["lora"]["b"][i]
        )
    out = part["output"]
    fill(base.output, out["kernel"], out["bias"], out["lora"]["a"][0], out["lora"]["b"][0])
    predicted = theirs(torch.tensor(x))
    np.testing.assert_allclose(found, predicted.detach().numpy(), rtol=0, atol=24 * 10 * 10 * EPS32)
    predicted.square().sum().backward()
    with lora.adapting():
        slopes = jax.grad(lambda p: jnp.sum(Host().apply({"params": p}, x) ** 2))(params)["attention"]
    for i, layer in enumerate([*base.parts, base.output]):
        ours = slopes["query_key_value"]["lora"] if i < 3 else slopes["output"]["lora"]
        for side, module in (("a", layer.lora_A), ("b", layer.lora_B)):
            expected = module["default"].weight.grad.numpy().T
            np.testing.assert_allclose(ours[side][i % 3], expected, rtol=0, atol=1e-5 * np.abs(expected).max())
