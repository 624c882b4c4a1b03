"""Rates by layer on real backbones: which layer a parameter belongs to, and what is left alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgw_jax.backbones.convnext import ConvNeXt
from sgw_jax.backbones.dinov3 import dinov3
from sgw_jax.backbones.layer_rates import scale_by_layer
from sgw_jax.backbones.swin import Swin
from sgw_jax.backbones.vit import ViT
from sgw_jax.optimizers import make_optimizer
from sgw_jax.sharding import path_name

EPS32 = float(np.finfo(np.float32).eps)
BACKBONES = {
    "vit": ViT(32, 8, 4, 2, image_size=(32, 32), class_token=True, layer_scale=0.1),
    "dinov3": dinov3(width=8, depth=4, num_heads=2),
    "swin": Swin(width=4, depths=(2, 4, 2, 2), num_heads=(1, 1, 1, 1), window_size=2),
    "convnext": ConvNeXt(width=4, depths=(1, 3, 2, 1)),
}
# Layer of every parameter by the beginning of its path; a list for a stack's slices.
LAYERS = {
    "vit": {
        **dict.fromkeys(("patch_embed", "class_token", "position_embedding"), 0),
        "blocks": [1, 2, 3, 4],
        "norm": 5,
    },
    "dinov3": {
        **dict.fromkeys(("patch_embed", "class_token", "register_tokens"), 0),
        "blocks": [1, 2, 3, 4],
        "norm": 5,
    },
    "convnext": {
        **dict.fromkeys(("patch_embed", "patch_norm"), 0),
        "stage1": [1],
        "stage2": [2, 3, 4],
        "stage3": [5, 6],
        "stage4": [7],
        "downsample1": 2,
        "downsample2": 5,
        "downsample3": 7,
        "norm": 8,
    },
    "swin": {
        **dict.fromkeys(("patch_embed", "patch_norm"), 0),
        "stage1/regular": [1],
        "stage1/shifted": [2],
        "stage2/regular": [3, 5],
        "stage2/shifted": [4, 6],
        "stage3/regular": [7],
        "stage3/shifted": [8],
        "stage4/regular": [9],
        "stage4/shifted": [10],
        "merge1": 2,
        "merge2": 6,
        "merge3": 8,
    },
}
LAST = {"vit": 5, "dinov3": 5, "swin": 11, "convnext": 8}


def ones(name):
    shapes = jax.eval_shape(BACKBONES[name].init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    params = {"backbone": shapes, "stem": {"norm": {"scale": jax.ShapeDtypeStruct((3,), jnp.float32)}}}
    return jax.tree.map(lambda leaf: jnp.ones(leaf.shape), params)


@pytest.mark.parametrize("name", BACKBONES)
@pytest.mark.parametrize(("scale", "decay"), [(1.0, 0.75), (0.1, 1.0), (0.5, 0.9), (0.0, 0.8)])
def test_every_parameter_gets_its_layers_rate(name, scale, decay):
    updates = ones(name)
    transform = scale_by_layer(scale, decay)
    found, _ = jax.jit(transform.update)(updates, transform.init(updates))
    seen = set()
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        tail = path_name(path).removeprefix("backbone/")
        start = next((start for start in LAYERS[name] if tail == start or tail.startswith(f"{start}/")), None)
        if start is None:  # the pyramid, the output norms, and the model's other parts
            assert tail.startswith(("pyramid", "norm_stage", "stem/"))
            expected = np.ones(1)
        else:
            seen.add(start)
            expected = scale * decay ** (LAST[name] - np.atleast_1d(LAYERS[name][start]).astype(float))
        shape = (-1,) + (1,) * (leaf.ndim - 1)
        # One power of float32 numbers, to a rounding for each factor.
        np.testing.assert_allclose(leaf, np.broadcast_to(expected.reshape(shape), leaf.shape), rtol=16 * EPS32)
    assert seen == set(LAYERS[name])


def test_frozen_layers_do_not_move_and_added_ones_do():
    params = ones("swin")
    optimizer = make_optimizer(0.1, weight_decay=0.5, backbone_scale=0.0)
    updates, _ = jax.jit(optimizer.update)(params, optimizer.init(params), params)
    for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
        name = path_name(path)
        assert np.any(leaf) == (not name.startswith("backbone/") or "norm_stage" in name), name


@pytest.mark.parametrize(
    ("options", "message"), [((-1.0, 1.0), "backbone_scale is -1"), ((1.0, 1.5), "layer_decay is 1.5")]
)
def test_errors(options, message):
    with pytest.raises(ValueError, match=message):
        scale_by_layer(*options)
