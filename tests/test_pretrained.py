"""Pretrained files: every tensor accounted for, clear errors, and what becomes of them in a model."""

import hashlib
import json
import math
import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file, save_file

from sgw_jax.__main__ import main
from sgw_jax.backbones.hub import FAMILIES, HALF, IMAGENET
from sgw_jax.backbones.pretrained import ARCHITECTURE, PretrainedError, fit, load_pretrained, read_pretrained
from sgw_jax.backbones.swin import Swin
from sgw_jax.backbones.vit import ViT, hidden_width
from sgw_jax.configs.base import SYSTEMS
from sgw_jax.experiment.build import build_model, build_tasks
from sgw_jax.experiment.config_files import read_config
from sgw_jax.layers.resize import cubic_matrix
from sgw_jax.run.checkpoints import Checkpoints

EPS32 = float(np.finfo(np.float32).eps)
CONFIGS = {
    "vit": {
        "model_type": "vit",
        "hidden_size": 8,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 64,
        "patch_size": 16,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-12,
    },
    "dinov2": {
        "model_type": "dinov2",
        "hidden_size": 8,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "mlp_ratio": 2,
        "image_size": 56,
        "patch_size": 14,
        "layer_norm_eps": 1e-6,
        "layerscale_value": 1.0,
    },
    "dinov2_with_registers": {
        "model_type": "dinov2_with_registers",
        "hidden_size": 8,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "mlp_ratio": 2,
        "image_size": 56,
        "patch_size": 14,
        "num_register_tokens": 3,
        "use_swiglu_ffn": True,
    },
    "dinov3_vit": {
        "model_type": "dinov3_vit",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
        "hidden_act": "silu",
        "use_gated_mlp": True,
        "image_size": 64,
        "patch_size": 16,
        "num_register_tokens": 3,
        "pos_embed_rescale": 2.0,
    },
    "dinov3_convnext": {
        "model_type": "dinov3_convnext",
        "hidden_sizes": [4, 8, 16, 32],
        "depths": [1, 1, 2, 1],
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    },
    "swin": {
        "model_type": "swin",
        "embed_dim": 4,
        "depths": [2, 2, 2, 2],
        "num_heads": [1, 1, 2, 2],
        "window_size": 3,
        "mlp_ratio": 2.0,
        "patch_size": 4,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-5,
    },
}


TOKENS = {"cls_token": 1, "mask_token": 1, "register_tokens": 3}


def names_and_shapes(kind):
    """What the hub's file of such a model holds."""

    def dense(name, inputs, outputs):
        return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}

    def norm(name, width):
        return {f"{name}.weight": (width,), f"{name}.bias": (width,)}

    projection = "embeddings.patch_embeddings.projection"
    if kind == "swin":
        found = {f"{projection}.weight": (4, 3, 4, 4), f"{projection}.bias": (4,), **norm("embeddings.norm", 4)}
        for stage in range(4):
            width, heads = 4 << stage, CONFIGS["swin"]["num_heads"][stage]
            for index in range(2):
                at = f"encoder.layers.{stage}.blocks.{index}"
                found |= norm(f"{at}.layernorm_before", width) | norm(f"{at}.layernorm_after", width)
                for part in ("query", "key", "value"):
                    found |= dense(f"{at}.attention.self.{part}", width, width)
                found |= {f"{at}.attention.self.relative_position_bias_table": (25, heads)}
                found |= {f"{at}.attention.self.relative_position_index": (9, 9)}
                found |= dense(f"{at}.attention.output.dense", width, width)
                found |= dense(f"{at}.intermediate.dense", width, 2 * width)
                found |= dense(f"{at}.output.dense", 2 * width, width)
            if stage < 3:
                found |= norm(f"encoder.layers.{stage}.downsample.norm", 4 * width)
                found |= {f"encoder.layers.{stage}.downsample.reduction.weight": (2 * width, 4 * width)}
        return {f"swin.{name}": shape for name, shape in (found | norm("layernorm", 32)).items()} | {
            "classifier.weight": (5, 32),
            "classifier.bias": (5,),
        }
    if kind == "dinov3_convnext":
        found = norm("layer_norm", 32)
        for stage, depth in enumerate(CONFIGS[kind]["depths"]):
            width, at = 4 << stage, f"stages.{stage}"
            first, second = f"{at}.downsample_layers.0", f"{at}.downsample_layers.1"
            if stage:
                found |= norm(first, width // 2) | dense(second, width // 2, width)
                found |= {f"{second}.weight": (width, width // 2, 2, 2)}
            else:
                found |= norm(second, width) | {f"{first}.weight": (width, 3, 4, 4), f"{first}.bias": (width,)}
            for index in range(depth):
                layer = f"{at}.layers.{index}"
                found |= norm(f"{layer}.layer_norm", width) | {f"{layer}.gamma": (width,)}
                found |= {f"{layer}.depthwise_conv.weight": (width, 1, 7, 7), f"{layer}.depthwise_conv.bias": (width,)}
                found |= dense(f"{layer}.pointwise_conv1", width, 4 * width)
                found |= dense(f"{layer}.pointwise_conv2", 4 * width, width)
        return found
    if kind == "dinov3_vit":
        patches = "embeddings.patch_embeddings"
        found = {f"{patches}.weight": (8, 3, 16, 16), f"{patches}.bias": (8,), **norm("norm", 8)}
        found |= {f"embeddings.{name}": (1, n, 8) for name, n in TOKENS.items()}
        for index in range(4):
            at = f"layer.{index}"
            found |= norm(f"{at}.norm1", 8) | norm(f"{at}.norm2", 8)
            found |= {f"{at}.layer_scale{i}.lambda1": (8,) for i in (1, 2)}
            found |= {f"{at}.attention.k_proj.weight": (8, 8)}
            for name in "qvo":
                found |= dense(f"{at}.attention.{name}_proj", 8, 8)
            for name in ("gate", "up"):
                found |= dense(f"{at}.mlp.{name}_proj", 8, 16)
            found |= dense(f"{at}.mlp.down_proj", 16, 8)
        return found
    patch = CONFIGS[kind]["patch_size"]
    found = {f"{projection}.weight": (8, 3, patch, patch), f"{projection}.bias": (8,), **norm("layernorm", 8)}
    found |= {"embeddings.cls_token": (1, 1, 8), "embeddings.position_embeddings": (1, 17, 8)}
    for index in range(4):
        at = f"encoder.layer.{index}"
        for part in ("query", "key", "value"):
            found |= dense(f"{at}.attention.attention.{part}", 8, 8)
        found |= dense(f"{at}.attention.output.dense", 8, 8)
        if kind.startswith("dinov2"):
            found |= norm(f"{at}.norm1", 8) | norm(f"{at}.norm2", 8)
            if kind == "dinov2":
                found |= dense(f"{at}.mlp.fc1", 8, 16) | dense(f"{at}.mlp.fc2", 16, 8)
            else:  # two thirds of 16, in multiples of 8
                found |= dense(f"{at}.mlp.weights_in", 8, 2 * 16) | dense(f"{at}.mlp.weights_out", 16, 8)
            found |= {f"{at}.layer_scale{i}.lambda1": (8,) for i in (1, 2)}
        else:
            found |= norm(f"{at}.layernorm_before", 8) | norm(f"{at}.layernorm_after", 8)
            found |= dense(f"{at}.intermediate.dense", 8, 16) | dense(f"{at}.output.dense", 16, 8)
    if kind == "dinov2_with_registers":
        found |= {"embeddings.register_tokens": (1, 3, 8)}
    if kind.startswith("dinov2"):
        return found | {"embeddings.mask_token": (1, 8)}
    return {f"vit.{name}": shape for name, shape in found.items()} | {
        "classifier.weight": (5, 8),
        "classifier.bias": (5,),
    }


def write(folder, kind, tensors=None, **changes):
    """A folder in the hub's layout, random unless ``tensors`` are given."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    if tensors is None:
        shapes = names_and_shapes(kind)
        tensors = {name: rng.normal(0, 0.3, size=shape).astype(np.float32) for name, shape in shapes.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind] | changes))
    return folder


def write_augreg(path, **changes):
    """An AugReg file: width 8, two heads, four layers, patches of 16, 4 x 4 positions, and a classifier's head."""
    rng = np.random.default_rng(0)
    shapes = {"cls": (1, 1, 8), "embedding/kernel": (16, 16, 3, 8), "embedding/bias": (8,), "head/kernel": (8, 5)}
    shapes |= {"head/bias": (5,), "Transformer/posembed_input/pos_embedding": (1, 17, 8)}
    shapes |= {f"Transformer/encoder_norm/{part}": (8,) for part in ("scale", "bias")}
    for layer in range(4):
        at = f"Transformer/encoderblock_{layer}"
        shapes |= {f"{at}/LayerNorm_{i}/{part}": (8,) for i in (0, 2) for part in ("scale", "bias")}
        attention = f"{at}/MultiHeadDotProductAttention_1"
        shapes |= {f"{attention}/{part}/kernel": (8, 2, 4) for part in ("query", "key", "value")}
        shapes |= {f"{attention}/{part}/bias": (2, 4) for part in ("query", "key", "value")}
        shapes |= {f"{attention}/out/kernel": (2, 4, 8), f"{attention}/out/bias": (8,)}
        shapes |= {f"{at}/MlpBlock_3/Dense_0/kernel": (8, 16), f"{at}/MlpBlock_3/Dense_0/bias": (16,)}
        shapes |= {f"{at}/MlpBlock_3/Dense_1/kernel": (16, 8), f"{at}/MlpBlock_3/Dense_1/bias": (8,)}
    arrays = {name: rng.normal(0, 0.3, size=shape).astype(np.float32) for name, shape in shapes.items()}
    arrays |= changes
    np.savez(path, **{name: value for name, value in arrays.items() if value is not None})
    return path


# ---- what is loaded ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_tensor_is_accounted_for(tmp_path, caplog, kind):
    """The values that are loaded are those of the file, each once; what is left over is named."""
    folder = write(tmp_path / kind, kind)
    tensors = load_file(folder / "model.safetensors")
    found = read_pretrained(folder)
    unused = {
        "vit": {"classifier.weight", "classifier.bias"},
        **{name: {"embeddings.mask_token"} for name in ("dinov2", "dinov2_with_registers", "dinov3_vit")},
        "dinov3_convnext": set(),
        "swin": {"classifier.weight", "classifier.bias", "layernorm.weight", "layernorm.bias"}
        | {name.removeprefix("swin.") for name in tensors if name.endswith("relative_position_index")},
    }[kind]
    assert set(found.unused) == unused
    assert found.tensors == len(tensors) - len(unused)
    flat = jax.tree.leaves(found.params)
    loaded = np.sort(np.concatenate([leaf.ravel() for leaf in flat if leaf.shape != (1, 1, 8)]))
    used = {
        name: value for name, value in tensors.items() if name.split(".", 1)[-1] not in unused and name not in unused
    }
    merged = [value for name, value in used.items() if "cls_token" not in name and "position_embeddings" not in name]
    merged += [value[:, 1:] for name, value in used.items() if "position_embeddings" in name]
    np.testing.assert_array_equal(loaded, np.sort(np.concatenate([value.ravel() for value in merged])))
    assert {leaf.dtype for leaf in flat} == {np.dtype(np.float32)}
    with caplog.at_level("INFO"):
        load_pretrained(folder)
    count, content = sum(leaf.size for leaf in flat), (folder / "model.safetensors").read_bytes()
    assert f"{found.tensors} tensors, {count:,} parameters" in caplog.text
    assert f"sha256 {hashlib.sha256(content).hexdigest()[:16]}" in caplog.text
    # and the module takes exactly these
    shapes = jax.eval_shape(found.module.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))["params"]
    assert jax.tree.map(lambda a: a.shape, shapes) == jax.tree.map(lambda a: a.shape, found.params)


def test_an_augreg_file_computes_what_its_authors_code_does(tmp_path):
    """Against a ViT in Flax as AugReg's repository has it: `nn.MultiHeadDotProductAttention`, tanh GELU, eps 1e-6."""
    path = write_augreg(tmp_path / "B_16.npz")
    arrays = dict(np.load(path))
    module, variables = load_pretrained(path)
    image = np.random.default_rng(1).normal(size=(2, 64, 64, 3)).astype(np.float32)

    def expected(image):
        params = {}
        for name, value in arrays.items():
            node = params
            *parents, last = name.split("/")
            for parent in parents:
                node = node.setdefault(parent, {})
            node[last] = value
        tokens = nn.Conv(8, (16, 16), (16, 16), padding="VALID").apply({"params": params["embedding"]}, image)
        tokens = jnp.concatenate([jnp.tile(params["cls"], (2, 1, 1)), tokens.reshape(2, 16, 8)], 1)
        tokens += params["Transformer"]["posembed_input"]["pos_embedding"]
        outputs = []
        for layer in range(4):
            block = params["Transformer"][f"encoderblock_{layer}"]
            normed = nn.LayerNorm().apply({"params": block["LayerNorm_0"]}, tokens)
            attention = nn.MultiHeadDotProductAttention(2, deterministic=True)
            tokens += attention.apply({"params": block["MultiHeadDotProductAttention_1"]}, normed, normed)
            normed = nn.LayerNorm().apply({"params": block["LayerNorm_2"]}, tokens)
            hidden = nn.gelu(nn.Dense(16).apply({"params": block["MlpBlock_3"]["Dense_0"]}, normed))
            tokens += nn.Dense(8).apply({"params": block["MlpBlock_3"]["Dense_1"]}, hidden)
            outputs.append(tokens)
        outputs[-1] = nn.LayerNorm().apply({"params": params["Transformer"]["encoder_norm"]}, outputs[-1])
        return [tokens[:, 1:].reshape(2, 4, 4, 8) for tokens in outputs]

    found = jax.jit(module.apply)(variables, image)
    for level, theirs in zip(found.values(), jax.jit(expected)(image), strict=True):
        # As in tests/test_vit.py: 16 operations a layer on sums of at most 768 terms of size below 1.
        np.testing.assert_allclose(level, theirs, rtol=0, atol=4 * 16 * 28 * EPS32)
    assert read_pretrained(path).unused == ("head/bias", "head/kernel")
    assert read_pretrained(path).normalisation == HALF


def test_the_snippet_of_the_page_runs(tmp_path, monkeypatch):
    text = (Path(__file__).parent.parent / "docs" / "backbones.md").read_text(encoding="utf-8")
    snippet, _ = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)  # LoRA's: test_frozen.py
    write(tmp_path / "dinov2-large", "dinov2")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(snippet, names)
    assert {layer: level.shape for layer, level in names["maps"].items()} == dict.fromkeys((1, 2, 3, 4), (1, 5, 7, 8))


def test_half_precision_files_are_read(tmp_path):
    tensors = load_file(write(tmp_path / "a", "vit") / "model.safetensors")
    for dtype in (ml_dtypes.bfloat16, np.float16):
        half = {name: value.astype(dtype) for name, value in tensors.items()}
        params = read_pretrained(write(tmp_path / "b", "vit", half)).params
        np.testing.assert_array_equal(params["norm"]["scale"], half["vit.layernorm.weight"].astype(np.float32))


def test_shards_are_read_as_one_file(tmp_path):
    folder = write(tmp_path / "dinov3", "dinov3_vit")
    whole = read_pretrained(folder)
    shard(folder)
    found = read_pretrained(folder)
    jax.tree.map(np.testing.assert_array_equal, found.params, whole.params)
    assert (found.tensors, found.unused) == (whole.tensors, whole.unused)
    content = b"".join((folder / f"{index}.safetensors").read_bytes() for index in range(2))
    assert found.sha256 == hashlib.sha256(content).hexdigest()


# ---- what is refused -----------------------------------------------------------------------------------------------


def damaged(change):
    def make(tmp_path):
        folder = write(tmp_path / "vit", "vit")
        change(folder)
        return folder

    return make


def rewrite(edit):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model.safetensors")

    return damaged(change)


def cut(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])


def sharded(change, cut=False):
    """A ViT in two files and their index, which ``change`` (folder, index) spoils."""

    def make(tmp_path):
        folder = write(tmp_path / "vit", "vit")
        shard(folder)
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(folder, index)
        text = json.dumps(index)
        path.write_text(text[: len(text) // 2] if cut else text)
        return folder

    return make


def shard(folder):
    """The folder's tensors in two files, every second in each, as the hub lays out large models."""
    tensors = load_file(folder / "model.safetensors")
    files = {name: f"{index % 2}.safetensors" for index, name in enumerate(sorted(tensors))}
    for file in set(files.values()):
        save_file({name: tensors[name] for name in tensors if files[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    index = {"metadata": {"total_size": sum(value.nbytes for value in tensors.values())}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def pickled(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_npz(tmp_path):
    path = write_augreg(tmp_path / "a.npz")
    path.write_bytes(path.read_bytes()[:1000])
    return path


def lone_array(tmp_path):
    with open(tmp_path / "a.npz", "wb") as file:
        np.save(file, np.zeros(3))
    return tmp_path / "a.npz"


def augreg(**changes):
    return lambda tmp_path: write_augreg(tmp_path / "a.npz", **changes)


def write_config(folder, kind):
    (folder / "config.json").write_text(json.dumps(CONFIGS[kind]))


def configured_text(text):
    return damaged(lambda folder: (folder / "config.json").write_text(text))


def configured(**changes):
    return lambda tmp_path: write(tmp_path / "model", changes.get("model_type", "vit"), **changes)


FIRST = "Transformer/encoderblock_0"
REFUSED = {
    "missing": (rewrite(lambda t: t.pop("vit.layernorm.bias")), r"1 missing: layernorm.bias"),
    "unexpected": (
        rewrite(lambda t: t.update({"vit.encoder.layer.3.norm": np.zeros(3)})),
        "1 unexpected: encoder.layer.3.norm",
    ),
    "shape": (
        rewrite(lambda t: t.update({"vit.layernorm.bias": np.zeros(9)})),
        r"1 of another shape: layernorm.bias \(9,\) instead of \(8,\)",
    ),
    "nan": (rewrite(lambda t: t["vit.layernorm.bias"].fill(np.nan)), "NaN or infinity in layernorm.bias"),
    "cut": (damaged(cut), "truncated or no safetensors file"),
    "pickled": (damaged(pickled), "pytorch_model.bin is not read: convert it"),
    "no_config": (damaged(lambda folder: (folder / "config.json").unlink()), "config.json cannot be read"),
    "bad_config": (
        damaged(lambda folder: (folder / "config.json").write_text("{")),
        "config.json is damaged: it is no JSON",
    ),
    "nothing": (lambda tmp_path: tmp_path / "absent", "absent/config.json cannot be read"),
    "activation": (configured(model_type="vit", hidden_act="relu"), "hidden_act is 'relu'; it must be one of"),
    "other": (configured_text('{"model_type": "resnet"}'), "model_type is 'resnet'"),
    "width": (configured(hidden_size=16), r"by hidden_size embeddings.cls_token is \(1, 1, 16\), but .* \(1, 1, 8\)"),
    "depth": (configured(num_hidden_layers=8), "num_hidden_layers is 8, but the file has 4 layers"),
    "deep": (configured(num_hidden_layers=1_000_000), "num_hidden_layers is 1000000, but the file has 4 layers"),
    "deeper": (configured(num_hidden_layers=10**9), "num_hidden_layers is 1000000000; it must be .* at most"),
    "wide": (configured(hidden_size=1_000_000), "by hidden_size embeddings.cls_token is"),
    "ratio_wide": (configured(model_type="dinov2", mlp_ratio=1e6), "by mlp_ratio encoder.layer.0.mlp.fc1.weight is"),
    "swin_deep": (
        configured(model_type="swin", depths=[2, 2, 1_000_000, 2]),
        r"depths\[2\] is 1000000, but the file has 2 layers",
    ),
    "twice": (
        rewrite(lambda t: t.update({"layernorm.bias": np.zeros(8)})),
        r"1 tensors with and without a prefix, such as \['vit.layernorm.bias'\]",
    ),
    "long_header": (
        damaged(lambda folder: (folder / "model.safetensors").write_bytes(b"\xff" * 8)),
        "truncated or no safetensors file",
    ),
    "no_bias": (configured(qkv_bias=False), "qkv_bias is False; only True is supported"),
    "odd": (configured(model_type="swin", depths=[1, 2, 2, 2]), r"depths \(1, 2, 2, 2\) must be 4 even numbers"),
    "window": (configured(model_type="swin", window_size=7), "relative_position_bias_table"),
    "no_object": (
        damaged(lambda folder: (folder / "config.json").write_text("[]")),
        "it holds a list where a JSON object belongs",
    ),
    "kind": (configured_text('{"model_type": ["vit"]}'), r"model_type is \['vit'\]; it must be one of"),
    "heads": (configured(num_attention_heads=3), "hidden_size 8 does not divide into num_attention_heads = 3"),
    "epsilon": (configured(layer_norm_eps="1e-6"), "layer_norm_eps is '1e-6'; it must be a positive number"),
    "ratio": (configured(model_type="dinov2", mlp_ratio=None), "mlp_ratio is None; it must be a positive number"),
    "stages": (configured(model_type="swin", depths=2), "depths is 2; it must be a list of positive whole numbers"),
    "one_file": (lambda tmp_path: write(tmp_path / "m", "vit") / "model.safetensors", "is one file; give the folder"),
    "index_cut": (sharded(lambda folder, index: None, cut=True), "index.json is damaged: it is no JSON"),
    "index_empty": (sharded(lambda folder, index: index.clear()), "weight_map must name a .safetensors file"),
    "index_outside": (
        sharded(lambda folder, index: index["weight_map"].update({"vit.layernorm.bias": "../1.safetensors"})),
        "weight_map must name a .safetensors file of the same folder",
    ),
    "shard_missing": (
        sharded(lambda folder, index: (folder / "1.safetensors").unlink()),
        "lists 2 files, of which 1 are missing: 1.safetensors",
    ),
    "shard_cut": (
        sharded(lambda folder, index: (folder / "1.safetensors").write_bytes(b"1")),
        "1.safetensors is truncated or no safetensors file",
    ),
    "shard_disagrees": (
        sharded(lambda folder, index: index["weight_map"].update({"vit.layernorm.bias": "1.safetensors"})),
        "index.json and 0.safetensors disagree: nothing is in the index alone, vit.layernorm.bias in the file alone",
    ),
    "shard_lacks": (
        sharded(lambda folder, index: index["weight_map"].update({"other": "0.safetensors"})),
        "index.json and 0.safetensors disagree: other is in the index alone, nothing in the file alone",
    ),
    "key_bias": (configured(model_type="dinov3_vit", key_bias=True), "key_bias is True; only False is supported"),
    "gate": (configured(model_type="dinov3_vit", hidden_act="gelu"), "hidden_act is 'gelu'; only 'silu' is supported"),
    "switch": (configured(model_type="dinov3_vit", use_gated_mlp=1), "use_gated_mlp is 1; it must be true or false"),
    "registers": (
        configured(model_type="dinov3_vit", num_register_tokens=4),
        r"by num_register_tokens embeddings.register_tokens is \(1, 4, 8\), but in the file it is \(1, 3, 8\)",
    ),
    "convnext_widths": (
        configured(model_type="dinov3_convnext", hidden_sizes=[4, 8, 16, 16]),
        "must be of four stages, each twice as wide as the one before",
    ),
    "other_models": (
        lambda tmp_path: (write(tmp_path / "m", "swin"), write_config(tmp_path / "m", "dinov2"))[0],
        "num_hidden_layers is 4, but the file has 0 layers; embeddings.cls_token is missing",
    ),
    "no_number": (configured(patch_size="16"), "patch_size is '16'; it must be a positive whole number"),
    "npz_cut": (cut_npz, "truncated or no .npz"),
    "npz_objects": (
        lambda tmp_path: write_augreg(tmp_path / "a.npz", cls=np.array([{"a": 1}], dtype=object)),
        "truncated or no .npz of plain arrays",
    ),
    "npz_foreign": (lambda tmp_path: write_augreg(tmp_path / "a.npz", cls=None), r"has no \['cls'\]"),
    "npz_key": (augreg(**{f"{FIRST}/MlpBlock_3/Dense_0/bias": None}), r"has no \['.*Dense_0/bias'\]"),
    "npz_axes": (augreg(**{"embedding/kernel": np.zeros((3, 8))}), "the shapes .* are no ViT's"),
    "npz_heads": (
        augreg(**{f"{FIRST}/MultiHeadDotProductAttention_1/query/kernel": np.zeros((8, 3, 4))}),
        "has 3 heads, into which the width 8 does not divide",
    ),
    "npz_text": (augreg(cls=np.array([[["a"] * 8]])), "cls must be arrays of numbers"),
    "npz_array": (lone_array, "truncated or no .npz of plain arrays"),
    "npz_missing": (
        lambda tmp_path: write_augreg(tmp_path / "a.npz", **{"Transformer/encoder_norm/bias": None}),
        "1 missing: Transformer/encoder_norm/bias",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_right_is_refused(tmp_path, case):
    make, message = REFUSED[case]
    with pytest.raises(PretrainedError, match=message):
        load_pretrained(make(tmp_path))


MEAN, STD = np.array(IMAGENET[0]), np.array(IMAGENET[1])
PREPROCESSORS = {
    "nothing said": ({}, lambda p: (p / 255 - 0.5) / 0.5),
    "0..1": ({"image_mean": [*MEAN], "image_std": [*STD], "size": 224}, lambda p: (p / 255 - MEAN) / STD),
    "0..255": (
        {"do_rescale": False, "image_mean": [*(255 * MEAN)], "image_std": [*(255 * STD)]},
        lambda p: (p - 255 * MEAN) / (255 * STD),
    ),
    "scaled alone": ({"do_normalize": False, "do_convert_rgb": None}, lambda p: p / 255),
    "offset": ({"do_normalize": False, "rescale_factor": 1 / 127.5, "offset": True}, lambda p: p / 127.5 - 1),
    "0..2": (
        {"rescale_factor": 1 / 127.5, "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
        lambda p: (p / 127.5 - 0.5) / 0.5,
    ),
}


@pytest.mark.parametrize("case", PREPROCESSORS)
def test_the_patch_embedding_sees_what_the_preprocessor_says(tmp_path, case):
    """A 3 x 16 x 16 patch of 8-bit pixels through the original projection and through the fitted one, in float64; the
    fitted kernel and bias were rounded once to float32, and the largest pixel is 512 deviations from its mean."""
    options, processed = PREPROCESSORS[case]
    folder = write(tmp_path / "vit", "vit")
    (folder / "preprocessor_config.json").write_text(json.dumps(options))
    found = read_pretrained(folder)
    flat = fit(found, found.module, shapes_of(found.module, (64, 64)), *IMAGENET)
    pixels = np.random.default_rng(3).integers(0, 256, (16, 16, 3)).astype(float)
    tensors = load_file(folder / "model.safetensors")
    projection = "vit.embeddings.patch_embeddings.projection"
    kernel, bias = (tensors[f"{projection}.{part}"].astype(float) for part in ("weight", "bias"))
    expected = np.einsum("ochw,hwc->o", kernel, processed(pixels)) + bias
    kernel, bias = (flat[f"patch_embed/projection/{part}"].astype(float) for part in ("kernel", "bias"))
    got = np.einsum("hwco,hwc->o", kernel, (pixels / 255 - MEAN) / STD) + bias
    largest = np.einsum("hwco,hwc->o", np.abs(kernel), np.abs((pixels / 255 - MEAN) / STD)) + np.abs(bias)
    assert (np.abs(got - expected) <= EPS32 * largest).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"image_mean": 0.5}, "image_mean is 0.5; it must be three numbers"),
        ({"image_mean": [0.5, 0.5, True]}, r"image_mean is \[0.5, 0.5, True\]; it must be three numbers"),
        ({"image_std": [1, 0, 1]}, "image_std is .* it must be positive"),
        ({"image_std": [1, math.nan, 1]}, "image_std is .* it must be three numbers"),
        ({"do_rescale": "false"}, "do_rescale is 'false'; it must be true or false"),
        ({"do_normalize": None}, "do_normalize is None; it must be true or false"),
        ({"do_flip_channel_order": True}, "do_flip_channel_order is true; of the steps only"),
        ({"rescale_factor": -1}, "rescale_factor is -1; it must be a positive number"),
        ({"do_rescale": False, "do_normalize": False}, "whether the model's pixels are of 0..255 or of 0..1"),
        ({"do_rescale": False, "image_mean": [0.5] * 3}, "whether the model's pixels are of 0..255 or of 0..1"),
        (
            {"image_mean": [123.7, 116.3, 103.5], "image_std": [58.4, 57.1, 57.4]},
            r"lie in 0\.\.1; for a mean of 0..255",
        ),
        ({"image_std": [58.4, 57.1, 57.4]}, r"image_std \[58.4, 57.1, 57.4\], but pixels"),
    ],
    ids=str,
)
def test_a_preprocessor_that_cannot_be_honoured_is_refused(tmp_path, options, message):
    folder = write(tmp_path / "vit", "vit")
    (folder / "preprocessor_config.json").write_text(json.dumps(options))
    with pytest.raises(PretrainedError, match=message):
        read_pretrained(folder)


def test_what_is_not_used_is_told_by_kind(tmp_path):
    summary = read_pretrained(write(tmp_path / "swin", "swin")).summary()
    assert "encoder.layers.*.blocks.*.attention.self.relative_position_index (8)" in summary
    assert "classifier.weight" in summary
    assert "blocks.0" not in summary


# ---- in a model ----------------------------------------------------------------------------------------------------


def shapes_of(backbone, size):
    return jax.eval_shape(backbone.init, jax.random.key(0), jnp.zeros((1, *size, 3)))["params"]


@pytest.mark.parametrize("kind", ["vit", "dinov2", "dinov2_with_registers", "dinov3_vit", "augreg"])
def test_fitted_to_another_size_and_normalisation(tmp_path, kind):
    """The pretrained function on a larger image that is normalised in another way, to the accuracy of a kernel whose
    entries were rounded once more: 3 x 16 x 16 terms of an embedding, through four layers."""
    path = write_augreg(tmp_path / "a.npz") if kind == "augreg" else write(tmp_path / kind, kind)
    found = read_pretrained(path)
    patch = found.module.patch_size
    size = (6 * patch, 10 * patch)
    pixels = np.random.default_rng(0).uniform(size=(1, *size, 3))
    theirs, ours = (((pixels - m) / s).astype(np.float32) for m, s in (found.normalisation, IMAGENET))
    expected = jax.jit(found.module.apply)({"params": found.params}, theirs)
    target = found.module.clone(image_size=size)
    flat = fit(found, target, shapes_of(target, size), *IMAGENET)
    params = unflatten_dict(flat, sep="/")
    if kind != "dinov3_vit":
        assert params["position_embedding"].shape == (1, 6, 10, 8)
    for level, other in zip(jax.jit(target.apply)({"params": params}, ours).values(), expected.values(), strict=True):
        np.testing.assert_allclose(level, other, rtol=0, atol=4 * 28 * 16 * EPS32 * float(np.abs(other).max()))


def test_fit_leaves_what_the_model_adds(tmp_path):
    found = read_pretrained(write(tmp_path / "swin", "swin"))
    target = Swin(4, (2, 2, 2, 2), (1, 1, 2, 2), 3, 2.0)
    flat = fit(found, target, shapes_of(target, (64, 64)), *IMAGENET)
    assert not any(name.startswith("norm_stage") for name in flat)
    pyramid = ViT(16, 8, 4, 2, 2.0, (64, 64), class_token=True, epsilon=1e-12)
    found = read_pretrained(write(tmp_path / "vit", "vit"))
    assert not any("pyramid" in name for name in fit(found, pyramid, shapes_of(pyramid, (64, 64)), *IMAGENET))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 16}, "of another ViT: width is 8 there, 16 here"),
        ({"class_token": False}, "class_token is True there, False here"),
        ({"epsilon": 1e-6, "approximate_gelu": True}, "approximate_gelu is False there, True here; epsilon is 1e-12"),
    ],
)
def test_another_models_file_is_refused(tmp_path, changes, message):
    found = read_pretrained(write(tmp_path / "vit", "vit"))
    target = found.module.clone(**changes)
    with pytest.raises(PretrainedError, match=message):
        fit(found, target, shapes_of(target, (64, 64)), *IMAGENET)
    with pytest.raises(PretrainedError, match="holds a ViT, but the backbone is a Swin"):
        fit(found, Swin(), {}, *IMAGENET)


def test_what_the_module_lacks_is_refused(tmp_path):
    """A norm of the last layer, which no tap reaches, would be dropped in silence."""
    found = read_pretrained(write(tmp_path / "vit", "vit"))
    target = found.module.clone(tapped=(1, 2, 3))
    with pytest.raises(PretrainedError, match=r"\['norm/scale', 'norm/bias'\] are in it alone"):
        fit(found, target, shapes_of(target, (64, 64)), *IMAGENET)


def test_a_ratio_that_was_rounded_gives_the_files_width():
    """30 / 22 x 22 is below 30 in float64."""
    assert int(22 * (30 / 22)) == 29
    assert hidden_width(22, 30 / 22) == 30
    assert hidden_width(10, 2.75) == 27


# Of config.json as published (hub), or of an AugReg file's shapes: what decides whether weights fit a system.
PUBLISHED = {
    "swin_t": {"model_type": "swin", "embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24]},
    "swin_b": {"model_type": "swin", "embed_dim": 128, "depths": [2, 2, 18, 2], "num_heads": [4, 8, 16, 32]},
    "swin_l": {"model_type": "swin", "embed_dim": 192, "depths": [2, 2, 18, 2], "num_heads": [6, 12, 24, 48]},
    "vit_b": {"model_type": "vit", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
    "vit_l": {"model_type": "vit", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "dinov2_l": {"model_type": "dinov2", "hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16},
    "dinov3_l": {
        "model_type": "dinov3_vit",
        "hidden_size": 1024,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "intermediate_size": 4096,
    },
    "dinov3_hplus": {
        "model_type": "dinov3_vit",
        "hidden_size": 1280,
        "num_hidden_layers": 32,
        "num_attention_heads": 20,
        "intermediate_size": 5120,
        "use_gated_mlp": True,
        "hidden_act": "silu",
    },
    "convnext_l": {
        "model_type": "dinov3_convnext",
        "hidden_sizes": [192, 384, 768, 1536],
        "depths": [3, 3, 27, 3],
    },
}
MORE = {
    "swin_t": {"window_size": 7, "mlp_ratio": 4.0},
    "swin": {"window_size": 12, "mlp_ratio": 4.0},
    "vit": {"patch_size": 16, "image_size": 384, "layer_norm_eps": 1e-6, "hidden_act": "gelu_new"},
    "dinov2": {"patch_size": 14, "image_size": 518, "mlp_ratio": 4},
    "dinov3": {"patch_size": 16, "num_register_tokens": 4},
    "convnext": {},
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_published_weights_fit_the_full_size_systems(system):
    config = PUBLISHED[system] | MORE.get(system, MORE[SYSTEMS[system][0]])
    if config["model_type"] == "vit":
        config["intermediate_size"] = 4 * config["hidden_size"]
    theirs, _, _ = FAMILIES[config["model_type"]]("config.json", config, set())
    read = read_config(f"nyud:{system}", ())
    ours = build_model(read, build_tasks(read)).backbone
    assert type(ours) is type(theirs)
    for name in ARCHITECTURE[type(ours)]:
        assert (getattr(ours, name) is None) == (getattr(theirs, name) is None), name
        assert name == "layer_scale" or getattr(ours, name) == getattr(theirs, name), name


def test_the_cubic_kernel():
    """Weights sum to 1, reproduce straight lines inside, and are a = -0.75's at a quarter of the way."""
    for old, new in ((4, 4), (4, 9), (7, 3), (14, 28)):
        matrix = cubic_matrix(old, new)
        np.testing.assert_allclose(matrix.sum(1), 1, atol=8 * EPS32)
        centre = (np.arange(new) + 0.5) * old / new - 0.5
        inside = (centre >= 1) & (centre <= old - 2)
        np.testing.assert_allclose((matrix @ np.arange(old))[inside], centre[inside], atol=old * 8 * EPS32 + 0.1)
    assert np.array_equal(cubic_matrix(4, 4), np.eye(4))
    x = 0.25  # sample 2 of 8 from 4 lies a quarter after sample 0 ... of the old ones 0, 1
    row = cubic_matrix(8, 16)[5]  # centre 2.25
    expected = [
        -0.75 * ((1 + x) ** 3 - 5 * (1 + x) ** 2 + 8 * (1 + x) - 4),
        1.25 * x**3 - 2.25 * x**2 + 1,
        1.25 * (1 - x) ** 3 - 2.25 * (1 - x) ** 2 + 1,
        -0.75 * ((2 - x) ** 3 - 5 * (2 - x) ** 2 + 8 * (2 - x) - 4),
    ]
    np.testing.assert_allclose(row[1:5], expected, atol=8 * EPS32)
    assert not row[[0, 5, 6, 7]].any()


def test_the_cubic_kernel_with_antialiasing_is_pillows():
    """Enlarging by its a = -0.5, and reducing over as many samples as a new one covers; `jax.image` has the same."""
    for old, new in ((4, 4), (4, 9), (7, 3), (14, 5)):
        expected = jax.image.resize(jnp.eye(old), (new, old), "cubic", antialias=True)
        np.testing.assert_allclose(cubic_matrix(old, new, antialias=True), expected, atol=32 * EPS32)


@pytest.mark.slow
def test_a_run_starts_from_the_file_and_goes_on_without_it(tmp_path, capsys):
    """The command: loaded, frozen, resumed after the file is gone; another model's file is an error at the start."""
    weights = write(tmp_path / "vit", "vit")
    arguments = [
        *("train", "--config=scenes:tasks=depth", f"--workdir={tmp_path / 'run'}", f"--cache_dir={tmp_path / 'cache'}"),
        *(f"--config.{option}" for option in (
            "data.size=32,64", "data.lengths.train=16", "data.lengths.validation=0", "data.lengths.test=0",
            "backbones.vit.width=8", "backbones.vit.num_heads=2", "backbones.vit.patch_size=16",
            "backbones.vit.patch_embed=patch", "backbones.vit.class_token=true", "backbones.vit.mlp_ratio=2",
            "channels=8", "interaction=none", "batch_size=8", "checkpoint_every=1", "eval_every=1",
            "schedule.warmup_steps=0", "optimizer.backbone_scale=0", f"backbone_weights={weights}",
        )),
    ]  # fmt: skip
    assert main([*arguments, "--config.steps=2"]) == 1
    assert "epsilon is 1e-12 there, 1e-06 here" in capsys.readouterr().err.replace("\n", " ")
    arguments.append("--config.backbones.vit.epsilon=1e-12")
    assert main([*arguments, "--config.steps=2"]) == 0
    output = capsys.readouterr().err.replace("\n", " ")
    assert "Backbone from" in output
    assert "fresh: pyramid" in output
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints", read_only=True)
    shapes = checkpoints.shapes(2)
    found = read_pretrained(weights).params["blocks"]["mlp"]["hidden"]["kernel"]
    name = "params/backbone/blocks/mlp/hidden/kernel"
    one = {"params": {"backbone": {"blocks": {"mlp": {"hidden": {"kernel": None}}}}}}
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    one["params"]["backbone"]["blocks"]["mlp"]["hidden"]["kernel"] = jax.ShapeDtypeStruct(
        shapes[name], jnp.float32, sharding=sharding
    )
    kept = checkpoints.restore_variables(one, 2)["params"]["backbone"]["blocks"]["mlp"]["hidden"]["kernel"]
    np.testing.assert_array_equal(kept, found)
    (weights / "model.safetensors").unlink()
    assert main([*arguments, "--config.steps=2"]) == 0
