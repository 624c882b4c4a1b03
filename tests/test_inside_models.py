"""KEM inside other people's models: `constants` stay fixed and no optimiser sees them; the page's code runs."""

import functools
import json
import re
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from sgw_jax import KEM

DOCS = Path(__file__).parent.parent / "docs"
EPS32 = float(np.finfo(np.float32).eps)
# Two programs that compute the same numbers in another order: sums of at most some hundred terms of size O(10).
CLOSE = {"rtol": 0, "atol": 1000 * EPS32}
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})
FRAMES = {"etf": ("etf", "vertices"), "orthonormal": ("orthonormal", "frame")}


class TwoTasks(nn.Module):
    """What a user writes: a trunk, a stem per task, KEM between the stems, a head per task."""

    projection: str = "etf"
    remat: bool = False

    @nn.compact
    def __call__(self, image):
        shared = nn.relu(nn.Conv(8, (3, 3), 2)(image))
        features = {name: nn.Conv(8, (3, 3))(shared) for name in ("semseg", "depth")}
        member = nn.remat(KEM) if self.remat else KEM
        features = member(3, top_k=4, etf_vertices=5, projection=self.projection, name="kem")(features)
        return {"semseg": nn.Dense(3)(features["semseg"]), "depth": nn.Dense(1)(features["depth"])}


def batch(examples=8):
    rng = np.random.default_rng(0)
    image = rng.normal(size=(examples, 8, 8, 3)).astype(np.float32)
    small = image[:, ::2, ::2]
    return image, {"semseg": small.argmax(-1), "depth": small.sum(-1, keepdims=True)}


def loss_of(outputs, target):
    labels = optax.softmax_cross_entropy_with_integer_labels(outputs["semseg"], target["semseg"])
    return labels.mean() + jnp.square(outputs["depth"] - target["depth"]).mean()


def assert_close(found, expected, **kwargs):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **(CLOSE | kwargs)), found, expected)


@pytest.mark.parametrize("projection", FRAMES)
def test_training_a_users_model_leaves_constants_alone(projection):
    """Plain JAX and Optax, with weight decay, which would shrink the frame if the optimiser saw it."""
    model, (image, target) = TwoTasks(projection), batch()
    variables = jit(model.init)(jax.random.key(0), image)
    params, constants = variables["params"], variables["constants"]
    module, leaf = FRAMES[projection]
    assert jax.tree.map(np.shape, constants) == {"kem": {module: {leaf: (8, 5 if projection == "etf" else 4)}}}
    before = jax.tree.map(np.array, constants)
    optimizer = optax.adamw(1e-2, weight_decay=0.1)

    @jit
    def step(params, state, constants):
        def loss(params):
            outputs, changed = model.apply(
                {"params": params, "constants": constants}, image, mutable=["constants", "intermediates"]
            )
            return loss_of(outputs, target), changed["constants"]

        (value, constants), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state, constants, value

    start, state, losses = params, optimizer.init(params), []
    for _ in range(10):
        params, state, constants, loss = step(params, state, constants)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, constants, before)  # even where apply may change them
    moments = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(state)}
    assert any("slots" in path for path in moments)
    assert not any(leaf in path for path in moments)
    moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), params["kem"], start["kem"])
    assert all(jax.tree.leaves(moved)), moved


class Layer(nn.Module):
    """A KEM as nn.scan wants its layers."""

    projection: str
    remat: bool

    @nn.compact
    def __call__(self, features, _):
        member = nn.remat(KEM) if self.remat else KEM
        return member(3, top_k=4, etf_vertices=5, projection=self.projection, name="kem")(features), None


@pytest.mark.parametrize("projection", FRAMES)
def test_remat_inside_scan(projection):
    """The same variables, outputs and gradients as without remat; one frame for all layers."""
    features = {"a": np.random.default_rng(0).normal(size=(2, 2, 3, 8)).astype(np.float32)}
    features["b"] = features["a"][:, 0] + 1
    results = []
    for remat in (False, True):
        scanned = nn.scan(
            Layer, variable_axes={"params": 0}, variable_broadcast="constants", split_rngs={"params": True}, length=2
        )(projection, remat)
        variables = jit(scanned.init)(jax.random.key(0), features, None)

        def loss(params, constants, module=scanned):
            outputs, _ = module.apply({"params": params, "constants": constants}, features, None)
            return sum(jnp.square(x).mean() for x in outputs.values())

        results.append((variables, jit(jax.value_and_grad(loss))(variables["params"], variables["constants"])))
    assert all(x.shape[0] == 2 for x in jax.tree.leaves(results[0][0]["params"]))
    module, leaf = FRAMES[projection]
    assert results[0][0]["constants"]["kem"][module][leaf].shape == (8, 5 if projection == "etf" else 4)
    assert_close(results[1], results[0])


def test_remat_returns_the_slots_when_told_statically():
    features = {"a": np.ones((2, 3, 8), np.float32)}
    variables = jit(KEM(3).init)(jax.random.key(0), features)
    expected = jit(lambda v: KEM(3).apply(v, features, return_slots=True))(variables)
    remat = nn.remat(KEM, static_argnums=(3,))(3)
    assert_close(jit(lambda v: remat.apply(v, features, None, True))(variables), expected)


@pytest.mark.parametrize(
    "projection", ["etf", *(pytest.param(other, marks=pytest.mark.slow) for other in FRAMES if other != "etf")]
)
def test_gradients_over_devices_and_through_nnx(projection):
    """Every way to take the gradient of a batch's mean loss gives the plain one."""
    model, (image, target) = TwoTasks(projection), batch()
    variables = jit(model.init)(jax.random.key(0), image)

    def loss(params, constants, image, target, model=model):
        return loss_of(model.apply({"params": params, "constants": constants}, image), target)

    args = (variables["params"], variables["constants"], image, target)
    expected = jit(jax.grad(loss))(*args)

    one = jit(
        jax.grad(lambda p, c, i, t: jax.vmap(lambda *e: loss(p, c, *jax.tree.map(lambda x: x[None], e)))(i, t).mean())
    )
    assert_close(one(*args), expected, err_msg="vmap")

    remat = functools.partial(loss, model=TwoTasks(projection, remat=True))
    assert_close(jit(jax.grad(remat))(*args), expected, err_msg="remat")

    mesh = jax.make_mesh((8,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    over_mesh = jax.shard_map(
        lambda *args: jax.lax.pmean(loss(*args), "rows"),
        mesh=mesh,
        in_specs=(P(), P(), P("rows"), P("rows")),
        out_specs=P(),
    )
    assert_close(jit(jax.grad(over_mesh))(*args), expected, err_msg="shard_map")

    over_devices = jax.pmap(
        lambda *args: jax.lax.pmean(jax.grad(loss)(*args), "rows"), "rows", in_axes=(None, None, 0, 0), out_axes=None
    )
    split = jax.tree.map(lambda x: x[:, None], (image, target))
    assert_close(over_devices(*args[:2], *split), expected, err_msg="pmap")

    bridged = nnx.jit(lambda: nnx.bridge.ToNNX(model, rngs=nnx.Rngs(0)).lazy_init(image))()
    constants = nnx.state(bridged, nnx.variable_type_from_name("constants"))
    assert_close(nnx.to_pure_dict(constants), variables["constants"], atol=0)
    nnx.replace_by_pure_dict(learned := nnx.state(bridged, nnx.Param), variables["params"])
    nnx.update(bridged, learned)
    through = nnx.jit(nnx.grad(lambda m, i, t: loss_of(m(i), t)))(bridged, image, target)
    assert_close(nnx.to_pure_dict(through), expected, err_msg="nnx")


@pytest.fixture
def quick_compilation():
    """The documentation's programs run for microseconds: most of their time is compilation. Off is JAX's default."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_every_snippet_of_the_page_runs():
    """The code blocks of docs/extending.md: each section's after the first snippet alone, which it may go on from."""
    text = (DOCS / "extending.md").read_text(encoding="utf-8")
    first, *sections = (
        re.findall(r"^```python\n(.*?)^```", part, re.M | re.S) for part in re.split("^## ", text, flags=re.M)
    )
    assert len(first) + sum(map(len, sections)) == text.count("```python") == 14
    start: dict[str, Any] = {}
    exec(compile(first[0], "docs/extending.md", "exec"), start)
    names = dict(start)
    for blocks in sections:
        section = dict(start)
        for block in blocks:
            exec(compile(block, "docs/extending.md", "exec"), section)
        names |= {name: value for name, value in section.items() if name not in start}
    predictions, features = names["predictions"], names["features"]
    for loss in ("loss", "nnx_loss", "heat"):
        assert np.isfinite(names[loss]) and names[loss] > 0, loss  # noqa: PT018
    assert names["metrics"]["loss"] > 0
    assert names["own_metrics"]["loss"] > 0
    assert 0 <= names["miou"]["miou"] <= 100
    assert set(names["records"]["KEM_0"]) >= {"readout", "update_ratio"}
    assert names["ensemble"]["depth"].shape == (3, 8, 8, 8, 1)
    for way in ("singles", "sharded", "parallel"):
        same = jax.tree.map(lambda x, like: x.reshape(like.shape), names[way], predictions)
        assert_close(same, predictions, err_msg=way)
    assert names["mixed"]["depth"].sharding.spec[0] == "data"
    before, after = names["variables"], names["updated"]
    jax.tree.map(np.testing.assert_array_equal, after["constants"], before["constants"])
    jax.tree.map(np.testing.assert_array_equal, after["params"]["Conv_0"], before["params"]["Conv_0"])
    assert np.any(after["params"]["KEM_0"]["slots"] != before["params"]["KEM_0"]["slots"])
    assert jax.tree.structure(names["as_linen"]) == jax.tree.structure(before["params"]["KEM_0"])
    for name, value in features.items():
        assert names["refined"][name].shape == value.shape
        assert names["refined_frames"][name].shape == (3, *value.shape)
        np.testing.assert_array_equal(names["padded"][name][:, 3:], value[:, 3:])


@pytest.mark.usefixtures("quick_compilation")
def test_the_notebook_runs():
    """Its code cells, top to bottom in one namespace; the outputs on the page name no machine."""
    text = (DOCS / "kem_in_20_lines.ipynb").read_text(encoding="utf-8")
    notebook = json.loads(text)
    assert notebook["nbformat"] == 4
    assert not re.search(r"/home/|/tmp/|/Users/", text)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] or cell is not cells[-1] for cell in cells)
    names: dict[str, Any] = {}
    for number, cell in enumerate(cells, 1):
        exec(compile("".join(cell["source"]), f"cell {number} of kem_in_20_lines.ipynb", "exec"), names)
    assert names["losses"][-1] < 0.5 * names["losses"][0]
    assert names["constants_unchanged"]
