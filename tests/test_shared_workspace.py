"""SharedWorkspace against the authors' maths in NumPy float64, fed from a state_dict in their names and layout."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgw_jax.interactions.shared_workspace import SharedWorkspace, WorkspaceInteraction
from sgw_jax.interactions.shared_workspace_checkpoint import shared_workspace_params

EPS32 = float(np.finfo(np.float32).eps)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})
BATCH, TOKENS, INPUTS = 2, 7, 5

CASES = {
    "soft, unit gate": SharedWorkspace(3, 2, 4),
    "hard, unit gate": SharedWorkspace(3, 2, 4, top_k=2),
    "hard, memory gate, wide keys": SharedWorkspace(3, 2, 4, key_dim=6, top_k=3, gate="memory"),
    "no gate, rounds and layers": SharedWorkspace(4, 2, 3, key_dim=2, top_k=4, gate=None, mlp_layers=2, rounds=3),
    "everything": SharedWorkspace(5, 1, 4, key_dim=3, top_k=2, gate="unit", mlp_layers=3, rounds=2),
    "top_k of all tokens": SharedWorkspace(2, 2, 2, top_k=TOKENS),
}


def make_state_dict(module, seed=0):
    """Random weights of a module under the authors' names, torch's (out, in) layout, float32."""
    rng = np.random.default_rng(seed)
    width = module.num_heads * module.head_dim
    keys = module.num_heads * (module.key_dim or module.head_dim)
    shapes = {"input_projector": (width, INPUTS), "query_proj": (keys, width), "key_proj": (keys, width)}
    shapes |= {"value_proj": (width, width), "attention_mlp.0": (width, width)}
    found = {}
    for name, shape in shapes.items():
        found[f"{name}.weight"] = rng.normal(size=shape) / np.sqrt(shape[1])
        found[f"{name}.bias"] = 0.3 * rng.normal(size=shape[0])
    for layer in range(1, module.mlp_layers):
        found |= {f"attention_mlp.{layer}.{part}": found[f"attention_mlp.0.{part}"] for part in ("weight", "bias")}
    for name in ("attended_memory_layernorm", "attended_memory_layernorm2"):
        found |= {f"{name}.weight": 1 + 0.3 * rng.normal(size=width), f"{name}.bias": 0.3 * rng.normal(size=width)}
    if module.gate is not None:
        gates = 2 * (width if module.gate == "unit" else 1)
        found["input_gate_projector.w"] = rng.normal(size=width)
        found["input_gate_projector.linear.weight"] = rng.normal(size=(gates, width))
        found["input_gate_projector.linear.bias"] = rng.normal(size=gates)
        found["memory_gate_projector.weight"] = rng.normal(size=(module.num_slots, width, gates))
        found["memory_gate_projector.bias"] = rng.normal(size=(module.num_slots, gates))
        found |= {"input_bias": np.asarray(rng.normal()), "forget_bias": np.asarray(rng.normal())}
    return {name: value.astype(np.float32) for name, value in found.items()}


def reference(module, weights, inputs, initial=None):
    """Steps 0 to 11 of the method, a slot, a head and a token at a time; and the least margin of a selection."""
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    heads, value_dim, key_dim = module.num_heads, module.head_dim, module.key_dim or module.head_dim
    width, margin = heads * value_dim, np.inf

    def linear(name, x):
        return w[f"{name}.weight"] @ x + w[f"{name}.bias"]

    def norm(name, x):
        return (x - x.mean()) / np.sqrt(x.var() + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]

    def sigmoid(x):
        return 1 / (1 + np.exp(-x))

    def attend(to, source, keep):
        nonlocal margin
        result = np.zeros((len(to), width))
        for row, head in itertools.product(range(len(to)), range(heads)):
            cut = slice(head * key_dim, (head + 1) * key_dim)
            scores = np.array([linear("query_proj", to[row])[cut] @ linear("key_proj", s)[cut] for s in source])
            attention = np.exp(scores - scores.max())
            attention /= attention.sum()
            order = sorted(range(len(source)), key=lambda i: (-attention[i], i))
            if keep is not None and keep < len(order):
                margin = min(margin, scores[order[keep - 1]] - scores[order[keep]])
                attention[order[keep:]] = 0
            out = slice(head * value_dim, (head + 1) * value_dim)
            result[row, out] = sum(a * linear("value_proj", s)[out] for a, s in zip(attention, source, strict=True))
        return result

    broadcasts, states = [], []
    for b in range(len(inputs)):
        tokens = [linear("input_projector", x) for x in inputs[b].astype(np.float64)]
        start = np.eye(module.num_slots, width) if initial is None else initial[b].astype(np.float64)
        memory = start
        for _ in range(module.rounds):
            attended = attend(memory, tokens, module.top_k)
            memory = np.stack([norm("attended_memory_layernorm", x) for x in memory + attended])
            thought = memory
            for layer in range(module.mlp_layers):
                thought = np.stack([np.maximum(linear(f"attention_mlp.{layer}", x), 0) for x in thought])
            memory = np.stack([norm("attended_memory_layernorm2", x) for x in memory + thought])
        if module.gate is not None:
            pooled = np.mean([np.maximum(w["input_gate_projector.w"] * x, 0) for x in tokens], axis=0)
            of_inputs = linear("input_gate_projector.linear", pooled)
            gated = []
            for slot in range(module.num_slots):
                of_slot = np.tanh(start[slot]) @ w["memory_gate_projector.weight"][slot]
                both = of_inputs + of_slot + w["memory_gate_projector.bias"][slot]
                half = len(both) // 2
                opened = sigmoid(both[:half] + w["input_bias"])
                kept = sigmoid(both[half:] + w["forget_bias"])
                gated.append(opened * np.tanh(memory[slot]) + kept * start[slot])
            memory = np.stack(gated)
        broadcasts.append(attend(tokens, memory, None))
        states.append(memory)
    return np.stack(broadcasts), np.stack(states), margin


@functools.cache
def clear_case(case, with_slots=False):
    """The first seed none of whose selections is near a tie."""
    module = CASES[case]
    for seed in range(50):
        rng = np.random.default_rng(seed + 1000)
        weights = make_state_dict(module, seed)
        inputs = rng.normal(size=(BATCH, TOKENS, INPUTS)).astype(np.float32)
        state = (BATCH, module.num_slots, module.num_heads * module.head_dim)
        slots = rng.normal(size=state).astype(np.float32) if with_slots else None
        *expected, margin = reference(module, weights, inputs, slots)
        if margin > 1e-3:
            return weights, inputs, slots, expected
    raise AssertionError(f"{case}: no seed keeps every selection away from a tie")


@pytest.mark.parametrize("with_slots", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_authors_maths(case, with_slots):
    """In float64 to 1e-11: up to fifteen sums of ten terms in a chain, through layer norms and exponentials of scores
    up to ten."""
    module = CASES[case]
    weights, inputs, slots, expected = clear_case(case, with_slots)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (shared_workspace_params(weights), inputs, slots))
        found = jit(lambda p, *args: module.clone(dtype=jnp.float64).apply({"params": p}, *args))(*wide)
        for ours, theirs in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-11)


@pytest.mark.parametrize("case", ["hard, unit gate", "hard, memory gate, wide keys", "no gate, rounds and layers"])
def test_parameters_have_the_checkpoints_shapes(case):
    """What `init` makes and what a checkpoint gives are the same tree; in float32 the answers agree."""
    module = CASES[case]
    weights, inputs, _, expected = clear_case(case)
    params = shared_workspace_params(weights)
    made = jax.eval_shape(module.init, jax.random.key(0), inputs)["params"]
    assert jax.tree.map(lambda x: (x.shape, x.dtype), made) == jax.tree.map(lambda x: (x.shape, x.dtype), params)
    for ours, theirs in zip(jit(module.apply)({"params": params}, inputs), expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=module.rounds * 8 * 10 * 100 * EPS32)


def test_the_authors_checkpoint_without_gates_still_holds_the_gates_biases():
    weights = make_state_dict(CASES["no gate, rounds and layers"])
    expected = shared_workspace_params(weights)
    biases = {"input_bias": np.float32(1), "forget_bias": np.float32(0)}
    found = shared_workspace_params(weights | biases)
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    with pytest.raises(ValueError, match=r"shape of input_bias: \(1,\), expected \(\)"):
        shared_workspace_params(weights | biases | {"input_bias": np.ones(1, np.float32)})


def test_the_state_persists():
    """The slots that a call returns may start the next one."""
    module = CASES["hard, unit gate"]
    weights, inputs, _, (_, slots) = clear_case("hard, unit gate")
    expected, after, _ = reference(module, weights, inputs, slots)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (shared_workspace_params(weights), inputs, slots))
        found = jit(lambda p, *args: module.clone(dtype=jnp.float64).apply({"params": p}, *args))(*wide)
    np.testing.assert_allclose(found[0], expected, rtol=0, atol=1e-11)
    np.testing.assert_allclose(found[1], after, rtol=0, atol=1e-11)


def test_interaction_is_residual_and_normalised():
    """x + broadcast(LN(x)) over all tasks' tokens together, slots starting anew in every call."""
    rng = np.random.default_rng(0)
    features = {"b": rng.normal(size=(2, 2, 3, 8)), "a": rng.normal(size=(2, 4, 8))}
    features = {name: value.astype(np.float32) for name, value in features.items()}
    module = WorkspaceInteraction(3, num_heads=2, top_k=4)
    variables = module.init(jax.random.key(0), features)
    tokens = np.concatenate([features["b"].reshape(2, 6, 8), features["a"]], axis=1)
    centred = tokens - tokens.mean(axis=-1, keepdims=True)
    normed = centred / np.sqrt(tokens.var(axis=-1, keepdims=True) + 1e-5)
    broadcast, _ = SharedWorkspace(3, 2, 4, top_k=4).apply({"params": variables["params"]["workspace"]}, normed)
    found = module.apply(variables, features)
    expected = tokens + np.asarray(broadcast)
    np.testing.assert_allclose(found["b"].reshape(2, 6, 8), expected[:, :6], rtol=0, atol=1000 * EPS32)
    np.testing.assert_allclose(found["a"], expected[:, 6:], rtol=0, atol=1000 * EPS32)


def test_more_slots_than_units_start_as_the_authors_do():
    slots = SharedWorkspace(5, 1, 3, gate=None).init_with_output(jax.random.key(0), jnp.ones((1, 2, 4)))[0][1]
    assert slots.shape == (1, 5, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gate": "slot"}, "gate is 'slot'; it must be one of"),
        ({"num_slots": 0}, "num_slots is 0"),
        ({"num_heads": 0}, "num_heads is 0"),
        ({"key_dim": 0}, "key_dim is 0"),
        ({"top_k": 0}, "top_k is 0"),
        ({"rounds": 0}, "rounds is 0"),
        ({"mlp_layers": 0}, "mlp_layers is 0"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SharedWorkspace(**{"num_slots": 3, "num_heads": 2, "head_dim": 4, **options}).init(
            jax.random.key(0), jnp.ones((2, 7, 5))
        )


def test_slots_and_heads_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"initial slots have shape \(3, 8\).*= \(2, 3, 8\)"):
        SharedWorkspace(3, 2, 4).init(jax.random.key(0), jnp.ones((2, 7, 5)), jnp.ones((3, 8)))
    with pytest.raises(ValueError, match="channels = 8 do not divide by num_heads = 3"):
        WorkspaceInteraction(3, num_heads=3).init(jax.random.key(0), {"a": jnp.ones((2, 7, 8))})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("key_proj.bias"), r"missing: key_proj.bias \(8,\)"),
        (lambda d: d.pop("forget_bias"), r"missing: forget_bias \(\)"),
        (lambda d: d.pop("input_gate_projector.w"), r"missing: input_gate_projector.w \(8,\)"),
        (lambda d: d.update({"pos_emb": np.zeros(3)}), r"unexpected: pos_emb \(3,\)"),
        (
            lambda d: d.update({"value_proj.weight": np.zeros((8, 9))}),
            r"value_proj.weight: \(8, 9\), expected \(8, 8\)",
        ),
        (lambda d: d.update({"key_proj.weight": np.zeros((4, 8))}), r"key_proj.weight: \(4, 8\), expected \(8, 8\)"),
        (lambda d: d.update({"attention_mlp.1.bias": np.ones(8, np.float32)}), "layers must be tied"),
        (lambda d: d.clear(), "missing: value_proj.weight"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(change, message):
    weights = make_state_dict(SharedWorkspace(3, 2, 4, mlp_layers=2))
    change(weights)
    with pytest.raises(ValueError, match=message):
        shared_workspace_params(weights)
