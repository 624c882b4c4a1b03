"""ConvNeXt: a block against NumPy, published sizes, any image size, what is refused."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.errors import InvalidRngError
from scipy.special import erf

from sgw_jax.backbones.convnext import SIZES, ConvNeXt, ConvNeXtBlock, convnext

EPS32 = float(np.finfo(np.float32).eps)
TINY = ConvNeXt(width=4, depths=(1, 2, 1, 1))
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


def shapes_of(model, shape, **kwargs):
    return jax.eval_shape(lambda x: model.init_with_output(jax.random.key(0), x, **kwargs), jnp.zeros(shape))


def count(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("size", [(1, 1), (5, 33), (70, 121)])
def test_any_image_size(size):
    maps, _ = shapes_of(TINY, (2, *size, 3))
    assert {stride: level.shape for stride, level in maps.items()} == {
        stride: (2, -(-size[0] // stride), -(-size[1] // stride), stride) for stride in (4, 8, 16, 32)
    }


@pytest.mark.parametrize(
    ("size", "published"),
    [("tiny", 28_589_128), ("small", 50_223_688), ("base", 88_591_464), ("large", 197_767_336)],
)
def test_parameter_counts(size, published):
    """Of the paper's classifiers, without their head of 1000 classes."""
    params = shapes_of(convnext(size, output="taps"), (1, 32, 32, 3))[1]["params"]
    assert count(params) == published - 1000 * (8 * SIZES[size].width + 1)


def test_a_block_is_the_papers():
    grid = np.random.default_rng(0).normal(size=(1, 5, 9, 3))
    shapes = jax.eval_shape(ConvNeXtBlock().init, jax.random.key(0), grid, 0.0)["params"]
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), shapes)
    padded = np.pad(grid, ((0, 0), (3, 3), (3, 3), (0, 0)))
    mixed = np.zeros_like(grid)
    for y, x in np.ndindex(5, 9):
        window = padded[:, y : y + 7, x : x + 7]
        mixed[:, y, x] = np.einsum("bijc,ijc->bc", window, params["depthwise"]["kernel"][:, :, 0])
    mixed += params["depthwise"]["bias"]
    normed = (mixed - mixed.mean(-1, keepdims=True)) / np.sqrt(mixed.var(-1, keepdims=True) + 1e-6)
    normed = normed * params["norm"]["scale"] + params["norm"]["bias"]
    hidden = normed @ params["mlp"]["hidden"]["kernel"] + params["mlp"]["hidden"]["bias"]
    hidden = hidden * (1 + erf(hidden / np.sqrt(2))) / 2
    branch = hidden @ params["mlp"]["output"]["kernel"] + params["mlp"]["output"]["bias"]
    with jax.enable_x64(True):
        found = jit(ConvNeXtBlock(dtype=jnp.float64).apply)({"params": params}, grid, 0.0)[0]
        np.testing.assert_allclose(found, grid + params["scale"] * branch, rtol=0, atol=1e-11)


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({"depths": (1, 1, 1)}, 32, r"depths \(1, 1, 1\) must be 4 positive numbers"),
        ({"depths": (1, 1, 0, 1)}, 32, "must be 4 positive numbers"),
        ({"width": 0}, 32, "width 0 must be at least 1"),
        ({"output": "maps"}, 32, r"'maps'; it must be one of \('pyramid', 'taps'\)"),
        ({"drop_path": 1.0}, 32, r"drop_path 1.0 must be in \[0, 1\)"),
        ({"remat": "all"}, 32, "'all'; it must be one of"),
        ({"output": "taps"}, 31, "the image is 31 x 31; its last map's cells are 32 x 32"),
    ],
)
def test_what_does_not_fit_is_refused(changes, size, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(TINY.clone(**changes), (1, size, size, 3))
    with pytest.raises(ValueError, match="'huge'; it must be one of"):
        convnext("huge")


def test_drop_path_asks_for_randomness_in_training_alone():
    image = jnp.zeros((2, 32, 32, 3))
    params = jax.eval_shape(TINY.init, jax.random.key(0), image)
    dropping = TINY.clone(drop_path=0.5)
    jax.eval_shape(lambda p: (TINY.apply(p, image, train=True), dropping.apply(p, image)), params)
    with pytest.raises(InvalidRngError, match="drop_path"):
        jax.eval_shape(lambda p: dropping.apply(p, image, train=True), params)


@pytest.mark.slow
def test_no_gradient_goes_through_frozen_layers():
    """Nor into what lies below them; the maps are the same. Two: stage 1, and the first block of stage 2."""
    image = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    params = jit(TINY.init)(jax.random.key(0), image)["params"]
    params = jax.tree.map(lambda leaf: leaf + 0.1, params)  # layer scales start too small to be seen

    def run(params, frozen):
        maps = TINY.clone(frozen_layers=frozen).apply({"params": params}, image)
        return sum(jnp.sum(jnp.sin(level)) for level in maps.values())

    (free, _), (fixed, grads) = (jit(jax.value_and_grad(run), static_argnums=1)(params, frozen) for frozen in (0, 2))
    np.testing.assert_allclose(free, fixed, rtol=64 * EPS32)
    learns = jax.tree.map(lambda leaf: bool(np.any(leaf)), grads)
    assert not any(jax.tree.leaves([learns[name] for name in ("patch_embed", "patch_norm", "stage1", "downsample1")]))
    assert all(jax.tree.leaves([learns[name] for name in ("downsample2", "stage3", "stage4", "norm", "norm_stage1")]))
    kernel = grads["stage2"]["mlp"]["hidden"]["kernel"]
    assert not np.any(kernel[0])
    assert np.any(kernel[1])
    with pytest.raises(ValueError, match="frozen_layers is 6; it has 5 blocks"):
        shapes_of(TINY.clone(frozen_layers=6), (1, 32, 32, 3))
