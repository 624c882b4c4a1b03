"""The training step: accumulation, missing labels, averages, randomness, and the same numbers on any mesh."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sgw_jax.backbones.swin import Swin
from sgw_jax.backbones.vit import ViT
from sgw_jax.heads import TaskStem
from sgw_jax.interactions import KEM, CrossTaskAttention, NoInteraction
from sgw_jax.layers.drop_path import DropPath
from sgw_jax.layers.patch_embed import PatchEmbed
from sgw_jax.layers.placement import Placement
from sgw_jax.model import PRELIMINARY, MultiTaskModel
from sgw_jax.multi_objective import Scalarizer, upgrad
from sgw_jax.optimizers import make_optimizer
from sgw_jax.plan.cost import operations
from sgw_jax.sharding import BATCH, CONTEXT, global_batch, make_mesh, path_name, replicated, state_sharding
from sgw_jax.tasks import Depth, Saliency, SemSeg
from sgw_jax.train_step import (
    TrainState,
    init_state,
    make_eval_step,
    make_train_step,
    micro_batches,
    task_losses,
)

EPS32 = float(np.finfo(np.float32).eps)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})

TASKS = (SemSeg(num_classes=3, dot_regression=0.5), Depth(), Saliency())
SGD = make_optimizer(0.02, name="sgd", momentum=0.9)  # after one step its state is the first gradient itself
ROWS, SIZE = 8, (32, 32)


def make_model():
    backbone = ViT(8, 8, 4, 2, 2.0, SIZE)
    interaction = KEM(3, num_heads=2, etf_vertices=6, placement=Placement(BATCH, CONTEXT))
    return MultiTaskModel(TASKS, backbone, interaction, channels=8, stride=8)


def make_batch(seed=0):
    """Rows with very different numbers of labels, from none to all, and of positive pixels."""
    rng = np.random.default_rng(seed)
    labelled = rng.random((ROWS, *SIZE)) < np.linspace(0, 1, ROWS)[:, None, None]
    salient = rng.random((ROWS, *SIZE)) < np.linspace(0.8, 0.1, ROWS)[:, None, None]
    return {
        "image": rng.normal(size=(ROWS, *SIZE, 3)).astype(np.float32),
        "semseg": np.where(labelled, rng.integers(0, 3, (ROWS, *SIZE)), 255).astype(np.int32),
        "depth": np.where(labelled, rng.uniform(1, 2, (ROWS, *SIZE)), 0).astype(np.float32)[..., None],
        "saliency": np.where(labelled, salient, -1).astype(np.float32)[..., None],
    }


@pytest.fixture(scope="module")
def start():
    """The state at step 0, on the host."""
    make = functools.partial(init_state, make_model(), SGD)
    return jax.device_get(jit(make)(make_batch()["image"]))


@pytest.fixture(scope="module")
def one_step():
    """The plain step, compiled once for the tests of this file."""
    return jit(make_train_step(make_model(), TASKS, SGD))


def first_gradient(state):
    """Path -> the trace of SGD after one step."""
    (trace,) = (part.trace for part in state.opt_state if hasattr(part, "trace"))
    return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(trace)}


def assert_gradients_close(found, expected, tolerance):
    """Relative to the largest entry of each parameter's gradient, whose entries are sums of terms of that size; a
    gradient below a thousandth of the largest of all is itself a remainder of cancelled sums, right to no more than a
    rounding of what cancelled."""
    largest = max(np.abs(g).max() for g in expected.values())
    for name, gradient in expected.items():
        scale = max(np.abs(gradient).max(), 1e-3 * largest)
        atol = max(tolerance * scale, np.finfo(gradient.dtype).eps * largest)
        np.testing.assert_allclose(found[name], gradient, rtol=0, atol=atol, err_msg=name)


def test_in_bfloat16_no_product_is_wider_but_that_of_the_last_resize():
    """Forward and backward: a float32 operand makes a whole matrix product float32, several times slower on a GPU."""
    backbone = ViT(8, 8, 4, 2, 2.0, SIZE, dtype=jnp.bfloat16)
    model = MultiTaskModel(TASKS, backbone, KEM(3, top_k=5, dtype=jnp.bfloat16), 8, 8, dtype=jnp.bfloat16)
    batch = make_batch()
    state = jax.eval_shape(lambda: init_state(model, SGD, jnp.asarray(batch["image"])))
    trace = jax.make_jaxpr(make_train_step(model, TASKS, SGD))(state, batch)
    products = [
        op for _, _, op in operations(trace.jaxpr) if op.primitive.name in ("dot_general", "conv_general_dilated")
    ]
    wide = [op for op in products if any(operand.aval.dtype != jnp.bfloat16 for operand in op.invars)]
    assert len(products) > 20
    resized = [any(set(SIZE) & set(v.aval.shape) for v in (*op.invars, *op.outvars)) for op in wide]
    assert all(resized), [op for op, known in zip(wide, resized, strict=True) if not known]


# ---- one large batch in parts --------------------------------------------------------------------------------------


def test_accumulation_equals_one_large_batch(start, one_step):
    """Class balance (saliency) and counts differ between the micro-batches; only whole-batch statistics make them add
    up. Up to float32 sums in another order: 1e-5 of a gradient's size."""
    batch = make_batch()
    parts = [SemSeg(num_classes=3).batch_statistics(part)["count"] for part in micro_batches(batch, 4)["semseg"]]
    assert len({int(part) for part in parts}) == 4
    whole_state, whole = one_step(start, batch)
    parts_state, parts = jit(make_train_step(make_model(), TASKS, SGD, accumulate=4))(start, batch)
    for name, value in whole.items():
        np.testing.assert_allclose(parts[name], value, rtol=1e-5, err_msg=name)
    assert_gradients_close(first_gradient(parts_state), first_gradient(whole_state), 1e-5)


def test_micro_batches_take_every_kth_row():
    rows = np.arange(8)
    assert np.array_equal(micro_batches({"x": rows}, 4)["x"], [[0, 4], [1, 5], [2, 6], [3, 7]])
    with pytest.raises(ValueError, match="x has 8 rows, not a multiple of 3"):
        micro_batches({"x": rows}, 3)


def test_a_task_without_labels_has_no_loss_and_no_gradient(start, one_step):
    batch = make_batch()
    batch["depth"] = np.full_like(batch["depth"], np.nan)
    state, metrics = one_step(start, batch)
    assert metrics["loss/depth"] == 0
    for name, gradient in first_gradient(state).items():
        assert np.all(np.isfinite(gradient)), name
        assert np.all(gradient == 0) == name.startswith("head_depth"), name


# ---- bookkeeping, on a model that compiles in no time --------------------------------------------------------------


class Toy(nn.Module):
    """A linear map of the colours, behind drop path."""

    rate: float = 0.5

    @nn.compact
    def __call__(self, image, train=False):
        channels = nn.Dense(5, name="head")(image)
        channels = DropPath()(channels, self.rate, train)
        return {"depth": channels[..., :1], "saliency": channels[..., 1:2], "semseg": channels[..., 2:]}


def toy(**options):
    optimizer = optax.adam(0.1)
    batch = {"image": make_batch()["image"], "depth": make_batch()["depth"]}
    ema = options.get("ema_decay") is not None
    state = init_state(Toy(), optimizer, batch["image"], ema=ema, objective=options.get("objective"))
    return make_train_step(Toy(), (Depth(),), optimizer, **options), state, batch


def test_metrics_are_the_losses_of_the_tasks():
    """ "loss/TASK" is Task.loss of the whole batch, and "loss" the sum weighted by the tasks. Sums of 2^13 terms."""
    batch, model = make_batch(), Toy(rate=0.0)
    state = init_state(model, SGD, batch["image"])
    _, metrics = jit(make_train_step(model, TASKS, SGD))(state, batch)
    predictions = model.apply(state.variables, batch["image"])
    expected = {task.name: float(task.loss(predictions[task.name], batch[task.name])) for task in TASKS}
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[f"loss/{name}"], value, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], sum(t.weight * expected[t.name] for t in TASKS), rtol=1e-5)
    assert set(metrics) == {"loss", "grad_norm", "loss/semseg", "loss/depth", "loss/saliency"}
    assert all(value.dtype == jnp.float32 and value.shape == () for value in metrics.values())


def test_average_of_the_parameters_and_donation():
    """ema_t = d_t ema + (1 - d_t) params with d_t = min(d, (1 + t) / (10 + t)): the warm-up rules for t < 3 here. The
    donated state, of which no two leaves may share memory, is gone."""
    step, state, batch = toy(ema_decay=0.3)
    state = jax.tree.map(jnp.array, state)
    update = jax.jit(step, donate_argnums=0)
    expected = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params)
    assert state.variables["params"] is state.ema
    for t in range(6):
        old = state
        state, _ = update(state, batch)
        decay = min(0.3, (1 + t) / (10 + t))
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params)
        expected = jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, expected, params)  # noqa: B023
        assert old.params["head"]["kernel"].is_deleted()
        assert int(state.step) == t + 1
    assert decay == 0.3
    for found, wanted in zip(jax.tree.leaves(state.ema), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=0, atol=6 * 4 * EPS32)
    assert not np.allclose(state.ema["head"]["kernel"], state.params["head"]["kernel"])


def test_what_a_batch_or_a_model_lacks_is_named(one_step, start):
    batch = make_batch()
    lacking = {name: value for name, value in batch.items() if name not in ("image", "depth")}
    for step, state in ((one_step, start), (make_eval_step(make_model(), TASKS), start.variables)):
        with pytest.raises(ValueError, match=r"lacks image, depth; its keys are \['saliency', 'semseg'\]"):
            jax.eval_shape(step, state, lacking)
    silent = {"apply": lambda variables, image, **_: {"semseg": jnp.zeros((*image.shape[:3], 3))}}
    step, count = make_train_step(None, TASKS, SGD, **silent), make_eval_step(None, TASKS, **silent)
    for function, state in ((step, start), (count, start.variables)):
        with pytest.raises(ValueError, match=r"predicts no depth, saliency, only \['semseg'\]"):
            jax.eval_shape(function, state, batch)


def test_average_must_be_in_step_and_state():
    step, state, batch = toy(ema_decay=0.9)
    with pytest.raises(ValueError, match=r"ema_decay is 0.9, but the state holds no average"):
        jax.eval_shape(step, state.replace(ema=None), batch)
    step, state, batch = toy()
    with pytest.raises(ValueError, match=r"ema_decay is None, but the state holds an average"):
        jax.eval_shape(step, state.replace(ema=state.params), batch)


def test_randomness_is_a_function_of_seed_and_step():
    step, state, batch = toy()
    step = jax.jit(step)
    first, again = (step(state, batch)[1]["loss"] for _ in range(2))
    later = step(state.replace(step=jnp.int32(7)), batch)[1]["loss"]
    resumed = step(jax.tree.map(jnp.array, jax.device_get(state.replace(step=jnp.int32(7)))), batch)[1]["loss"]
    assert first == again
    assert later == resumed
    assert len({float(first), float(later), float(step(state.replace(seed=jnp.uint32(1)), batch)[1]["loss"])}) == 3
    assert step._cache_size() == 1  # one program for all seeds


def test_scalarizer_state_is_carried():
    def apply(losses, n, mask=None):
        return 2 * jnp.sum(losses), n + 1

    base, state, batch = toy(accumulate=2)
    expected = jax.jit(base)(state, batch)[1]
    for linear in (True, False):
        counting = Scalarizer(init=lambda: jnp.zeros(()), apply=apply, linear=linear)
        step, state, batch = toy(objective=counting, accumulate=2)
        state, metrics = jax.jit(step)(state, batch)
        np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=4 * EPS32)
        np.testing.assert_allclose(metrics["grad_norm"], 2 * expected["grad_norm"], rtol=16 * EPS32)
        assert state.objective == 1  # once a step, not once a micro-batch


def test_preliminary_predictions_add_their_loss():
    rng = np.random.default_rng(0)
    batch = make_batch()
    early, final = (rng.normal(size=(ROWS, *SIZE, 1)).astype(np.float32) for _ in range(2))
    task = Depth()
    statistics = {"depth": task.batch_statistics(batch["depth"])}
    (both,) = task_losses((task,), {"depth": final, PRELIMINARY + "depth": early}, batch, statistics)
    alone = [task_losses((task,), {"depth": p}, batch, statistics)[0] for p in (early, final)]
    np.testing.assert_allclose(both, alone[0] + alone[1], rtol=4 * EPS32)
    np.testing.assert_allclose(alone[1], task.loss(final, batch["depth"]), rtol=4 * EPS32)


def test_eval_step_sums_add_up_over_batches_and_padding_adds_nothing():
    task, model = Depth(), Toy()
    _, state, batch = toy()
    step = jax.jit(make_eval_step(model, (task,)))
    whole = step(state.variables, batch)
    halves = [step(state.variables, {name: value[rows] for name, value in batch.items()})
              for rows in (slice(0, 4), slice(4, 8))]  # fmt: skip
    added = jax.tree.map(lambda a, b: a + b, *halves)
    padded = {"image": np.pad(batch["image"], [(0, 2), (0, 0), (0, 0), (0, 0)]),
              "depth": np.pad(batch["depth"], [(0, 2), (0, 0), (0, 0), (0, 0)])}  # fmt: skip
    for other in (added, step(state.variables, padded)):
        for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(whole), jax.tree.leaves(other), strict=True):
            np.testing.assert_allclose(b, a, rtol=ROWS * 1024 * EPS32, err_msg=str(path))  # a sum of that many terms


# ---- other people's models -----------------------------------------------------------------------------------------


class Host(nn.Module):
    """A network as others write them: dropout, ``deterministic``, and sKEM in its midst."""

    @nn.compact
    def __call__(self, image, deterministic):
        channels = nn.Dropout(0.5)(nn.Dense(4)(image[:, ::8, ::8]), deterministic=deterministic)
        mixed = KEM(3, top_k=4, etf_vertices=4)({"depth": channels, "saliency": channels})
        return {name: jnp.repeat(jnp.repeat(nn.Dense(1)(x), 8, 1), 8, 2) for name, x in mixed.items()}


def host_apply(variables, image, *, train, rngs):
    return Host().apply(variables, image, deterministic=not train, rngs=rngs)


def host_init(key, image):
    return Host().init(key, image, deterministic=True)


def linear_init(key, image):
    """A function as Haiku's `transform` makes them: names with slashes, no collections."""
    return {"params": {"net/~/linear": {"w": 0.1 * jax.random.normal(key, (image.shape[-1], 2)), "b": jnp.zeros(2)}}}


def linear_apply(variables, image, *, train, rngs):
    layer = variables["params"]["net/~/linear"]
    if train:
        image *= jax.random.bernoulli(rngs["dropout"], 0.5, image.shape)
    channels = image @ layer["w"] + layer["b"]
    return {"depth": channels[..., :1], "saliency": channels[..., 1:]}


@jax.tree_util.register_pytree_node_class
class Linear:
    """Parameters that are an object, as Equinox's modules are."""

    def __init__(self, w):
        self.w = w

    def tree_flatten(self):
        return (self.w,), None

    @classmethod
    def tree_unflatten(cls, _, leaves):
        return cls(*leaves)

    def __call__(self, image):
        channels = image @ self.w
        return {"depth": channels[..., :1], "saliency": channels[..., 1:]}


def object_apply(variables, image, *, train, rngs):
    return variables["params"](image)


OTHERS = {
    "linen": (host_init, host_apply),
    "function": (linear_init, linear_apply),
    "object": (lambda key, _: {"params": Linear(0.1 * jax.random.normal(key, (3, 2)))}, object_apply),
}
PAIR = (Depth(), Saliency())


def other(name, **options):
    init, apply = OTHERS[name]
    optimizer, batch = optax.adam(0.03), {k: v for k, v in make_batch().items() if k != "semseg"}
    state = jit(lambda: init_state(None, optimizer, batch["image"], init=init, objective=options.get("objective")))()
    return jit(make_train_step(None, PAIR, optimizer, rngs=("dropout",), apply=apply, **options)), state, batch


@pytest.mark.parametrize("objective", [None, upgrad(2)], ids=["sum", "upgrad"])
@pytest.mark.parametrize("name", OTHERS)
def test_models_of_other_libraries(name, objective):
    """The loss falls in two micro-batches, what is fixed stays, the structure too, and evaluation draws nothing."""
    step, start, batch = other(name, accumulate=2, objective=objective)
    state, losses = start, []
    for _ in range(8):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < losses[0]
    assert step._cache_size() == 1
    assert jax.tree.structure(state) == jax.tree.structure(start)
    jax.tree.map(np.testing.assert_array_equal, state.constants, start.constants)
    evaluate = jit(make_eval_step(None, PAIR, apply=OTHERS[name][1]))
    first, again = evaluate(state.variables, batch), evaluate(state.variables, batch)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert set(first) == {"depth", "saliency"}


@pytest.mark.parametrize("name", ["linen", "function"])
def test_a_resumed_host_draws_the_same(name):
    step, state, batch = other(name, accumulate=2)
    for _ in range(2):
        state, _ = step(state, batch)
    kept = jax.device_get(state)
    on, resumed = step(state, batch), step(jax.tree.map(jnp.array, kept), batch)
    jax.tree.map(np.testing.assert_array_equal, resumed, on)
    assert on[1]["loss"] != step(state.replace(step=jnp.int32(9)), batch)[1]["loss"]
    assert on[1]["loss"] != step(state.replace(seed=jnp.uint32(9)), batch)[1]["loss"]


def test_every_stream_has_its_key_and_that_of_drop_path_is_the_micro_batchs():
    """fold_in(fold_in(key(seed), step), micro-batch): what checkpoints of runs under way go on with."""
    seen = []

    def apply(variables, image, *, train, rngs):
        seen.append({name: jax.random.key_data(key) for name, key in rngs.items()})
        return Toy().apply(variables, image, train, rngs=rngs)

    _, state, batch = toy()
    state = state.replace(seed=jnp.uint32(5), step=jnp.int32(7))
    with jax.disable_jit():
        make_train_step(None, (Depth(),), optax.adam(0.1), rngs=("drop_path", "dropout", "noise"), apply=apply)(
            state, batch
        )
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), 7), 0)
    np.testing.assert_array_equal(seen[0]["drop_path"], jax.random.key_data(key))
    assert len({tuple(np.ravel(data).tolist()) for data in seen[0].values()}) == 3
    default = jit(make_train_step(Toy(), (Depth(),), optax.adam(0.1)))(state, batch)[1]
    predicted = Toy().apply(state.variables, batch["image"], True, rngs={"drop_path": key})["depth"]
    np.testing.assert_allclose(default["loss"], Depth().loss(predicted, batch["depth"]), rtol=1e-5)


def test_models_that_are_called_otherwise_are_told_how():
    image = make_batch()["image"]
    state, batch = init_state(None, SGD, image, init=host_init), make_batch()
    with pytest.raises(ValueError, match=r"Host has no argument train; say how it is called, such as init="):
        init_state(Host(), SGD, image)
    with pytest.raises(ValueError, match=r"Host has no argument train; say how it is called, such as apply="):
        make_train_step(Host(), PAIR, SGD)
    with pytest.raises(ValueError, match=r"evaluation step: function is no linen module; .* apply="):
        make_eval_step(linear_apply, PAIR)
    with pytest.raises(
        ValueError, match=r"stream 'dropout', .*\('drop_path',\); name it: .*\('drop_path', 'dropout'\)"
    ):
        jax.eval_shape(make_train_step(None, PAIR, SGD, apply=host_apply), state, batch)
    drawing = make_eval_step(None, PAIR, apply=lambda *args, train, rngs: host_apply(*args, train=True, rngs=rngs))
    with pytest.raises(ValueError, match=r"'dropout' with train=False; give apply="):
        jax.eval_shape(drawing, state.variables, batch)
    with pytest.raises(ValueError, match=r"rngs is 'dropout'; give a sequence of names, \('dropout',\)"):
        make_train_step(Toy(), PAIR, SGD, rngs="dropout")
    with pytest.raises(ValueError, match=r"calls encode and decode, and apply= neither"):
        make_train_step(make_model(), TASKS, SGD, gradients="representation", apply=host_apply)


def test_running_state_is_refused():
    class Running(nn.Module):
        @nn.compact
        def __call__(self, image, train=False):
            return {"depth": nn.BatchNorm(not train)(nn.Dense(1)(image))}

    with pytest.raises(ValueError, match=r"collections \['batch_stats'\]; a train step carries"):
        init_state(Running(), SGD, make_batch()["image"])


# ---- meshes --------------------------------------------------------------------------------------------------------


def train(model, tasks, optimizer, state, batch, mesh, steps):
    """Losses (steps, tasks) and the first gradient, with every parameter split that can be."""
    shardings = state_sharding(state, mesh, min_size=1)
    update = jit(
        make_train_step(model, tasks, optimizer), out_shardings=(shardings, replicated(mesh)), donate_argnums=0
    )
    losses = []
    with jax.set_mesh(mesh):
        state = jax.tree.map(lambda x, place: jax.device_put(jnp.array(x), place), state, shardings)
        placed = global_batch(batch, mesh)
        for step in range(steps):
            state, metrics = update(state, placed)
            losses.append([metrics[f"loss/{task.name}"] for task in tasks])
            if step == 0:
                gradient = first_gradient(state)
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
        assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
    return np.asarray(jax.device_get(losses)), gradient


MESHES = [{"data": 8}, {"data": 2, "fsdp": 4}, {"data": 2, "fsdp": 2, "context": 2}]
PLACEMENT = Placement(BATCH, CONTEXT)


@pytest.fixture(scope="module")
def curve(start, one_step):
    """30 steps on one device without any mesh: losses, and the first gradient."""
    state, losses, batch = start, [], make_batch()
    for step in range(30):
        state, metrics = one_step(state, batch)
        losses.append([metrics[f"loss/{task.name}"] for task in TASKS])
        if step == 0:
            gradient = first_gradient(state)
    return np.asarray(jax.device_get(losses)), gradient


def test_the_loss_falls(curve):
    losses, _ = curve
    weights = [task.weight for task in TASKS]
    assert losses[-1] @ weights < 0.8 * losses[0] @ weights


@pytest.mark.parametrize(
    "sizes", [*(pytest.param(sizes, marks=pytest.mark.slow) for sizes in MESHES[:-1]), MESHES[-1]], ids=str
)
def test_eight_devices_learn_what_one_does(start, curve, sizes):
    """The same step on one device and eight: float32 sums in another order, 1e-5 over 20 steps of SGD."""
    losses, gradient = train(make_model(), TASKS, SGD, start, make_batch(), make_mesh(sizes), 20)
    np.testing.assert_allclose(losses, curve[0][:20], rtol=1e-5)
    assert_gradients_close(gradient, curve[1], 1e-5)


class Patches(nn.Module):
    """A backbone that compiles fast: what is tested with it is the selection, on devices that each hold some rows."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, image, train=False):
        return {8: PatchEmbed(8, 8, dtype=self.dtype)(image.astype(self.dtype))[0]}


@dataclasses.dataclass(frozen=True)
class WideDepth(Depth):
    """Depth whose loss keeps the dtype, so that a float64 program has no float32 in it."""

    def float32(self, prediction):
        return prediction


TOP_K = 5
DEPTHS = (WideDepth("near"), WideDepth("far"))


def selecting_model(dtype):
    interaction = KEM(3, num_heads=2, top_k=TOP_K, placement=PLACEMENT, dtype=dtype)
    return MultiTaskModel(DEPTHS, Patches(dtype), interaction, channels=8, stride=8, dtype=dtype)


def selecting_start(seed, dtype):
    """A state with drawn parameters, and a batch."""
    batch = make_batch(seed)
    batch = {"image": batch["image"], "near": batch["depth"], "far": np.roll(batch["depth"], 1, axis=0)}
    shapes = jax.eval_shape(selecting_model(dtype).init, jax.random.key(0), batch["image"])
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda leaf: 0.5 * rng.normal(size=leaf.shape).astype(dtype), shapes["params"])
    state = TrainState(
        step=np.int32(0),
        seed=np.uint32(0),
        params=params,
        constants={},
        opt_state=SGD.init(params),
        ema=None,
        objective=(),
    )
    return state, {name: value.astype(dtype) for name, value in batch.items()}


@jit
def stem_outputs(variables, image):
    model = selecting_model(jnp.float32)
    return model.apply(variables, image, capture_intermediates=lambda module, _: isinstance(module, TaskStem))[1]


def selection_margin(state, batch):
    """The least difference of the k-th and the (k+1)-th score over rows, heads and slots, in float64."""
    found = stem_outputs(state.variables, batch["image"])
    stems = [found["intermediates"][f"stem_{task.name}"]["__call__"][0] for task in DEPTHS]
    tokens = np.concatenate([np.asarray(stem, np.float64).reshape(ROWS, -1, 8) for stem in stems], axis=1)
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), state.params["interaction"])
    query = (params["slots"] @ params["retrieve"]["query"]["kernel"]).reshape(3, 2, 4)
    key = (tokens @ params["retrieve"]["key"]["kernel"]).reshape(ROWS, -1, 2, 4)
    scores = np.sort(np.einsum("lhd,bnhd->bhln", query, key) / 2, axis=-1)
    return np.min(scores[..., -TOP_K] - scores[..., -TOP_K - 1])


@pytest.fixture(scope="module")
def selecting_seed():
    """Of a start whose selection hangs on no rounding."""
    starts = (selecting_start(seed, np.float32) for seed in range(20))
    return next(i for i, start in enumerate(starts) if selection_margin(*start) > 1e-4)


def train_selecting(seed, dtype, steps, meshes):
    with jax.enable_x64(dtype == np.float64):
        state, batch = selecting_start(seed, dtype)
        found = [train(selecting_model(dtype), DEPTHS, SGD, state, batch, mesh, steps) for mesh in meshes]
    assert found[0][0].dtype == dtype
    return found


@pytest.fixture(scope="module")
def selecting_curve(selecting_seed):
    """Five steps on one device in float64: losses and the first gradient."""
    return train_selecting(selecting_seed, np.float64, 5, [make_mesh({"data": 1}, jax.devices()[:1])])[0]


@pytest.mark.slow
def test_top_k_on_eight_devices(selecting_seed, selecting_curve):
    for losses, gradient in train_selecting(selecting_seed, np.float64, 5, map(make_mesh, MESHES[1:])):
        np.testing.assert_allclose(losses, selecting_curve[0], rtol=1e-9)
        assert_gradients_close(gradient, selecting_curve[1], 1e-9)


@pytest.mark.slow
def test_top_k_on_eight_devices_in_float32(selecting_seed, selecting_curve):
    """One step: the margin ensures that all select the same. These large random parameters make gradients of cancelled
    sums, of which one device itself is 4e-5 off, relative to the largest entry of a gradient (or a thousandth of
    the largest of all): the rounding of this network. No mesh may be off by more than twice that; single gradients
    happen to be closer on one device or the other."""
    losses, expected = selecting_curve
    meshes = [make_mesh({"data": 1}, jax.devices()[:1]), *map(make_mesh, MESHES[1:])]
    largest = max(np.abs(value).max() for value in expected.values())
    scales = {name: max(np.abs(value).max(), 1e-3 * largest) for name, value in expected.items()}
    worst = []
    for found, gradient in train_selecting(selecting_seed, np.float32, 1, meshes):
        np.testing.assert_allclose(found, losses[:1], rtol=1e-5)
        worst.append(max((np.abs(gradient[name] - expected[name]).max() / scales[name], name) for name in expected))
    assert worst[0] < (1e-4,), worst[0]
    assert max(worst)[0] <= 2 * worst[0][0], worst


BACKBONES = {
    "vit": ViT(8, 8, 4, 2, 2.0, SIZE, class_token=True, dtype=jnp.float64),  # 17 tokens: they divide by nothing
    "chunked": ViT(8, 8, 4, 2, 2.0, SIZE, class_token=True, attention_chunk=8, dtype=jnp.float64),
    "swin": Swin(8, (2, 2, 2, 2), (1, 1, 2, 2), window_size=3, dtype=jnp.float64),  # maps of 8, 4, 2 and 1 rows
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "interaction"),
    [
        ("vit", CrossTaskAttention(query_chunk=16, dtype=jnp.float64)),
        ("chunked", NoInteraction()),
        ("swin", KEM(3, top_k=5, placement=PLACEMENT, dtype=jnp.float64)),
    ],
    ids=["vit-dense", "chunked", "swin-kem"],
)
def test_image_rows_over_devices(backbone, interaction):
    """The gradient of every parameter in float64, images split by rows over 4 devices, against one device."""
    model = MultiTaskModel(
        DEPTHS, BACKBONES[backbone], interaction, channels=8, stride=4, upsample="subpixel", dtype=jnp.float64
    )
    with jax.enable_x64(True):
        _, batch = selecting_start(0, np.float64)
        shapes = jax.eval_shape(model.init, jax.random.key(0), batch["image"])["params"]
        rng = np.random.default_rng(0)
        params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape), shapes)
        state = TrainState(np.int32(0), np.uint32(0), params, {}, SGD.init(params), None, ())
        one, four = (
            train(model, DEPTHS, SGD, state, batch, mesh, 1)
            for mesh in (make_mesh({"data": 1}, jax.devices()[:1]), make_mesh({"fsdp": 2, "context": 4}))
        )
    np.testing.assert_allclose(four[0], one[0], rtol=1e-9)
    assert_gradients_close(four[1], one[1], 1e-9)
