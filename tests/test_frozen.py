"""Frozen parts of a backbone: what they cost, that the rest learns as before, and what they leave out."""

import functools
import re
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgw_jax.__main__ import main
from sgw_jax.backbones.convnext import ConvNeXt
from sgw_jax.backbones.freezing import Freezing
from sgw_jax.backbones.swin import Swin
from sgw_jax.backbones.vit import ViT
from sgw_jax.differentiate import flat
from sgw_jax.interactions import KEM
from sgw_jax.layers.lora import LoRA
from sgw_jax.layers.stack import drop_rates, scan_blocks
from sgw_jax.model import MultiTaskModel
from sgw_jax.multi_objective import upgrad
from sgw_jax.optimizers import make_optimizer
from sgw_jax.plan.cost import multiply_accumulates
from sgw_jax.plan.hlo import parse
from sgw_jax.run.saved_run import open_run, saved_model
from sgw_jax.sharding import global_batch, make_mesh, replicated, state_sharding
from sgw_jax.tasks import Depth, Saliency
from sgw_jax.train_step import init_state, make_train_step

EPS32 = float(np.finfo(np.float32).eps)
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})

TASKS, SIZE, ROWS = (Depth(), Saliency()), (32, 32), 8
SGD = make_optimizer(0.02, name="sgd", momentum=0.9)  # after one step its state is the first gradient itself
VIT = ViT(8, 8, 4, 2, 2.0, SIZE, class_token=True)
SWIN = Swin(4, (2, 2, 2, 2), (1, 1, 1, 1), window_size=2)
CONVNEXT = ConvNeXt(4, (1, 1, 2, 1))
DINOV3 = VIT.clone(registers=2, rope_theta=100.0, gated=True, qkv_bias="query_value", layer_scale=0.1)


def model_of(backbone, frozen=0, **options):
    return MultiTaskModel(TASKS, backbone.clone(frozen_layers=frozen, **options), KEM(2), channels=8, stride=8)


@functools.cache
def batch():
    rng = np.random.default_rng(0)
    return {
        "image": rng.normal(size=(ROWS, *SIZE, 3)).astype(np.float32),
        "depth": rng.uniform(1, 2, (ROWS, *SIZE, 1)).astype(np.float32),
        "saliency": (rng.random((ROWS, *SIZE, 1)) < 0.3).astype(np.float32),
    }


def one_step(model, trained=None, optimizer=SGD, **options):
    """(state before, state after, metrics)."""
    ema = options.get("ema_decay") is not None
    make = functools.partial(init_state, model, optimizer, ema=ema, objective=options.get("objective"), trained=trained)
    state = jit(make)(batch()["image"])
    return state, *jit(make_train_step(model, TASKS, optimizer, trained=trained, **options))(state, batch())


def gradient(state):
    (trace,) = (part.trace for part in state.opt_state if hasattr(part, "trace"))
    return flat(trace)


def rows_like(whole, part):
    """Of each leaf of a part, the same rows of the whole."""
    return {name: np.asarray(whole[name])[len(whole[name]) - len(leaf) :] for name, leaf in part.items()}


def assert_close(found, expected):
    """Sums of at most a few thousand float32 terms in another order: 1e-5 of the largest entry."""
    largest = max(np.abs(leaf).max() for leaf in expected.values())
    for name, leaf in expected.items():
        np.testing.assert_allclose(found[name], leaf, rtol=0, atol=1e-5 * largest, err_msg=name)


# ---- which parameters learn ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "freezing", "gone", "rows"),
    [
        (VIT, Freezing(3), {"patch_embed", "class_token", "position_embedding"}, {"blocks": 1}),
        (VIT, Freezing(4), {"patch_embed", "class_token", "position_embedding", "blocks"}, {}),
        (VIT, Freezing(0, True), {"patch_embed", "class_token", "position_embedding", "blocks", "norm"}, {}),
        (SWIN, Freezing(4), {"patch_embed", "patch_norm", "stage1", "stage2", "merge1", "merge2"}, {"stage3": 1}),
        (CONVNEXT, Freezing(1), {"patch_embed", "patch_norm", "stage1"}, {"stage2": 1}),
        (
            CONVNEXT,
            Freezing(3),
            {"patch_embed", "patch_norm", "stage1", "stage2", "downsample1", "downsample2"},
            {"stage3": 1},
        ),
        (DINOV3, Freezing(1), {"patch_embed", "class_token", "register_tokens"}, {"blocks": 3}),
    ],
    ids=["vit-3", "vit-4", "vit-all", "swin-4", "convnext-1", "convnext-3", "dinov3-1"],
)
def test_the_part_that_learns(backbone, freezing, gone, rows):
    shapes = jax.eval_shape(model_of(backbone).init, jax.random.key(0), batch()["image"])["params"]
    part = jax.eval_shape(freezing, shapes)
    assert set(shapes["backbone"]) - set(part["backbone"]) == gone
    assert {key: part[key] for key in part if key != "backbone"} == {
        key: shapes[key] for key in shapes if key != "backbone"
    }
    for stack, count in rows.items():
        assert {leaf.shape[0] for leaf in jax.tree.leaves(part["backbone"][stack])} == {count}


def test_nothing_frozen_is_the_whole():
    params = {"backbone": {"blocks": {"bias": jnp.ones((4, 2))}, "norm": {"scale": jnp.ones(2)}}, "head": jnp.ones(1)}
    assert jax.tree.all(jax.tree.map(jnp.array_equal, Freezing()(params), params))


@pytest.mark.parametrize(("backbone", "frozen"), [(VIT, 5), (VIT, -1), (SWIN, 3), (SWIN, 10), (CONVNEXT, 6)])
def test_layers_that_cannot_be_frozen(backbone, frozen):
    with pytest.raises(ValueError, match=rf"frozen_layers is {frozen}; it has [458] blocks.*config.optimizer.frozen"):
        jax.eval_shape(model_of(backbone, frozen).init, jax.random.key(0), batch()["image"])


class Added(nn.Module):
    """A block whose output is told by what all of them share."""

    @nn.compact
    def __call__(self, carry, rate, shared):
        carry = carry + rate * jnp.tanh(nn.Dense(4, name="map")(carry) + shared)
        return carry, carry


class Tower(nn.Module):
    frozen: int = 0

    @nn.compact
    def __call__(self, x):
        rates = drop_rates(0.5, 3, self.frozen) + 1
        carry, outputs = scan_blocks(Added(name="blocks"), x, rates, x[0], length=3, frozen=self.frozen)
        return carry + outputs[0] + outputs[-1]


def test_a_stack_of_which_the_lowest_blocks_are_frozen():
    """One scan or two, the same numbers; the gradient ends above the frozen blocks, also that of what entered them."""
    x = jnp.linspace(-1, 1, 8).reshape(2, 4)
    params = Tower().init(jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, Tower(2).init(jax.random.key(0), x)["params"])

    def slope(frozen):
        return jax.grad(lambda p, x: jnp.sum(Tower(frozen).apply({"params": p}, x)), (0, 1))(params, x)

    kernels = [np.abs(slope(frozen)[0]["blocks"]["map"]["kernel"]).sum((1, 2)) > 0 for frozen in range(4)]
    assert [list(moved) for moved in kernels] == [[True] * 3, [False, True, True], [False, False, True], [False] * 3]
    assert not np.any(slope(3)[1][1])  # of the row that nothing shares
    np.testing.assert_array_equal(drop_rates(0.5, 3), [0, 0.25, 0.5])
    np.testing.assert_array_equal(drop_rates(0.5, 3, 2), [0, 0, 0.5])


# ---- what learns, learns as before ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole_vit():
    """All parameters' gradient, by a step that trains all."""
    return one_step(model_of(VIT))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("frozen", "freezing", "options"),
    [
        (4, Freezing(0, True), {}),
        (2, Freezing(2), {"accumulate": 2, "ema_decay": 0.5}),
        (2, Freezing(2), {"objective": upgrad(2), "gradients": "representation", "accumulate": 2}),
    ],
    ids=["all", "lowest-2", "representation"],
)
def test_gradients_are_those_of_the_whole_network(whole_vit, frozen, freezing, options):
    """The lowest layers out of it, the others' gradients are the same numbers, and what is frozen stays bit for bit."""
    before, after, metrics = one_step(model_of(VIT, frozen, remat="full"), freezing, **options)
    _, whole, expected = whole_vit
    part = gradient(after)
    assert set(part) == set(flat(freezing(before.params)))
    if "objective" in options:  # the weights are UPGrad's: another update, of which the heads' own part is the sum's
        part = {name: leaf for name, leaf in part.items() if name.startswith("head")}
    assert_close(part, rows_like(gradient(whole), part))
    for name, leaf in flat(after.params).items():
        old, moved = flat(before.params)[name], gradient(after).get(name)
        kept = len(leaf) if moved is None else len(leaf) - len(moved)
        np.testing.assert_array_equal(leaf[:kept], old[:kept], err_msg=name)
        assert moved is None or not np.array_equal(leaf[kept:], old[kept:]) or not np.any(moved), name
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
    norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in gradient(after).values()))
    np.testing.assert_allclose(metrics["grad_norm"], norm, rtol=1e-5)
    if "ema_decay" in options:
        assert jax.tree.map(jnp.shape, flat(after.ema)) == jax.tree.map(jnp.shape, part)
        averaged, params = flat(after.variables["params"]), flat(after.params)
        assert set(averaged) == set(params)
        blocks = "backbone/blocks/mlp/hidden/kernel"
        np.testing.assert_array_equal(averaged[blocks][:2], params[blocks][:2])
        np.testing.assert_array_equal(averaged[blocks][2:], flat(after.ema)[blocks])


@pytest.mark.slow
def test_an_aggregator_sees_the_trained_parameters_alone():
    """Weights from the Gramian of the shared parameters that learn, by NumPy from the tasks' own gradients."""
    model, freezing = model_of(VIT, 4), Freezing(0, True)
    _, after, metrics = one_step(model, freezing, objective=upgrad(2))
    rows = []
    for name in ("depth", "saliency"):
        task = next(task for task in TASKS if task.name == name)
        state = jit(functools.partial(init_state, model, SGD, trained=freezing))(batch()["image"])
        step = jit(make_train_step(model, (task,), SGD, trained=freezing))
        shared = {n: g for n, g in gradient(step(state, batch())[0]).items() if not n.startswith("head")}
        rows.append(task.weight * np.concatenate([np.ravel(g).astype(np.float64) for _, g in sorted(shared.items())]))
    cosine = rows[0] @ rows[1] / np.linalg.norm(rows[0]) / np.linalg.norm(rows[1])
    np.testing.assert_allclose(metrics["cosine/depth-saliency"], cosine, atol=1e-4)
    assert not any("blocks" in name for name in gradient(after))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "frozen", "kernel"),
    [
        (SWIN, 4, "stage2/regular/mlp/hidden/kernel"),
        (CONVNEXT, 2, "downsample1/projection/kernel"),
        (CONVNEXT, 3, "stage2/mlp/hidden/kernel"),
    ],
    ids=["swin", "convnext-at-a-stage", "convnext-within"],
)
def test_the_lowest_blocks_of_stages(backbone, frozen, kernel):
    before, after, _ = one_step(model_of(backbone, frozen), Freezing(frozen))
    _, whole, _ = one_step(model_of(backbone))
    assert_close(gradient(after), rows_like(gradient(whole), gradient(after)))
    np.testing.assert_array_equal(*(flat(state.params)[f"backbone/{kernel}"] for state in (before, after)))


@pytest.mark.slow
def test_the_lowest_blocks_that_share_a_rotation():
    _, after, _ = one_step(model_of(DINOV3, 2), Freezing(2))
    _, whole, _ = one_step(model_of(DINOV3))
    assert_close(gradient(after), rows_like(gradient(whole), gradient(after)))


@pytest.mark.parametrize("frozen", [2, 4])
def test_no_path_is_dropped_in_what_is_frozen(frozen):
    """The features below are in training what they are in evaluation, but for roundings; those above are not."""
    backbone = VIT.clone(drop_path=0.5, frozen_layers=frozen, output="taps", tapped=(1, 2, 3, 4))
    image = batch()["image"]
    variables = jit(backbone.init)(jax.random.key(0), image)
    rngs = {"drop_path": jax.random.key(1)} if frozen < 4 else {}
    training = jit(lambda v, x: backbone.apply(v, x, True, rngs=rngs))(variables, image)
    evaluation = jit(backbone.apply)(variables, image)
    same = {layer: bool(jnp.allclose(training[layer], evaluation[layer], rtol=0, atol=1e-5)) for layer in training}
    assert same == {layer: layer <= frozen for layer in (1, 2, 3, 4)}


@pytest.mark.slow
def test_on_eight_devices():
    """Every parameter split that can be, the lowest two layers frozen, against one device."""
    model, freezing, mesh = model_of(VIT, 2), Freezing(2), make_mesh({"data": 2, "fsdp": 2, "context": 2})
    options = {"ema_decay": 0.5, "accumulate": 1}
    start, expected, _ = one_step(model, freezing, **options)
    shardings = state_sharding(start, mesh, min_size=1)
    with jax.set_mesh(mesh):
        state = jax.tree.map(lambda x, place: jax.device_put(jnp.array(x), place), start, shardings)
        step = make_train_step(model, TASKS, SGD, trained=freezing, **options)
        step = jit(step, out_shardings=(shardings, replicated(mesh)), donate_argnums=0)
        state, _ = step(state, global_batch(batch(), mesh))
        variables = state.variables
    assert_close(gradient(state), gradient(expected))
    assert_close(flat(variables["params"]), flat(expected.variables["params"]))


# ---- what it costs -------------------------------------------------------------------------------------------------


class Rest(nn.Module):
    """What a frozen Swin adds, on maps that cost nothing."""

    frozen_layers: int = 0

    @nn.compact
    def __call__(self, image, train=False):
        maps = {}
        for stage, stride in enumerate((4, 8, 16, 32), 1):
            width = 4 * stride
            maps[stride] = nn.LayerNorm(name=f"norm_stage{stage}")(jnp.tile(image[:, ::stride, ::stride, :1], width))
        return maps


def compiled(function, *args, **options):
    program = jit(function, **options).lower(*args).compile()
    memory = program.memory_analysis()
    return program, program.cost_analysis()["flops"], memory.temp_size_in_bytes


@pytest.mark.slow
def test_a_frozen_backbone_costs_its_forward_pass():
    """FLOPs and memory of the compiled step: at most 1.05 times those of the frozen forward pass and of a step of the
    rest. No operation of its backward pass is in the program, and the state holds nothing of it."""
    adam, size = make_optimizer(1e-3), (4, 64, 64)
    data = {
        "image": jax.ShapeDtypeStruct((*size, 3), jnp.float32),
        "depth": jax.ShapeDtypeStruct((*size, 1), jnp.float32),
        "saliency": jax.ShapeDtypeStruct((*size, 1), jnp.float32),
    }
    backbone, freezing = SWIN.clone(width=16, frozen_layers=8), Freezing(0, True)

    def step(model, trained):
        make = functools.partial(init_state, model, adam, trained=trained)
        state = jax.eval_shape(make, data["image"])
        return state, make_train_step(model, TASKS, adam, trained=trained)

    frozen_state, frozen_step = step(model_of(backbone, 8), freezing)
    rest_state, rest_step = step(model_of(Rest()), None)
    program, flops, memory = compiled(frozen_step, frozen_state, data, donate_argnums=0)
    variables = {"params": frozen_state.params["backbone"]}
    _, forward_flops, forward_memory = compiled(backbone.apply, variables, data["image"])
    _, rest_flops, rest_memory = compiled(rest_step, rest_state, data, donate_argnums=0)
    assert flops <= 1.05 * (forward_flops + rest_flops)
    assert memory <= 1.05 * (forward_memory + rest_memory)
    moments = jax.tree.map(jnp.shape, flat(frozen_state.opt_state))
    assert moments == jax.tree.map(jnp.shape, flat(rest_state.opt_state))
    computations, _ = parse(program.as_text())
    paths = [instruction.path for lines in computations.values() for instruction in lines.values()]
    assert not [path for path in paths if "transpose(" in path and "backbone/stage" in path]
    assert [path for path in paths if "backbone/stage" in path]


def test_multiplications_of_the_lowest_layers():
    """A block below costs one forward pass, one above three; counted in the trace, scans as often as they turn."""

    def macs(frozen, freezing):
        model = model_of(VIT, frozen)
        state = jax.eval_shape(functools.partial(init_state, model, SGD, trained=freezing), batch()["image"])
        return sum(multiply_accumulates(make_train_step(model, TASKS, SGD, trained=freezing), state, batch()).values())

    variables = jax.eval_shape(model_of(VIT).init, jax.random.key(0), batch()["image"])
    forward = multiply_accumulates(lambda v, x: model_of(VIT).apply(v, x, method="encode"), variables, batch()["image"])
    blocks = sum(count for path, count in forward.items() if "blocks" in path)
    patches = sum(count for path, count in forward.items() if "patch_embed" in path)
    whole = macs(0, None)
    # Of the patches no gradient of the image is taken: one more product, not two. Taps of frozen blocks need none.
    for frozen in (2, 4):
        saved = whole - macs(frozen, Freezing(frozen))
        assert saved >= 2 * blocks * frozen / 4 + patches
        assert saved <= 1.1 * (2 * blocks * frozen / 4 + patches)


# ---- runs ----------------------------------------------------------------------------------------------------------

RUN = [
    "train",
    "--config=scenes:tasks=depth",
    *(
        f"--config.{key}"
        for key in (
            "data.size=32,32",
            "data.lengths.train=8",
            "data.lengths.validation=8",
            "data.lengths.test=8",
            "backbones.vit.width=8",
            "backbones.vit.depth=4",
            "backbones.vit.num_heads=2",
            "interactions.kem.num_slots=2",
            "interactions.kem.top_k=4",
            "channels=8",
            "schedule.warmup_steps=0",
            "checkpoint_every=1",
            "eval_every=1",
            "ema_decay=0.5",
        )
    ),
]


@pytest.mark.slow
def test_runs_begin_go_on_and_are_read_back(tmp_path, capsys, monkeypatch):
    """The lowest two layers frozen, then LoRA from there: what is not pretrained is named, a checkpoint holds all."""
    first, second = tmp_path / "first", tmp_path / "runs" / "lora"
    frozen = [*RUN, f"--workdir={first}", "--config.optimizer.frozen_layers=2", "--config.steps=2"]
    assert main(frozen) == 0
    assert "The frozen part of the backbone is random" in " ".join("".join(capsys.readouterr()).split())
    with open_run(first) as run:
        variables = run.variables(saved_model(run))
        saved = run.checkpoints.shapes(run.step)
    blocks = "backbone/blocks/mlp/hidden/kernel"
    assert (saved[f"params/{blocks}"][0], saved[f"ema/{blocks}"][0]) == (4, 2)
    assert not any("patch_embed" in name for name in saved if not name.startswith("params/"))
    assert flat(variables["params"])[blocks].shape[0] == 4
    assert main(frozen) == 0  # finished before: it is read, evaluated and reported again
    adapted = [*RUN, f"--workdir={second}", "--config.lora.rank=1", f"--init_from={first}", "--config.steps=1"]
    assert main(adapted) == 0
    assert "lora" in "".join(capsys.readouterr())
    with open_run(second) as run:
        later = flat(run.variables(saved_model(run))["params"])
    np.testing.assert_array_equal(later[blocks], flat(variables["params"])[blocks])
    assert any("lora" in name for name in later)
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "backbones.md").read_text(encoding="utf-8")
    _, snippet = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert names["lora"] == LoRA(1, 16.0)
    jax.tree.map(np.testing.assert_array_equal, flat(names["again"]), later)
    assert not any("lora" in name for name in flat(names["plain"]))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (["optimizer.frozen_layers=5"], ["frozen_layers is 5", "it has 4 blocks", "config.optimizer.frozen_layers"]),
        (["lora.rank=9"], ["lora.rank is 9", "at most 8"]),
        (["lora.rank=0"], ["config.lora.rank is 0; it must be"]),
        (["lora.rank=1", "lora.targets=norms"], ["lora.targets are ('norms',)"]),
        (["lora.rank=1", "optimizer.layer_decay=0.5"], ["config.lora freezes", "layer_decay (0.5)"]),
        (["optimizer.lora_scale=0.1"], ["lora_scale is 0.1", "of which there are none", "set config.lora.rank"]),
    ],
    ids=["layers", "width", "zero", "targets", "decay", "scale"],
)
def test_what_cannot_be_frozen_is_said_at_the_start(tmp_path, capsys, keys, said):
    assert main([*RUN, f"--workdir={tmp_path / 'run'}", *(f"--config.{key}" for key in keys)]) != 0
    found = " ".join(capsys.readouterr().err.split())
    assert all(part in found for part in said), found
    assert not (tmp_path / "run").exists()
