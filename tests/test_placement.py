"""Slots that retrieve from tokens on several devices: the numbers of one device, and nothing exchanged that grows."""

import re
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from sgw_jax.functional.tokens import concatenate_tasks, split_tasks
from sgw_jax.interactions import KEM, CrossTaskAttention
from sgw_jax.interactions.shared_workspace import WorkspaceInteraction
from sgw_jax.layers.placement import Placement
from sgw_jax.layers.topk_attention import topk_attention
from sgw_jax.sharding import BATCH, CONTEXT, make_mesh

PLACEMENT = Placement(BATCH, CONTEXT)
SIZES = ({"data": 8}, {"context": 8}, {"data": 2, "fsdp": 2, "context": 2}, {"fsdp": 2, "context": 4})
COLLECTIVE = re.compile(r"= (.*?) (all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def maps(channels=8, batch=8, rows=(16, 8)):
    """Two tasks; the second on a coarser grid."""
    keys = jax.random.split(jax.random.key(1), len(rows))
    names = ("a_fine", "b_coarse")  # in the order of their names: jit sorts them
    shapes = [(batch, height, 6, channels) for height in rows]
    return {name: jax.random.normal(key, shape) for name, key, shape in zip(names, keys, shapes, strict=True)}


def on_mesh(mesh, features):
    return jax.device_put(features, NamedSharding(mesh, P(BATCH, CONTEXT)))


# ---- the attention -------------------------------------------------------------------------------------------------


def inputs(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = ((4, 3, 2, 5), (4, 64, 2, 5), (4, 64, 2, 7))
    return [jax.random.normal(key, shape, dtype) for key, shape in zip(keys, shapes, strict=True)]


def attend(top_k, over, placement, *args):
    output, weights, index = topk_attention(*args, top_k, normalise_over=over, placement=placement)
    return output, weights, jnp.zeros(()) if index is None else index


@pytest.mark.parametrize("over", ["kept", pytest.param("all", marks=pytest.mark.slow)])
# 20: more than a shard's tokens on 4 and 8 shards.
@pytest.mark.parametrize("top_k", [*(pytest.param(top_k, marks=pytest.mark.slow) for top_k in (1, 5)), 20, None])
def test_attention_over_shards_is_that_of_one_device(top_k, over):
    args = inputs()

    def loss(placement, *args):
        output, weights, _ = attend(top_k, over, placement, *args)
        return jnp.sum(jnp.sin(output)) + jnp.sum(weights**2)

    expected = attend(top_k, over, None, *args)
    gradient = jax.grad(loss, argnums=(1, 2, 3))(None, *args)
    for sizes in SIZES[1:]:
        with jax.set_mesh(make_mesh(sizes)):
            found = jax.jit(attend, static_argnums=(0, 1, 2))(top_k, over, PLACEMENT, *args)
            slopes = jax.jit(jax.grad(loss, argnums=(1, 2, 3)), static_argnums=0)(PLACEMENT, *args)
        # Sums of at most 64 terms in another order: 64 roundings of 6e-8 of values up to 4.
        chex.assert_trees_all_close(found, expected, atol=2e-5, rtol=1e-5)
        chex.assert_trees_all_close(slopes, gradient, atol=2e-5, rtol=1e-5)


def test_ties_go_to_the_lowest_index_of_all_shards():
    query, key, value = inputs()
    tied = jnp.zeros_like(key).at[:, 40:48].set(1.0)  # eight best, in shard 5 of 8
    spread = (3, 21, 22, 38, 47, 60)  # six best, in five shards
    some = jnp.ones_like(query)
    cases = [(jnp.zeros_like(key), range(5)), (tied, range(40, 45))]
    cases.append((jnp.zeros_like(key).at[:, spread, :].set(1.0), spread[:5]))
    for keys, expected in cases:
        with jax.set_mesh(make_mesh({"context": 8})):
            _, _, index = jax.jit(lambda *args: topk_attention(*args, 5, placement=PLACEMENT))(some, keys, value)
        assert np.array_equal(np.sort(index, -1), np.broadcast_to(list(expected), index.shape))


def test_a_nan_is_not_lost():
    query, key, value = inputs()
    with jax.set_mesh(make_mesh({"context": 8})):
        args = query, key.at[0, 17].set(jnp.nan), value
        output = jax.jit(lambda *args: topk_attention(*args, 5, placement=PLACEMENT)[0])(*args)
    assert np.all(np.isnan(output[0]))
    assert np.all(np.isfinite(output[1:]))


def test_tokens_that_do_not_divide_are_refused():
    query, key, value = inputs()
    with jax.set_mesh(make_mesh({"context": 8})), pytest.raises(ValueError, match="63 tokens do not divide over 8"):
        topk_attention(query, key[:, 1:], value[:, 1:], 5, placement=PLACEMENT)


def test_approximate_selection_is_exact_off_tpus():
    query, key, value = inputs()
    exact, approximate = (topk_attention(query, key, value, 5, recall=recall) for recall in (None, 0.9))
    for one, other in zip(exact[:2], approximate[:2], strict=True):
        np.testing.assert_allclose(np.sort(one, -1), np.sort(other, -1), rtol=1e-6)


# ---- where a placement finds no mesh --------------------------------------------------------------------------------


def test_a_placement_without_its_mesh_changes_nothing():
    features = maps()
    plain = KEM(3, top_k=4)
    placed = KEM(3, top_k=4, placement=PLACEMENT)
    variables = plain.init(jax.random.key(0), features)
    expected = plain.apply(variables, features)
    chex.assert_trees_all_equal(placed.apply(variables, features), expected)  # no mesh
    with jax.set_mesh(make_mesh({"data": 1}, jax.devices()[:1])):
        chex.assert_trees_all_equal(placed.apply(variables, features), expected)  # one device
    other = jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))
    anywhere = placed.copy(placement=Placement(BATCH, CONTEXT, strict=False))
    with jax.set_mesh(other):
        chex.assert_trees_all_close(jax.jit(anywhere.apply)(variables, features), expected, atol=1e-5)
        with pytest.raises(ValueError, match=r"no axis 'data', 'fsdp', 'context'; its axes are \('model',\)"):
            jax.eval_shape(placed.apply, variables, features)
    mesh = make_mesh({"data": 8})
    one = jax.tree.map(lambda x: x[:1], features)  # a single image on many devices
    with jax.set_mesh(mesh):
        found = jax.jit(placed.apply)(variables, one)
    chex.assert_trees_all_close(found, jax.tree.map(lambda x: x[:1], expected), atol=1e-5)
    rows = P("data")
    with jax.set_mesh(mesh):  # already shard by shard
        inside = jax.shard_map(lambda f: placed.apply(variables, f), in_specs=rows, out_specs=rows)
        chex.assert_trees_all_close(jax.jit(inside)(features), expected, atol=1e-5)


def test_a_placement_that_cannot_be_is_refused():
    mesh = jax.make_mesh((2, 4), ("rows", "model"), axis_types=(AxisType.Auto,) * 2)
    with pytest.raises(ValueError, match=r"no axis 'nope'; its axes are \('rows', 'model'\)"):
        Placement(batch=("nope",), mesh=mesh)
    with pytest.raises(ValueError, match=r"batch is 'data' .* give a tuple"):
        Placement(batch="data")
    with pytest.raises(ValueError, match="another axis, or None, for the tokens"):
        Placement(batch=("data",), tokens="data")


def test_the_snippet_of_the_page_runs():
    text = (Path(__file__).parent.parent / "docs" / "scaling.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names = {}
    exec(snippet, names)
    with jax.set_mesh(names["mesh"]):
        assert names["kem"].placement.shards() == 4


def test_a_mesh_as_an_argument_needs_none_in_force():
    features = maps()
    mesh = jax.make_mesh((2, 4), ("rows", "model"), axis_types=(AxisType.Auto,) * 2)
    placed = KEM(3, top_k=4, placement=Placement(batch=(), tokens="rows", mesh=mesh))
    variables = placed.init(jax.random.key(0), features)
    expected = KEM(3, top_k=4).apply(variables, features)
    chex.assert_trees_all_close(jax.jit(placed.apply)(variables, features), expected, atol=1e-5)
    assert COLLECTIVE.search(jax.jit(placed.apply).lower(variables, features).compile().as_text())


# ---- the modules ---------------------------------------------------------------------------------------------------

MODULES = {
    "kem": (KEM, {"num_slots": 5, "num_heads": 2, "top_k": 4}),
    "softmax": (KEM, {"num_slots": 5, "top_k": None}),
    "many": (KEM, {"num_slots": 5, "top_k": 40}),
    "skem": (KEM, {"num_slots": 5, "top_k": 4, "etf_vertices": 9, "task_embedding": True, "task_gate": True}),
    "balanced": (KEM, {"num_slots": 3, "top_k": 4, "balanced": True, "slot_exchange": True, "pair_gate": True}),
    "balanced softmax": (KEM, {"num_slots": 3, "top_k": None, "balanced": True}),
    "rounds": (KEM, {"num_slots": 5, "top_k": 4, "rounds": 2, "pre_norm": True}),
    "unfolded": (KEM, {"num_slots": 5, "num_heads": 8, "top_k": 4, "etf_vertices": 9}),
    "workspace": (WorkspaceInteraction, {"num_slots": 5, "num_heads": 2, "top_k": 4}),
}


@pytest.mark.parametrize(
    "name", ["kem", *(pytest.param(name, marks=pytest.mark.slow) for name in MODULES if name != "kem")]
)
def test_modules_over_shards_are_those_of_one_device(name):
    """Values and gradients in float64, where only a different selection could make a difference of 1e-9."""
    make, options = MODULES[name]
    with jax.enable_x64(True):
        features = jax.tree.map(lambda x: x.astype(jnp.float64), maps())
        plain = make(**options, dtype=jnp.float64)
        placed = make(**options, dtype=jnp.float64, placement=PLACEMENT)
        variables = jax.tree.map(lambda x: x.astype(jnp.float64), plain.init(jax.random.key(0), features))
        # Gates and embeddings start equal: make every token and task count.
        leaves, treedef = jax.tree.flatten(variables["params"])
        keys = jax.random.split(jax.random.key(2), len(leaves))
        leaves = [x + 0.3 * jax.random.normal(key, x.shape, x.dtype) for x, key in zip(leaves, keys, strict=True)]
        params = jax.tree.unflatten(treedef, leaves)

        def loss(params, features, module):
            found, slots = module.apply({**variables, "params": params}, features, None, True)
            return sum(jnp.sum(jnp.sin(x)) for x in found.values()) + jnp.sum(slots**2), (found, slots)

        slope = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True), static_argnums=2)
        expected = slope(params, features, plain)
        for sizes in SIZES[1:3]:
            mesh = make_mesh(sizes)
            with jax.set_mesh(mesh):
                found = slope(params, on_mesh(mesh, features), placed)
            chex.assert_trees_all_close(found, expected, atol=1e-9, rtol=1e-9)


def test_bfloat16_scores_have_one_backward_pass_over_shards_or_not():
    """The rule for narrow products inside a shard_map sums over shards what one device sums. Either is float32's
    gradient up to four roundings (weights, output, slope of the scores, result), 2^-9 each, of the largest entry."""
    rng = np.random.default_rng(0)
    query, key = (jnp.asarray(rng.normal(size=(4, n, 2, 8)), jnp.bfloat16) for n in (3, 16))

    def loss(query, key, value, placement):
        return jnp.sum(jnp.sin(topk_attention(query, key, value, None, placement=placement)[0].astype(jnp.float32)))

    slope = jax.jit(jax.grad(loss, argnums=(0, 1, 2)), static_argnums=3)
    exact = slope(*(x.astype(jnp.float32) for x in (query, key, key)), None)
    mesh = make_mesh(SIZES[1])
    with jax.set_mesh(mesh):
        over_shards = slope(query, key, key, PLACEMENT)
    for found in (slope(query, key, key, None), over_shards):
        for one, other in zip(found, exact, strict=True):
            np.testing.assert_allclose(np.asarray(one, np.float32), other, rtol=0, atol=2**-7 * np.abs(other).max())


@pytest.mark.parametrize(("tied", "top_k"), [(False, 4), (True, 30)])
def test_what_is_recorded_is_in_the_order_of_one_device(tied, top_k):
    """Where all tokens are equal, too: the first 30 of the whole sequence are rows of the first task, on two devices,
    the first of which also holds rows of the second task, equal to them and later in the sequence."""
    features = jax.tree.map(jnp.ones_like, maps()) if tied else maps()
    plain, placed = KEM(3, top_k=top_k), KEM(3, top_k=top_k, placement=PLACEMENT)
    variables = plain.init(jax.random.key(0), features)
    record = {"mutable": ["intermediates"]}
    _, expected = plain.apply(variables, features, **record)
    with jax.set_mesh(make_mesh({"data": 2, "context": 4})):
        _, found = jax.jit(lambda v, f: placed.apply(v, f, **record))(variables, features)
    chex.assert_trees_all_close(found, expected, atol=1e-5)


@pytest.mark.parametrize("parts", [1, 2, 4])
def test_parts_of_the_sequence(parts):
    features = maps()
    tokens, layout = concatenate_tasks(features, "test", parts)
    whole, _ = concatenate_tasks(features, "test")
    assert np.array_equal(layout.by_index(tokens, 1), whole)
    chex.assert_trees_all_equal(split_tasks(tokens, layout), features)
    rows = [tokens.shape[1] // parts * part for part in range(parts)]
    assert np.array_equal(tokens[:, rows[-1]], features["a_fine"][:, 16 // parts * (parts - 1), 0])


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match=r"KEM: the map of b_coarse has 6 rows, which 4 parts .* do not divide"):
        concatenate_tasks(maps(rows=(16, 6)), "KEM", 4)


# ---- what is exchanged ---------------------------------------------------------------------------------------------

BYTES = {"f32": 4, "s32": 4, "u32": 4, "pred": 1, "bf16": 2, "f64": 8, "s64": 8}


def exchanged(module, tokens, mesh, batch=2, channels=16):
    """Bytes of every collective of a forward and backward pass, largest first."""
    shape = jax.ShapeDtypeStruct(
        (batch, tokens // 64, 32, channels), jnp.float32, sharding=NamedSharding(mesh, P(BATCH, CONTEXT))
    )
    features = {"a": shape, "b": shape}  # 32 + 32 tokens a row
    variables = jax.eval_shape(module.init, jax.random.key(0), features)

    def loss(params, features):
        return sum(jnp.sum(x**2) for x in module.apply({**variables, "params": params}, features).values())

    with jax.set_mesh(mesh):
        program = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(variables["params"], features).compile().as_text()
    sizes = []
    for shapes, _ in COLLECTIVE.findall(program):
        found = re.findall(r"(\w+)\[([\d,]*)\]", shapes)
        sizes.append(sum(BYTES[kind] * int(np.prod([int(n) for n in dims.split(",") if n])) for kind, dims in found))
    return sorted(sizes, reverse=True)


@pytest.mark.parametrize("sizes", [{"context": 8}, pytest.param({"data": 2, "context": 4}, marks=pytest.mark.slow)])
def test_what_kem_exchanges_does_not_grow_with_tokens(sizes):
    mesh = make_mesh(sizes)
    options = {"num_slots": 8, "top_k": 16}
    kem = KEM(**options, placement=PLACEMENT)
    small, large = (exchanged(kem, tokens, mesh) for tokens in (4_096, 262_144))
    assert small == large
    candidates = 2 * 2 * 8 * 16 * mesh.shape["context"] * 4  # scores and indices of 2 images, 8 slots, k of each shard
    parameters = 4 * (6 * 16 * 16 + 8 * 16)  # their gradients
    assert sum(large) <= 4 * (candidates + parameters)
    alone = [exchanged(KEM(**options), tokens, mesh)[0] for tokens in (4_096, 65_536)]
    assert alone[1] > 10 * alone[0]  # what the partitioner does without a placement


def test_dense_cross_attention_gathers_all_tokens():
    mesh = make_mesh({"context": 8})
    small, large = (sum(exchanged(CrossTaskAttention(query_chunk=None), tokens, mesh)) for tokens in (1_024, 4_096))
    assert large > 3.5 * small


def test_a_split_batch_is_not_gathered_either():
    """Off TPUs the partitioner gathers the scores of the whole batch before top_k."""
    mesh = make_mesh({"data": 8})
    scores = 8 * 8 * 4_096 * 4
    assert max(exchanged(KEM(8, top_k=16, placement=PLACEMENT), 4_096, mesh, batch=8)) < scores / 50
