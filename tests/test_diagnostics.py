"""Diagnostics of KEM against NumPy loops written from their definitions, and at extremes where the answer is known."""

import functools
import itertools
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgw_jax.data_pipelines.transforms import IMAGE_MEAN, IMAGE_STD
from sgw_jax.evaluation import diagnostics
from sgw_jax.evaluation.diagnostics import diagnose
from sgw_jax.evaluation.evaluate import evaluate
from sgw_jax.evaluation.examples import SHOWN_SLOTS, collect_examples
from sgw_jax.heads import PredictionHead
from sgw_jax.interactions import INTERACTIONS, KEM, NoInteraction
from sgw_jax.model import MultiTaskModel
from sgw_jax.sharding import make_mesh
from sgw_jax.tasks import Depth, SemSeg
from sgw_jax.train_step import make_eval_step

TASKS = (SemSeg(num_classes=3), Depth())
NAMES = [task.name for task in TASKS]
LAYOUT = NAMES[::-1]  # the model has its tasks, hence its tokens, in another order than the one asked for
SIZE, STRIDE, CHANNELS, BATCH = (32, 24), 8, 8, 4
TOKENS = SIZE[0] * SIZE[1] // STRIDE**2  # of one task
LENGTH = 6  # of the split: the second batch has two rows of padding
SLOTS, HEADS, TOP_K = 6, 2, 5
EPS = float(np.finfo(np.float32).eps)
# Means of numbers of size <= 1, each the result of a softmax over at most 2 * TOKENS float32 terms and of fewer than 64
# rounded operations after it; the reference starts from the same sown weights, which are rounded once.
TOLERANCE = {"rtol": 0, "atol": (2 * TOKENS + 64) * EPS}
# Sums over the pixels of a batch, in the order that the compiler chose.
SUM_TOLERANCE = math.prod(SIZE) * BATCH * EPS
# The NumPy module below runs in float64 from the float32 features: the model rounds every one of the projections, the
# softmax and the head (a convolution over 9 * CHANNELS products), each of size O(10).
MODEL_TOLERANCE = {"rtol": 0, "atol": 10 * 4 * (9 * CHANNELS + 2 * TOKENS) * EPS}


class Patches(nn.Module):
    """The smallest backbone: a map for each stride."""

    strides: tuple[int, ...] = (STRIDE,)

    @nn.compact
    def __call__(self, image, train=False):
        return {stride: nn.Conv(CHANNELS, (stride, stride), stride, padding="VALID")(image) for stride in self.strides}


def model_with(interaction, scales=(), **options):
    backbone = Patches((STRIDE, *scales))
    return MultiTaskModel(
        TASKS[::-1], backbone, interaction, channels=CHANNELS, stride=STRIDE, scales=scales, **options
    )


def kem(**options):
    return KEM(**{"num_slots": SLOTS, "num_heads": HEADS, "top_k": TOP_K, **options})


def variables_of(model, seed=0):
    """Random parameters of every collection, drawn by NumPy: compiling `init` would take longer than the tests."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *SIZE, 3), jnp.float32))
    rng = np.random.default_rng(seed)

    def draw(leaf):
        fan_in = math.prod(leaf.shape[:-1])
        return jnp.asarray(rng.normal(size=leaf.shape) / math.sqrt(fan_in), jnp.float32)

    variables = jax.tree.map(draw, {name: tree for name, tree in shapes.items() if name != "intermediates"})
    module = variables["params"].get("interaction", {})
    if "slots" in module:
        module["slots"] *= math.sqrt(module["slots"].shape[0])
    return variables


def images(rng, count):
    return rng.normal(size=(count, *SIZE, 3)).astype(np.float32)


def split(seed=0, length=LENGTH, image=None):
    """Batches as the loader yields them: the last one padded with zeros and ignored targets."""
    rng = np.random.default_rng(seed)
    arrays = {
        "image": images(rng, length) if image is None else np.repeat(image[None], length, axis=0),
        "semseg": rng.integers(0, 3, (length, *SIZE)).astype(np.int32),
        "depth": rng.uniform(1, 5, (length, *SIZE, 1)).astype(np.float32),
    }
    fill = {"image": 0, "semseg": 255, "depth": 0}
    padding = -length % BATCH
    for name, array in arrays.items():
        rows = np.full((padding, *array.shape[1:]), fill[name], array.dtype)
        arrays[name] = np.concatenate([array, rows])
    arrays["item"] = np.where(np.arange(length + padding) < length, np.arange(length + padding), -1).astype(np.int32)
    return [{name: a[i : i + BATCH] for name, a in arrays.items()} for i in range(0, length + padding, BATCH)]


def mesh_of(devices=1):
    return make_mesh({"data": -1}, jax.devices()[:devices])


def run(model, variables, batches, devices=1):
    return diagnose(model, variables, batches, mesh_of(devices), TASKS)


@functools.cache
def forward(model):
    """Jitted (variables, image) -> (predictions, collections with the diagnostics)."""
    return jax.jit(lambda variables, image: model.apply(variables, image, mutable=["intermediates"]))


def sown_by(model, variables, batches, length=LENGTH):
    """Round -> name -> the array over the split's real images, as the module sows it."""
    image = np.concatenate([batch["image"] for batch in batches])[:length]
    _, collections = forward(model)(variables, image)
    sown = collections["intermediates"]["interaction"]
    rounds = len(sown["readout"])
    return [{name: np.asarray(values[r]) for name, values in sown.items()} for r in range(rounds)]


def reference(rounds):
    """The definitions of `diagnose` in float64, one image, head, slot, pair at a time."""
    diversity, retrieve, write, cosine, ratio, reads, writes, flow = ([] for _ in range(8))
    for sown in rounds:
        weights, attention = sown["retrieve_weights"].astype(np.float64), sown["write_weights"].astype(np.float64)
        count, heads, slots, kept = weights.shape
        for image, head in itertools.product(range(count), range(heads)):
            everything = np.tile(np.arange(kept), (slots, 1))
            index = sown["retrieve_index"][image, head] if "retrieve_index" in sown else everything
            sets = [set(row.tolist()) for row in index]
            diversity += [1 - len(a & b) / len(a | b) for a, b in itertools.combinations(sets, 2)]
            w = weights[image, head]
            retrieve += [-sum(x * math.log(x) for x in row if x > 0) / math.log(kept) for row in w]
            a = attention[image, head]
            write += [-sum(x * math.log(x) for x in row if x > 0) / math.log(slots) for row in a]
            places = [LAYOUT.index(name) for name in NAMES]
            read = np.array([[w[s][index[s] // TOKENS == t].sum() for t in places] for s in range(slots)])
            use = np.array([a[t * TOKENS : (t + 1) * TOKENS].mean(axis=0) for t in places])
            reads.append(read)
            writes.append(use)
            flow.append(use @ read)
        for one, other in itertools.combinations(sown["readout"].astype(np.float64), 2):
            dot = np.sum(one * other, axis=-1)
            cosine += list(dot / (np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)))
        ratio += sown["update_ratio"].tolist()
    single = {
        "slot_diversity": diversity,
        "retrieve_entropy": retrieve,
        "write_entropy": write,
        "readout_cosine": cosine,
        "update_ratio": ratio,
    }
    return {
        **{name: np.mean(values) for name, values in single.items()},
        "reads": np.mean(reads, axis=0),
        "writes": np.mean(writes, axis=0),
        "flow": np.mean(flow, axis=0),
    }


@pytest.fixture(scope="module", autouse=True)
def fast_compilation():
    """Compile little and once: the tests differ in parameters and data more than in programs."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diagnostics, "make_step", functools.cache(diagnostics.make_step))
        yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def plain():
    """(model, variables, batches, diagnostics) of one configuration."""
    model = model_with(kem())
    variables, batches = variables_of(model), split()
    return model, variables, batches, run(model, variables, batches)


def check_against_reference(found, rounds):
    for name, expected in reference(rounds).items():
        if found[name] is not None:
            np.testing.assert_allclose(found[name], expected, err_msg=name, **TOLERANCE)


def test_every_number_is_its_definition_over_the_real_images_alone(plain):
    model, variables, batches, found = plain
    check_against_reference(found, sown_by(model, variables, batches))
    assert found["images"] == LENGTH
    assert found["tasks"] == NAMES
    assert list(found["ablations"]) == ["zeroed", "swapped"]
    assert 0 < found["slot_diversity"] < 1
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def kept(model, variables, batch):
    """Per image, head and slot the set of kept tokens, in the first round."""
    index = sown_by(model, variables, [batch], length=BATCH)[0]["retrieve_index"]
    return [[[set(slot.tolist()) for slot in head] for head in image] for image in index]


def overlap(one, other):
    pairs = [(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)]
    return np.mean([len(a & b) / len(a | b) for a, b in pairs])


def test_selection_under_noise_and_between_images_by_sets(plain):
    model, variables, batches, _ = plain
    found = run(model, variables, batches[:1])
    noise = diagnostics.NOISE * np.asarray(jax.random.normal(jax.random.key(0), batches[0]["image"].shape))
    clean = kept(model, variables, batches[0])
    noisy = kept(model, variables, {**batches[0], "image": batches[0]["image"] + noise})
    stable = np.mean([overlap(a, b) for a, b in zip(clean, noisy, strict=True)])
    between = np.mean([overlap(a, b) for a, b in itertools.permutations(clean, 2)])
    np.testing.assert_allclose(found["selection_stability"], stable, **TOLERANCE)
    np.testing.assert_allclose(found["selection_between_images"], between, **TOLERANCE)
    assert between < stable < 1


def test_rounds_of_plain_softmax():
    model = model_with(kem(rounds=2, top_k=None, task_gate=True))
    variables, batches = variables_of(model, seed=1), split(1)
    found = run(model, variables, batches)
    gates = {task.name: variables["params"]["interaction"][f"task_gate_{task.name}"][0] for task in TASKS}
    assert found["task_gates"] == {name: float(gate) for name, gate in gates.items()}
    check_against_reference(found, sown_by(model, variables, batches))
    for name in ("slot_diversity", "selection_stability", "selection_between_images"):
        assert found[name] is None


def test_who_reads_whom_by_gates_of_pairs():
    """Slots of a task read it alone, and a task reads another by the size of their gate."""
    model = model_with(kem(balanced=True, pair_gate=True))
    variables, batches = variables_of(model, seed=1), split(1)
    found = run(model, variables, batches)
    names, number = [task.name for task in TASKS], model.interaction.num_slots
    own = [[name == source for name in names] for source in sorted(names)]
    np.testing.assert_allclose(found["reads"], np.repeat(own, number, axis=0), **TOLERANCE)
    params = variables["params"]["interaction"]
    gates = np.array([[float(params[f"pair_gate_{reader}_from_{s}"][0]) for s in names] for reader in names])
    np.testing.assert_array_equal(found["pair_gates"], gates)
    np.testing.assert_allclose(found["flow"], np.abs(gates) / np.abs(gates).sum(1, keepdims=True), **TOLERANCE)


def test_shares_are_shares(plain):
    for name in ("reads", "writes", "flow"):
        np.testing.assert_allclose(np.sum(plain[3][name], axis=-1), 1, **TOLERANCE)


def test_padding_that_is_not_a_number_changes_nothing(plain):
    model, variables, batches, found = plain
    spoilt = {**batches[1], "image": batches[1]["image"].copy()}
    spoilt["image"][LENGTH - BATCH :] = np.nan
    assert run(model, variables, [batches[0], spoilt]) == found


def test_without_items_every_row_counts(plain):
    model, variables, batches, _ = plain
    bare = [{name: values for name, values in batch.items() if name != "item"} for batch in batches]
    assert run(model, variables, bare)["images"] == 2 * BATCH
    assert run(model, variables, bare[:1]) == run(model, variables, batches[:1])


def test_more_devices_give_the_same(plain):
    model, variables, batches, found = plain
    sharded = run(model, variables, batches, devices=2)
    for name in ("slot_diversity", "readout_cosine", "reads", "writes", "flow", "update_ratio"):
        np.testing.assert_allclose(sharded[name], found[name], err_msg=name, **TOLERANCE)
    for name, expected in found["ablations"].items():
        assert sharded["ablations"][name]["losses"] == pytest.approx(expected["losses"], rel=SUM_TOLERANCE)


def test_equal_slots_have_no_diversity_and_are_used_alike():
    model = model_with(kem())
    variables = variables_of(model)
    slots = variables["params"]["interaction"]["slots"]
    variables["params"]["interaction"]["slots"] = jnp.broadcast_to(slots[:1], slots.shape)
    found = run(model, variables, split())
    assert found["slot_diversity"] == 0
    np.testing.assert_allclose(found["write_entropy"], 1, **TOLERANCE)


def test_slots_that_keep_disjoint_tokens_have_diversity_one():
    """Two slots with opposite queries keep the tokens of highest and of lowest score: disjoint for 2k <= n_s."""
    model = model_with(kem(num_slots=2, num_heads=1))
    variables = variables_of(model)
    slots = variables["params"]["interaction"]["slots"]
    variables["params"]["interaction"]["slots"] = jnp.stack([slots[0], -slots[0]])
    assert run(model, variables, split())["slot_diversity"] == 1


def test_zero_queries_average_and_zero_values_make_the_module_inert():
    model = model_with(kem(rounds=2, top_k=None))
    variables = variables_of(model)
    module = variables["params"]["interaction"]
    for part, name in (("retrieve", "query"), ("write", "value")):
        module[part][name]["kernel"] = jnp.zeros_like(module[part][name]["kernel"])
    found = run(model, variables, split())
    np.testing.assert_allclose(found["retrieve_entropy"], 1, **TOLERANCE)
    np.testing.assert_allclose(found["reads"], np.full((SLOTS, len(TASKS)), 1 / len(TASKS)), **TOLERANCE)
    assert found["update_ratio"] == 0


def test_equal_images_have_cosine_one_and_nothing_to_swap():
    image = images(np.random.default_rng(5), 1)[0]
    model = model_with(kem())
    variables, batches = variables_of(model), split(image=image)
    found = run(model, variables, batches)
    np.testing.assert_allclose(found["readout_cosine"], 1, **TOLERANCE)
    expected = evaluated(model, variables, batches)
    check_ablation(found["ablations"]["swapped"], expected)


def test_numbers_that_are_not_defined_are_none():
    model = model_with(kem(num_slots=1, top_k=1))
    found = run(model, variables_of(model), split(length=1))
    undefined = {name for name, value in found.items() if value is None}
    between = {"readout_cosine", "selection_between_images"}
    assert undefined == {"slot_diversity", "retrieve_entropy", "write_entropy", *between}


def evaluated(model, variables, batches):
    return evaluate(jax.jit(make_eval_step(model, TASKS)), variables, batches, mesh_of(), TASKS)


def check_ablation(found, expected):
    """Equal in the integer counts of semseg, and up to the order of addition in the rest."""
    assert found["metrics"]["semseg"] == expected.metrics["semseg"]
    assert found["metrics"]["depth"] == pytest.approx(expected.metrics["depth"], rel=SUM_TOLERANCE)
    assert found["losses"] == pytest.approx(expected.losses, rel=SUM_TOLERANCE)


def test_a_zeroed_read_out_is_no_interaction(plain):
    _, variables, batches, found = plain
    without = {"params": {name: tree for name, tree in variables["params"].items() if name != "interaction"}}
    expected = evaluated(model_with(NoInteraction()), without, batches)
    check_ablation(found["ablations"]["zeroed"], expected)


def test_a_swapped_read_out_is_that_of_the_image_before(plain):
    """The whole path from R^ on, in NumPy: write with the other image's read-out, then the model's own heads."""
    model, variables, batches, found = plain
    sown = sown_by(model, variables, batches)[0]
    source = [3, 0, 1, 2, 5, 4]  # within the batch; the second batch has two real images
    features = stem_features(model, variables, np.concatenate([batch["image"] for batch in batches])[:LENGTH])
    mixed = numpy_write(variables["params"]["interaction"], features, sown["readout"][source].astype(np.float64))
    targets = {name: np.concatenate([batch[name] for batch in batches])[:LENGTH] for name in NAMES}
    for task in TASKS:
        head = PredictionHead(task.channels, SIZE)
        prediction = head.apply({"params": variables["params"][f"head_{task.name}"]}, jnp.asarray(mixed[task.name]))
        loss = float(task.loss(prediction, targets[task.name]))
        assert found["ablations"]["swapped"]["losses"][task.name] == pytest.approx(loss, abs=MODEL_TOLERANCE["atol"])
    assert found["ablations"]["swapped"]["losses"] != found["ablations"]["zeroed"]["losses"]


def stem_features(model, variables, image):
    """The interaction's input, read off as the output of the stems."""
    _, state = model.apply(variables, image, capture_intermediates=lambda m, _: (m.name or "").startswith("stem_"))
    return {name: np.asarray(state["intermediates"][f"stem_{name}"]["__call__"][0], np.float64) for name in LAYOUT}


def numpy_write(params, features, readout):
    """F + softmax((F W_q)(R W_k)^T / sqrt(d)) (R W_v) by task, float32 at the end as the model has it."""
    write = {name: np.asarray(params["write"][name]["kernel"], np.float64) for name in ("query", "key", "value")}
    tokens = np.concatenate([value.reshape(LENGTH, -1, CHANNELS) for value in features.values()], axis=1)
    width = CHANNELS // HEADS
    update = np.zeros_like(tokens)
    for head in range(HEADS):
        part = slice(head * width, (head + 1) * width)
        query, key, value = tokens @ write["query"], readout @ write["key"], readout @ write["value"]
        scores = query[..., part] @ key[..., part].transpose(0, 2, 1) / math.sqrt(width)
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        update[..., part] = weights / weights.sum(axis=-1, keepdims=True) @ value[..., part]
    parts = np.split((tokens + update).astype(np.float32), len(NAMES), axis=1)
    return {name: part.reshape(value.shape) for part, (name, value) in zip(parts, features.items(), strict=True)}


def test_another_interaction_has_no_diagnostics():
    model = model_with(NoInteraction())
    variables, batches = variables_of(model), split()
    assert run(model, variables, batches) is None
    assert collect_examples(model, variables, batches[0], mesh_of(), TASKS, 2)["retrieve"] is None


MODELS = {
    **{name: (member, {}) for name, member in INTERACTIONS.items()},
    "kem of two scales": (KEM, {"scales": (2 * STRIDE,)}),
    "kem of two scales, slots kept": (KEM, {"scales": (2 * STRIDE,), "persist": True}),
}
OPTIONS = {"skem": {"num_slots": SLOTS, "etf_vertices": 6}, "none": {}, "cross_attention": {}}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "scales" in name else name for name in MODELS]
)
def test_examples_are_what_the_network_predicts_whatever_the_interaction(name):
    """Looking at a KEM changes nothing, wherever in the network there are others."""
    member, options = MODELS[name]
    model = model_with(member(**OPTIONS.get(name, {"num_slots": SLOTS})), **options)
    variables, (batch, _) = variables_of(model), split()
    predicted = model.apply(variables, batch["image"])
    found = collect_examples(model, variables, batch, mesh_of(), TASKS, BATCH)
    for task in TASKS:
        expected = np.asarray(task.decode(predicted[task.name]))
        np.testing.assert_allclose(found["tasks"][task.name]["prediction"], expected, **MODEL_TOLERANCE)
    diagnosed = run(model, variables, [batch])
    assert (diagnosed is None) == (member is not KEM)
    if diagnosed:
        losses = [changed["losses"][task] for changed in diagnosed["ablations"].values() for task in NAMES]
        assert np.isfinite(losses).all()


def test_an_empty_split_is_an_error(plain):
    with pytest.raises(ValueError, match="no batches"):
        run(plain[0], plain[1], [])


@pytest.fixture(scope="module")
def shown(plain):
    """(the original pictures, the batch, its examples)."""
    model, variables, batches, _ = plain
    pictures = np.random.default_rng(0).integers(0, 256, (BATCH, *SIZE, 3), dtype=np.uint8)
    batch = {**batches[0], "image": ((pictures / 255 - IMAGE_MEAN) / IMAGE_STD).astype(np.float32)}
    return pictures, batch, collect_examples(model, variables, batch, mesh_of(), TASKS, 3)


def test_examples_hold_the_first_images_as_a_user_sees_them(plain, shown):
    model, variables, _, _ = plain
    pictures, batch, found = shown
    np.testing.assert_array_equal(found["image"], pictures[:3])
    predictions, _ = forward(model)(variables, batch["image"])
    for task in TASKS:
        example = found["tasks"][task.name]
        decoded = task.decode(predictions[task.name])[:3]
        np.testing.assert_array_equal(example["target"], batch[task.name][:3])
        np.testing.assert_allclose(example["prediction"], decoded, **MODEL_TOLERANCE)
        for drawn in example["pictures"].values():
            assert drawn.shape == (3, *SIZE, 3)
            assert drawn.dtype == np.uint8
    assert found["tasks"]["semseg"]["legend"] == TASKS[0].legend()


def dense_weights(sown, top_k):
    """(images, slots, tokens): every weight added where its token is."""
    weights = sown["retrieve_weights"]
    dense = np.zeros((len(weights), SLOTS, len(TASKS) * TOKENS))
    for image, head, slot in np.ndindex(len(weights), HEADS, SLOTS):
        index = slice(None) if top_k is None else sown["retrieve_index"][image, head, slot]
        dense[image, slot, index] += weights[image, head, slot] / HEADS
    return dense


def check_maps(found, sown, top_k):
    dense, use = dense_weights(sown, top_k), sown["write_weights"].mean(axis=(0, 1, 2))
    assert list(found["maps"]) == NAMES
    assert found["slots"] == np.argsort(-use)[:SHOWN_SLOTS].tolist()
    for position, name in enumerate(LAYOUT):
        expected = dense[:, found["slots"], position * TOKENS : (position + 1) * TOKENS]
        assert found["maps"][name].shape[2:] == (SIZE[0] // STRIDE, SIZE[1] // STRIDE)
        np.testing.assert_allclose(found["maps"][name].reshape(expected.shape), expected, **TOLERANCE)


def test_retrieve_maps_put_each_weight_where_its_token_was(plain, shown):
    model, variables, _, _ = plain
    _, batch, found = shown
    check_maps(found["retrieve"], sown_by(model, variables, [batch], length=3)[0], TOP_K)


def test_retrieve_maps_of_plain_softmax_are_of_the_last_round():
    model = model_with(kem(rounds=2, top_k=None))
    variables, batches = variables_of(model), split()
    found = collect_examples(model, variables, batches[0], mesh_of(), TASKS, 2)
    check_maps(found["retrieve"], sown_by(model, variables, batches[:1], length=2)[-1], None)
