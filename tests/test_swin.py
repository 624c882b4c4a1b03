"""Swin: every token against a NumPy loop over tokens, published sizes, any image size, scan, remat, drop path."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from sgw_jax.backbones import BACKBONES
from sgw_jax.backbones.swin import SIZES, BlockPair, PatchMerging, Swin, swin
from sgw_jax.interactions import KEM
from sgw_jax.layers.drop_path import DropPath
from sgw_jax.layers.window_attention import (
    WindowAttention,
    from_windows,
    group_size,
    offset_index,
    to_windows,
    together,
)
from sgw_jax.model import MultiTaskModel
from sgw_jax.sharding import make_mesh
from sgw_jax.tasks import Depth, Normals

EPS32 = float(np.finfo(np.float32).eps)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})
TINY = Swin(width=4, depths=(2, 4, 2, 2), num_heads=(1, 2, 1, 2), window_size=3, mlp_ratio=2.0)
# Neither side divides by the patch; the maps are 8 x 12, 4 x 6, 2 x 3 and 1 x 2.
SHAPE = (2, 29, 46, 3)
# Activations are of size O(1) behind a layer norm; about 16 operations a block, each a sum of at most 2 x 32 terms,
# over ten blocks.
ROUNDING = 10 * 16 * 64 * EPS32


@pytest.fixture(scope="module")
def image():
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


@pytest.fixture(scope="module")
def params(image):
    """Every parameter drawn, so that no bias, norm or position table is at a value that hides it."""
    shapes = jax.eval_shape(TINY.init, jax.random.key(0), image)["params"]
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        scale = 1.0 if path[-1].key in ("scale", "relative_position_bias_table") else 0.4
        return (scale * rng.normal(size=leaf.shape) + (path[-1].key == "scale")).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def count(tree):
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def shapes_of(model, shape, **kwargs):
    return jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, **kwargs), jax.ShapeDtypeStruct(shape, jnp.float32)
    )


# ---- shapes, without computing anything ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "always_partition", "dtype"),
    [
        ((64, 96), False, jnp.float32),
        ((1, 1), True, jnp.float32),
        ((5, 33), False, jnp.bfloat16),
        ((97, 224), True, jnp.bfloat16),
    ],
)
def test_any_image_size(size, always_partition, dtype):
    maps, variables = shapes_of(TINY.clone(dtype=dtype, always_partition=always_partition), (2, *size, 3))
    assert {stride: level.shape for stride, level in maps.items()} == {
        stride: (2, -(-size[0] // stride), -(-size[1] // stride), stride) for stride in (4, 8, 16, 32)
    }
    assert {level.dtype for level in maps.values()} == {jnp.dtype(dtype)}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("size", "published", "features"),
    [
        ("tiny", 28_288_354, 768),
        ("small", 49_606_258, 768),
        ("base", 87_768_224, 1024),
        ("large", 196_532_476, 1536),
    ],
)
def test_parameter_counts(size, published, features):
    """The published classifiers (28.3, 49.6, 87.8 and 196.5 M) have one last norm and a head of 1000 classes."""
    params = shapes_of(BACKBONES["swin"](size, image_size=(64, 96)), (1, 64, 96, 3))[1]["params"]
    other_norms = sum(count(params[f"norm_stage{stage}"]) for stage in (1, 2, 3))
    assert count(params) - other_norms == published - 1000 * (features + 1)
    width, depths, heads = SIZES[size].width, SIZES[size].depths, SIZES[size].num_heads
    for stage in range(4):
        wide = width * 2**stage  # attention 4 d^2 + 4 d, MLP 8 d^2 + 5 d, norms 4 d, the table 13^2 per head
        block = 12 * wide**2 + 13 * wide + 169 * heads[stage]
        assert count(params[f"stage{stage + 1}"]) == depths[stage] * block


def test_output_norms_can_be_left_out(params):
    without = shapes_of(TINY.clone(output_norms=False), SHAPE)[1]["params"]
    assert set(params) - set(without) == {f"norm_stage{stage}" for stage in (1, 2, 3, 4)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": (2, 2, 3, 2)}, r"depths \(2, 2, 3, 2\) must be 4 even numbers"),
        ({"depths": (2, 2, 2)}, "must be 4 even numbers"),
        ({"depths": (0, 2, 2, 2)}, "must be 4 even numbers"),
        ({"num_heads": (1, 2, 2)}, r"num_heads \(1, 2, 2\) must be 4 positive"),
        ({"num_heads": (1, 0, 1, 1)}, "must be 4 positive"),
        ({"num_heads": (1, 3, 1, 1)}, "width of stage 2, 8, does not divide into its 3 heads"),
        ({"window_size": 0}, "window_size 0 must be at least 1"),
        ({"window_chunk": 0}, "window_chunk 0 must be at least 1"),
        ({"drop_path": 1.0}, r"drop_path 1.0 must be in \[0, 1\)"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(TINY.clone(**changes), (1, 32, 32, 3))


def test_what_else_is_refused():
    with pytest.raises(ValueError, match="'huge'; it must be one of"):
        swin("huge")
    with pytest.raises(ValueError, match="width 4 does not divide into num_heads = 3"):
        shapes_of(WindowAttention(3), (1, 4, 4, 4))
    with pytest.raises(ValueError, match="window_size 0 must be at least 1"):
        shapes_of(WindowAttention(1, window_size=0), (1, 4, 4, 4))


def test_the_whole_network_takes_maps_of_different_widths():
    model = MultiTaskModel((Depth(), Normals()), TINY, KEM(3, top_k=4), channels=8)
    predictions, _ = shapes_of(model, (2, 30, 45, 3), train=True)
    assert {name: value.shape[:3] for name, value in predictions.items()} == dict.fromkeys(
        ("depth", "normals"), (2, 30, 45)
    )


# ---- against NumPy, token by token ---------------------------------------------------------------------------------


def norm(x, p):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p["scale"] + p["bias"]


def dense(x, p):
    return x @ p["kernel"] + p.get("bias", 0.0)


def reference_attention(grid, p, heads, table_window, window, shift):
    """One image. Token a attends to the tokens b of the padded map for which, on both axes, (position - shift) modulo
    the padded length lies in the same window, and which are on the same side of ``shift``."""
    height, width, channels = grid.shape
    tall, wide = -(-height // window) * window, -(-width // window) * window
    padded = np.zeros((tall, wide, channels))
    padded[:height, :width] = grid
    query, key, value = np.split(dense(padded, p["query_key_value"]), 3, -1)
    table = p["relative_position_bias_table"].reshape(2 * table_window - 1, 2 * table_window - 1, heads)
    dim = channels // heads

    def place(position, length):
        moved = (position - shift) % length
        return moved // window, position < shift, moved % window

    mixed = np.zeros((height, width, channels))
    for y, x in np.ndindex(height, width):
        (row, top, i), (column, left, j) = place(y, tall), place(x, wide)
        others = []
        for v, u in np.ndindex(tall, wide):
            (row2, top2, k), (column2, left2, m) = place(v, tall), place(u, wide)
            if (row, top, column, left) == (row2, top2, column2, left2):
                others.append((v, u, i - k, j - m))
        for head in range(heads):
            cut = slice(head * dim, (head + 1) * dim)
            scores = [
                query[y, x, cut] @ key[v, u, cut] / np.sqrt(dim)
                + table[dy + table_window - 1, dx + table_window - 1, head]
                for v, u, dy, dx in others
            ]
            weights = np.exp(scores) / np.exp(scores).sum()
            mixed[y, x, cut] = sum(w * value[v, u, cut] for w, (v, u, _, _) in zip(weights, others, strict=True))
    return dense(mixed, p["output"])


def reference(image, params, always_partition):
    """The whole network for one image, float64."""
    from scipy.special import erf

    tall, wide = -(-image.shape[0] // 4), -(-image.shape[1] // 4)
    padded = np.zeros((4 * tall, 4 * wide, 3))
    padded[: image.shape[0], : image.shape[1]] = image
    grid = np.zeros((tall, wide, 4))
    projection = params["patch_embed"]["projection"]
    for y, x in np.ndindex(tall, wide):
        patch = padded[4 * y : 4 * y + 4, 4 * x : 4 * x + 4]
        grid[y, x] = np.einsum("yxc,yxcd->d", patch, projection["kernel"]) + projection["bias"]
    grid = norm(grid, params["patch_norm"])
    maps = {}
    for stage, (depth, heads) in enumerate(zip(TINY.depths, TINY.num_heads, strict=True)):
        if stage:
            height, width, channels = grid.shape
            even = np.zeros((height + height % 2, width + width % 2, channels))
            even[:height, :width] = grid
            four = [even[0::2, 0::2], even[1::2, 0::2], even[0::2, 1::2], even[1::2, 1::2]]
            merge = params[f"merge{stage}"]
            grid = dense(norm(np.concatenate(four, -1), merge["norm"]), merge["reduction"])
        for index in range(depth):
            pair = params[f"stage{stage + 1}"]["shifted" if index % 2 else "regular"]
            p = jax.tree.map(lambda leaf: leaf[index // 2], pair)  # noqa: B023
            window, shift = 3, index % 2  # half of 3 is 1
            if not always_partition and min(grid.shape[:2]) <= 3:
                window, shift = min(grid.shape[:2]), 0
            grid = grid + reference_attention(norm(grid, p["norm1"]), p["attention"], heads, 3, window, shift)
            hidden = dense(norm(grid, p["norm2"]), p["mlp"]["hidden"])
            grid = grid + dense(hidden * (1 + erf(hidden / np.sqrt(2))) / 2, p["mlp"]["output"])
        maps[4 << stage] = norm(grid, params[f"norm_stage{stage + 1}"])
    return maps


@pytest.mark.parametrize(("always_partition", "chunk"), [(True, None), (False, None), (True, 5)])
def test_network_matches_numpy(image, params, always_partition, chunk):
    """Also the scan: the second stage is two scanned pairs, here four blocks one after the other. In chunks of five
    the windows of an image are 12 (three groups of 4), 4 with two heads (two of 2), then 1 at once."""
    params = jax.tree.map(lambda leaf: leaf.astype(np.float64), params)
    model = TINY.clone(always_partition=always_partition, window_chunk=chunk, dtype=jnp.float64)
    image = image if always_partition else image[:1]
    with jax.enable_x64(True):
        found = jit(model.apply)({"params": params}, image.astype(np.float64))
        for number in range(len(image)):
            expected = reference(image[number].astype(np.float64), params, always_partition)
            for stride in Swin.strides:
                np.testing.assert_allclose(found[stride][number], expected[stride], rtol=0, atol=1e-11)


def test_windows_are_cut_and_put_back():
    grid = np.arange(2 * 4 * 6 * 5).reshape(2, 4, 6, 5)
    windows = np.asarray(to_windows(jnp.asarray(grid), 2))
    assert windows.shape == (2 * 2 * 3, 4, 5)
    for b, row, column, y, x in np.ndindex(2, 2, 3, 2, 2):
        expected = grid[b, 2 * row + y, 2 * column + x]
        assert np.array_equal(windows[6 * b + 3 * row + column, 2 * y + x], expected)
    assert np.array_equal(from_windows(jnp.asarray(windows), 2, (4, 6)), grid)


def test_only_the_last_windows_are_divided():
    """On each axis a shifted window other than the last one is whole; the last one falls into the two edges."""
    allowed = np.asarray(together((4, 6), 2, 1)).reshape(2, 3, 4, 4)
    rows, columns = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    for row, column in np.ndindex(2, 3):
        expected = np.ones((4, 4), bool)
        if row == 1:
            expected &= rows[:, None] == rows
        if column == 2:
            expected &= columns[:, None] == columns
        assert np.array_equal(allowed[row, column], expected)


def test_a_smaller_window_reads_the_same_offsets():
    """Every pair's entry holds its offset, whatever the window: the row is that of the full table."""
    for window in (1, 2, 4):
        for i, j in np.ndindex(window**2, window**2):
            dy, dx = i // window - j // window, i % window - j % window
            assert offset_index(window, 4)[i, j] == (dy + 3) * 7 + dx + 3


# ---- precision, gradients, scan, remat -----------------------------------------------------------------------------


# A pair of blocks on a map that is padded in both directions, and its parameters.
PAIR = BlockPair(2, window_size=3, mlp_ratio=2.0)
RATES = np.zeros(2, np.float32)


@pytest.fixture(scope="module")
def pair(params):
    grid = np.random.default_rng(2).normal(size=(2, 4, 5, 8)).astype(np.float32)
    return {"params": jax.tree.map(lambda leaf: leaf[0], params["stage2"])}, grid


def test_bfloat16_follows_float32_with_a_float32_softmax(pair):
    plain = jit(PAIR.apply)(*pair, RATES)[0]
    lowered = jit(PAIR.clone(dtype=jnp.bfloat16).apply).lower(*pair, RATES)
    found = lowered.compile()(*pair, RATES)[0].astype(jnp.float32)
    # About 16 independent roundings of relative size 2^-9 in each of two blocks, of numbers that are at most a few
    # times as large as the result.
    assert np.sqrt(np.mean((found - plain) ** 2) / np.mean(plain**2)) < 4 * np.sqrt(32) * 2**-9
    exponentials = [line for line in lowered.as_text().split("\n") if ".exponential" in line]
    assert len(exponentials) == 2
    assert all("bf16" not in line for line in exponentials)


def test_gradients_are_finite_and_neither_remat_nor_chunks_change_them(pair):
    """In chunks of four, two of the four windows are taken at a time."""
    variables, grid = pair

    def loss(model, params, grid):
        return jnp.sum(jnp.sin(model.apply({"params": params}, grid, RATES)[0]))

    one, *others = (
        jit(jax.value_and_grad(functools.partial(loss, PAIR.clone(**changes)), (0, 1)))(variables["params"], grid)
        for changes in ({}, {"remat": "full"}, {"remat": "dots"}, {"window_chunk": 4})
    )
    rest = (jax.tree.leaves(other) for other in others)
    for (path, a), *b in zip(jax.tree_util.tree_leaves_with_path(one), *rest, strict=True):
        name = jax.tree_util.keystr(path)
        assert np.all(np.isfinite(a)), name
        assert np.any(a), name
        # A gradient sums over the 2 x 20 positions.
        for other in b:
            np.testing.assert_allclose(a, other, rtol=0, atol=40 * ROUNDING, err_msg=name)


def test_padded_groups_of_windows_change_nothing(params):
    """Seven windows by six, hence two groups of four, one of them padded: values and gradients, plain and shifted."""
    first = jax.tree.map(lambda leaf: leaf[0].astype(np.float64), params["stage2"]["shifted"]["attention"])
    grid = np.random.default_rng(3).normal(size=(2, 2, 20, 8))

    def loss(params, grid, shifted, chunk):
        attention = WindowAttention(2, 3, shifted, chunk=chunk, dtype=jnp.float64)
        return jnp.sum(jnp.sin(attention.apply({"params": params}, grid)))

    with jax.enable_x64(True):
        for shifted in (False, True):
            one, other = (
                jit(jax.value_and_grad(functools.partial(loss, shifted=shifted, chunk=chunk), (0, 1)))(first, grid)
                for chunk in (None, 12)
            )
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-11), one, other)


@pytest.mark.parametrize(
    ("windows", "most", "size"), [(120, 16, 15), (30, 8, 6), (9, 4, 3), (7, 6, 4), (4, 2, 2), (3, 9, 3)]
)
def test_groups_of_windows_divide_them_where_that_costs_little(windows, most, size):
    """Swin-L's four stages at 448 x 576, then a prime number, which is padded, and all at once."""
    assert group_size(windows, most) == size


@pytest.mark.eight_devices
def test_groups_of_windows_stay_where_their_images_are():
    """Of a batch over devices nothing is gathered or moved, and only gradients of parameters and bias are summed."""
    attention = WindowAttention(2, 3, True, chunk=4)
    mesh = make_mesh({"data": 8})
    grid = jax.ShapeDtypeStruct((8, 6, 12, 8), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data")))
    params = jax.eval_shape(attention.init, jax.random.key(0), grid)

    def loss(params, grid):
        return jnp.sum(jnp.sin(attention.apply(params, grid)))

    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss)).lower(params, grid).compile().as_text()
    assert " all-reduce" in program
    assert not [word for word in ("all-gather(", "all-to-all(", "collective-permute(") if word in program]
    in_groups = [line for line in program.splitlines() if " all-reduce(" in line and "while/body" in line]
    assert all(line.split(" = ")[1].startswith("f32[2,9,9]") for line in in_groups)


def test_remat_reaches_every_block(image, params):
    program = jax.make_jaxpr(TINY.clone(remat="full").apply)({"params": params}, image)
    assert str(program).count("remat2[") == 8  # two blocks in each of four scans


def test_layers_start_from_different_draws(image):
    def kernels(key):
        pairs = TINY.init(key, image)["params"]["stage2"]
        return [pairs[name]["mlp"]["hidden"]["kernel"][number] for name in pairs for number in (0, 1)]

    assert len({float(kernel[0, 0]) for kernel in jit(kernels)(jax.random.key(0))}) == 4


# ---- drop path -----------------------------------------------------------------------------------------------------


def test_drop_path_is_for_training_only(image, params):
    """The program of the evaluation knows nothing of it; at rate 0 nothing random is drawn in training either."""
    variables, dropping = {"params": params}, TINY.clone(drop_path=0.5)
    programs = [jit(lambda v, x, m=model: m.apply(v, x)).lower(variables, image) for model in (TINY, dropping)]
    assert programs[0].as_text() == programs[1].as_text()
    jax.eval_shape(lambda v: TINY.apply(v, image, train=True), variables)  # without a "drop_path" stream


def test_drop_path_is_seeded(pair):
    apply = jit(lambda key: PAIR.clone(train=True).apply(*pair, RATES + 0.5, rngs={"drop_path": key})[0])
    draws = [np.asarray(apply(jax.random.key(seed))) for seed in (0, 0, *range(1, 9))]
    assert np.array_equal(draws[0], draws[1])
    # Four branches of which each is kept or dropped: that nine draws agree has probability 2^-32.
    assert any(not np.array_equal(draws[0], other) for other in draws[2:])


def test_drop_rates_are_linear_over_all_blocks(image, params):
    """With every branch replaced by its rate and merging by the rates so far, the maps show the sums of the rates."""

    def replace(next_fun, args, kwargs, context):
        if context.method_name == "__call__" and isinstance(context.module, DropPath):
            return jnp.broadcast_to(jnp.asarray(args[1], args[0].dtype), args[0].shape)
        if context.method_name == "__call__" and context.module.name == "patch_norm":
            return jnp.zeros_like(args[0])
        if context.method_name == "__call__" and isinstance(context.module, PatchMerging):
            return jnp.repeat(args[0][:, ::2, ::2], 2, axis=-1)
        return next_fun(*args, **kwargs)

    def run(params, image):
        with nn.intercept_methods(replace):
            model = TINY.clone(drop_path=0.9, output_norms=False)
            return model.apply({"params": params}, image, train=True, rngs={"drop_path": jax.random.key(0)})

    found = jit(run)(params, image)
    sums = np.cumsum(2 * np.arange(10) / 10)  # ten blocks: 0, 0.1, ..., 0.9, each on two branches
    for stride, last in zip(Swin.strides, np.cumsum(TINY.depths) - 1, strict=True):
        np.testing.assert_allclose(found[stride], sums[last], rtol=0, atol=64 * EPS32)
