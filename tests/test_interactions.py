"""Interactions: what every member promises, KEM against loops in NumPy float64, and how much memory attention takes."""

import functools
import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from sgw_jax.configs.base import get_config
from sgw_jax.etf.simplex import orthonormal_frame, simplex_etf
from sgw_jax.interactions import INTERACTIONS, KEM, CrossTaskAttention
from sgw_jax.layers.attention import attention, in_groups
from sgw_jax.layers.topk_attention import topk_attention
from sgw_jax.plan.cost import multiply_accumulates

EPS32 = float(np.finfo(np.float32).eps)
CHANNELS = 8
# These programs run for microseconds: compiling them without optimisation is what keeps the file fast.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})

# Where the defaults are not small; of the others those of the configuration.
SMALL: dict[str, dict[str, Any]] = {
    "none": {"mlp_width": 6},
    "cross_attention": {"num_heads": 2, "query_chunk": 5},
    "kem": {"num_slots": 3, "num_heads": 2, "top_k": 4},
    "skem": {"num_slots": 3, "num_heads": 2, "top_k": 4, "etf_vertices": 5},
    "shared_workspace": {"num_slots": 3, "num_heads": 2, "key_dim": 5, "top_k": 4},
    "within_tasks": {"num_slots": 3, "num_heads": 2, "top_k": 4},
}
MEMBERS = {name: {**get_config().interactions[name], **SMALL.get(name, {})} for name in INTERACTIONS}
RAGGED = {"b": (2, 2, 3, CHANNELS), "a": (2, 5, CHANNELS), "c": (2, 1, 2, 2, CHANNELS)}


def make_features(shapes=RAGGED, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


def initialise(module, features, seed=0):
    """Variables with every parameter, gates and embeddings too, away from its special starting value; not compiled."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        name = jax.tree_util.keystr(path[-1:], simple=True)
        spread = leaf.shape[0] ** -0.5 if name == "kernel" else 0.5 if name == "scale" or "gate" in name else 1.0
        return (spread * rng.normal(size=leaf.shape) + (name == "scale" or "gate" in name)).astype(np.float32)

    shapes = jax.eval_shape(module.init, jax.random.key(0), features)
    variables = {"params": jax.tree_util.tree_map_with_path(draw, shapes.get("params", {}))}
    if "etf" in shapes.get("constants", {}):
        dim, vertices = shapes["constants"]["etf"]["vertices"].shape
        frame = simplex_etf(vertices, dim, seed=module.etf_seed).astype(np.float32)
        variables["constants"] = {"etf": {"vertices": frame}}
    elif "constants" in shapes:
        dim, rank = shapes["constants"]["orthonormal"]["frame"].shape
        variables["constants"] = {"orthonormal": {"frame": orthonormal_frame(dim, rank).astype(np.float32)}}
    return variables


# ---- every member --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEMBERS)
def test_contract(name):
    """Keys, their order, shapes and dtypes are kept; every gradient is finite; every parameter takes part."""
    module = INTERACTIONS[name](**MEMBERS[name])
    features = make_features()
    variables = initialise(module, features)
    assert set(variables) <= {"params", "constants"}

    def loss(params, inputs):
        inputs = {key: inputs[key] for key in RAGGED}  # jit has sorted the keys
        outputs = module.apply({**variables, "params": params}, inputs)
        assert list(outputs) == list(RAGGED)
        return sum(jnp.sum(jnp.sin(value)) for value in outputs.values()), outputs

    (_, outputs), (of_params, of_inputs) = jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(
        variables["params"], features
    )
    for key, value in features.items():
        assert outputs[key].shape == value.shape
        assert outputs[key].dtype == value.dtype
        assert np.any(of_inputs[key] != 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path((of_params, of_inputs)):
        assert np.all(np.isfinite(leaf)), path
    for path, leaf in jax.tree_util.tree_leaves_with_path(of_params):
        assert np.any(leaf != 0), path


@pytest.mark.parametrize("name", MEMBERS)
def test_bfloat16_features_stay_bfloat16(name):
    module = INTERACTIONS[name](**MEMBERS[name], dtype=jnp.bfloat16)
    features = {key: jnp.asarray(value, jnp.bfloat16) for key, value in make_features().items()}
    outputs, variables = jax.eval_shape(functools.partial(module.init_with_output, jax.random.key(0)), features)
    assert {key: value.dtype for key, value in outputs.items()} == dict.fromkeys(RAGGED, jnp.bfloat16)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(variables))


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize(
    ("features", "message"),
    [
        ({}, "empty"),
        ({"a": jnp.ones((2, 3, 8)), "b": jnp.ones((2, 3, 6))}, "number of channels.*'b': 6"),
        ({"a": jnp.ones((2, 3, 8)), "b": jnp.ones((1, 3, 8))}, "batch size.*'b': 1"),
        ({"a": jnp.ones((2, 3, 8)), "b": jnp.ones((2, 3, 8), jnp.bfloat16)}, "dtype.*bfloat16"),
    ],
)
def test_features_that_do_not_fit_are_refused(name, features, message):
    with pytest.raises(ValueError, match=message):
        INTERACTIONS[name](**MEMBERS[name]).init(jax.random.key(0), features)


# ---- KEM against a reference ---------------------------------------------------------------------------------------

SIXTEEN = {f"task{i:02}": (1, 2, CHANNELS) for i in range(16)}
CASES: dict[str, tuple[KEM, dict]] = {
    "plain": (KEM(3), RAGGED),
    "top-k, heads, wide slots": (KEM(4, num_heads=2, top_k=5, slot_dim=12), RAGGED),
    "more slots than their width": (KEM(7, num_heads=2, top_k=3, slot_dim=4), RAGGED),
    "more slots, ETF": (KEM(7, num_heads=2, top_k=3, slot_dim=4, etf_vertices=5), RAGGED),
    "more slots, softmax over all": (KEM(7, num_heads=4, top_k=None, slot_dim=4), RAGGED),
    "ETF for all": (KEM(3, num_heads=2, top_k=4, etf_vertices=9, etf_seed=3), RAGGED),
    "direction": (KEM(3, top_k=4, etf_vertices=9, projection="direction", temperature=0.5), RAGGED),
    "orthonormal": (KEM(3, top_k=4, etf_vertices=6, projection="orthonormal"), RAGGED),
    "learned": (KEM(3, top_k=4, etf_vertices=6, projection="learned", task_embedding=True, rounds=2), RAGGED),
    "all options": (
        KEM(
            3,
            num_heads=2,
            top_k=4,
            slot_dim=6,
            etf_vertices=5,
            etf_for="selection",
            pre_norm=True,
            task_embedding=True,
            task_gate=True,
            temperature=0.7,
            rounds=2,
        ),
        RAGGED,
    ),
    "one task": (KEM(3, top_k=2, task_embedding=True, task_gate=True), {"only": (2, 6, CHANNELS)}),
    "balanced": (KEM(3, num_heads=2, top_k=4, slot_dim=12, balanced=True), RAGGED),
    "balanced, softmax over all": (KEM(2, balanced=True, slot_exchange=True), RAGGED),
    "balanced, fewer tokens than k": (KEM(2, top_k=13, balanced=True), RAGGED),
    "slot exchange": (KEM(4, num_heads=2, top_k=5, slot_dim=12, slot_exchange=True, rounds=2), RAGGED),
    "pair gates": (
        KEM(
            2,
            num_heads=2,
            top_k=3,
            etf_vertices=9,
            pre_norm=True,
            task_embedding=True,
            balanced=True,
            slot_exchange=True,
            pair_gate=True,
            rounds=2,
        ),
        RAGGED,
    ),
    "sixteen tasks": (KEM(3, top_k=6, task_embedding=True), SIXTEEN),
}
MARGIN = 1e-3  # between the k-th and the (k+1)-th score: far more than rounding or a finite difference moves a score


def cuts(size, parts):
    """The parts of an axis that belong to each head."""
    return [slice(i * size // parts, (i + 1) * size // parts) for i in range(parts)]


def softmax(scores):
    weights = np.exp(np.asarray(scores) - np.max(scores))
    return weights / weights.sum()


def frame_of(module, variables, channels):
    """The columns that a token is projected on."""
    if module.projection == "direction":
        return np.eye(channels)
    if module.projection == "learned":
        return np.asarray(variables["params"]["learned"]["kernel"], np.float64)
    ((frame,),) = (found.values() for found in variables["constants"].values())
    return np.asarray(frame, np.float64)


def exchanged(params, slots, heads, scale):
    """What each slot holds once it has looked at all."""
    centred = slots - slots.mean(1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-6)
    normed = normed * params["norm"]["scale"] + params["norm"]["bias"]
    query, key, value = (normed @ params[name]["kernel"] for name in ("query", "key", "value"))
    taken = np.zeros_like(slots)
    for slot, cut in itertools.product(range(len(slots)), heads):
        taken[slot, cut] = softmax([query[slot, cut] @ other * scale for other in key[:, cut]]) @ value[:, cut]
    return slots + params["gate"] * taken


def reference(module, variables, features, slots=None, record=None):
    """The method, one score at a time: outputs, slots, the least margin of a selection, and the largest number met.
    ``record`` gets {name: {(image, head, slot or token, entry): weight or index}} of the last round."""
    record = (
        {name: {} for name in ("retrieve_weights", "retrieve_index", "write_weights")} if record is None else record
    )
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    retrieve, write = (
        {name: params[part][name]["kernel"] for name in ("query", "key", "value")} for part in ("retrieve", "write")
    )
    names = sorted(features) if module.balanced else list(features)
    batch, channels = features[names[0]].shape[0], features[names[0]].shape[-1]
    tokens = {n: features[n].astype(np.float64).reshape(batch, -1, channels) for n in names}
    owner = [n for n in names for _ in range(tokens[n].shape[1])]
    margin, largest = np.inf, 1.0
    results, states = [], []
    for b in range(batch):
        stream = [row for n in names for row in tokens[n][b]]
        state = np.tile(params["slots"], (len(names) if module.balanced else 1, 1))
        state = state if slots is None else slots[b].astype(np.float64)
        width = state.shape[1]
        for _ in range(module.rounds):
            normed, chooser = [], []
            for row, task in zip(stream, owner, strict=True):
                x = row
                if module.pre_norm:
                    scaled = (x - x.mean()) / np.sqrt(x.var() + 1e-6)
                    x = scaled * params["norm"]["scale"] + params["norm"]["bias"]
                z = x
                if module.etf_vertices is not None:
                    z = np.sqrt(channels) * frame_of(module, variables, channels).T @ x / np.sqrt(x @ x + 1e-12)
                normed.append(x if module.etf_for == "selection" else z)
                chooser.append(z + (params[f"task_embedding_{task}"] if module.task_embedding else 0))
            heads, wide = (cuts(size, module.num_heads) for size in (width, channels))
            scale = 1 / np.sqrt(width // module.num_heads)
            found = np.zeros_like(state)
            for slot, cut in itertools.product(range(len(state)), heads):
                query = (state[slot] @ retrieve["query"])[cut]
                scores = [query @ (z @ retrieve["key"])[cut] * scale / module.temperature for z in chooser]
                seen = [
                    i for i, task in enumerate(owner) if not module.balanced or task == names[slot // module.num_slots]
                ]
                order = sorted(seen, key=lambda i: (-scores[i], i))
                kept = order if module.top_k is None else order[: module.top_k]
                if len(kept) < len(order):
                    margin = min(margin, scores[kept[-1]] - scores[order[len(kept)]])
                weights = softmax([scores[i] for i in kept])
                head = heads.index(cut)
                for entry, (i, weight) in enumerate(zip(kept, weights, strict=True)):
                    record["retrieve_index"][b, head, slot, entry] = i
                    record["retrieve_weights"][b, head, slot, entry] = weight
                values = [(normed[i] @ retrieve["value"])[cut] for i in kept]
                found[slot, cut] = sum(w * value for w, value in zip(weights, values, strict=True))
                largest = max(largest, np.abs(scores).max(), np.abs(query).max())
            state = exchanged(params["exchange"], found, heads, scale) if module.slot_exchange else found
            groups = cuts(len(state), len(names) if module.pair_gate else 1)
            updated = []
            for token, (row, task, z) in enumerate(zip(stream, owner, chooser, strict=True)):
                update = np.zeros(channels)
                for head, (cut, out) in enumerate(zip(heads, wide, strict=True)):
                    query = (z @ write["query"])[cut]
                    scores = [query @ (slot @ write["key"])[cut] * scale for slot in state]
                    weights = np.concatenate([softmax(scores[group]) for group in groups])
                    shares = factors = np.ones(len(state))
                    if module.pair_gate:
                        gates = np.concatenate([params[f"pair_gate_{task}_from_{source}"] for source in names])
                        factors = np.repeat(gates, module.num_slots)
                        shares = np.abs(factors) / np.abs(gates).sum()
                    record["write_weights"] |= {(b, head, token, i): w for i, w in enumerate(weights * shares)}
                    read = zip(weights * factors, state, strict=True)
                    update[out] = sum(w * (slot @ write["value"])[out] for w, slot in read)
                    largest = max(largest, np.abs(scores).max())
                updated.append(row + update * (params[f"task_gate_{task}"] if module.task_gate else 1))
            stream = updated
            largest = max(largest, np.abs(stream).max(), np.abs(state).max())
        results.append(np.stack(stream))
        states.append(state)
    joined, start, outputs = np.stack(results), 0, {}
    for n in names:
        length = tokens[n].shape[1]
        outputs[n] = joined[:, start : start + length].reshape(features[n].shape)
        start += length
    return outputs, np.stack(states), margin, largest


@functools.cache
def clear_case(case, with_slots=False):
    """Features, variables (and initial slots) of the first seed none of whose selections is within MARGIN of a tie, and
    the reference's answer to them."""
    module, shapes = CASES[case]
    for seed in range(50):
        features = make_features(shapes, seed)
        variables = initialise(module, features, seed)
        batch, (number, width) = features[next(iter(shapes))].shape[0], variables["params"]["slots"].shape
        slots = np.random.default_rng(seed + 100).normal(size=(batch, number, width)).astype(np.float32)
        answer = reference(module, variables, features, slots if with_slots else None)
        if answer[2] > MARGIN:
            return features, variables, slots, answer
    raise AssertionError(f"{case}: no seed keeps every selection away from a tie")


def as_float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def rounding(module, largest):
    """What float32 may lose: per round five products in a chain, each a sum of at most N = 24 terms, N eps relative to
    intermediates of at most M; scores pass through exponentials, which multiplies by M once more."""
    return module.rounds * 5 * 24 * EPS32 * largest**2


@pytest.mark.parametrize("case", CASES)
def test_kem_matches_the_reference(case):
    """In float64 to 1e-12, and in float32 to `rounding`."""
    module, shapes = CASES[case]
    features, variables, _, (expected, expected_slots, _, largest) = clear_case(case)

    def apply(v, f):
        return module.apply(v, {name: f[name] for name in shapes}, return_slots=True)

    outputs, slots = jit(apply)(variables, features)
    np.testing.assert_allclose(slots, expected_slots, rtol=0, atol=rounding(module, largest))
    for name in shapes:
        assert outputs[name].dtype == jnp.float32
        np.testing.assert_allclose(outputs[name], expected[name], rtol=0, atol=rounding(module, largest))

    with jax.enable_x64(True):
        module = module.clone(dtype=jnp.float64)
        outputs, slots = jit(apply)(as_float64(variables), as_float64(features))
        np.testing.assert_allclose(slots, expected_slots, rtol=0, atol=1e-12)
        for name in shapes:
            np.testing.assert_allclose(outputs[name], expected[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        # On the slots' side: scores of retrieving and writing, and what is written.
        (KEM(4, top_k=5), 4 * CHANNELS * 3),
        (KEM(4, num_heads=2, top_k=5, slot_dim=12), 2 * 4 * CHANNELS * 2 + 4 * CHANNELS),
        (KEM(4, top_k=5, etf_vertices=5), 4 * CHANNELS * 3),
        # Task embeddings are added among the vertices: one projection of the tokens, scores of five numbers.
        (KEM(4, top_k=5, etf_vertices=5, task_embedding=True), CHANNELS * 5 + 4 * 5 * 2 + 4 * CHANNELS),
        # Too many slots and heads: keys, queries and values of every token, which is projected once.
        (KEM(12, num_heads=2, top_k=5), 2 * 2 * 12 * CHANNELS + 12 * CHANNELS),  # as many either way
        (KEM(13, num_heads=2, top_k=5), 3 * CHANNELS**2 + 3 * 13 * CHANNELS),
        (KEM(9, num_heads=2), 3 * CHANNELS**2 + 4 * 9 * CHANNELS),  # with what is retrieved from all tokens
        (KEM(8, num_heads=2), 3 * 2 * 8 * CHANNELS + 8 * CHANNELS),
        (KEM(12, num_heads=4, top_k=5, etf_vertices=5), CHANNELS * 5 + 3 * 5 * CHANNELS + 3 * 12 * CHANNELS),
        (
            KEM(12, num_heads=4, top_k=5, etf_vertices=5, etf_for="selection"),
            CHANNELS * 5 + (2 * 5 + CHANNELS) * CHANNELS + 3 * 12 * CHANNELS,
        ),
    ],
)
def test_maps_are_applied_to_the_side_with_fewer_products(module, expected):
    """By the products for one token; what the slots cost among themselves is little beside thousands of tokens."""
    tokens = 4096
    features = {"a": jax.ShapeDtypeStruct((1, tokens, CHANNELS), jnp.float32)}
    variables = jax.eval_shape(module.init, jax.random.key(0), features)
    found = sum(multiply_accumulates(module.apply, variables, features).values()) / tokens
    assert found == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize(
    "module",
    [
        KEM(32, top_k=8),
        pytest.param(KEM(32, etf_vertices=128), marks=pytest.mark.slow),
        pytest.param(KEM(32, top_k=8, etf_vertices=128, etf_for="selection"), marks=pytest.mark.slow),
        pytest.param(KEM(64, num_heads=8, etf_vertices=128), marks=pytest.mark.slow),
        pytest.param(KEM(32, etf_vertices=128, task_embedding=True), marks=pytest.mark.slow),
    ],
    ids=["kem", "skem", "selection", "unfolded", "embedded"],
)
def test_full_size_widths_are_compiled_right(module):
    """Outputs and gradients in float32, with all of the compiler's fusions, beside float64. jax 0.10.2's CPU compiler
    makes wrong numbers, off by as much as they are large, of softmax(F (M W) q^T) v at these widths, hence the order of
    our products."""
    rng = np.random.default_rng(0)
    features = {name: rng.normal(size=(2, 24, 192)).astype(np.float32) for name in "ab"}
    variables = module.init(jax.random.key(0), features)

    def slopes(module, variables, features):
        def loss(params, features):
            outputs = module.apply({**variables, "params": params}, features)
            return sum(jnp.sum(jnp.sin(x)) for x in outputs.values()), outputs

        return jax.grad(loss, (0, 1), has_aux=True)(variables["params"], features)

    found = jax.jit(slopes, static_argnums=0)(module, variables, features)
    with jax.enable_x64(True):
        wide = module.clone(dtype=jnp.float64)
        expected = jax.jit(slopes, static_argnums=0)(wide, as_float64(variables), as_float64(features))
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        # Chains of ten products (five forward), sums of at most 192 terms of numbers of at most a few units.
        np.testing.assert_allclose(one, other, rtol=0, atol=10 * 192 * EPS32 * np.abs(other).max())


def test_parameters_are_float32_in_a_float64_program():
    module = KEM(3, top_k=4, etf_vertices=5, task_embedding=True, task_gate=True, dtype=jnp.float64)
    with jax.enable_x64(True):
        variables = module.init(jax.random.key(0), as_float64(make_features()))
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {np.dtype(np.float32)}


@pytest.mark.parametrize("case", ["top-k, heads, wide slots", "all options", "pair gates"])
def test_kem_gradients_match_finite_differences(case):
    """Central differences along random directions of all parameters and features at once, in float64, of h and h / 2,
    extrapolated to 0: truncation h^4 = 1e-20 and cancellation 1e-16 / h = 1e-11, times values up to 1e3."""
    module, shapes = CASES[case]
    features, variables, _, _ = clear_case(case)
    rng = np.random.default_rng(1)
    weights = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    with jax.enable_x64(True):
        module = module.clone(dtype=jnp.float64)
        point = (as_float64(variables["params"]), as_float64(features))
        constants = as_float64({key: value for key, value in variables.items() if key != "params"})

        def loss(params, inputs):
            outputs = module.apply({**constants, "params": params}, {name: inputs[name] for name in shapes})
            return sum(jnp.sum(weights[name] * outputs[name]) for name in shapes)

        value_and_grad = jit(jax.value_and_grad(loss, argnums=(0, 1)))
        _, gradient = value_and_grad(*point)
        h = 1e-5
        for _ in range(4):
            direction = jax.tree.map(lambda x: rng.normal(size=x.shape), point)

            def central(h):
                ahead, behind = (
                    value_and_grad(*jax.tree.map(lambda x, u: x + sign * h * u, point, direction))[0]  # noqa: B023
                    for sign in (1, -1)
                )
                return (ahead - behind) / (2 * h)

            along = sum(np.sum(g * u) for g, u in zip(*map(jax.tree.leaves, (gradient, direction)), strict=True))
            np.testing.assert_allclose((4 * central(h / 2) - central(h)) / 3, along, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(
    "case",
    [
        "top-k, heads, wide slots",
        "more slots than their width",
        "all options",
        pytest.param("pair gates", marks=pytest.mark.slow),
    ],
)
def test_what_is_recorded_matches_the_reference(case):
    """Weights and indices by head, slot and token, with maps on either side."""
    module, shapes = CASES[case]
    features, variables, _, _ = clear_case(case)
    expected = {name: {} for name in ("retrieve_weights", "retrieve_index", "write_weights")}
    reference(module, variables, features, record=expected)
    ordered = {name: features[name] for name in shapes}
    _, sown = module.apply(variables, ordered, mutable=["intermediates"])
    for name, entries in expected.items():
        found = np.asarray(sown["intermediates"][name][-1])
        assert found.size == len(entries), name
        for place, value in entries.items():
            np.testing.assert_allclose(found[place], value, rtol=0, atol=1e-4, err_msg=f"{name} {place}")


def test_initial_slots_replace_the_learned_ones():
    module, shapes = CASES["top-k, heads, wide slots"]
    features, variables, own, (expected, expected_slots, _, largest) = clear_case(
        "top-k, heads, wide slots", with_slots=True
    )

    def apply(v, f, s):
        return module.apply(v, {name: f[name] for name in shapes}, s, return_slots=True)

    outputs, slots = jit(apply)(variables, features, own)
    np.testing.assert_allclose(slots, expected_slots, rtol=0, atol=rounding(module, largest))
    np.testing.assert_allclose(outputs["c"], expected["c"], rtol=0, atol=rounding(module, largest))
    with pytest.raises(ValueError, match=r"initial slots have shape \(4, 12\)"):
        module.apply(variables, features, own[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_slots": 0}, "num_slots is 0"),
        ({"num_slots": 2, "top_k": 0}, "top_k is 0"),
        ({"num_slots": 2, "rounds": 0}, "rounds is 0"),
        ({"num_slots": 2, "num_heads": 0}, "num_heads is 0"),
        ({"num_slots": 2, "slot_dim": 0}, "slot_dim is 0"),
        ({"num_slots": 2, "num_heads": 3}, "slot_dim = 8 does not divide by num_heads = 3"),
        ({"num_slots": 2, "num_heads": 3, "slot_dim": 6}, "channels = 8 does not divide by num_heads = 3"),
        ({"num_slots": 2, "etf_for": "keys"}, "etf_for is 'keys'"),
        ({"num_slots": 2, "temperature": 0.0}, "temperature is 0.0"),
        ({"num_slots": 2, "pair_gate": True}, "pair_gate tells .* it needs balanced=True"),
        ({"num_slots": 2, "pair_gate": True, "balanced": True, "task_gate": True}, "neither would learn; choose one"),
        ({"num_slots": 2, "projection": "pca", "etf_vertices": 5}, "projection is 'pca'"),
        ({"num_slots": 2, "projection": "learned"}, "etf_vertices is None"),
        ({"num_slots": 2, "projection": "orthonormal", "etf_vertices": 10}, r"rank is 9; it must be in \[1, 8\]"),
        ({"num_slots": 2, "etf_vertices": 0}, "at least 2 vertices"),
        ({"num_slots": 2, "etf_vertices": 10}, "at most 9 vertices"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        KEM(**options).init(jax.random.key(0), make_features())


def test_no_interaction_is_the_identity_and_its_mlp_mixes_nothing():
    features = make_features()
    module = INTERACTIONS["none"]()
    assert not module.init(jax.random.key(0), features)
    assert all(module.apply({}, features)[name] is features[name] for name in features)
    wide = INTERACTIONS["none"](mlp_width=6)
    variables = initialise(wide, features)
    apply = jit(wide.apply)
    before = apply(variables, features)
    changed = {**features, "a": features["a"] * np.array([2, 1, 1, 1, 1], np.float32)[:, None]}
    after = apply(variables, changed)
    assert np.array_equal(after["b"], before["b"])
    assert np.array_equal(after["a"][:, 1:], before["a"][:, 1:])
    assert not np.array_equal(after["a"][:, 0], before["a"][:, 0])


def test_within_tasks_is_a_kem_of_each_task_alone():
    features = make_features()
    options = {"num_slots": 3, "num_heads": 2, "top_k": 4}
    module = INTERACTIONS["within_tasks"](**options)
    variables = initialise(module, features)
    found = jit(module.apply)(variables, features)
    alone = {"params": variables["params"]["kem"]}
    for name, value in features.items():
        expected = jit(KEM(**options).apply)(alone, {name: value})[name]
        np.testing.assert_allclose(found[name], expected, rtol=0, atol=1000 * EPS32)


# ---- KEM's properties ----------------------------------------------------------------------------------------------


def test_parameter_tree():
    module = KEM(4, num_heads=2, slot_dim=12, etf_vertices=5)
    variables = jax.eval_shape(module.init, jax.random.key(0), make_features())
    shapes = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf.shape
              for p, leaf in jax.tree_util.tree_leaves_with_path(variables)}  # fmt: skip
    assert shapes == {
        "params/slots": (4, 12),
        "params/retrieve/query/kernel": (12, 12),
        "params/retrieve/key/kernel": (5, 12),
        "params/retrieve/value/kernel": (5, 12),
        "params/write/query/kernel": (5, 12),
        "params/write/key/kernel": (12, 12),
        "params/write/value/kernel": (12, 8),
        "constants/etf/vertices": (8, 5),
    }


def test_slots_start_orthogonal_and_queries_with_unit_variance():
    """float32 QR leaves rows orthogonal to about width eps. A query entry has variance 1 by the LeCun start, and L d
    independent entries estimate it to sqrt(2 / (L d)); five standard errors are allowed."""
    width, number = 32, 80
    features = {"a": np.ones((1, 2, width), np.float32)}
    params = jit(KEM(number, slot_dim=width).init)(jax.random.key(0), features)["params"]
    slots = np.asarray(params["slots"], np.float64)
    for start in range(0, number, width):  # blocks of 32, 32 and 16 rows
        block = slots[start : start + width]
        np.testing.assert_allclose(block @ block.T, width * np.eye(len(block)), atol=8 * width * width * EPS32)
    assert not np.allclose(slots[:width], slots[width : 2 * width])
    queries = slots @ np.asarray(params["retrieve"]["query"]["kernel"], np.float64)
    np.testing.assert_allclose(np.mean(queries[:width] ** 2), 1, atol=5 * np.sqrt(2 / width**2))


@pytest.mark.parametrize("options", [{"task_gate": True}, {"balanced": True, "slot_exchange": True, "pair_gate": True}])
def test_gates_start_as_the_identity(options):
    """And learn at once: each has a gradient, though nothing behind them has one yet."""
    features = make_features()
    module = KEM(3, top_k=4, **options)
    variables = jit(module.init)(jax.random.key(0), features)

    def loss(params):
        outputs = module.apply({"params": params}, features)
        return sum(jnp.sum(jnp.sin(value)) for value in outputs.values()), outputs

    gradient, outputs = jit(jax.grad(loss, has_aux=True))(variables["params"])
    assert all(np.array_equal(outputs[name], features[name]) for name in features)
    gates = [name for name in gradient if "_gate_" in name]
    assert len(gates) == len(features) ** (2 if module.pair_gate else 1)
    assert all(np.all(gradient[name] != 0) for name in gates)
    assert not np.any(gradient["write"]["value"]["kernel"])


def test_top_k_of_all_tokens_is_plain_softmax_bitwise():
    features = make_features()
    variables = initialise(KEM(3, num_heads=2), features)
    tokens = sum(int(np.prod(shape[1:-1])) for shape in RAGGED.values())
    plain, exact, more = (
        jit(KEM(3, num_heads=2, top_k=k).apply)(variables, features) for k in (None, tokens, tokens + 5)
    )
    for name in RAGGED:
        assert np.array_equal(plain[name], exact[name])
        assert np.array_equal(plain[name], more[name])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ties_go_to_the_lowest_token(dtype):
    """Tokens 0..3 score 0 and 4..7 score 1: of the equal ones the first are kept, and nothing beyond k."""
    key = np.repeat([0, 1], 8).reshape(1, 8, 1, 2).astype(dtype)
    value = np.arange(8).reshape(1, 8, 1, 1).astype(dtype)
    query = np.full((1, 1, 1, 2), 0.5**0.5, dtype)
    for k, kept in ((2, {4, 5}), (5, {4, 5, 6, 7, 0}), (7, {4, 5, 6, 7, 0, 1, 2})):
        output, weights, index = jit(topk_attention, static_argnums=3)(query, key, value, k)
        assert set(np.asarray(index).ravel().tolist()) == kept
        assert weights.shape == (1, 1, 1, k)
        assert weights.dtype == jnp.float32
        assert output.dtype == dtype


def test_unselected_tokens_get_no_gradient_through_retrieve():
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(2, n, 2, 4)).astype(np.float32) for n in (3, 9, 9))

    def loss(key, value):
        output, _, index = topk_attention(query, key, value, 2)
        return jnp.sum(jnp.sin(output)), index

    (of_key, of_value), index = jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(key, value)
    chosen = np.zeros((2, 9, 2), bool)
    for b, head in itertools.product(range(2), range(2)):
        chosen[b, np.unique(np.asarray(index)[b, head]), head] = True
    assert 0 < chosen.sum() < chosen.size
    for gradient in (of_key, of_value):
        assert np.all(np.asarray(gradient)[~chosen] == 0)
        assert np.all(np.any(np.asarray(gradient)[chosen] != 0, axis=-1))


def test_permuting_the_tokens_of_a_task_permutes_its_output():
    """The same numbers in another order of summation."""
    module, _ = CASES["ETF for all"]
    features, variables, _, (_, _, _, largest) = clear_case("ETF for all")
    order = np.random.default_rng(2).permutation(5)
    apply = jit(module.apply)
    straight = apply(variables, features)
    permuted = apply(variables, {**features, "a": features["a"][:, order]})
    bound = 2 * rounding(module, largest)
    np.testing.assert_allclose(permuted["a"], np.asarray(straight["a"])[:, order], rtol=0, atol=bound)
    np.testing.assert_allclose(permuted["b"], straight["b"], rtol=0, atol=bound)


def test_the_order_of_tasks_does_not_matter():
    """jit sorts the keys of a mapping: embeddings and gates must follow their task, not their place."""
    module, shapes = CASES["all options"]
    features, variables, _, (expected, _, _, largest) = clear_case("all options")
    found = jit(module.apply)(variables, features)
    for name in shapes:
        np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=rounding(module, largest))


def test_bfloat16_is_close_to_float32_with_a_float32_softmax():
    """Every stored value is rounded to bfloat16 (u = 2^-8): features, five products and the weights, some twelve
    roundings in a chain, of intermediates of at most M, through scores: 12 u M^2 with plain softmax (a selection
    could flip)."""
    features = {name: jnp.asarray(value, jnp.bfloat16) for name, value in make_features().items()}
    wide = {name: np.asarray(value, np.float32) for name, value in features.items()}
    module = KEM(3, num_heads=2)
    variables = jit(module.init)(jax.random.key(0), wide)
    expected, _, _, largest = reference(module, variables, wide)
    low = module.clone(dtype=jnp.bfloat16)
    outputs, sown = jit(functools.partial(low.apply, mutable=["intermediates"]))(variables, features)
    for name in RAGGED:
        assert outputs[name].dtype == jnp.bfloat16
        np.testing.assert_allclose(
            np.asarray(outputs[name], np.float64), expected[name], rtol=0, atol=12 * 2**-8 * largest**2
        )
    for which in ("retrieve_weights", "write_weights"):
        (weights,) = sown["intermediates"][which]
        assert weights.dtype == jnp.float32
        np.testing.assert_allclose(weights.sum(axis=-1), 1, atol=32 * EPS32)  # bfloat16 weights would miss by 2^-8


def test_diagnostics_are_sown_once_a_round_and_not_by_init():
    module = KEM(3, top_k=4, rounds=2)
    features = make_features()
    variables = jit(module.init)(jax.random.key(0), features)
    assert set(variables) == {"params"}
    _, sown = jit(functools.partial(module.apply, mutable=["intermediates"]))(variables, features)
    shapes = {name: [value.shape for value in values] for name, values in sown["intermediates"].items()}
    assert shapes == {
        "retrieve_weights": [(2, 1, 3, 4)] * 2,
        "retrieve_index": [(2, 1, 3, 4)] * 2,
        "readout": [(2, 3, 8)] * 2,
        "write_weights": [(2, 1, 15, 3)] * 2,
        "update_ratio": [(2,)] * 2,
    }


# ---- KEM inside JAX's and Flax's transformations -------------------------------------------------------------------


@pytest.mark.eight_devices
def test_kem_under_vmap_pmap_shard_map_and_remat():
    """Examples do not see each other, so each way to split the batch gives the batch's numbers up to rounding."""
    module = KEM(3, num_heads=2, top_k=4, etf_vertices=5)
    features = make_features({"a": (8, 2, 3, CHANNELS), "b": (8, 4, CHANNELS)})
    variables = initialise(module, features)
    expected = jit(module.apply)(variables, features)

    def one(example):
        outputs = module.apply(variables, jax.tree.map(lambda x: x[None], example))
        return jax.tree.map(lambda x: x[0], outputs)

    split = jax.tree.map(lambda x: x[:, None], features)
    ways = {
        "vmap": jit(jax.vmap(one))(features),
        "pmap": jax.tree.map(lambda x: np.asarray(x)[:, 0], jax.pmap(lambda f: module.apply(variables, f))(split)),
        "shard_map": jit(
            jax.shard_map(
                lambda f: module.apply(variables, f),
                mesh=jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,)),
                in_specs=P("rows"),
                out_specs=P("rows"),
            )
        )(features),
        "remat": jit(nn.remat(KEM)(3, num_heads=2, top_k=4, etf_vertices=5).apply)(variables, features),
    }
    for way, outputs in ways.items():
        for name in features:
            np.testing.assert_allclose(outputs[name], expected[name], rtol=0, atol=1000 * EPS32, err_msg=way)


class Stack(nn.Module):
    """Two KEMs in a scan: `params` get a leading axis, `constants` are one for all."""

    @nn.compact
    def __call__(self, features):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, carry, _):
                return KEM(3, top_k=4, etf_vertices=5, name="kem")(carry), None

        layers = nn.scan(
            Layer, variable_axes={"params": 0}, variable_broadcast="constants", split_rngs={"params": True}, length=2
        )
        return layers(name="layers")(features, None)[0]


def test_kem_under_scan_carries_its_constants():
    features = make_features()
    variables = jit(Stack().init)(jax.random.key(0), features)
    assert variables["params"]["layers"]["kem"]["slots"].shape == (2, 3, 8)
    assert variables["constants"]["layers"]["kem"]["etf"]["vertices"].shape == (8, 5)
    outputs = jit(Stack().apply)(variables, features)
    by_hand = features
    for i in range(2):
        layer = {
            "params": jax.tree.map(lambda x: x[i], variables["params"]["layers"]["kem"]),  # noqa: B023
            "constants": variables["constants"]["layers"]["kem"],
        }
        by_hand = jit(KEM(3, top_k=4, etf_vertices=5).apply)(layer, by_hand)
    for name in features:
        np.testing.assert_allclose(outputs[name], by_hand[name], rtol=0, atol=1000 * EPS32)


def test_kem_in_nnx():
    """`constants` become variables of a type of their own, apart from nnx.Param, so that no optimiser sees them."""
    features = make_features()
    module = KEM(3, top_k=4, etf_vertices=5)
    bridged = nnx.jit(lambda: nnx.bridge.ToNNX(module, rngs=nnx.Rngs(0)).lazy_init(features))()
    _, params, rest = nnx.split(bridged, nnx.Param, ...)
    assert "slots" in params
    assert any("vertices" in path for path, _ in nnx.to_flat_state(rest))
    outputs = nnx.jit(lambda model, inputs: model(inputs))(bridged, features)
    for name, value in features.items():
        assert outputs[name].shape == value.shape


# ---- memory --------------------------------------------------------------------------------------------------------


def largest_array(function, *args):
    """Elements of the largest array in the function's program, the programs inside it included."""
    sizes = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            sizes.extend(int(np.prod(v.aval.shape)) for v in equation.outvars)
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                walk(getattr(inner, "jaxpr", inner)) if hasattr(inner, "eqns") or hasattr(inner, "jaxpr") else None

    walk(jax.make_jaxpr(function)(*args).jaxpr)
    return max(sizes)


@pytest.mark.parametrize(
    ("module", "is_quadratic"),
    [
        (KEM(4, num_heads=2, top_k=8), False),
        (KEM(4, num_heads=2), False),
        (KEM(4, num_heads=2, top_k=8, etf_vertices=9, pre_norm=True, rounds=2), False),
        (CrossTaskAttention(2, query_chunk=32), False),
        (CrossTaskAttention(2, query_chunk=None), True),
    ],
)
def test_memory_is_linear_in_the_tokens(module, is_quadratic):
    """No array of n_s x n_s elements in the program of value and gradient, unless attention is dense and unchunked."""
    tokens = 512
    features = {"a": jnp.zeros((1, tokens // 2, CHANNELS)), "b": jnp.zeros((1, 8, tokens // 16, CHANNELS))}
    variables = jax.eval_shape(module.init, jax.random.key(0), features)

    def loss(v, f):
        return sum(jnp.sum(value) for value in module.apply(v, f).values())

    largest = largest_array(jax.grad(loss, argnums=1), variables, features)
    assert (largest >= tokens**2) == is_quadratic
    if not is_quadratic:
        double = jax.tree.map(lambda x: jnp.concatenate([x, x], axis=1), features)
        assert largest_array(jax.grad(loss, argnums=1), variables, double) == 2 * largest


@pytest.mark.parametrize("chunk", [1, 4, 5, 11, 12])
def test_chunked_attention_equals_dense(chunk):
    """11 queries, so that 4 and 5 do not divide them. The same sums in a program of another shape: every number is a
    sum of at most 13 + 4 terms of size O(10)."""
    rng = np.random.default_rng(0)
    query, key, value = (rng.normal(size=(2, n, 2, w)).astype(np.float32) for n, w in ((11, 4), (13, 4), (13, 3)))

    def loss(chunk, *args):
        output = attention(*args, chunk=chunk)
        return jnp.sum(jnp.sin(output)), output

    dense, chunked = (
        jit(jax.value_and_grad(functools.partial(loss, c), argnums=(0, 1, 2), has_aux=True))(query, key, value)
        for c in (None, chunk)
    )
    for a, b in zip(jax.tree.leaves(dense), jax.tree.leaves(chunked), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=17 * 10 * EPS32)


@pytest.mark.parametrize(
    ("count", "chunk", "expected"),
    [
        (2304, 1024, 768),  # six tasks of 16 x 24: three groups without a row too many
        (1009, 128, 128),  # 16 x 63 and a row: no more groups than 128 at a time need
        (64, 24, 24),
        (40, 33, 24),  # even halves would be of 20
        (13, 5, 5),  # fewer than EVEN: as asked
    ],
)
def test_groups_are_as_few_as_allowed_and_even(count, chunk, expected):
    sizes = []

    def identity(part):
        sizes.append(part.shape[1])
        return part

    entries = jnp.arange(2.0 * count).reshape(2, count)
    np.testing.assert_array_equal(in_groups(identity, (entries,), chunk), entries)
    assert set(sizes) == {expected}


def test_chunk_must_be_positive():
    with pytest.raises(ValueError, match="chunk is 0"):
        attention(jnp.ones((1, 2, 1, 2)), jnp.ones((1, 2, 1, 2)), jnp.ones((1, 2, 1, 2)), chunk=0)


def test_cross_attention_matches_a_reference():
    """float64: F + softmax((F W_q)(F W_k)^T / sqrt(C / h)) (F W_v) W_o over the tokens of all tasks."""
    features = make_features()
    with jax.enable_x64(True):
        module = CrossTaskAttention(2, query_chunk=4, dtype=jnp.float64)
        wide = as_float64(features)
        variables = as_float64(initialise(module, wide))
        outputs = jit(module.apply)(variables, wide)
    kernels = {name: leaf["kernel"] for name, leaf in variables["params"].items()}
    names = sorted(features)  # as jit orders them; any order gives the same
    tokens = np.concatenate([wide[n].reshape(2, -1, CHANNELS) for n in names], axis=1)
    for b in range(2):
        mixed = np.zeros_like(tokens[b])
        for cut in (slice(0, 4), slice(4, 8)):
            query, key, value = ((tokens[b] @ kernels[n])[:, cut] for n in ("query", "key", "value"))
            for row in range(len(query)):
                mixed[row, cut] = softmax(key @ query[row] / 2) @ value
        expected = tokens[b] + mixed @ kernels["output"]
        found = np.concatenate([np.asarray(outputs[n][b]).reshape(-1, CHANNELS) for n in names])
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12)
