"""The whole network: what it returns, how tasks hang together, and that users can bring their own parts."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgw_jax.backbones.vit import ViT
from sgw_jax.interactions import KEM, NoInteraction
from sgw_jax.layers import parameter_names as names
from sgw_jax.model import FEATURES, PRELIMINARY, MultiTaskModel
from sgw_jax.sharding import path_name
from sgw_jax.tasks import TASKS, Depth, Normals, SemSeg, Task
from sgw_jax.tasks.base import count

jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": "0"})
ALL = tuple(kind() for kind in TASKS.values())
SIZE = (32, 64)


def make_model(tasks=ALL, interaction=None, **options):
    dtype = options.get("dtype", jnp.float32)
    backbone = ViT(width=8, depth=4, num_heads=2, mlp_ratio=2.0, image_size=SIZE, dtype=dtype)
    return MultiTaskModel(tasks, backbone, interaction or KEM(3, top_k=4), channels=8, **options)


def shapes_of(model, image=(2, *SIZE, 3), **kwargs):
    """Predictions and variables as shapes."""
    return jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, **kwargs), jax.ShapeDtypeStruct(image, jnp.float32)
    )


@pytest.mark.parametrize("upsample", ["bilinear", "subpixel"])
@pytest.mark.parametrize("stride", [4, 8])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_one_float32_map_per_task(upsample, stride, dtype):
    predictions, variables = shapes_of(make_model(upsample=upsample, stride=stride, dtype=dtype), train=True)
    assert {n: p.shape for n, p in predictions.items()} == {t.name: (2, *SIZE, t.channels) for t in ALL}
    assert {p.dtype for p in predictions.values()} == {jnp.dtype(jnp.float32)}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}
    stems, heads = ({f"{part}_{task.name}" for task in ALL} for part in ("stem", "head"))
    assert set(variables["params"]) == {"backbone", "interaction"} | stems | heads


@pytest.mark.slow
def test_an_image_of_any_size_is_that_image_padded():
    """Predictions have the image's size and lie where the pixels are: those of the image in zeros, cropped."""
    model = make_model((Depth(),), NoInteraction(), scales=(16,))
    image = np.random.default_rng(0).normal(size=(1, 30, 45, 3)).astype(np.float32)
    variables = jit(model.init)(jax.random.key(0), image)
    padded = np.pad(image, ((0, 0), (0, 2), (0, 3), (0, 0)))
    found, expected = (jit(model.apply)(variables, pixels)["depth"] for pixels in (image, padded))
    assert found.shape == (1, 30, 45, 1)
    np.testing.assert_array_equal(found, expected[:, :30, :45])
    assert shapes_of(model.clone(upsample="subpixel"), (1, 29, 41, 3))[0]["depth"].shape == (1, 29, 41, 1)


def test_every_parameter_lies_in_a_part():
    """And a task's own are found by its name, at every scale."""
    _, variables = shapes_of(make_model(scales=(16,), preliminary=True), train=True)
    paths = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(variables["params"])]
    assert {names.part_of(path) for path in paths} == {"backbone", "stem", "interaction", "head", "preliminary"}
    tasks = [task.name for task in ALL]
    for path in paths:
        own = next((task for task in tasks if path.split("/")[0].endswith(f"_{task}")), None)
        assert names.owner(path, tasks, mixes=False) == own
        assert (names.in_backbone(path) is not None) == path.startswith("backbone/")
    assert names.of_task(names.STEM, "depth", 16) == "stem16_depth"
    assert names.part_of("jit(step)/transpose(jvp(stem16_depth))") is None
    assert names.part_of("optimizer/mu/kernel") is None


def test_preliminary_predictions_are_for_training_only():
    model = make_model(preliminary=True)
    trained, _ = shapes_of(model, train=True)
    names = {task.name for task in ALL}
    assert set(trained) == names | {PRELIMINARY + name for name in names}
    assert all(trained[name].shape == trained[PRELIMINARY + name].shape for name in names)
    assert set(shapes_of(model, train=False)[0]) == names
    assert set(shapes_of(make_model(), train=True)[0]) == names


def test_features_are_returned_in_training_for_the_task_that_uses_them():
    model = make_model((SemSeg(num_classes=3, dot_regression=1), Depth()))
    trained, _ = shapes_of(model, train=True)
    assert set(trained) == {"semseg", "depth", FEATURES + "semseg"}
    assert trained[FEATURES + "semseg"].shape == (2, SIZE[0] // 4, SIZE[1] // 4, 8)
    assert set(shapes_of(model, train=False)[0]) == {"semseg", "depth"}


def test_the_network_may_see_less_than_it_predicts():
    """Predictions keep the image's size; the features are those of the resized image."""
    model = make_model((SemSeg(num_classes=3, dot_regression=1),), input_scale=0.5)
    predictions, _ = shapes_of(model, (1, 64, 128, 3), train=True)
    assert predictions["semseg"].shape == (1, 64, 128, 3)
    assert predictions[FEATURES + "semseg"].shape == (1, 8, 16, 8)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (make_model(tasks=()), r"tasks are \[\]"),
        (make_model(tasks=(Depth(), Depth())), r"\['depth', 'depth'\]; give at least one, each name once"),
        (make_model(upsample="nearest"), "upsample is 'nearest'"),
        (make_model(stride=2), r"stride 2 is not in the pyramid, which has \[4, 8, 16, 32\]"),
    ],
)
def test_what_does_not_fit_is_refused(model, message):
    with pytest.raises(ValueError, match=message):
        shapes_of(model)


@pytest.mark.parametrize(("interaction", "mixes"), [(NoInteraction(), False), (KEM(3), True)])
def test_tasks_meet_in_the_interaction_alone(interaction, mixes):
    """Another task's stem changes a prediction through KEM and through nothing else; another's head never does."""
    image = np.random.default_rng(0).normal(size=(1, 32, 32, 3)).astype(np.float32)
    model = make_model((Depth(), Normals()), interaction, stride=8)
    _, variables = shapes_of(model, image.shape)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: 0.3 * rng.normal(size=leaf.shape).astype(leaf.dtype), variables["params"])
    depth = jit(lambda params: model.apply({"params": params}, image)["depth"])
    for part, changes in (("stem_normals", mixes), ("head_normals", False), ("stem_depth", True), ("backbone", True)):
        moved = {**params, part: jax.tree.map(lambda leaf: leaf + 0.1, params[part])}
        assert np.array_equal(depth(params), depth(moved)) != changes, part


@dataclasses.dataclass(frozen=True)
class Albedo(Task):
    """A task that the package does not know."""

    name: str = "albedo"

    @property
    def channels(self):
        return 2

    @property
    def target(self):
        return {"kind": "mask", "fill": -1.0, "resample": "linear"}

    @property
    def metric(self):
        return "mse"

    @property
    def higher_is_better(self):
        return False

    def valid(self, target):
        return target[..., 0] >= 0

    def loss_terms(self, prediction, target, statistics=None):
        valid = self.valid(target)
        error = jnp.sum(jnp.square(self.float32(prediction) - target), axis=-1)
        return jnp.sum(jnp.where(valid, error, 0)), count(valid)

    def metric_sums(self, prediction, target):
        total, number = self.loss_terms(prediction, target)
        return {"squared": total, "pixels": number}

    def metric_values(self, sums):
        return {"mse": float(sums["squared"]) / int(sums["pixels"])}

    def decode(self, prediction):
        return prediction

    def draw(self, decoded, like=None):
        return np.zeros((*decoded.shape[:2], 3), np.uint8)


class Mean(nn.Module):
    """An interaction that the package does not know: every task gets the mean of all."""

    @nn.compact
    def __call__(self, features):
        mean = sum(features.values()) / len(features)
        return {name: nn.Dense(value.shape[-1], name=name)(mean) for name, value in features.items()}


def test_users_bring_their_own_task_and_interaction():
    task = Albedo()
    model = make_model((SemSeg(num_classes=3), task), Mean())
    predictions, variables = shapes_of(model)
    assert predictions["albedo"].shape == (2, *SIZE, 2)
    assert set(variables["params"]["interaction"]) == {"semseg", "albedo"}
    loss = jax.eval_shape(task.loss, predictions["albedo"], jax.ShapeDtypeStruct((2, *SIZE, 2), jnp.float32))
    assert loss.shape == ()


# ---- several scales ------------------------------------------------------------------------------------------------


class Recorder(nn.Module):
    """An interaction with slots that adds one to every feature and counts its calls in the slots."""

    has_slots = True

    @nn.compact
    def __call__(self, features, slots=None, return_slots=False):
        slots = jnp.zeros((2, 1, 1)) if slots is None else slots + 1
        self.param("weight", nn.initializers.ones, ())
        result = {name: value + 1 for name, value in features.items()}
        self.sow("seen", "slots", slots)
        self.sow("seen", "size", next(iter(features.values())).shape[1:3])
        return (result, slots) if return_slots else result


def several(**options):
    backbone = ViT(width=8, depth=4, num_heads=2, mlp_ratio=2.0, image_size=SIZE)
    options = {"interaction": Recorder(), "scales": (8, 16), "channels": 8} | options
    return MultiTaskModel((Depth(), Normals()), backbone, **options)


@pytest.mark.slow
@pytest.mark.parametrize("persist", [False, True])
def test_scales_go_from_coarse_to_fine(persist):
    """Each scale has its own stems and interaction; with persist the slots of one start the next."""
    model = several(persist=persist)
    image = jnp.zeros((2, *SIZE, 3))
    variables = jax.jit(model.init)(jax.random.key(0), image)
    assert {name for name in variables["params"] if name.startswith("interaction")} == {
        "interaction", "interaction8", "interaction16"
    }  # fmt: skip
    stems = {f"stem{scale}_{task}" for scale in ("", 8, 16) for task in ("depth", "normals")}
    assert stems == {name for name in variables["params"] if name.startswith("stem")}
    _, found = model.apply({"params": variables["params"]}, image, mutable="seen")
    found = found["seen"]
    for turn, name in enumerate(("interaction16", "interaction8", "interaction")):
        np.testing.assert_array_equal(found[name]["slots"][0], np.full((2, 1, 1), float(turn if persist else 0)))
        stride = (16, 8, 4)[turn]
        assert found[name]["size"][0] == (SIZE[0] // stride, SIZE[1] // stride)


@pytest.mark.slow
def test_coarse_scales_reach_the_predictions():
    """A gradient of the predictions comes to the slots of the coarsest scale's KEM, through the finer ones too."""
    model = several(interaction=KEM(3, top_k=5), persist=True)
    image = jnp.asarray(np.random.default_rng(0).normal(size=(1, *SIZE, 3)), jnp.float32)
    params = jax.jit(model.init)(jax.random.key(0), image)["params"]
    grads = jax.jit(jax.grad(lambda p: sum(jnp.sum(v**2) for v in model.apply({"params": p}, image).values())))(params)
    for name in ("stem16_depth", "interaction16"):
        assert all(np.any(leaf) for leaf in jax.tree.leaves(grads[name])), name
    # A scale that is handed its slots has no use for its own, so only the coarsest learns any.
    assert not np.any(grads["interaction"]["slots"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scales": (4,)}, r"scales \(4,\) must be different strides, coarser than stride 4"),
        ({"scales": (8, 8)}, "must be different strides"),
        ({"interaction": NoInteraction(), "persist": True}, "persist needs an interaction with slots; NoInteraction"),
        ({"scales": (64,)}, r"stride 64 is not in the pyramid"),
    ],
)
def test_scales_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(several(**options).init, jax.random.key(0), jnp.zeros((1, *SIZE, 3)))
