"""Costs counted from the trace, against formulas; the promises that docs/cost.md makes of the full-size systems."""

import io
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from sgw_jax.__main__ import main
from sgw_jax.backbones.vit import Block
from sgw_jax.configs.base import SYSTEMS
from sgw_jax.experiment.build import build_model, build_tasks
from sgw_jax.experiment.config_files import read_config
from sgw_jax.interactions import INTERACTIONS, CrossTaskAttention, NoInteraction
from sgw_jax.optimizers import make_optimizer
from sgw_jax.plan.cost import largest_arrays, multiply_accumulates, residual_bytes
from sgw_jax.plan.network import Plan, plan, print_plan, target_shapes
from sgw_jax.tasks import Depth
from sgw_jax.train_step import init_state, make_eval_step, make_train_step

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "full_size.json"
f32 = jnp.float32


def shape(*lengths, dtype=f32):
    return jax.ShapeDtypeStruct(lengths, dtype)


class Small(nn.Module):
    """A matrix product, a convolution in two groups and a stack of three scanned products."""

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(6, (3, 5), feature_group_count=2, name="conv")(x)
        x = nn.Dense(8, name="dense")(x)
        stack = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return stack(name="stack")(x, None)[0]


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return nn.remat(nn.Dense)(8, name="inner")(x), None


def test_counts_are_the_formulas():
    x = shape(2, 7, 9, 4)
    variables = jax.eval_shape(Small().init, jax.random.key(0), x)
    positions = 2 * 7 * 9
    found = multiply_accumulates(Small().apply, variables, x)
    assert {path.split("/")[1]: count for path, count in found.items()} == {
        "conv": positions * 6 * 3 * 5 * 2,
        "dense": positions * 6 * 8,
        "stack": 3 * positions * 8 * 8,
    }
    # Backward: a product with the kernel and one with the input for each; remat repeats what the scan holds. The
    # convolution's input needs no gradient.
    grads = multiply_accumulates(jax.grad(lambda v, x: jnp.sum(Small().apply(v, x) ** 2)), variables, x)
    repeated = {"conv": 2, "dense": 3, "stack": 4}
    total = sum(repeated[path.split("/")[1]] * count for path, count in found.items())
    # A kernel's gradient is a convolution whose groups are over batches: counted by its own shapes.
    assert sum(grads.values()) == pytest.approx(total, rel=0.25)


def test_a_strided_convolution_is_differentiated_by_two_of_its_size():
    """The gradient of its input is a convolution of the gradients with zeros between them, which are not counted."""
    conv = nn.Conv(6, (4, 4), (4, 4), padding="VALID", use_bias=False)
    image = jnp.zeros((1, 16, 16, 3))
    params = jax.eval_shape(conv.init, jax.random.key(0), image)
    forward = sum(multiply_accumulates(conv.apply, params, image).values())
    assert forward == 16 * 6 * 4 * 4 * 3

    def loss(params, image):
        return jnp.sum(conv.apply(params, image) ** 2)

    assert sum(multiply_accumulates(jax.grad(loss, argnums=(0, 1)), params, image).values()) == 3 * forward


class Constant(nn.Module):
    """A network that neither learns nor multiplies anything."""

    tasks: tuple = (Depth(),)
    interaction: nn.Module = NoInteraction()
    dtype: str = "float32"

    def __call__(self, image, train=False):
        return {"depth": image[..., :1]}


def test_a_network_of_no_cost():
    found = plan(Constant(), (4, 6))
    assert not any(found.parameters.values())
    assert not any(found.macs.values())
    assert found.to_dict()["interaction_share"] == 0
    console = Console(file=io.StringIO(), width=120)
    print_plan(found, console)
    assert "network" in console.file.getvalue()
    assert "%" not in console.file.getvalue()


def test_branches_and_loops():
    square = shape(4, 4)
    branch = multiply_accumulates(lambda x: jax.lax.cond(x[0, 0] > 0, lambda y: y @ y @ y, lambda y: y @ y, x), square)
    assert sum(branch.values()) == 2 * 64
    assert sum(multiply_accumulates(lambda x: jax.lax.map(lambda row: x @ row, x), square).values()) == 64
    with pytest.raises(ValueError, match="inside a while loop"):
        multiply_accumulates(lambda x: jax.lax.while_loop(lambda y: y[0, 0] < 9, lambda y: y @ y, x), square)


def test_residuals_are_what_the_gradient_needs():
    def forward(params, x):
        return jnp.sum(jnp.tanh(x @ params))

    # tanh keeps its output; the product needs its input, which is an argument.
    assert residual_bytes(forward, shape(8, 16), shape(4, 8)) in (4 * 4 * 16, 4 * 4 * 16 * 2)
    tokens, rate = shape(2, 16, 8), shape()
    kept = {}
    for policy in ("none", "full"):
        block = nn.remat(Block)(2) if policy == "full" else Block(2)
        params = jax.eval_shape(Block(2).init, jax.random.key(0), tokens, rate)
        kept[policy] = residual_bytes(lambda p, t, r, block=block: block.apply(p, t, r)[0], params, tokens, rate)
    assert kept["full"] < kept["none"] / 10


@pytest.mark.parametrize("name", INTERACTIONS)
def test_no_array_of_an_interaction_grows_with_the_square_of_the_tokens(name):
    """Four times the tokens, four times the largest array; only dense attention without chunks has the square."""
    options = {"kem": {"num_slots": 4, "top_k": 16}, "none": {"mlp_width": 16}}
    options |= {"skem": options["kem"] | {"etf_vertices": 9}, "within_tasks": options["kem"]}
    member = INTERACTIONS[name](**options.get(name, {}))

    def largest(side, member=member):
        features = {task: shape(1, side, side, 16) for task in "ab"}
        variables = jax.eval_shape(member.init, jax.random.key(0), features)
        return largest_arrays(lambda v, f: member.apply(v, f), variables, features, number=1)[0][2]

    # 16,384 and 65,536 tokens a task: far more than slots, channels or a chunk of 1,024 queries.
    assert largest(256) <= 4 * largest(128)
    dense = CrossTaskAttention(query_chunk=None)
    assert largest(256, dense) == 16 * largest(128, dense)


@pytest.mark.parametrize(
    "name", ["kem", "skem", pytest.param("shared_workspace", marks=pytest.mark.slow), "cross_attention"]
)
def test_compiled_memory_of_the_backward_pass(name):
    """From the compiler: temporaries of forward and backward over 2,048 and 8,192 tokens."""
    slots = {"num_slots": 4, "top_k": 16}
    options = {"kem": slots, "skem": slots | {"etf_vertices": 9}, "shared_workspace": slots}
    member = INTERACTIONS[name](**options.get(name, {"query_chunk": None}))

    def temporaries(side):
        features = {task: shape(1, side, side, 8) for task in "ab"}
        variables = jax.eval_shape(member.init, jax.random.key(0), features)

        def loss(v, f):
            return sum(jnp.sum(value**2) for value in member.apply(v, f).values())

        return jax.jit(jax.grad(loss)).lower(variables, features).compile().memory_analysis().temp_size_in_bytes

    ratio = temporaries(64) / temporaries(32)
    assert ratio > 15 if name == "cross_attention" else ratio <= 4.2


def planned(name: str, overrides=()) -> Plan:
    config = read_config(name, overrides)
    return plan(build_model(config, build_tasks(config)), tuple(config.data.size))


def test_the_swin_l_system_is_as_small_as_promised():
    found = planned("nyud:swin_l,interaction=skem")
    assert sum(found.parameters.values()) < 240e6
    assert sum(found.macs.values()) < 365e9
    assert found.interaction_share < 0.05
    saved = json.loads(RESULTS.read_text())["systems"]["nyud:swin_l,interaction=skem"]["plan"]
    assert (found.parameters, found.macs, found.training_macs) == (
        *(saved[key] for key in ("parameters", "macs", "training_macs")),
    ), "the table of docs/cost.md is of another network: run benchmarks/speed/full_size.py anew"
    tokens = 4 * 112 * 144
    assert all(size < 4 * tokens * 1024 for _, _, size in found.largest)  # linear in tokens x tasks
    # Over all tokens the scores of retrieving and of writing and what is written, of 32 slots; the maps, and the frame
    # where tokens were mapped, over slots alone, and the 32 tokens that each keeps.
    slots, width, vertices, top_k = 32, 192, 128, 32
    expected = 3 * tokens * slots * width + 3 * slots * width * width + 6 * slots * vertices * width
    expected += slots * top_k * width
    assert found.macs["interaction"] == expected


# Every backbone, and every data set's size and tasks; what is kept of most pairs is read in the test below.
@pytest.mark.parametrize(
    ("config", "system"),
    [
        pytest.param(config, system, marks=() if config == "nyud" and system == "vit_b" else pytest.mark.slow)
        for config, system in [
            *(("nyud", system) for system in SYSTEMS if system != "swin_b"),  # between two of its family
            *((config, "vit_l") for config in ("pascal_context", "cityscapes")),
        ]
    ],
)
def test_every_system_is_traced(config, system):
    """Training and prediction at the published size, with two scales on a persisting workspace."""
    found = planned(f"{config}:{system},interaction=skem", ["--config.scales=16", "--config.persist=true"])
    assert found.macs["backbone"] > 4e9
    assert found.training_macs > 2.5 * sum(found.macs.values())
    assert found.kept_bytes > 2**28


def test_every_full_size_variant_was_compiled():
    """What the compiler reserves for the whole network: a workspace adds far less than one array of tokens x tasks
    squared, in bfloat16, would take."""
    systems = json.loads(RESULTS.read_text())["systems"]
    counted = {"dinov3_l", "dinov3_hplus", "convnext_l"}  # by their traces alone
    for config in ("nyud", "pascal_context", "cityscapes"):
        read = read_config(config, ())
        height, width = (round(length * read.input_scale) // 4 for length in read.data.size)
        square = 2 * (len(read.tasks) * height * width) ** 2
        for system in set(SYSTEMS) - counted:
            compiled = {
                name: systems[f"{config}:{system},interaction={name}"]["compiled"]
                for name in ("none", "cross_attention", "shared_workspace", "kem", "skem")
            }
            assert all(set(steps) == {"train", "evaluate"} for steps in compiled.values())
            for name in ("shared_workspace", "kem", "skem"):
                for step, memory in compiled[name].items():
                    added = memory["temporary_bytes"] - compiled["none"][step]["temporary_bytes"]
                    assert added < square / 10, (config, system, name, step)


@pytest.mark.slow
def test_a_full_size_system_runs():
    """One step of training and one evaluation of the published widths and depths, on noise of a quarter of the
    published height and width, at two scales on one workspace."""
    name, overrides = "nyud:swin_t,interaction=skem", ("--config.scales=16,", "--config.persist=true")
    config = read_config(name, overrides)
    tasks = build_tasks(config)
    size = tuple(length // 4 for length in config.data.size)
    model, optimizer = build_model(config, tasks, size), make_optimizer(1e-4)
    rng = np.random.default_rng(0)
    image = rng.normal(size=(1, *size, 3)).astype(np.float32)
    batch = {"image": image} | {
        task: rng.integers(0, 2, target.shape).astype(target.dtype)
        for task, target in target_shapes(tasks, size).items()
    }
    state = jax.jit(lambda: init_state(model, optimizer, jnp.zeros(image.shape)))()
    before = jax.tree.map(np.asarray, state.params)
    state, logs = jax.jit(make_train_step(model, tasks, optimizer))(state, batch)
    assert all(np.all(np.isfinite(value)) for value in jax.tree.leaves(logs))
    moved = jax.tree.map(lambda old, new: bool(np.any(old != new)), before, state.params)
    assert all(moved[part] for part in ("backbone", "interaction"))
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state.params))
    sums = jax.jit(make_eval_step(model, tasks))(state.variables, batch)
    assert all(np.all(np.isfinite(value)) for value in jax.tree.leaves(sums))


def test_the_command(tmp_path, capsys):
    assert main(["plan", "--config=scenes", f"--json={tmp_path / 'plan.json'}", f"--cache_dir={tmp_path}"]) == 0
    output = capsys.readouterr().out
    for part in ("parameters (M)", "MACs (G)", "= 2 MACs", "backbone", "interaction", "GiB an image"):
        assert part in " ".join(output.split())
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert saved["macs_total"] == sum(saved["macs"].values())
    assert saved["parameters_total"] == 961_782
