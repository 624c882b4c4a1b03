"""Loaded backbones against transformers on the same weights: features and gradients, at any image size."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from sgw_jax.backbones.pretrained import load_pretrained

pytestmark = pytest.mark.parity
STAGES = ["stage1", "stage2", "stage3", "stage4"]
KINDS = {
    # name: (class, configuration class, its options)
    "swin": ("SwinBackbone", "SwinConfig", {"window_size": 3, "depths": (2, 2, 4, 2), "out_features": STAGES}),
    "swin_w7": ("SwinBackbone", "SwinConfig", {"window_size": 7, "depths": (2, 2, 2, 2), "out_features": STAGES}),
    "swin_classifier": ("SwinForImageClassification", "SwinConfig", {"window_size": 3, "depths": (2, 2, 4, 2)}),
    "vit": ("ViTModel", "ViTConfig", {"intermediate_size": 80, "patch_size": 8}),
    "vit_classifier": ("ViTForImageClassification", "ViTConfig", {"intermediate_size": 128, "patch_size": 16}),
    "augreg": (
        "ViTModel",
        "ViTConfig",
        {"intermediate_size": 80, "patch_size": 8, "hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6},
    ),
    "dinov2": ("Dinov2Model", "Dinov2Config", {"patch_size": 14, "layerscale_value": 0.7}),
    "dinov2_backbone": ("Dinov2Backbone", "Dinov2Config", {"patch_size": 7}),
    "dinov2_giant": ("Dinov2Model", "Dinov2Config", {"patch_size": 14, "use_swiglu_ffn": True}),
    "dinov2_registers": ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", {"patch_size": 14}),
    "dinov2_registers_giant": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        {"patch_size": 7, "use_swiglu_ffn": True, "num_register_tokens": 3},
    ),
    "dinov3": ("DINOv3ViTModel", "DINOv3ViTConfig", {"patch_size": 16}),
    "dinov3_plus": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {"patch_size": 8, "use_gated_mlp": True, "hidden_act": "silu", "rope_theta": 50.0},
    ),
    "dinov3_7b": (
        "DINOv3ViTBackbone",
        "DINOv3ViTConfig",
        {"use_gated_mlp": True, "hidden_act": "silu", "query_bias": False, "value_bias": False},
    ),
    "convnext": ("DINOv3ConvNextModel", "DINOv3ConvNextConfig", {"depths": [1, 2, 3, 1]}),
    "convnext_backbone": (
        "DINOv3ConvNextBackbone",
        "DINOv3ConvNextConfig",
        {"depths": [2, 1, 1, 1], "out_features": STAGES},
    ),
}
SIZES = {
    # the training size, larger, smaller, not square, not divisible by patch or window, less than a window
    "swin": [(64, 64), (64, 96), (70, 121), (285, 259), (13, 9)],
    "vit": [(56, 56), (112, 112), (28, 28), (64, 96), (70, 121)],
    "convnext": [(64, 64), (64, 96), (70, 121), (33, 190)],
}
SHARDED = ("dinov2_giant", "dinov3_7b")  # read from several files


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(family, transformers' model, its folder): no parameter is at its start."""
    import torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    kind, config, options = KINDS[request.param]
    family = next(name for name in ("swin", "convnext", "vit") if name in request.param or name == "vit")
    if family == "convnext":
        options = {"hidden_sizes": [8, 16, 32, 64], **options}
    elif family == "swin":
        options = {"embed_dim": 16, "num_heads": (1, 2, 4, 8), "image_size": 64, "drop_path_rate": 0.0, **options}
    else:
        options = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": 56, **options}
        if "dinov3" in request.param:
            options = {"intermediate_size": 80, "num_register_tokens": 4, **options}
    config = getattr(transformers, config)(**options)
    config._attn_implementation = "eager"
    model = getattr(transformers, kind)(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            table = "position" in name or "token" in name
            scale = 0.5 if table else 0.2 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            centre = 1.0 if parameter.ndim == 1 and not name.endswith("bias") else 0.0
            parameter.copy_(centre + scale * torch.randn(parameter.shape, generator=generator))
    folder = tmp_path_factory.mktemp(request.param)
    save(model, folder, request.param in SHARDED)
    return family, model, folder, request.param == "augreg"


def save(model, folder, sharded=False):
    model.save_pretrained(folder, **({"max_shard_size": "20KB"} if sharded else {}))
    assert (folder / "model.safetensors.index.json").exists() == sharded


def load(folder, as_augreg):
    """The folder's module and variables; ``as_augreg`` by way of the same weights as an AugReg file."""
    if not as_augreg:
        return load_pretrained(folder)
    np.savez(folder / "augreg.npz", **augreg_arrays(load_file(folder / "model.safetensors"), heads=4))
    return load_pretrained(folder / "augreg.npz")


AUGREG = {
    "layernorm_before": "LayerNorm_0",
    "layernorm_after": "LayerNorm_2",
    "layernorm": "encoder_norm",
    "attention.attention.query": "MultiHeadDotProductAttention_1/query",
    "attention.attention.key": "MultiHeadDotProductAttention_1/key",
    "attention.attention.value": "MultiHeadDotProductAttention_1/value",
    "attention.output.dense": "MultiHeadDotProductAttention_1/out",
    "intermediate.dense": "MlpBlock_3/Dense_0",
    "output.dense": "MlpBlock_3/Dense_1",
}


def augreg_arrays(tensors, heads):
    """The hub's tensors of a ViT under AugReg's names: (in, out) kernels, heads on an axis of their own."""
    projection = "embeddings.patch_embeddings.projection"
    found = {
        "cls": tensors["embeddings.cls_token"],
        "Transformer/posembed_input/pos_embedding": tensors["embeddings.position_embeddings"],
        "embedding/kernel": tensors[f"{projection}.weight"].transpose(2, 3, 1, 0),
        "embedding/bias": tensors[f"{projection}.bias"],
    }
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(?:encoder\.layer\.(\d+)\.)?(.+)\.(weight|bias)", name)
        if match and match[2] in AUGREG:
            theirs = AUGREG[match[2]]
            value = tensor.T
            if theirs.endswith(("query", "key", "value")):
                value = value.reshape(*value.shape[:-1], heads, -1)
            elif theirs.endswith("out") and value.ndim == 2:
                value = value.reshape(heads, -1, value.shape[-1])
            part = "bias" if match[3] == "bias" else "scale" if "norm" in match[2] else "kernel"
            at = "Transformer/" if match[1] is None else f"Transformer/encoderblock_{match[1]}/"
            found[f"{at}{theirs}/{part}"] = value
    return found


def expected_maps(family, model, pixels):
    """The maps that ours correspond to, (batch, height, width, channels), as torch tensors."""
    if type(model).__name__ == "SwinBackbone":
        return [level.permute(0, 2, 3, 1) for level in model(pixels).feature_maps]
    if family == "swin":
        body = model.swin
        size = body.embeddings.patch_embeddings(pixels)[1]
        hidden = body.embeddings(pixels)[0]
        found = body.encoder(
            hidden,
            size,
            output_hidden_states=True,
            output_hidden_states_before_downsampling=True,
            always_partition=True,
        )
        return [level.permute(0, 2, 3, 1) for level in found.reshaped_hidden_states[1:]]
    if family == "convnext":
        hidden, levels = pixels, []
        for stage in model.model.stages:
            hidden = stage(hidden)
            levels.append(hidden.permute(0, 2, 3, 1))
        return [*levels[:-1], model.layer_norm(levels[-1])] if hasattr(model, "layer_norm") else levels
    body = getattr(model, model.base_model_prefix, model)
    body = model if type(model).__name__.startswith("DINOv3") else body
    if type(body).__name__ in ("Dinov2Backbone", "DINOv3ViTBackbone"):  # give their last layer alone
        tokens, hidden = body.embeddings(pixels), []
        rotary = type(body).__name__.startswith("DINOv3")
        options = {"position_embeddings": body.rope_embeddings(pixels)} if rotary else {}
        for layer in body.model.layer if rotary else body.encoder.layer:
            tokens = layer(tokens, **options)
            hidden.append(tokens)
    else:
        options = {"interpolate_pos_encoding": True} if type(body).__name__ == "ViTModel" else {}
        hidden = list(body(pixels, output_hidden_states=True, **options).hidden_states)[1:]
    patch = body.config.patch_size
    rows, columns = pixels.shape[2] // patch, pixels.shape[3] // patch
    hidden[-1] = (body.norm if hasattr(body, "norm") else body.layernorm)(hidden[-1])
    first = 1 + getattr(body.config, "num_register_tokens", 0)
    return [level[:, first:].reshape(len(pixels), rows, columns, -1) for level in hidden]


def close(found, expected, name=""):
    """To 2e-5 of the largest feature: float32 sums of up to 4 x 128 terms, through four to ten blocks."""
    expected = np.asarray(expected)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-5 * max(1.0, np.abs(expected).max()), err_msg=name)


def test_features(pair):
    import torch

    family, model, folder, as_augreg = pair
    module, variables = load(folder, as_augreg)
    apply = jax.jit(module.apply)
    for size in SIZES[family]:
        image = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
        with torch.no_grad():
            expected = expected_maps(family, model, torch.from_numpy(image.transpose(0, 3, 1, 2).copy()))
        found = apply(variables, image)
        assert len(found) == len(expected)
        for (key, level), theirs in zip(found.items(), expected, strict=True):
            close(level, theirs.numpy(), f"{size}, {key}")


def test_gradients(pair, tmp_path):
    """Of every parameter and of the pixels, at a size where the position embedding is interpolated. torch's gradients
    are read as if they were a checkpoint, which transposes and joins them as it does the parameters."""
    import torch

    family, model, folder, as_augreg = pair
    module, variables = load(folder, as_augreg)
    rng = np.random.default_rng(1)
    image = rng.normal(size=(2, 72, 91, 3)).astype(np.float32)
    pixels = torch.from_numpy(image.transpose(0, 3, 1, 2).copy()).requires_grad_()
    maps = expected_maps(family, model, pixels)
    weights = [rng.normal(size=level.shape).astype(np.float32) / level[0].numel() ** 0.5 for level in maps]
    model.zero_grad()
    sum((level * torch.from_numpy(weight)).sum() for level, weight in zip(maps, weights, strict=True)).backward()

    def loss(params, image):
        found = module.apply({"params": params}, image).values()
        return sum(jnp.sum(level * weight) for level, weight in zip(found, weights, strict=True))

    grads, image_grad = jax.jit(jax.grad(loss, (0, 1)))(variables["params"], image)
    close(image_grad, pixels.grad.numpy().transpose(0, 2, 3, 1), "pixels")

    # save_pretrained renames parameters, so the gradients take the parameters' place before they are saved.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.zeros_like(parameter) if parameter.grad is None else parameter.grad)
    save(model, tmp_path)
    model.load_state_dict(type(model).from_pretrained(folder).state_dict())
    expected = load(tmp_path, as_augreg)[1]["params"]
    # The sum of two parameters with the same gradient.
    if "position_embedding" in expected:
        expected["class_token"] = expected["class_token"] / 2
    flat = jax.tree_util.tree_leaves_with_path(grads)
    for (path, found), theirs in zip(flat, jax.tree.leaves(expected), strict=True):
        assert np.any(theirs), path
        close(found, theirs, jax.tree_util.keystr(path))


@pytest.mark.parametrize("pair", ["swin_classifier"], indirect=True)
@pytest.mark.parametrize("size", [(96, 96), (70, 97)])  # the last map as high as the window
def test_the_classifiers_swin(pair, size):
    """Maps no larger than the window, as `SwinModel` treats them: one unshifted window."""
    import torch

    _, model, folder, _ = pair
    module, variables = load_pretrained(folder)
    image = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    fresh = type(model).from_pretrained(folder).eval()  # the model remembers a map that small
    with torch.no_grad():
        outputs = fresh.swin(
            torch.from_numpy(image.transpose(0, 3, 1, 2).copy()),
            output_hidden_states=True,
            output_hidden_states_before_downsampling=True,
        )
    found = jax.jit(module.clone(always_partition=False).apply)(variables, image)
    for level, theirs in zip(found.values(), outputs.reshaped_hidden_states[1:], strict=True):
        close(level, theirs.numpy().transpose(0, 2, 3, 1))
