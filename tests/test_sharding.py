"""The mesh and its rules: where every leaf lies, what it costs a device, and when activations are pinned."""

import functools
import json
from types import SimpleNamespace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from sgw_jax import sharding
from sgw_jax.backbones.vit import ViT
from sgw_jax.experiment.build import build
from sgw_jax.experiment.config_files import read_config
from sgw_jax.interactions import KEM
from sgw_jax.model import MultiTaskModel
from sgw_jax.run.state import abstract_state
from sgw_jax.sharding import (
    batch_sharding,
    check_batch,
    check_rows,
    check_split,
    constrain_activations,
    global_batch,
    make_mesh,
    mesh_sizes,
    own_rows,
    path_name,
    read_rules,
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
        ({"data": 8}, (8, 1, 1)),
        ({"data": -1}, (8, 1, 1)),
        ({"fsdp": -1}, (1, 8, 1)),
        ({"data": 2, "fsdp": -1}, (2, 4, 1)),
        ({"data": -1, "fsdp": 8}, (1, 8, 1)),
        ({"fsdp": 2, "data": 4}, (4, 2, 1)),
        ({"fsdp": -1, "context": 2}, (1, 4, 2)),
    ],
)
def test_mesh_sizes(sizes, shape):
    mesh = make_mesh(sizes)
    assert mesh.axis_names == sharding.AXES
    assert mesh.devices.shape == shape
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_mesh_of_some_devices():
    assert make_mesh({"data": -1}, jax.devices()[:3]).devices.shape == (3, 1, 1)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"data": 2, "model": 4}, r"unknown axis \['model'\]; the axes are \['data', 'fsdp', 'context'\]"),
        ({"data": -1, "fsdp": -1}, "at most one -1"),
        ({"data": 0}, "must be positive"),
        ({"data": -2}, "must be positive"),
        ({"data": -1, "fsdp": 3}, r"8 devices do not divide by 3 .* one of \[1, 2, 4, 8\]"),
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


def test_check_batch():
    mesh = make_mesh({"data": 4, "fsdp": 2})
    check_batch(16, mesh)
    check_batch(32, mesh, accumulate=4)
    with pytest.raises(ValueError, match=r"batch_size 16 must divide by 8 devices \(data x fsdp\) x 4 .* = 32"):
        check_batch(16, mesh, accumulate=4)


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


def test_constrain_activations_pins_rows_inside_our_mesh_alone():
    x = jnp.ones((16, 6, 2))
    assert constraints(constrain_activations, x) == []  # no mesh
    with jax.set_mesh(make_mesh({"data": 2, "fsdp": 4})):
        assert constraints(constrain_activations, x) == [P(sharding.BATCH)]
        gradient = jax.grad(lambda y: jnp.sum(constrain_activations(y) ** 2))
        assert constraints(gradient, x) == [P(sharding.BATCH)] * 2
        assert constraints(constrain_activations, x[:3]) == []  # rows that do not divide: a single image, say
        per_example = constraints(jax.vmap(lambda row: constrain_activations(row[None])[0]), x)
        assert per_example == []
    with jax.set_mesh(make_mesh({"data": 2, "context": 4})):
        assert constraints(constrain_activations, x) == [P(sharding.BATCH, "context")]  # 6 over 4: padded
        assert constraints(constrain_activations, x[:, :3]) == [P(sharding.BATCH)]  # fewer than the devices
        assert constraints(constrain_activations, x[:, 0]) == [P(sharding.BATCH)]
    with jax.set_mesh(jax.make_mesh((8,), ("model",), axis_types=(AxisType.Auto,))):
        assert constraints(constrain_activations, x) == []
    with jax.set_mesh(jax.make_mesh((2, 2, 2), sharding.AXES, axis_types=(AxisType.Explicit,) * 3)):
        assert constraints(constrain_activations, x) == []


def test_constrain_activations_is_silent_inside_shard_map_and_pmap():
    x = jnp.arange(128.0).reshape(64, 2)  # 8 rows a device, which would divide once more
    mesh = make_mesh({"data": 2, "fsdp": 4})
    rows = P(sharding.BATCH)
    with jax.set_mesh(mesh):
        mapped = jax.shard_map(lambda y: 2 * constrain_activations(y), in_specs=rows, out_specs=rows)
        assert constraints(mapped, x) == []
        assert np.array_equal(jit(mapped)(x), 2 * x)
        assert np.array_equal(jit(constrain_activations)(x), x)
    over_devices = jax.pmap(lambda y: 2 * constrain_activations(y))
    assert np.array_equal(over_devices(x.reshape(8, 8, 2)).reshape(64, 2), 2 * x)


# ---- named meshes, and what a start refuses -------------------------------------------------------------------------


@pytest.mark.parametrize("name", sharding.MESHES)
def test_named_meshes(name):
    sizes = mesh_sizes(name)
    assert set(sizes) <= set(sharding.AXES)
    assert list(sizes.values()).count(-1) == 1
    fixed = [size for size in sizes.values() if size != -1]
    if np.prod(fixed, initial=1) <= 8:
        assert make_mesh(sizes).size == 8


def test_sizes_replace_those_of_the_named_mesh():
    assert mesh_sizes() == {"data": -1}
    assert mesh_sizes("data_fsdp4", fsdp=2, context=None) == {"data": -1, "fsdp": 2}
    with pytest.raises(ValueError, match=r"mesh: 'pod' is not known; it must be one of \['data', 'fsdp'"):
        mesh_sizes("pod")


def test_the_smallest_leaves_are_repeated_up_to_a_hundredth():
    sizes = {"kernel": (64, 128), "bias": (64,), "norm": (16,)}
    tree = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in sizes.items()}
    found = state_sharding(tree, make_mesh({"fsdp": 8}))
    assert {name: place.spec for name, place in found.items()} == {"kernel": P(None, "fsdp"), "bias": P(), "norm": P()}
    tree["bias"] = jax.ShapeDtypeStruct((80,), jnp.float32)  # 96 of 8288: more than a hundredth
    assert state_sharding(tree, make_mesh({"fsdp": 8}))["bias"].spec == P("fsdp")


def test_a_start_over_parameters_that_do_not_split_is_refused():
    tree = {"wide": jax.ShapeDtypeStruct((6, 90), jnp.float32), "rest": jax.ShapeDtypeStruct((64, 80), jnp.float32)}

    def check(sizes):
        mesh = make_mesh(sizes)
        check_split(tree, state_sharding(tree, mesh), mesh)

    check({"data": 8})
    check({"data": 4, "fsdp": 2})
    with pytest.raises(ValueError, match=r"fsdp = 4, 9\.5% of the .* wide \(6, 90\)\. .* do divide: \[1, 2\]"):
        check({"data": 2, "fsdp": 4})


def test_check_rows():
    check_rows(64, (4, 8), make_mesh({"data": 2, "context": 4}))
    with pytest.raises(ValueError, match=r"context = 4 .* \{4: 15\} by stride, .* 60\. .* that do: \[1\]"):
        check_rows(60, (4,), make_mesh({"data": 2, "context": 4}))


class Device(NamedTuple):
    process_index: int


@pytest.mark.parametrize(
    ("shape", "per_process", "blocks"),
    [
        ((4, 1, 1), 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ((2, 1, 2), 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # a context within a process
        ((2, 1, 4), 2, [(0, 2)] * 4 + [(1, 2)] * 4),  # over two
        ((1, 1, 8), 4, [(0, 1)] * 8),
        ((2, 2, 1), 4, [(0, 1)] * 4),
    ],
)
def test_processes_that_share_rows_read_the_same(monkeypatch, shape, per_process, blocks):
    number = int(np.prod(shape))
    devices = np.empty(number, object)
    devices[:] = [Device(i // per_process) for i in range(number)]
    mesh = SimpleNamespace(devices=devices.reshape(shape), shape=dict(zip(sharding.AXES, shape, strict=True)))
    for i, expected in enumerate(blocks):
        monkeypatch.setattr(jax, "process_index", lambda i=i: i // per_process)
        assert own_rows(mesh) == expected


def test_processes_that_share_some_rows_are_refused():
    devices = np.empty(6, object)
    devices[:] = [Device(i // 2) for i in range(6)]
    mesh = SimpleNamespace(devices=devices.reshape(2, 1, 3), shape={"data": 2, "fsdp": 1, "context": 3})
    with pytest.raises(ValueError, match="3 devices of a context lie on processes that share"):
        own_rows(mesh)


# ---- rules of a configuration ---------------------------------------------------------------------------------------

RULED = """
from sgw_jax.configs import base


def get_config():
    config = base.get_config()
    config.tasks = ("depth",)
    config.backbones.vit.update({"width": 16, "depth": 4, "num_heads": 2, "patch_size": 8})
    config.channels, config.ema_decay = 8, 0.9
    config.mesh.name = "fsdp"
    config.mesh.rules = (("backbone/blocks/mlp/hidden/kernel", (None, "fsdp")), ("interaction/slots", ()))
    return config
"""


def test_a_configuration_places_a_parameter(tmp_path):
    """Its average and its moments too; what no rule names lies where the mesh puts it. A run may go on under others."""
    file = tmp_path / "ruled.py"
    file.write_text(RULED, encoding="utf-8")
    config = read_config(str(file))
    found, plain = build(config, None), build(read_config(str(file), ["--config.mesh.rules=None"]), None)
    state, other = abstract_state(found), abstract_state(plain)
    wanted = {"backbone/blocks/mlp/hidden/kernel": P(None, "fsdp"), "interaction/slots": P()}
    ruled = 0
    for (path, leaf), before in zip(jax.tree_util.tree_leaves_with_path(state), jax.tree.leaves(other), strict=True):
        spec = next((spec for name, spec in wanted.items() if path_name(path).endswith(name)), before.sharding.spec)
        assert leaf.sharding.spec == spec, path_name(path)
        ruled += leaf.sharding.spec != before.sharding.spec
    assert ruled >= 4  # parameter, average, two moments
    assert found.identity() == plain.identity()
    again = ConfigDict(json.loads(config.to_json()))  # as a checkpoint holds it
    assert build(again, None).rules == found.rules
    with pytest.raises(
        ValueError, match=r"mesh.rules=fsdp: expected what only a file can set, a tuple of pairs, or None"
    ):
        read_config("scenes", ["--config.mesh.rules=fsdp"])


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ("kernel", "rules are 'kernel'; give a tuple of pairs"),
        (("kernel", ("fsdp",)), "the rule 'kernel' is no pair"),
        ([("kernel", "fsdp")], "the rule .* is no pair"),
        ([("(", ("fsdp",))], r"the pattern '\(' of a rule is no regular expression"),
        ([("kernel", None)], "the axes of the rule 'kernel' are None; give a tuple"),
        ([("kernel", ("model",))], r"names the axes \['model'\]; they must be of \['data', 'fsdp', 'context'\]"),
        ([("kernel", (3,))], r"names the axes \[3\]"),
        ([("kernel", (("data", "fsdp"), "fsdp"))], "each at most once"),
    ],
)
def test_what_is_no_rule_is_refused(rules, message):
    with pytest.raises(ValueError, match=message):
        read_rules(rules)


def test_a_rule_that_matches_nothing_is_refused():
    with pytest.raises(ValueError, match=r"no leaf's path matches the rule 'kernle'; they are like a/kernel"):
        state_sharding({"a": {"kernel": jnp.zeros((16, 9))}}, make_mesh({"fsdp": 8}), [("kernle", P())])
