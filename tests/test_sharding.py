"""The mesh and its rules: where every leaf lies, what it costs a device, and when activations are pinned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sgw_jax import sharding
from sgw_jax.backbones.vit import ViT
from sgw_jax.interactions import KEM
from sgw_jax.model import MultiTaskModel
from sgw_jax.sharding import (
    batch_sharding,
    check_batch_size,
    constrain_batch,
    global_batch,
    make_mesh,
    path_name,
    replicated,
    state_sharding,
)
from sgw_jax.tasks import Depth
from sgw_jax.train_step import init_state

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})


# ---- the mesh ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ({"data": 8}, (8, 1)),
        ({"data": -1}, (8, 1)),
        ({"fsdp": -1}, (1, 8)),
        ({"data": 2, "fsdp": -1}, (2, 4)),
        ({"data": -1, "fsdp": 8}, (1, 8)),
        ({"fsdp": 2, "data": 4}, (4, 2)),
    ],
)
def test_mesh_sizes(sizes, shape):
    mesh = make_mesh(sizes)
    assert mesh.axis_names == ("data", "fsdp")
    assert mesh.devices.shape == shape
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_mesh_of_some_devices():
    assert make_mesh({"data": -1}, jax.devices()[:3]).devices.shape == (3, 1)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 2, "model": 4}, r"unknown axis \['model'\]; the axes are \['data', 'fsdp'\]"),
        ({"data": -1, "fsdp": -1}, "at most one -1"),
        ({"data": 0}, "must be positive"),
        ({"data": -2}, "must be positive"),
        ({"data": -1, "fsdp": 3}, "8 devices do not divide by 3"),
        ({"data": 3}, "need 3 devices, but there are 8"),
        ({}, "need 1 devices, but there are 8"),
    ],
)
def test_mesh_errors(sizes, message):
    with pytest.raises(ValueError, match=message):
        make_mesh(sizes)


# ---- the state -----------------------------------------------------------------------------------------------------


def spec_of(shape, sizes, rules=(), min_size=1):
    (found,) = state_sharding([jax.ShapeDtypeStruct(shape, jnp.float32)], make_mesh(sizes), rules, min_size)
    return found.spec


@pytest.mark.parametrize(
    ("shape", "fsdp", "spec"),
    [
        ((16, 24), 8, P(None, "fsdp")),  # the largest that divides
        ((24, 16), 8, P("fsdp")),
        ((16, 16), 8, P(None, "fsdp")),  # a tie goes to the last
        ((100, 8), 8, P(None, "fsdp")),  # the largest does not divide
        ((3, 3, 64, 32), 8, P(None, None, "fsdp")),
        ((7, 9), 8, P()),  # none divides
        ((), 8, P()),
        ((16, 16), 1, P()),  # nothing to split over
    ],
)
def test_fsdp_splits_the_largest_axis_that_divides(shape, fsdp, spec):
    assert spec_of(shape, {"data": -1, "fsdp": fsdp}) == spec


def test_small_leaves_are_repeated():
    assert spec_of((8, 8), {"fsdp": 8}, min_size=65) == P()
    assert spec_of((8, 8), {"fsdp": 8}, min_size=64) == P(None, "fsdp")


def test_the_first_rule_that_matches_decides():
    kernel = jnp.zeros((16, 24))
    tree = {"backbone": {"kernel": kernel, "bias": jnp.zeros((16,))}, "head": {"kernel": kernel}}
    rules = [("backbone/.*kernel", P("fsdp")), ("backbone", P()), ("head", P(("data", "fsdp"), None))]
    found = state_sharding(tree, make_mesh({"data": 2, "fsdp": 4}), rules, min_size=1)
    assert found["backbone"]["kernel"].spec == P("fsdp")
    assert found["backbone"]["bias"].spec == P()
    assert found["head"]["kernel"].spec == P(("data", "fsdp"), None)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (P(None, "fsdp"), r"a/kernel has shape \(16, 9\), which the rule .* cannot split into 8 parts"),
        (P(None, None, "fsdp"), r"a/kernel has shape \(16, 9\), which has fewer axes"),
        (P("model"), r"for a/kernel names \['model'\]"),
    ],
)
def test_rules_that_do_not_fit_are_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        state_sharding({"a": {"kernel": jnp.zeros((16, 9))}}, make_mesh({"fsdp": 8}), [("kernel", spec)])


def test_path_name():
    leaves = jax.tree_util.tree_leaves_with_path({"a": [{"b": 1}]})
    assert [path_name(path) for path, _ in leaves] == ["a/0/b"]


def test_a_sharded_state_costs_each_device_an_eighth():
    """Parameters and both moments of AdamW are born split; only leaves that no axis of which divides are repeated."""
    model = MultiTaskModel((Depth(),), ViT(32, 64, 4, 4, image_size=(32, 32)), KEM(8, etf_vertices=9), channels=16)
    mesh = make_mesh({"fsdp": 8})

    def make():
        return init_state(model, optax.adamw(1e-3), jnp.zeros((8, 32, 32, 3)))

    shardings = state_sharding(jax.eval_shape(make), mesh, min_size=64)
    with jax.set_mesh(mesh):
        state = jit(make, out_shardings=shardings)()
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    held = dict.fromkeys(mesh.devices.flat, 0)
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert max(held.values()) < 1.05 * total / 8
    assert max(held.values()) == min(held.values())
    assert state.params["backbone"]["blocks"]["mlp"]["hidden"]["kernel"].sharding.spec == P(None, None, "fsdp")
    moments = state.opt_state[0].mu["backbone"]["blocks"]["mlp"]["hidden"]["kernel"]
    assert moments.sharding.spec == P(None, None, "fsdp")


# ---- the batch -----------------------------------------------------------------------------------------------------


def test_check_batch_size():
    mesh = make_mesh({"data": 4, "fsdp": 2})
    check_batch_size(16, mesh)
    check_batch_size(32, mesh, accumulate=4)
    with pytest.raises(ValueError, match=r"batch_size 16 must divide by 8 devices x 4 .* = 32"):
        check_batch_size(16, mesh, accumulate=4)


def test_global_batch_splits_rows_over_both_axes():
    batch = {"image": np.arange(16 * 2).reshape(16, 2), "depth": np.arange(16.0)}
    mesh = make_mesh({"data": 2, "fsdp": 4})
    placed = global_batch(batch, mesh)
    for name, value in batch.items():
        assert np.array_equal(placed[name], value)
        assert placed[name].sharding == batch_sharding(mesh)
        assert {shard.data.shape[0] for shard in placed[name].addressable_shards} == {2}
    assert jax.device_put(jnp.ones(3), replicated(mesh)).addressable_shards[7].data.shape == (3,)


def constraints(function, *args):
    """Specs of the sharding constraints in the function's program."""
    found = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "sharding_constraint":
                found.append(equation.params["sharding"].spec)
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                walk(getattr(inner, "jaxpr", inner)) if hasattr(inner, "eqns") or hasattr(inner, "jaxpr") else None

    walk(jax.make_jaxpr(function)(*args).jaxpr)
    return found


def test_constrain_batch_pins_rows_inside_our_mesh_alone():
    x = jnp.ones((16, 3, 2))
    assert constraints(constrain_batch, x) == []  # no mesh
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 4})):
        assert constraints(constrain_batch, x) == [P(sharding.AXES)]
        assert constraints(jax.grad(lambda y: jnp.sum(constrain_batch(y) ** 2)), x) == [P(sharding.AXES)] * 2
        assert constraints(constrain_batch, x[:3]) == []  # rows that do not divide: a single image, say
        per_example = constraints(jax.vmap(lambda row: constrain_batch(row[None])[0]), x)
        assert per_example == []
    with jax.set_mesh(jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))):
        assert constraints(constrain_batch, x) == []
    with jax.set_mesh(jax.make_mesh((2, 4), sharding.AXES, axis_types=(AxisType.Explicit,) * 2)):
        assert constraints(constrain_batch, x) == []


def test_constrain_batch_is_silent_inside_shard_map_and_pmap():
    x = jnp.arange(128.0).reshape(64, 2)  # 8 rows a device, which would divide once more
    mesh = make_mesh({"data": 2, "fsdp": 4})
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(lambda y: 2 * constrain_batch(y), in_specs=P(sharding.AXES), out_specs=P(sharding.AXES))
        assert constraints(mapped, x) == []
        assert np.array_equal(jit(mapped)(x), 2 * x)
        assert np.array_equal(jit(constrain_batch)(x), x)
    over_devices = jax.pmap(lambda y: 2 * constrain_batch(y))
    assert np.array_equal(over_devices(x.reshape(8, 8, 2)).reshape(64, 2), 2 * x)
