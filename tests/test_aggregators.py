"""Aggregators as Optax transformations, task gradients by parameters and by representation, on trees and meshes."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from optax.experimental import aggregating

from sgw_jax.multi_objective import (
    AGGREGATORS,
    METHODS,
    Weighting,
    conflict_rate,
    cosines,
    ema_weights,
    every_k,
    from_weighting,
    gramian,
    method,
    mgda,
    nash_mtl,
    representation_gradients,
    task_gradients,
    upgrad,
    weighted_sum_of,
    weights,
)

EPS32 = float(np.finfo(np.float32).eps)
TASKS = 3
LOSSES = jnp.array([1.0, 2.0, 0.5])


def tree(seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    return {"a": rng.normal(size=(TASKS, 4, 6)).astype(dtype), "b": {"c": rng.normal(size=(TASKS, 5)).astype(dtype)}}


def flat(jacobian):
    return np.concatenate([np.asarray(leaf, np.float64).reshape(TASKS, -1) for leaf in jax.tree.leaves(jacobian)], 1)


PARAMS = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape[1:]), tree())


def test_gramian_of_a_tree():
    jacobian = tree()
    expected = flat(jacobian) @ flat(jacobian).T
    np.testing.assert_allclose(jax.jit(gramian)(jacobian), expected, rtol=0, atol=29 * 8 * EPS32 * expected.max())
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), jacobian)
    found = jax.jit(gramian)(half)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, flat(half) @ flat(half).T, rtol=0, atol=29 * 8 * EPS32 * expected.max())
    with pytest.raises(ValueError, match="same leading axis of tasks"):
        gramian({"a": jnp.zeros((2, 3)), "b": jnp.zeros((3, 3))})
    angles = np.asarray(cosines(jnp.array([[4.0, -2.0, 0], [-2.0, 9.0, 0], [0, 0, 0]])))
    np.testing.assert_allclose(angles, [[1, -1 / 3, 0], [-1 / 3, 1, 0], [0, 0, 0]], rtol=4 * EPS32)
    assert conflict_rate(jnp.array([[4.0, -2.0, 0], [-2.0, 9.0, 0], [0, 0, 0]])) == 1.0
    assert conflict_rate(jnp.array([[4.0, -2.0, 1], [-2.0, 9.0, 1], [1, 1, 1]])) == pytest.approx(1 / 3)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_contract(name):
    """An Optax aggregator that goes first in a chain, under jit and scan: structures, dtypes, masks, weights."""
    aggregator = AGGREGATORS[name](TASKS)
    assert isinstance(aggregator, aggregating.Aggregator)
    chain = optax.chain(aggregator, optax.clip_by_global_norm(1.0), optax.adamw(1e-2))
    jacobian = tree()

    def step(carry, mask):
        params, state = carry
        updates, state = chain.update(jacobian, state, params, losses=LOSSES, task_mask=mask)
        return (optax.apply_updates(params, updates), state), (state[0].weights, state[0].stationary)

    masks = jnp.array([[True] * 3, [True, False, True], [False] * 3, [True] * 3])
    (params, state), (found, flags) = jax.jit(lambda c: jax.lax.scan(step, c, masks))((PARAMS, chain.init(PARAMS)))
    assert jax.tree.structure(params) == jax.tree.structure(PARAMS)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((params, state)) if leaf.dtype == jnp.float32)
    assert found.shape == (4, TASKS)
    assert found[1, 1] == 0
    assert not found[2].any()  # nobody is there
    assert not flags[jnp.array([0, 1, 3])].any()
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), jacobian)
    update, state = aggregator.update(half, aggregator.init(PARAMS), losses=LOSSES)
    assert {leaf.dtype for leaf in jax.tree.leaves(update)} == {jnp.dtype(jnp.bfloat16)}
    expected = np.asarray(state.weights, np.float64) @ flat(half)
    size = np.abs(expected).max()
    found = np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(update)])
    np.testing.assert_allclose(found, expected, rtol=0, atol=size * 2**-8)  # one rounding to bfloat16
    with pytest.raises(ValueError, match="made for 3 tasks, but the Jacobian has 2 rows"):
        aggregator.update(jax.tree.map(lambda leaf: leaf[:2], jacobian), aggregator.init(PARAMS), losses=LOSSES)


def test_a_member_is_named_once():
    """Its aggregator, its function and what they are called all follow from one line of `METHODS`."""
    from sgw_jax import multi_objective

    assert list(AGGREGATORS) == list(METHODS)
    assert set(weights.__all__) == {multi_objective.public_name(name) for name in METHODS if name != "gradnorm"}
    for name, member in METHODS.items():
        public = multi_objective.public_name(name)
        assert public in multi_objective.__all__
        assert getattr(multi_objective, public) is AGGREGATORS[name] is member.aggregator
        assert member.aggregator.__name__ == name
        if member.weights is not None:
            assert getattr(weights, public) is member.weights
            assert f"`{name}_weights`" in member.aggregator.__doc__


def test_a_function_of_the_losses_gets_them():
    def yours_weights(matrix, *, losses, mask=None):
        return losses / jnp.diagonal(matrix)

    aggregator = method(yours_weights).aggregator(TASKS)
    _, state = aggregator.update(tree(), aggregator.init(PARAMS), losses=LOSSES)
    np.testing.assert_array_equal(state.weights, LOSSES / jnp.diagonal(gramian(tree())))
    with pytest.raises(ValueError, match="yours: the update needs losses="):
        aggregator.update(tree(), aggregator.init(PARAMS))


@pytest.mark.parametrize("name", [n for n in AGGREGATORS if n not in ("pcgrad", "gradvac", "gradnorm", "db_mtl")])
def test_many_parameters(name):
    """Inside one compiled program, as in training, the Gramian of long rows is summed as well as in one of its own: the
    weights are off by that error d and T roundings, by the cosines' least eigenvalue, for each of a few uses."""
    jacobian = np.random.default_rng(0).normal(size=(TASKS, 3_000_000)).astype(np.float32)
    jacobian[2] -= 1.2 * jacobian[0] + jacobian[1]
    wide = jacobian.astype(np.float64)
    matrix = wide @ wide.T
    norms = np.sqrt(np.diag(matrix))
    least = np.linalg.eigvalsh(matrix / np.outer(norms, norms))[0]
    summed = np.asarray(jax.jit(gramian)({"w": jacobian}), np.float64)
    off = np.abs((summed - matrix) / np.outer(norms, norms)).max()
    aggregator = AGGREGATORS[name](TASKS)
    _, state = jax.jit(aggregator.update)({"w": jacobian}, aggregator.init(None))
    expected = np.asarray(METHODS[name].weights(matrix.astype(np.float32)), np.float64)
    error = np.linalg.norm((state.weights - expected) * norms)
    assert error <= 4 * TASKS * (off + EPS32) / least * np.linalg.norm(expected * norms)


def test_the_stationary_flag():
    jacobian = tree()
    opposed = jax.tree.map(lambda leaf: jnp.stack([leaf[0], leaf[1], -leaf[0] - leaf[1]]), jacobian)
    for aggregator in (upgrad(TASKS), nash_mtl(TASKS), mgda(TASKS)):
        _, state = jax.jit(aggregator.update)(opposed, aggregator.init(PARAMS))
        assert state.stationary
        _, state = jax.jit(aggregator.update)(jacobian, aggregator.init(PARAMS))
        assert not state.stationary


def test_gradnorm_descends_the_distance_of_lengths():
    """Two updates against the papers' formula in float64: theta moves by the slope of the distance at held targets, by
    the mean length."""
    jacobian, alpha, rate = tree(), 1.5, 0.1
    norms = np.linalg.norm(flat(jacobian), axis=1)
    shares = np.array([0.5, 1.0, 1.5])
    aggregator = AGGREGATORS["gradnorm"](TASKS, alpha=alpha, learning_rate=rate, preference=shares)
    update, state, theta = jax.jit(aggregator.update), aggregator.init(PARAMS), np.zeros(TASKS)
    for losses in (np.asarray(LOSSES), np.array([0.5, 2.5, 0.1])):
        _, state = update(jacobian, state, losses=jnp.asarray(losses))
        progress = losses / np.asarray(LOSSES)
        w = TASKS * np.exp(theta) / np.exp(theta).sum()
        mean = np.mean(w * norms)
        signs = np.sign(w * norms - shares * mean * (progress / progress.mean()) ** alpha)
        # d w_i / d theta_j = w_i (delta_ij - w_j / T)
        theta = theta - rate * (signs * norms * w - w / TASKS * np.sum(signs * norms * w)) / mean
        np.testing.assert_allclose(state.weights, TASKS * np.exp(theta) / np.exp(theta).sum(), rtol=64 * EPS32)


def test_without_a_number_of_tasks_the_state_is_empty_and_the_update_the_same():
    jacobian = tree()
    plain, counted = upgrad(), upgrad(TASKS)
    found, state = plain.update(jacobian, plain.init(PARAMS))
    expected, full = counted.update(jacobian, counted.init(PARAMS))
    assert state.weights is None
    np.testing.assert_array_equal(full.weights, weights.upgrad(gramian(jacobian)))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_users_own_weighting():
    aggregator = from_weighting(lambda matrix, mask: jnp.ones(len(matrix)) / jnp.sqrt(jnp.diagonal(matrix)), TASKS)
    update, _ = aggregator.update(tree(), aggregator.init(PARAMS))
    unit = flat(tree()) / np.linalg.norm(flat(tree()), axis=1, keepdims=True)
    found = np.concatenate([np.asarray(leaf).ravel() for leaf in jax.tree.leaves(update)])
    np.testing.assert_allclose(found, unit.sum(0), rtol=0, atol=64 * EPS32)


def given(values):
    """A weighting that gives one value after another."""
    table = jnp.asarray(values)
    return from_weighting(
        Weighting(lambda n: jnp.zeros((), jnp.int32), lambda g, i, *, losses, mask, key: (table[i], i + 1)), 2
    )


def run_wrapper(wrapper, masks):
    state, found = wrapper.init(None), []
    jacobian = {"x": jnp.eye(2)}
    for mask in masks:
        update, state = jax.jit(wrapper.update)(jacobian, state, task_mask=jnp.array(mask))
        found.append(np.asarray(update["x"]))
    return np.array(found)


def test_ema_weights():
    values = [[1.0, 4.0], [3.0, 0.0], [5.0, 2.0]]
    both, first = [True, True], [True, False]
    found = run_wrapper(ema_weights(given(values), 0.75, 2), [both, both, both])
    np.testing.assert_allclose(found, [[1, 4], [1.5, 3], [2.375, 2.75]], rtol=8 * EPS32)
    found = run_wrapper(ema_weights(given(values), 0.75, 2), [first, both, both])
    np.testing.assert_allclose(found, [[1, 0], [1.5, 0], [2.375, 0.5]], rtol=8 * EPS32)
    with pytest.raises(ValueError, match="decay is 1"):
        ema_weights(given(values), 1.0, 2)


def test_every_k():
    values = [[1.0, 4.0], [3.0, 0.0], [5.0, 2.0]]
    both, first = [True, True], [True, False]
    found = run_wrapper(every_k(given(values), 2, 2), [both, both, both, both, both])
    np.testing.assert_array_equal(found, [[1, 4], [1, 4], [3, 0], [3, 0], [5, 2]])
    found = run_wrapper(every_k(given(values), 2, 2), [first, both, both])  # until known, the mean of the others
    np.testing.assert_array_equal(found, [[1, 0], [1, 1], [3, 0]])
    values[1] = [3.0, 6.0]
    found = run_wrapper(every_k(given(values), 3, 2), [first, [False, True], both, both])  # none has a weight: anew
    np.testing.assert_array_equal(found, [[1, 0], [0, 6], [6, 6], [5, 2]])
    with pytest.raises(ValueError, match="k is 0"):
        every_k(given(values), 0, 2)


# ---- gradients -----------------------------------------------------------------------------------------------------


def network(params, x):
    """Two layers shared by three heads."""
    return jnp.tanh(jnp.tanh(x @ params["one"]) @ params["two"])


def heads(z, shared, own):
    z = jnp.sin(z @ shared)
    return jnp.stack([jnp.mean((z @ own[i] - i) ** 2) for i in range(TASKS)])


FORMS = {"vector": lambda losses: losses, "list": list, "tuple": tuple}


@pytest.fixture
def problem():
    rng = np.random.default_rng(0)
    trunk = {"one": rng.normal(size=(5, 7)), "two": rng.normal(size=(7, 6))}
    params = (trunk, rng.normal(size=(6, 6)), [rng.normal(size=(6, 2)) for _ in range(TASKS)])
    return jax.tree.map(lambda x: x.astype(np.float32), (params, rng.normal(size=(8, 5))))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ["map", "vmap", "unroll"])
def test_task_gradients(problem, mode, form):
    (trunk, shared, own), x = problem

    def losses(params, x):
        found = heads(network(params[0], x), params[1], own)
        return found, {"doubled": 2 * found}

    def formed(params, x):
        found, aux = losses(params, x)
        return FORMS[form](found), aux

    params = (trunk, shared)
    call = jax.jit(lambda p, x: task_gradients(formed, p, x, mode=mode, has_aux=True))
    values, jacobian, aux = call(params, x)
    np.testing.assert_allclose(values, losses(params, x)[0], rtol=32 * EPS32)
    np.testing.assert_allclose(aux["doubled"], 2 * values, rtol=32 * EPS32)
    for task in range(TASKS):
        expected = jax.grad(lambda p: losses(p, x)[0][task])(params)  # noqa: B023
        for found, leaf in zip(jax.tree.leaves(jacobian), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(found[task], leaf, rtol=0, atol=256 * EPS32)
    with pytest.raises(ValueError, match=r"shape \(\); they must be one vector"):
        task_gradients(lambda p: jnp.sum(p), jnp.ones(3), mode=mode)
    with pytest.raises(ValueError, match=r"shape \[\(\), \(3,\)\]; they must be one vector, or scalars"):
        task_gradients(lambda p: [jnp.sum(p), p], jnp.ones(3), mode=mode)
    with pytest.raises(ValueError, match="mode is 'loop'"):
        task_gradients(lambda p: p, jnp.ones(3), mode="loop")


@pytest.mark.parametrize(("mode", "form"), [("map", "vector"), ("unroll", "list")])
def test_representation_gradients(problem, mode, form):
    """G is the per-sample Gramian of dL/dz; the trunk's gradient is that of the weighted losses; own heads are not
    weighted."""
    (trunk, shared, own), x = problem
    formed = lambda z, s, o: FORMS[form](heads(z, s, o))  # noqa: E731
    weighting = lambda matrix, losses: (weights.upgrad(matrix), losses)  # noqa: E731
    found = jax.jit(
        lambda t, s, o: representation_gradients(lambda p: network(p, x), formed, t, s, o, weighting, mode=mode)
    )(trunk, shared, own)
    z = network(trunk, x)
    rows = np.asarray(jax.jacobian(heads)(z, shared, own), np.float64).reshape(TASKS, -1)
    scale = np.abs(rows @ rows.T).max()
    np.testing.assert_allclose(found.gramian, rows @ rows.T, rtol=0, atol=64 * EPS32 * scale)
    np.testing.assert_array_equal(found.weights, jax.jit(weights.upgrad)(found.gramian))
    np.testing.assert_array_equal(found.state, found.losses)

    def weighted(trunk, shared):
        return jnp.sum(found.weights * heads(network(trunk, x), shared, own))

    expected = jax.grad(weighted, (0, 1))(trunk, shared)
    for leaf, other in zip(jax.tree.leaves((found.trunk, found.shared)), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=512 * EPS32)
    unweighted = jax.grad(lambda o: jnp.sum(heads(z, shared, o)))(own)
    for leaf, other in zip(found.own, unweighted, strict=True):
        np.testing.assert_allclose(leaf, other, rtol=0, atol=512 * EPS32)


def test_a_task_of_weight_zero_adds_nothing_even_if_it_is_not_finite():
    jacobian = {"x": jnp.array([[1.0, 2.0], [jnp.nan, jnp.inf]])}
    np.testing.assert_array_equal(weighted_sum_of(jacobian, jnp.array([2.0, 0.0]))["x"], [2, 4])


def test_on_a_mesh_the_jacobian_stays_sharded(problem):
    """Eight devices, parameters split over four: the same update, in the parameters' sharding, and no collective of the
    compiled program moves more than the T x T numbers of the Gramian (gradients come from data that is everywhere)."""
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    jacobian = {"w": np.random.default_rng(0).normal(size=(TASKS, 16, 8)).astype(np.float32)}
    aggregator = upgrad(TASKS)
    expected, state = jax.jit(aggregator.update)(jacobian, aggregator.init(None))
    rows = NamedSharding(mesh, P(None, "fsdp"))
    run = jax.jit(aggregator.update, out_shardings=(NamedSharding(mesh, P("fsdp")), None))
    placed = jax.device_put(jacobian, rows)
    found, other = run(placed, aggregator.init(None))
    np.testing.assert_allclose(found["w"], expected["w"], rtol=0, atol=64 * EPS32)
    np.testing.assert_allclose(other.weights, state.weights, rtol=64 * EPS32)
    assert found["w"].sharding.spec == P("fsdp")
    program = run.lower(placed, aggregator.init(None)).compile().as_text()
    for line in re.findall(r".*(?:all-gather|all-reduce|all-to-all|collective-permute)(?:-start)?\(.*", program):
        sizes = [
            np.prod([int(n) for n in dims.split(",") if n] or [1]) for dims in re.findall(r"f32\[([\d,]*)\]", line)
        ]
        assert max(sizes) <= TASKS * TASKS, line


def test_the_example_of_the_documentation():
    text = (Path(__file__).parent.parent / "docs" / "objectives.md").read_text(encoding="utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    assert len([line for line in example.splitlines() if line]) <= 20
    names = {}
    exec(example, names)
    first = names["losses"]({k: jnp.zeros(s) for k, s in names["shapes"].items()}, jnp.ones((2, 4)))
    assert np.all(np.asarray(names["values"]) < np.asarray(first) / 2)
