"""In other people's models: what hosts do with collections, meshes, dtypes and containers that ours do not."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from sgw_jax import INTERACTIONS, KEM, CrossTaskAttention, SharedWorkspace
from sgw_jax.etf.simplex import etf_in_program, frame_in_program, orthonormal_frame, simplex_etf
from sgw_jax.functional import knowledge_extraction
from sgw_jax.interactions.shared_workspace import WorkspaceInteraction

EPS = float(np.finfo(np.float32).eps)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})

MODULES = {
    "kem": functools.partial(KEM, 4, top_k=3),
    "kem, maps on tokens": functools.partial(KEM, 4, num_heads=2, top_k=3, products="tokens"),
    "kem, all options": functools.partial(
        KEM, 4, num_heads=2, top_k=3, pre_norm=True, task_embedding=True, task_gate=True, rounds=2
    ),
    "skem": functools.partial(KEM, 4, top_k=3, etf_vertices=9),
    "skem, dense": functools.partial(KEM, 4, etf_vertices=9, etf_for="selection"),
    "shared_workspace": functools.partial(WorkspaceInteraction, 4, num_heads=2, top_k=3),
    "cross_attention": functools.partial(CrossTaskAttention, 2, pre_norm=True, query_chunk=16),
    "within_tasks": functools.partial(INTERACTIONS["within_tasks"], num_slots=4, top_k=3),
}


def by_module(*quick):
    """Parameters of a test over the modules; of all but those named it is slow, as programs are many."""
    assert set(quick) <= set(MODULES)
    return [name if name in quick else pytest.param(name, marks=pytest.mark.slow) for name in MODULES]


EACH_KIND = ("kem, all options", "skem", "shared_workspace", "cross_attention")


def maps(batch=8, size=4, channels=32):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=(batch, size, size, channels)), jnp.float32) for name in ("one", "two")}


@functools.cache
def made(name):
    """A module, and its variables away from the zeros that gates and embeddings start from."""
    module = MODULES[name]()
    variables = jit(module.init)(jax.random.key(0), maps(2))
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32), variables["params"])
    return module, {**variables, "params": params}


def value_and_gradient(module, variables, features):
    def loss(params, features):
        outputs = module.apply({**variables, "params": params}, features)
        return sum(jnp.sum(jnp.sin(x)) for x in outputs.values()), outputs

    return jax.value_and_grad(loss, (0, 1), has_aux=True)(variables["params"], features)


# Layouts


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *((name, P("data")) for name in EACH_KIND),
        ("kem, maps on tokens", P("data", None, None, "model")),
        *(
            pytest.param(name, layout, marks=pytest.mark.slow)
            for name in MODULES
            for layout in (P("data"), P("data", None, None, "model"), P(None, "data"), P())
            if (name, layout) != ("kem, maps on tokens", P("data", None, None, "model"))
            and not (name in EACH_KIND and layout == P("data"))
        ),
    ],
)
def test_the_default_mesh_whose_axes_are_explicit(name, layout):
    """The numbers of one device, laid out as the features came in; gradients too."""
    module, variables = made(name)
    expected = jit(functools.partial(value_and_gradient, module))(variables, maps())
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)  # the default since jax 0.9
    with jax.set_mesh(mesh):
        features = jax.device_put(maps(), jax.NamedSharding(mesh, layout))
        found = jit(functools.partial(value_and_gradient, module))(variables, features)
        (_, outputs), (_, slopes) = found
        for x in (*outputs.values(), *slopes.values()):
            assert jax.typeof(x).sharding.spec == jax.typeof(features["one"]).sharding.spec
    # Sums of at most 64 terms of size O(10), taken in another order; the value is one of 8,192 terms of at most 1.
    ((value, outputs), slopes), ((expected_value, *_), _) = found, expected
    np.testing.assert_allclose(value, expected_value, rtol=0, atol=8192 * EPS)
    found, expected = (outputs, slopes), (expected[0][1], expected[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=3000 * EPS), found, expected)


@pytest.mark.parametrize("name", by_module("kem", "cross_attention"))
@pytest.mark.parametrize("kind", ["auto", "manual"])
def test_auto_and_manual_axes(name, kind):
    module, variables = made(name)
    features = maps()
    expected = jit(module.apply)(variables, features)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh):
        apply = module.apply
        if kind == "manual":
            apply = jax.shard_map(apply, in_specs=(P(), P("data")), out_specs=P("data"))
        found = jit(apply)(variables, jax.device_put(features, jax.NamedSharding(mesh, P("data"))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=300 * EPS), found, expected)


# Collections


@pytest.mark.parametrize("name", by_module(*EACH_KIND))
def test_everything_mutable_keeps_structure_and_compiles_once(name):
    """A trainer that applies with ``mutable=True``, pops ``intermediates`` and keeps all else."""
    module, state = made(name)
    compiled = []

    @jit
    def step(state, features):
        compiled.append(1)
        outputs, state = module.apply(state, features, mutable=True)
        return outputs, {name: tree for name, tree in state.items() if name != "intermediates"}

    before = jax.tree.structure(state)
    for _ in range(3):
        _, state = step(state, maps(2))
        assert jax.tree.structure(state) == before
    assert len(compiled) == 1


@pytest.mark.parametrize("projection", ["etf", "orthonormal", "learned", "direction"])
def test_params_alone_are_enough(projection):
    """Trainers that drop ``constants`` get the same function: the program makes the frame."""
    module = KEM(4, top_k=3, etf_vertices=9, projection=projection)
    variables = jit(module.init)(jax.random.key(0), maps(2))
    expected = jit(module.apply)(variables, maps(2))
    found = jit(module.apply)({"params": variables["params"]}, maps(2))
    for key, value in expected.items():
        np.testing.assert_allclose(found[key], value, rtol=0, atol=300 * EPS)
    _, state = module.apply({"params": variables["params"]}, maps(2), mutable=True)
    assert "constants" not in state  # and nothing is added behind the trainer's back


def test_a_scan_that_does_not_carry_constants():
    class Layers(nn.Module):
        @nn.compact
        def __call__(self, features):
            layer = KEM(4, top_k=3, etf_vertices=9)
            axes, draws = {"params": 0}, {"params": True}
            scan = nn.scan(lambda m, x, _: (m(x), None), variable_axes=axes, split_rngs=draws, length=2)
            return scan(layer, features, None)[0]

    module = Layers()
    variables = jit(module.init)(jax.random.key(0), maps(2))
    assert set(variables) == {"params"}
    found = jit(module.apply)(variables, maps(2))
    assert all(np.isfinite(x).all() for x in found.values())


@pytest.mark.parametrize(("vertices", "dim"), [(2, 1), (9, 8), (9, 32), (64, 64), (128, 192)])
def test_the_frame_of_a_program_is_the_hosts(vertices, dim):
    """Every entry is a product of at most K terms, each rounded some few times in float32."""
    expected = simplex_etf(vertices, dim, seed=3)
    np.testing.assert_allclose(jit(lambda: etf_in_program(vertices, dim, seed=3))(), expected, rtol=0, atol=16 * EPS)
    rank = vertices - 1
    found = jit(lambda: frame_in_program(dim, rank, seed=3))()
    np.testing.assert_allclose(found, orthonormal_frame(dim, rank, seed=3), rtol=0, atol=16 * EPS)


def test_the_frame_is_no_literal_of_the_program():
    """Neither in the trace nor in the compiled program is there an array of the frame's size."""
    module, features = KEM(4, top_k=3, etf_vertices=200), maps(2, channels=256)
    params = {"params": jit(module.init)(jax.random.key(0), features)["params"]}
    lowered = jax.jit(module.apply).lower(params, features)
    without = jax.jit(KEM(4, top_k=3).apply).lower({"params": _without_frame(params["params"])}, features)
    assert len(lowered.as_text()) < len(without.as_text()) + 20_000  # the frame as text is 500,000 characters and more


def _without_frame(params):
    rng = np.random.default_rng(0)
    wide = {name: {"kernel": rng.normal(size=(256, 256)).astype(np.float32)} for name in ("query", "key", "value")}
    return {"slots": params["slots"], "retrieve": wide, "write": wide}


@pytest.mark.parametrize("projection", ["etf", "orthonormal"])
def test_no_gradient_flows_into_the_frame(projection):
    """Hosts that differentiate whatever they find leave it alone."""
    module = KEM(4, top_k=3, etf_vertices=9, projection=projection)
    variables = jit(module.init)(jax.random.key(0), maps(2))
    gradients = jit(jax.grad(lambda v: sum(jnp.sum(jnp.sin(x)) for x in module.apply(v, maps(2)).values())))(variables)
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradients["constants"]))
    assert any(np.any(leaf) for leaf in jax.tree.leaves(gradients["params"]))


# Parameters


@pytest.mark.parametrize("make", [*(MODULES[n] for n in ("kem, all options", "shared_workspace", "cross_attention"))])
def test_parameters_in_bfloat16_by_ones_own_draw_with_named_axes(make):
    init = nn.initializers.normal(0.5)
    module = make(param_dtype=jnp.bfloat16, kernel_init=init, kernel_axes=("embed", "heads"))
    shapes = jax.eval_shape(module.init, jax.random.key(0), maps(2))["params"]
    specs = nn.get_partition_spec(shapes)
    for path, leaf in jax.tree_util.tree_leaves_with_path(nn.unbox(shapes)):
        assert leaf.dtype == jnp.bfloat16, path
    named = [spec for path, spec in jax.tree_util.tree_leaves_with_path(specs) if "kernel" in str(path)]
    assert named.count(P("embed", "heads")) >= 4
    params = jit(module.init)(jax.random.key(0), maps(2))["params"]
    kernels = [
        x for p, x in jax.tree_util.tree_leaves_with_path(nn.unbox(params)) if "kernel" in str(p) and x.ndim == 2
    ]
    assert 0.4 < np.std(np.concatenate([np.ravel(x).astype(np.float32) for x in kernels])) < 0.6


# Containers


@pytest.mark.parametrize("name", by_module(*EACH_KIND, "within_tasks"))
def test_lists_tuples_and_keywords(name):
    module, _ = made(name)
    one, two = maps(2).values()
    variables = jit(module.init)(jax.random.key(0), {"0": one, "1": two})
    expected = list(module.apply(variables, {"0": one, "1": two}).values())
    for kind in (list, tuple):
        found = module.apply(variables, kind((one, two)))
        assert type(found) is kind
        jax.tree.map(np.testing.assert_array_equal, list(found), expected)


@pytest.mark.parametrize("name", by_module(*EACH_KIND, "within_tasks"))
def test_inside_a_sequential(name):
    """Which hands a mapping on as keyword arguments."""
    module = nn.Sequential([lambda x: {"one": x, "two": 2 * x}, MODULES[name]()])
    variables = jit(module.init)(jax.random.key(0), maps(2)["one"])
    assert set(jit(module.apply)(variables, maps(2)["one"])) == {"one", "two"}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(
    ("features", "message"),
    [
        (np.zeros((2, 8, 4, 4, 32), np.float32), r"ndarray \(2, 8, 4, 4, 32\); give a mapping"),
        ({"one": np.zeros((4, 32), np.float32)}, r"shape \(4, 32\); it must be \(batch, \*space, channels\)"),
        ({"one": np.zeros((8, 4, 4, 32), np.int32)}, "int32; it must be floating-point"),
        ({"one": [[[1.0]]]}, "list; it must be floating-point"),
        ({"a/b": np.zeros((8, 4, 4, 32), np.float32)}, "'a/b' cannot be a task's name"),
        ({}, "at least one task"),
        ([], "at least one task"),
    ],
)
def test_features_that_are_none(name, features, message):
    with pytest.raises(ValueError, match=message):
        MODULES[name]().init(jax.random.key(0), features)


# Padding


@pytest.mark.parametrize("name", [p for p in by_module(*EACH_KIND) if p in EACH_KIND or p.values[0] != "within_tasks"])
@pytest.mark.parametrize("padding", ["nearly all", "all of one image"])
def test_padding_is_neither_retrieved_nor_changed(name, padding):
    """What stands in the padding has no influence, and real tokens get what they get in a batch without padding."""
    module, variables = made(name)
    features, rng = maps(4), np.random.default_rng(2)
    share = 0.9 if padding == "nearly all" else 0.3
    mask = {key: rng.random((4, 4, 4)) >= share for key in features}
    for real in mask.values():
        real[:, 0, 0] = True
        if padding == "all of one image":
            real[1] = False

    def filled(value):
        return {key: jnp.where(mask[key][..., None], x, value) for key, x in features.items()}

    apply = jit(lambda x: module.apply(variables, x, mask=mask))
    one, other = apply(filled(0.0)), apply(filled(1e4))
    for key, real in mask.items():
        np.testing.assert_array_equal(one[key][real], other[key][real])
        assert np.isfinite(one[key]).all()
        np.testing.assert_array_equal(other[key][~real], 1e4)

    # The same tokens alone, as sequences: an image at a time, because each has another number.
    image = 0
    alone = {key: x[image][mask[key][image]][None] for key, x in features.items()}
    expected = module.apply(variables, alone)
    for key, real in mask.items():
        np.testing.assert_allclose(one[key][image][real[image]], expected[key][0], rtol=0, atol=1000 * EPS)


def test_a_mask_that_does_not_fit_is_named():
    module, variables = made("kem")
    with pytest.raises(ValueError, match=r"masks have the shapes .* they must have"):
        module.apply(variables, maps(2), mask={"one": np.ones((2, 4, 4), bool)})


def test_padding_over_shards():
    """Tokens split over devices, some of them padding: the numbers of one device."""
    from sgw_jax import Placement

    module, variables = made("kem")
    features = maps(4)
    mask = {key: np.random.default_rng(2).random((4, 4, 4)) > 0.7 for key in features}
    expected = jit(lambda x: module.apply(variables, x, mask=mask))(features)
    mesh = jax.make_mesh((2, 4), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    placed = module.copy(placement=Placement(("data",), "context"))
    with jax.set_mesh(mesh):
        found = jit(lambda x: placed.apply(variables, x, mask=mask))(features)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=300 * EPS), found, expected)


# Functions


@pytest.mark.parametrize("name", ["kem", "kem, all options", "skem"])
def test_the_function_behind_the_module(name):
    """Parameters as a plain dict, nothing of Flax: what Haiku, Equinox and plain JAX call."""
    from sgw_jax.etf import etf_projection

    module, variables = made(name)
    projection = None if module.etf_vertices is None else etf_projection(module.etf_vertices, seed=module.etf_seed)
    found = knowledge_extraction(
        variables["params"],
        maps(2),
        num_heads=module.num_heads,
        top_k=module.top_k,
        rounds=module.rounds,
        projection=projection,
    )
    expected = module.apply(variables, maps(2))
    for key, value in expected.items():
        np.testing.assert_allclose(found.features[key], value, rtol=0, atol=300 * EPS)
    assert found.slots.shape == (2, 4, 32)


def test_shared_workspace_alone_on_the_default_mesh():
    module = SharedWorkspace(4, 2, 8, top_k=3)
    inputs = jnp.asarray(np.random.default_rng(0).normal(size=(8, 12, 32)), jnp.float32)
    variables = jit(module.init)(jax.random.key(0), inputs)
    expected = jit(module.apply)(variables, inputs)
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        found = jit(module.apply)(variables, jax.device_put(inputs, jax.NamedSharding(mesh, P("data"))))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=300 * EPS), found, expected)
