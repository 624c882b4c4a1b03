"""The nnx modules: linen's numbers on the same parameters, and what NNX does with modules."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import sgw_jax
from sgw_jax.nnx import KEM, CrossTaskAttention, SharedWorkspace, SimplexETF, from_linen, to_linen

EPS = float(np.finfo(np.float32).eps)
C = 16
TASKS = ("one", "two")


def maps(batch=2, size=3):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=(batch, size, size, C)), jnp.float32) for name in TASKS}


def tokens():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, C)), jnp.float32)


ALL = {"num_heads": 2, "pre_norm": True, "task_embedding": True, "task_gate": True, "rounds": 2}
BY_TASK = {"balanced": True, "slot_exchange": True, "pair_gate": True}
PAIRS = {  # linen, nnx, an input
    "kem": (sgw_jax.KEM(4, top_k=3), lambda r: KEM(C, 4, top_k=3, rngs=r), maps),
    "kem, all options": (
        sgw_jax.KEM(4, top_k=3, **ALL),
        lambda r: KEM(C, 4, top_k=3, tasks=TASKS, rngs=r, **ALL),
        maps,
    ),
    "kem, by pairs": (
        sgw_jax.KEM(4, top_k=3, **BY_TASK),
        lambda r: KEM(C, 4, top_k=3, tasks=TASKS, rngs=r, **BY_TASK),
        maps,
    ),
    **{
        f"skem, {kind}": (
            sgw_jax.KEM(4, top_k=3, etf_vertices=9, projection=kind),
            functools.partial(lambda r, kind: KEM(C, 4, top_k=3, etf_vertices=9, projection=kind, rngs=r), kind=kind),
            maps,
        )
        for kind in ("etf", "orthonormal", "learned", "direction")
    },
    "cross_attention": (
        sgw_jax.CrossTaskAttention(2, pre_norm=True),
        lambda r: CrossTaskAttention(C, 2, pre_norm=True, rngs=r),
        maps,
    ),
    "shared_workspace": (
        sgw_jax.SharedWorkspace(4, 2, 4, top_k=3),
        lambda r: SharedWorkspace(C, 4, 2, 4, top_k=3, rngs=r),
        tokens,
    ),
    "shared_workspace, memory": (
        sgw_jax.SharedWorkspace(4, 2, 4, gate="memory", rounds=2),
        lambda r: SharedWorkspace(C, 4, 2, 4, gate="memory", rounds=2, rngs=r),
        tokens,
    ),
}


# Each option once; the rest of the pairs is slow, as programs are many.
QUICK = ("kem, all options", "skem, etf", "cross_attention", "shared_workspace")
BY_PAIR = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PAIRS]


def noisy(params):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), params)


def loss_of(outputs):
    return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(outputs))


@pytest.mark.parametrize("name", BY_PAIR)
def test_value_and_gradient_are_linens(name):
    """On the same parameters, converted both ways."""
    linen, make, inputs = PAIRS[name]
    variables = jax.jit(linen.init)(jax.random.key(0), inputs())
    variables = {**variables, "params": noisy(variables["params"])}
    module = make(nnx.Rngs(0))
    from_linen(module, variables)
    jax.tree.map(np.testing.assert_array_equal, to_linen(module)["params"], variables["params"])

    def of_linen(params, x):
        return loss_of(linen.apply({"params": params}, x))  # the frame is the program's in both

    expected = jax.jit(jax.value_and_grad(of_linen, (0, 1)))(variables["params"], inputs())
    found = nnx.jit(nnx.value_and_grad(lambda m, x: loss_of(m(x)), argnums=(0, 1)))(module, inputs())
    value, (slopes, of_inputs) = found
    # To 1e-6 of the largest of each array, whose entries are sums of some hundred terms.
    pairs = [(value, expected[0]), (of_inputs, expected[1][1]), (nnx.to_pure_dict(slopes), expected[1][0])]
    for one, other in pairs:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(1, np.abs(b).max())), one, other
        )


@pytest.mark.parametrize("name", BY_PAIR)
def test_parameters_alone_so_that_splits_are_exhaustive(name):
    """No random state, no records and no frame is left in the module, before or after a call."""
    _, make, inputs = PAIRS[name]
    module = make(nnx.Rngs(0))
    before = jax.tree.structure(nnx.state(module))
    module(inputs())
    assert jax.tree.structure(nnx.state(module)) == before
    graph, params = nnx.split(module, nnx.Param)
    found = jax.jit(lambda params, x: nnx.merge(graph, params)(x))(params, inputs())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=300 * EPS),
        found,
        nnx.jit(lambda m, x: m(x))(module, inputs()),
    )


def test_transformations():
    """vmap and scan over stacked modules, remat: the numbers of one module after another."""

    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(key):
        return KEM(C, 4, top_k=3, etf_vertices=9, rngs=nnx.Rngs(params=key))

    keys = jax.random.split(jax.random.key(0), 2)
    layers = stack(keys)
    expected = maps()
    for key in keys:
        expected = KEM(C, 4, top_k=3, etf_vertices=9, rngs=nnx.Rngs(params=key))(expected)

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def through(layer, x):
        return nnx.remat(lambda m, x: m(x))(layer, x)

    found = nnx.jit(through)(layers, maps())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1000 * EPS), found, expected)


def test_training_with_decay_and_a_checkpoint(tmp_path):
    """nnx.Optimizer over all that it finds, then a round trip through Orbax; the frame is the same before and after."""
    module = KEM(C, 4, top_k=3, etf_vertices=9, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(module, optax.adamw(1e-2, weight_decay=0.1), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer, x):
        value, slopes = nnx.value_and_grad(lambda m: loss_of(m(x)))(module)
        optimizer.update(module, slopes)
        return value

    values = [float(step(module, optimizer, maps())) for _ in range(5)]
    assert values[-1] < values[0]
    expected = module(maps())
    graph, state = nnx.split(module)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "kem", nnx.to_pure_dict(state))
        checkpointer.wait_until_finished()
        restored = checkpointer.restore(tmp_path / "kem", nnx.to_pure_dict(state))
    nnx.replace_by_pure_dict(state, restored)
    found = nnx.merge(graph, state)(maps())
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.eight_devices
def test_bfloat16_own_draws_metadata_and_the_default_mesh():
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    options = {"param_dtype": jnp.bfloat16, "kernel_init": jax.nn.initializers.normal(0.5)}
    plain = KEM(C, 4, top_k=3, etf_vertices=9, rngs=nnx.Rngs(0), kernel_metadata={"layer": "kem"}, **options)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(plain))} == {jnp.dtype(jnp.bfloat16)}
    assert plain.retrieve.query.kernel.layer == "kem"
    expected = nnx.jit(lambda m, x: m(x))(plain, maps(8))
    with jax.set_mesh(mesh):
        features = jax.device_put(maps(8), jax.NamedSharding(mesh, P("data")))
        found = nnx.jit(lambda m, x: m(x))(plain, features)
        assert all(jax.typeof(x).sharding.spec[0] == "data" for x in found.values())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=300 * EPS), found, expected)


def test_slots_masks_lists_and_what_happened():
    module = KEM(C, 4, top_k=3, rngs=nnx.Rngs(0))
    result, slots = module(list(maps().values()), None, True)
    assert isinstance(result, list)
    assert slots.shape == (2, 4, C)
    mask = {name: np.zeros((2, 3, 3), bool) for name in TASKS}
    jax.tree.map(np.testing.assert_array_equal, module(maps(), mask=mask), maps())
    records = module.extract(maps()).records
    assert {name: [x.shape for x in rounds] for name, rounds in records.items()} == {
        "retrieve_weights": [(2, 1, 4, 3)],
        "retrieve_index": [(2, 1, 4, 3)],
        "readout": [(2, 4, C)],
        "write_weights": [(2, 1, 18, 4)],
        "update_ratio": [(2,)],
    }


def test_the_projection_is_linens():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, C)), jnp.float32)
    linen = sgw_jax.SimplexETF(9, seed=3)
    expected = linen.apply(linen.init(jax.random.key(0), x), x)
    np.testing.assert_allclose(SimplexETF(9, seed=3)(x), expected, rtol=0, atol=100 * EPS)


def test_what_does_not_convert_is_named():
    linen = sgw_jax.KEM(4, top_k=3, etf_vertices=9)
    variables = jax.jit(linen.init)(jax.random.key(0), maps())
    with pytest.raises(ValueError, match=r"slots: \(4, 16\) given, \(5, 16\) here"):
        from_linen(KEM(C, 5, etf_vertices=9, rngs=nnx.Rngs(0)), variables)
    with pytest.raises(ValueError, match=r"task_gate_one: absent given, \(1,\) here"):
        from_linen(KEM(C, 4, etf_vertices=9, task_gate=True, tasks=TASKS, rngs=nnx.Rngs(0)), variables)
    other = {**variables, "constants": jax.tree.map(lambda x: x[::-1], variables["constants"])}
    with pytest.raises(ValueError, match="constants/etf/vertices is not the frame"):
        from_linen(KEM(C, 4, etf_vertices=9, rngs=nnx.Rngs(0)), other)
    with pytest.raises(ValueError, match=r"give tasks="):
        KEM(C, 4, task_gate=True, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="num_slots is 0"):
        KEM(C, 0, rngs=nnx.Rngs(0))
