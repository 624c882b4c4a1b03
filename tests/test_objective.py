"""Objectives in the training step: whose parameters they weigh, against gradients task by task; accumulation, missing
labels, bfloat16, and the same numbers on eight devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from sgw_jax.backbones.vit import ViT
from sgw_jax.differentiate import (
    Program,
    Question,
    by_parameters,
    by_representation,
    by_scalar,
    flat,
    gradient_metrics,
    initial_objective_state,
)
from sgw_jax.experiment.choice import taken
from sgw_jax.interactions import KEM, NoInteraction
from sgw_jax.layers.parameter_names import owner
from sgw_jax.model import MultiTaskModel
from sgw_jax.multi_objective import AGGREGATORS, SCALARIZERS, upgrad, weights
from sgw_jax.optimizers import make_optimizer
from sgw_jax.pictures.charts import loss_curves
from sgw_jax.plan.cost import multiply_accumulates
from sgw_jax.sharding import constrain_rows, global_batch, make_mesh, path_name, replicated, state_sharding
from sgw_jax.tasks import Depth, Saliency, SemSeg
from sgw_jax.train_step import init_state, make_train_step, task_losses

EPS32 = float(np.finfo(np.float32).eps)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})
TASKS = (SemSeg(num_classes=3, weight=2.0), Depth(), Saliency(weight=0.5))
NAMES = [task.name for task in TASKS]
SGD = make_optimizer(1.0, name="sgd", momentum=0.9)  # after one step its state is the first gradient itself
ROWS, SIZE = 16, (32, 32)  # two micro-batches of a row on each of eight devices


def make_model(interaction=None, dtype=jnp.float32):
    backbone = ViT(16, 8, 4, 2, 2.0, SIZE, dtype=dtype)
    interaction = KEM(3, top_k=4, dtype=dtype) if interaction is None else interaction
    return MultiTaskModel(TASKS, backbone, interaction, channels=8, stride=8, preliminary=True, dtype=dtype)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return {
        "image": rng.normal(size=(ROWS, *SIZE, 3)).astype(np.float32),
        "semseg": rng.integers(0, 3, (ROWS, *SIZE)).astype(np.int32),
        "depth": rng.uniform(1, 2, (ROWS, *SIZE, 1)).astype(np.float32),
        "saliency": (rng.random((ROWS, *SIZE, 1)) < 0.4).astype(np.float32),
    }


@functools.cache
def params_of(interaction=None):
    shape = jnp.zeros((ROWS, *SIZE, 3))
    return jax.device_get(
        jit(make_model(interaction).init, static_argnames="train")(jax.random.key(0), shape, train=True)
    )


def start(objective, interaction=None):
    image = jnp.zeros((ROWS, *SIZE, 3))
    state = jit(lambda: init_state(make_model(interaction), SGD, image, objective=objective))()
    return jax.device_get(state)


def step_of(objective, interaction=None, dtype=jnp.float32, **options):
    return make_train_step(make_model(interaction, dtype), TASKS, SGD, objective=objective, **options)


@functools.cache
def compiled_step(gradients, interaction=None):
    """UPGrad's step on one device, for all tests that need it."""
    return jit(step_of(upgrad(3), interaction, gradients=gradients))


def first_gradient(state):
    leaves = jax.tree_util.tree_leaves_with_path(state.opt_state)
    return {path_name(path).split("trace/")[1]: np.asarray(leaf) for path, leaf in leaves if "trace" in path_name(path)}


@pytest.mark.parametrize("gradients", ["parameters", "representation"])
def test_a_task_s_backward_pass_leaves_out_the_other_tasks_heads(batch, gradients):
    """Products of a step by the part of the model that makes them: what one task alone uses is passed through once,
    whatever the number of tasks; the backbone once more for each task, or once."""

    def products(objective, **options):
        found = multiply_accumulates(step_of(objective, NoInteraction(), **options), state, batch)
        count = lambda part: sum(n for path, n in found.items() if f"{part}" in path)  # noqa: E731
        return {part: count(part) for part in ("head_", "preliminary_", "stem_", "backbone")}

    state = start(upgrad(3), NoInteraction())
    plain = products(None)
    found = products(upgrad(3), gradients=gradients)
    for part in ("head_", "preliminary_", "stem_"):
        assert found[part] == plain[part] > 0, part
    assert found["backbone"] > 2 * plain["backbone"] if gradients == "parameters" else found == plain


@functools.cache
def task_by_task(interaction=None):
    """(losses, {path: (tasks, ...)}, (tasks, pyramid)): jax.jacrev of the weighted losses, apart from the step."""
    model = make_model(interaction)
    variables = params_of(interaction)
    data = batch.__wrapped__() if hasattr(batch, "__wrapped__") else None
    statistics = {task.name: task.batch_statistics(data[task.name]) for task in TASKS}
    scale = jnp.array([task.weight for task in TASKS])

    def losses(params):
        found = model.apply({"params": params}, data["image"], train=True)
        return scale * jnp.stack(task_losses(TASKS, found, data, statistics))

    def after(pyramid):
        found = model.apply(variables, pyramid, SIZE, True, method="decode")
        return scale * jnp.stack(task_losses(TASKS, found, data, statistics))

    pyramid = model.apply(variables, data["image"], method="encode")
    by_pyramid = jit(jax.jacrev(after))(pyramid)
    rows = np.concatenate([np.asarray(leaf, np.float64).reshape(3, -1) for leaf in jax.tree.leaves(by_pyramid)], 1)
    jacobian = jit(jax.jacrev(losses))(variables["params"])
    return np.asarray(losses(variables["params"])), {k: np.asarray(v) for k, v in flat(jacobian).items()}, rows


def test_who_owns_what():
    cases = {
        "backbone/blocks/norm1/scale": (None, None),
        "interaction/slots": (None, None),
        "interaction16/slots": (None, None),
        "head_depth/conv/kernel": ("depth", "depth"),
        "preliminary_depth/conv/kernel": ("depth", "depth"),
        "stem_depth/norm/scale": (None, "depth"),
        "stem16_depth/norm/scale": (None, "depth"),
        "head_of_state/kernel": (None, None),
        "backbone/head_depth/kernel": (None, None),
    }
    for path, (mixing, alone) in cases.items():
        assert owner(path, ["depth", "semseg"], True) == mixing
        assert owner(path, ["depth", "semseg"], False) == alone
    assert make_model().interaction.__class__ is KEM
    assert not NoInteraction.mixes_tasks


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gradients", "mixing"), [("representation", True), ("parameters", True), ("representation", False)]
)
def test_shared_parameters_take_the_weighted_gradient_and_heads_their_own(batch, gradients, mixing):
    interaction = None if mixing else NoInteraction()
    objective = upgrad(3)
    state = start(objective, interaction)
    new, metrics = compiled_step(gradients, interaction)(state, batch)
    losses, jacobian, by_pyramid = task_by_task(interaction)
    own = {path: owner(path, NAMES, mixing) for path in jacobian}
    assert {name for name in own.values() if name} == set(NAMES)
    shared = [leaf.reshape(3, -1).astype(np.float64) for path, leaf in jacobian.items() if own[path] is None]
    rows = np.concatenate(shared, 1) if gradients == "parameters" else by_pyramid
    matrix = rows @ rows.T
    expected = np.asarray(weights.upgrad(matrix.astype(np.float32)), np.float64)
    found = np.array([metrics[f"weight/{name}"] for name in NAMES])
    # Float32 sums in another order: 1e-5 of the gradients, as tests/test_train_step.py; cosines by the least
    # eigenvalue of generic gradients.
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    for path, gradient in first_gradient(new).items():
        if own[path] is None:
            wanted = np.tensordot(found, jacobian[path].astype(np.float64), 1)
        else:
            wanted = jacobian[path][NAMES.index(own[path])]
        size = np.abs(jacobian[path]).max()
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=2e-5 * max(size, 1e-3), err_msg=path)
    np.testing.assert_allclose(metrics["loss"], losses.sum(), rtol=1e-5)
    norms = np.sqrt(np.diag(matrix))
    np.testing.assert_allclose(metrics["cosine/semseg-depth"], matrix[0, 1] / norms[0] / norms[1], atol=1e-4)
    assert metrics["conflict_rate"] == np.mean([matrix[0, 1] < 0, matrix[0, 2] < 0, matrix[1, 2] < 0], dtype=np.float32)


@pytest.mark.slow
@pytest.mark.parametrize("gradients", ["parameters", "representation"])
def test_accumulation_equals_one_large_batch(batch, gradients):
    """On one device and by another method than below."""
    objective = AGGREGATORS["nash_mtl"](3)
    state = start(objective)
    once, metrics = jit(step_of(objective, gradients=gradients))(state, batch)
    parts, other = jit(step_of(objective, gradients=gradients, accumulate=4))(state, batch)
    for name in metrics:
        np.testing.assert_allclose(other[name], metrics[name], rtol=1e-3, atol=1e-4, err_msg=name)
    for path, gradient in first_gradient(once).items():
        size = max(np.abs(gradient).max(), 1e-3)
        np.testing.assert_allclose(first_gradient(parts)[path], gradient, rtol=0, atol=1e-3 * size, err_msg=path)


# ---- every member, on a program that compiles in no time -----------------------------------------------------------

RNG = np.random.default_rng(1)
PARAMS = {"backbone/w": RNG.normal(size=(4, 6)), "neck": RNG.normal(size=(6, 6)), "head_a/w": RNG.normal(size=6)}
PARAMS = {name: jnp.asarray(value, jnp.float32) for name, value in PARAMS.items()}
PARTS = jnp.asarray(RNG.normal(size=(4, 5, 4)), jnp.float32)  # four micro-batches of five rows


def encode(params, part, key):
    return jnp.tanh(part @ params["backbone/w"])


def decode(z, params, part, key):
    z = jnp.sin(z @ params["neck"])
    losses = jnp.stack([jnp.mean((z @ params["head_a/w"]) ** 2), jnp.mean((z[:, 0] - 1) ** 2), jnp.mean(z[:, 1] ** 2)])
    return losses / 4, {"loss/a/b": losses[0] / 8}


PROGRAM = Program(lambda p, part, key: decode(encode(p, part, key), p, part, key), encode, decode)


def run(function, objective, parts, program=PROGRAM, own=frozenset({"head_a/w"}), mask=(True, True, True)):
    keys = jax.random.split(jax.random.key(0), len(parts))

    def found(state, parts):
        return function(Question(program, PARAMS, state, parts, keys, jnp.array(mask), NAMES, own), objective)

    return jax.jit(found)(initial_objective_state(objective, PARAMS), parts)


def same(found, expected, tolerance):
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@functools.cache
def losses_and_rows():
    """(losses (3,), {path: (3, ...)}) of the whole batch: what every method is measured by, compiled once."""
    total = jax.jit(lambda params: sum(PROGRAM.losses(params, part, None)[0] for part in PARTS))
    return total(PARAMS), jax.jit(jax.jacrev(total))(PARAMS)


@pytest.mark.parametrize("name", SCALARIZERS)
def test_a_scalariser_accumulates_whether_it_is_linear_or_not(name):
    """Four micro-batches against the gradient of the scalariser of their summed losses."""
    objective = SCALARIZERS[name](3, **taken(SCALARIZERS[name], {"steps_per_epoch": 5}))
    found = run(by_scalar, objective, PARTS)
    state = initial_objective_state(objective, PARAMS)
    losses, rows = losses_and_rows()
    slope = jax.jit(jax.grad(lambda x: objective.apply(x, state)[0]))(losses)
    same(found.gradients, {path: np.tensordot(slope, rows[path], 1) for path in found.gradients}, 64 * EPS32)
    same(found.losses, losses, 64 * EPS32)
    same(found.metrics["loss/a/b"], losses[0] / 2, 64 * EPS32)  # what is said beside adds up too
    assert jax.tree.structure(found.state) == jax.tree.structure(state)


@pytest.mark.parametrize("function", [pytest.param(by_parameters, marks=pytest.mark.slow), by_representation])
@pytest.mark.parametrize("name", AGGREGATORS)
def test_every_aggregator_accumulates_and_keeps_its_state(name, function):
    """Weights of micro-batches are those of the whole; what a second step is given is what the first returned."""
    objective = AGGREGATORS[name](3)
    found = run(function, objective, PARTS)
    before = initial_objective_state(objective, PARAMS)
    assert jax.tree.structure(found.state) == jax.tree.structure(before)
    for leaf, other in zip(jax.tree.leaves(found.state), jax.tree.leaves(before), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.weak_type) == (other.shape, other.dtype, other.weak_type)
    assert not found.state.stationary
    same(found.metrics["loss/a/b"], losses_and_rows()[0][0] / 2, 64 * EPS32)
    w = np.array([found.metrics[f"weight/{task}"] for task in NAMES])
    assert np.all(np.isfinite(w))
    _, rows = losses_and_rows()
    expected = {path: np.tensordot(w, rows[path], 1) for path in found.gradients}
    expected["head_a/w"] = rows["head_a/w"][0]  # the first task's own, unweighted
    same(found.gradients, expected, 256 * EPS32 * max(1, np.abs(w).max()))


@pytest.mark.parametrize("function", [by_parameters, by_representation])
def test_opposed_tasks_raise_the_flag(function):
    def opposed(z, params, part, key):
        losses, said = decode(z, params, part, key)
        return losses[1] * jnp.array([1.0, -1.0, 1.0]), said

    program = Program(lambda p, part, key: opposed(encode(p, part, key), p, part, key), encode, opposed)
    found = run(function, upgrad(3), PARTS[:1], program, frozenset(), (True, True, False))
    assert found.state.stationary


def test_the_report_draws_what_is_logged():
    matrix = jnp.array([[4.0, -2.0, 1.0], [-2.0, 9.0, 1.0], [1.0, 1.0, 1.0]])
    metrics = gradient_metrics(matrix, jnp.array([0.5, 0.25, 0.25]), NAMES)
    lines = [{"step": step, "split": "train", **{k: float(v) for k, v in metrics.items()}} for step in (1, 2)]
    titles = {chart["title"] for chart in loss_curves(NAMES, lines)}
    assert len(titles) == len(metrics) == 1 + 3 + 3
    assert {"weight of depth", "share of conflicting pairs", "cosine of semseg and depth"} <= titles


@pytest.mark.parametrize("gradients", [pytest.param("parameters", marks=pytest.mark.slow), "representation"])
def test_a_task_without_labels_has_no_say(batch, gradients):
    """Its weight is 0, its head stands still, and the others combine as if there were two tasks."""
    without = dict(batch, depth=np.zeros_like(batch["depth"]))
    objective = upgrad(3)
    new, metrics = compiled_step(gradients)(start(objective), without)
    assert metrics["weight/depth"] == 0
    assert metrics["loss/depth"] == 0
    assert metrics["weight/semseg"] >= 0.5  # of two tasks
    for path, gradient in first_gradient(new).items():
        assert np.all(np.isfinite(gradient)), path
        if path.startswith(("head_depth", "preliminary_depth")):
            assert not gradient.any()


@pytest.mark.slow
def test_everything_at_once(batch):
    """Bfloat16, accumulation, an average of the parameters, a task without labels, three steps, eight devices: finite,
    one compilation, float32 parameters."""
    objective = upgrad(3)
    optimizer = make_optimizer(1e-3)
    model = make_model(dtype=jnp.bfloat16)
    step = make_train_step(
        model, TASKS, optimizer, objective=objective, gradients="representation", ema_decay=0.9, accumulate=2
    )
    state = jit(lambda: init_state(model, optimizer, jnp.zeros((ROWS, *SIZE, 3)), objective=objective, ema=True))()
    before = jax.device_get(state)
    data = dict(batch, depth=np.zeros_like(batch["depth"]))
    mesh = make_mesh({"fsdp": 8})
    with jax.set_mesh(mesh):
        placement = state_sharding(state, mesh, min_size=64)
        state, data = jax.device_put(state, placement), global_batch(data, mesh)
        run = jit(step, out_shardings=(placement, replicated(mesh)))
        for _ in range(3):
            state, metrics = run(state, data)
    assert all(np.isfinite(value) for value in jax.tree.leaves(metrics))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((state.params, state.ema)))
    assert metrics["weight/depth"] == metrics["loss/depth"] == 0
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.dtype(jnp.float32)}
    assert jax.tree.structure(state) == jax.tree.structure(before)
    assert run._cache_size() == 1


@pytest.mark.slow
@pytest.mark.parametrize("gradients", ["parameters", "representation"])
@pytest.mark.parametrize(("sizes", "accumulate"), [({"data": 2, "fsdp": 4}, 2), ({"data": 8}, 1)])
def test_eight_devices_in_micro_batches_do_what_one_does_at_once(batch, gradients, sizes, accumulate):
    state = start(upgrad(3))
    one, expected = compiled_step(gradients)(state, batch)
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        placement = state_sharding(state, mesh, min_size=64)
        placed = jax.device_put(state, placement)
        step = step_of(upgrad(3), gradients=gradients, accumulate=accumulate)
        run = jit(step, out_shardings=(placement, replicated(mesh)))
        many, found = run(placed, global_batch(batch, mesh))
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
    for path, gradient in first_gradient(one).items():
        size = max(np.abs(gradient).max(), 1e-3)
        np.testing.assert_allclose(first_gradient(many)[path], gradient, rtol=0, atol=1e-4 * size, err_msg=path)


def test_rows_keep_the_sharding_of_their_parameters():
    """Of leaves large enough to be split: that of the state, behind an axis of tasks that no device splits."""
    mesh = make_mesh({"data": 2, "fsdp": 4})
    params = {"kernel": np.zeros((256, 512)), "tall": np.zeros((1024, 6)), "bias": np.zeros(7)}
    placement = state_sharding(params, mesh)
    rows = jax.tree.map(lambda leaf: np.zeros((3, *leaf.shape), np.float32), params)
    with jax.set_mesh(mesh):
        found = jax.jit(constrain_rows)(rows)
    for name, leaf in found.items():
        assert leaf.sharding.is_equivalent_to(NamedSharding(mesh, P(None, *placement[name].spec)), leaf.ndim), name
    assert any("fsdp" in leaf.sharding.spec for leaf in found.values())


def test_errors():
    with pytest.raises(ValueError, match="gradients is 'features'; it must be one of"):
        step_of(upgrad(3), gradients="features")
    with pytest.raises(ValueError, match="needs a model with encode and decode; ViT has none"):
        make_train_step(ViT(), TASKS, SGD, objective=upgrad(3), gradients="representation")
