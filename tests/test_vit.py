"""The ViT: shapes and parameter counts of every variant, the scanned stack against a loop, drop path, image sizes."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgw_jax.backbones import BACKBONES
from sgw_jax.backbones.dinov2 import dinov2
from sgw_jax.backbones.dinov3 import dinov3
from sgw_jax.backbones.vit import SIZES, Block, ViT, vit
from sgw_jax.layers.drop_path import DropPath
from sgw_jax.layers.patch_embed import PatchEmbed
from sgw_jax.layers.resize import depth_to_space, resize, resize_to_stride

EPS32 = float(np.finfo(np.float32).eps)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})
TINY = ViT(width=8, depth=4, num_heads=2, mlp_ratio=2.0, image_size=(32, 64))
# Activations are of size O(1) behind a layer norm; about 16 operations a layer, each a sum of at most 24 terms, over
# four layers and the pyramid.
ROUNDING = 5 * 16 * 24 * EPS32


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).normal(size=(2, 32, 64, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def variables(image):
    return jit(TINY.init)(jax.random.key(0), image)


def count(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


# ---- shapes, without computing anything ----------------------------------------------------------------------------


@pytest.mark.parametrize("patch_embed", ["patch", "conv"])
@pytest.mark.parametrize("patch_size", [4, 8, 16, 32])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pyramid_shapes(patch_size, patch_embed, dtype):
    model = TINY.clone(patch_size=patch_size, patch_embed=patch_embed, image_size=(64, 96), dtype=dtype)
    maps, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), jnp.zeros((2, 64, 96, 3)))
    assert {stride: level.shape for stride, level in maps.items()} == {
        stride: (2, 64 // stride, 96 // stride, 8) for stride in (4, 8, 16, 32)
    }
    assert {level.dtype for level in maps.values()} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    laterals = {name for name in variables["params"] if name.startswith("lateral")}
    assert laterals == ({f"lateral{s}" for s in (4, 8, 16) if s < patch_size} if patch_embed == "conv" else set())


@pytest.mark.parametrize("size", SIZES)
def test_parameter_counts(size):
    """A block has 12 d^2 + 13 d parameters (attention 4 d^2 + 4 d, MLP 8 d^2 + 5 d, norms 4 d): 85.05 M in ViT-B."""
    model = BACKBONES["vit"](size)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))["params"]
    blocks = count(params["blocks"])
    width, depth = SIZES[size].width, SIZES[size].depth
    assert blocks == depth * (12 * width**2 + 13 * width)
    if size == "base":
        assert blocks == 85_054_464
    assert count(params["patch_embed"]) == 16 * 16 * 3 * width + width
    assert params["position_embedding"].shape == (1, 14, 14, width)
    assert count(params["norm"]) == 2 * width


@pytest.mark.parametrize(
    ("changes", "shape", "message"),
    [
        ({"output": "taps"}, (1, 32, 15, 3), "32 x 15; a patch has 16 pixels a side"),
        ({"registers": -1}, (1, 32, 32, 3), "registers is -1; it must not be negative"),
        (
            {"rope_theta": 100.0, "num_heads": 4},
            (1, 32, 32, 3),
            "rotary positions need heads whose width is a multiple",
        ),
        ({"qkv_bias": "key"}, (1, 32, 32, 3), r"'key'; it must be one of \('all', 'query_value', 'none'\)"),
        ({"patch_size": 0}, (1, 96, 96, 3), "patch_size 0 must be at least 1"),
        ({"tapped": (1, 2, 3)}, (1, 32, 32, 3), r"made of 4 taps; tapped is \(1, 2, 3\)"),
        ({"tapped": (1, 2, 4, 3)}, (1, 32, 32, 3), "must be layers from 1 to 4, in ascending order"),
        ({"tapped": (2, 3, 4, 5)}, (1, 32, 32, 3), "must be layers from 1 to 4, in ascending order"),
        ({"output": "maps"}, (1, 32, 32, 3), r"'maps'; it must be one of \('pyramid', 'taps'\)"),
        ({"remat": "all"}, (1, 32, 32, 3), r"'all'; it must be one of \['none', 'dots', 'full'\]"),
        ({"depth": 6}, (1, 32, 32, 3), "depth 6 must be a multiple of 4"),
        ({"depth": 0}, (1, 32, 32, 3), "depth 0 must be a multiple of 4"),
        ({"patch_embed": "hybrid"}, (1, 32, 32, 3), r"'hybrid'; it must be one of \['conv', 'patch'\]"),
        ({"patch_size": 1, "patch_embed": "conv"}, (1, 32, 32, 3), "power of two from 2 on, not 1"),
        ({"drop_path": 1.0}, (1, 32, 32, 3), r"drop_path 1.0 must be in \[0, 1\)"),
        ({"num_heads": 3}, (1, 32, 32, 3), "width 8 does not divide into num_heads = 3"),
    ],
)
def test_what_does_not_fit_is_refused(changes, shape, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(TINY.clone(**changes).init, jax.random.key(0), jnp.zeros(shape))


@pytest.mark.parametrize("make", [vit, dinov2, dinov3])
def test_unknown_size_is_refused(make):
    with pytest.raises(ValueError, match="'huge'; it must be one of"):
        make("huge")


@pytest.mark.parametrize(
    ("make", "size", "published"),
    [
        (dinov2, "small", 22.06e6),
        (dinov2, "giant", 1136e6),
        (dinov3, "small", 21.6e6),
        (dinov3, "small_plus", 28.7e6),
        (dinov3, "base", 85.7e6),
        (dinov3, "large", 303.1e6),
        (dinov3, "huge_plus", 840.5e6),
        (dinov3, "7b", 6716e6),
    ],
)
def test_parameters_of_the_dinos(make, size, published):
    """As their authors and the hub count them, which round to thousandths."""
    shapes = jax.eval_shape(make(size, output="taps").init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert count(shapes) == pytest.approx(published, rel=1e-3)


# ---- the stack -----------------------------------------------------------------------------------------------------


def taps(model, variables, image, *, replace=None, **kwargs):
    """What enters the pyramid at each stride; ``replace`` (module, args) -> output or None takes a module's place."""
    seen = {}

    def watch(next_fun, args, kwargs, context):
        if context.method_name == "__call__":
            if context.module.name in {f"pyramid{stride}" for stride in ViT.strides}:
                seen[int(context.module.name.removeprefix("pyramid"))] = args[0]
            if replace is not None and (output := replace(context.module, args)) is not None:
                return output
        return next_fun(*args, **kwargs)

    with nn.intercept_methods(watch):
        model.apply(variables, image, **kwargs)
    return seen


def test_scan_equals_a_loop(image, variables):
    params = variables["params"]

    def loop(params, image):
        grid = PatchEmbed(16, 8).apply({"params": params["patch_embed"]}, image)[0] + params["position_embedding"]
        tokens, outputs = grid.reshape(2, -1, 8), []
        for layer in range(4):
            sliced = jax.tree.map(lambda x: x[layer], params["blocks"])  # noqa: B023
            tokens = Block(2, 2.0).apply({"params": sliced}, tokens, 0.0)[0]
            outputs.append(tokens.reshape(grid.shape))
        outputs[-1] = nn.LayerNorm(epsilon=1e-6).apply({"params": params["norm"]}, outputs[-1])
        return outputs

    found = jit(functools.partial(taps, TINY))(variables, image)
    for stride, expected in zip(ViT.strides, jit(loop)(params, image), strict=True):
        np.testing.assert_allclose(found[stride], expected, rtol=0, atol=ROUNDING)
    kernels = params["blocks"]["mlp"]["hidden"]["kernel"]
    assert not np.array_equal(kernels[0], kernels[1])  # layers start from different draws


def test_block_matches_numpy(variables):
    """One block in float64: x + attention(norm(x)), then x + mlp(norm(x)), as in the paper."""
    from scipy.special import erf

    params = jax.tree.map(lambda x: np.asarray(x[1], np.float64), variables["params"]["blocks"])
    tokens = np.random.default_rng(1).normal(size=(2, 5, 8))

    def norm(x, p):
        return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]

    def dense(x, p):
        return x @ p["kernel"] + p["bias"]

    query, key, value = np.split(dense(norm(tokens, params["norm1"]), params["attention"]["query_key_value"]), 3, -1)
    mixed = np.zeros_like(tokens)
    for cut in (slice(0, 4), slice(4, 8)):
        weights = np.exp(query[..., cut] @ np.swapaxes(key[..., cut], 1, 2) / 2)
        mixed[..., cut] = weights / weights.sum(-1, keepdims=True) @ value[..., cut]
    expected = tokens + dense(mixed, params["attention"]["output"])
    hidden = dense(norm(expected, params["norm2"]), params["mlp"]["hidden"])
    expected = expected + dense(hidden * (1 + erf(hidden / np.sqrt(2))) / 2, params["mlp"]["output"])
    with jax.enable_x64(True):
        found = jit(Block(2, 2.0, dtype=jnp.float64).apply)({"params": params}, tokens, 0.0)[0]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)


def test_remat_changes_nothing(image, variables):
    def loss(model, params, image):
        return sum(jnp.sum(jnp.sin(level)) for level in model.apply({"params": params}, image, train=True).values())

    one, *others = (
        jit(jax.value_and_grad(functools.partial(loss, TINY.clone(remat=remat))))(variables["params"], image)
        for remat in ("none", "full", "dots")
    )
    # A gradient sums over the 2 x 128 positions of the finest map.
    for other in others:
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=256 * ROUNDING, err_msg=str(path))


# ---- drop path -----------------------------------------------------------------------------------------------------


def test_drop_path_layer():
    """Whole examples are dropped at the given rate and the others scaled: the mean of n examples is 1 within five
    standard errors sqrt(rate / (1 - rate) / n)."""
    rate, number = 0.3, 4000
    branch = np.ones((number, 2, 3), np.float32)
    layer = DropPath()
    apply = jit(lambda key, train: layer.apply({}, branch, rate, train, rngs={"drop_path": key}), static_argnums=1)
    found = np.asarray(apply(jax.random.key(0), True))
    assert np.array_equal(found, np.broadcast_to(found[:, :1, :1], found.shape))
    np.testing.assert_allclose(np.unique(found), [0, 1 / (1 - rate)], rtol=2 * EPS32)
    np.testing.assert_allclose(found.mean(), 1, atol=5 * np.sqrt(rate / (1 - rate) / number))
    assert np.array_equal(found, apply(jax.random.key(0), True))
    assert not np.array_equal(found, apply(jax.random.key(1), True))
    assert np.array_equal(apply(jax.random.key(0), False), branch)


def test_drop_path_of_the_model(image, variables):
    """Off in evaluation; seeded in training; no randomness is asked for at rate 0."""
    dropping = TINY.clone(drop_path=0.5)
    apply = jit(lambda model, v, x, key: model.apply(v, x, train=True, rngs={"drop_path": key}), static_argnums=0)
    evaluate = jit(lambda model, v, x: model.apply(v, x), static_argnums=0)
    plain = evaluate(TINY, variables, image)
    off = evaluate(dropping, variables, image)
    first, again, other = (apply(dropping, variables, image, jax.random.key(seed)) for seed in (0, 0, 1))
    for stride in ViT.strides:
        assert np.array_equal(plain[stride], off[stride])
        assert np.array_equal(first[stride], again[stride])
    assert not np.array_equal(first[32], other[32])
    assert not np.array_equal(first[32], plain[32])
    jax.eval_shape(lambda v: TINY.apply(v, image, train=True), variables)  # without a "drop_path" stream


def test_drop_rates_are_linear_in_depth(image, variables):
    """With every branch replaced by its rate, layer i adds 2 rate_i to the tokens, so that the taps show the rates."""

    def replace(module, args):
        if isinstance(module, DropPath):
            return jnp.broadcast_to(jnp.asarray(args[1], args[0].dtype), args[0].shape)
        return args[0] if module.name == "norm" else None

    model = TINY.clone(drop_path=0.3)
    key = {"drop_path": jax.random.key(0)}
    found = jit(functools.partial(taps, model, replace=replace, train=True))(variables, image, rngs=key)
    steps = [np.asarray(found[b]) - np.asarray(found[a]) for a, b in ((4, 8), (8, 16), (16, 32))]
    for step, rate in zip(steps, (0.1, 0.2, 0.3), strict=True):
        np.testing.assert_allclose(step, 2 * rate, rtol=0, atol=32 * EPS32)
    grid = PatchEmbed(16, 8).apply({"params": variables["params"]["patch_embed"]}, image)[0]
    np.testing.assert_allclose(found[4], grid + variables["params"]["position_embedding"], rtol=0, atol=ROUNDING)


# ---- image sizes and resizing --------------------------------------------------------------------------------------


def test_other_image_sizes_interpolate_the_position_embedding(variables):
    """A table that is constant over positions stays so, and a larger image then gives what a model made for it does."""
    large = np.random.default_rng(2).normal(size=(1, 64, 96, 3)).astype(np.float32)
    table = np.broadcast_to(np.arange(8, dtype=np.float32), (1, 2, 4, 8))
    params = {**variables["params"], "position_embedding": table}
    made_for_it = {**params, "position_embedding": np.broadcast_to(table[:, :1, :1], (1, 4, 6, 8))}
    found = jit(TINY.apply)({"params": params}, large)
    expected = jit(TINY.clone(image_size=(64, 96)).apply)({"params": made_for_it}, large)
    for stride in ViT.strides:
        np.testing.assert_allclose(found[stride], expected[stride], rtol=0, atol=8 * ROUNDING)


def test_an_image_of_any_size_is_that_image_padded(variables):
    """To whole patches with zeros, where the maps have as many cells."""
    image = np.random.default_rng(2).normal(size=(1, 30, 45, 3)).astype(np.float32)
    padded = np.pad(image, ((0, 0), (0, 2), (0, 3), (0, 0)))
    found, expected = (jit(TINY.apply)(variables, pixels) for pixels in (image, padded))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_another_stride_is_aligned_at_the_top_left():
    """A ramp stays that ramp: cell i of stride s has its centre at (i + 1/2) s pixels."""
    centres = {stride: (np.arange(-(-42 // stride)) + 0.5) * stride for stride in (4, 8, 16)}
    ramps = {stride: np.broadcast_to(c[None, :, None, None], (1, len(c), 3, 1)) for stride, c in centres.items()}
    for old, new in ((16, 4), (8, 4), (4, 8), (4, 16)):
        found = resize_to_stride(jnp.asarray(ramps[old], jnp.float32), old, new, (len(centres[new]), 3))
        inside = (centres[new] >= centres[old][0]) & (centres[new] <= centres[old][-1] - new)
        np.testing.assert_allclose(found[0, inside, 0, 0], centres[new][inside], rtol=16 * EPS32)
    short = resize_to_stride(jnp.ones((1, 2, 2, 1)), 8, 4, (5, 3))  # continued
    np.testing.assert_array_equal(short, np.ones((1, 5, 3, 1)))


def test_resize_is_torchs_interpolate():
    """Half-pixel centres, edges clamped, no antialiasing: output pixel i reads input (i + 0.5) / scale - 0.5."""
    values = np.random.default_rng(0).normal(size=(1, 3, 4, 2)).astype(np.float32)

    def matrix(new, old):
        weights = np.zeros((new, old))
        for i in range(new):
            at = min(max((i + 0.5) * old / new - 0.5, 0), old - 1)
            low = min(int(at), old - 2)
            weights[i, low : low + 2] = 1 - (at - low), at - low
        return weights

    for size in ((6, 12), (2, 3), (3, 7)):
        expected = np.einsum("yh,xw,bhwc->byxc", matrix(size[0], 3), matrix(size[1], 4), values)
        np.testing.assert_allclose(jit(resize, static_argnums=1)(values, size), expected, rtol=0, atol=32 * EPS32)
    assert resize(values, (3, 4)) is values


def test_depth_to_space():
    packed = np.arange(2 * 3 * 12).reshape(1, 2, 3, 12)
    found = depth_to_space(packed, 2)
    assert found.shape == (1, 4, 6, 3)
    for y, x, c in np.ndindex(4, 6, 3):
        assert found[0, y, x, c] == packed[0, y // 2, x // 2, (y % 2 * 2 + x % 2) * 3 + c]
