"""ODS of a network over a split: the frame of the labels, padding, devices, and the published protocol."""

import flax.linen as nn
import jax
import numpy as np
import pytest

from sgw_jax.data_pipelines.transforms import Target, valid_pixels
from sgw_jax.evaluation import boundary
from sgw_jax.evaluation.edge_scores import edge_scores
from sgw_jax.sharding import make_mesh
from sgw_jax.tasks import Edges

SIZE, BATCH, LENGTH = (24, 32), 4, 6
FRAMES = [(24, 32), (20, 30), (24, 20), (10, 32), (16, 16), (22, 26)]  # original sizes, padded in the middle


class FirstChannel(nn.Module):
    """The image's first channel as the logit: predictions are then known."""

    @nn.compact
    def __call__(self, image):
        return {"edges": image[..., :1]}


def centred(values, fill):
    padded = np.full(SIZE, fill, np.float32)
    top, left = ((whole - part) // 2 for whole, part in zip(SIZE, values.shape, strict=True))
    padded[top : top + values.shape[0], left : left + values.shape[1]] = values
    return padded


@pytest.fixture(scope="module")
def split():
    """(batches as the loader yields them, [(probability, target, ignored)] of the real images in their frames)."""
    rng = np.random.default_rng(0)
    images, targets, originals = [], [], []
    for frame in FRAMES:
        logit = rng.normal(size=frame).astype(np.float32) * 3
        target = (rng.random(frame) < 0.1).astype(np.float32)
        target[rng.random(frame) < 0.05] = -1
        target[0, 0] = target[-1, -1] = 1  # labelled corners: the frame of the labels is the image
        images.append(np.repeat(centred(logit, 0)[..., None], 3, axis=-1))
        targets.append(centred(target, -1)[..., None])
        originals.append((np.asarray(jax.nn.sigmoid(logit)), target > 0.5, target < 0))
    for _ in range(-LENGTH % BATCH):
        images.append(np.ones((*SIZE, 3), np.float32))
        targets.append(np.full((*SIZE, 1), 1, np.float32))  # it is no item that keeps it out, not the labels alone
    item = np.where(np.arange(len(images)) < LENGTH, np.arange(len(images)), -1).astype(np.int32)
    arrays = {"image": np.stack(images), "edges": np.stack(targets), "item": item}
    batches = [{n: a[i : i + BATCH] for n, a in arrays.items()} for i in range(0, len(images), BATCH)]
    return batches, originals


def scores(batches, devices=1, published=False, **options):
    mesh, task = make_mesh({"data": -1}, jax.devices()[:devices]), Edges(protocol="published" if published else "exact")
    return edge_scores(FirstChannel(), {}, batches, mesh, task=task, max_dist=0.05, **options)


def expected(originals, **options):
    program = options.pop("program", "ours")
    found = boundary.summarise(boundary.counts_of(originals, max_dist=0.05, **options), program=program)
    return {name: 100 * found[name] for name in ("ods", "ois", "ap")}


@pytest.mark.parametrize("devices", [1, 4])
def test_scores_are_those_of_the_images_without_padding(split, devices):
    batches, originals = split
    found = scores(batches, devices)
    assert found == expected(originals)
    assert 0 < found["ods"] < 100


def test_the_published_protocol_is_the_fields(split):
    """8 bits as `astype(uint8)` leaves them (127.5 is 127), suppression, precision 1 where nothing is predicted."""
    batches, originals = split
    saved = [((255 * p).astype(np.uint8), t, i) for p, t, i in originals]
    assert scores(batches, published=True) == expected(saved, suppressed=True, program="seism")
    outlined = expected(saved, suppressed=True, outline_targets=True, program="seism")
    assert scores(batches, published=True, outline_targets=True) == outlined


def test_suppression_is_an_option_of_the_exact_protocol(split):
    batches, originals = split
    assert scores(batches, suppress=True) == expected(originals, suppressed=True) != expected(originals)


def test_edges_and_ignored_pixels_are_those_of_the_task(split):
    """0.5 is an edge; negative and non-finite targets are ignored, and frame no image."""
    batches, originals = split
    odd = [{**batch, "edges": batch["edges"].copy()} for batch in batches]
    rng, others = np.random.default_rng(1), [np.nan, np.inf, -np.inf, -0.5]
    for batch in odd:
        edges = batch["edges"]
        edges[edges == 1] = rng.choice([0.5, 0.75, 1], size=np.sum(edges == 1))
        edges[edges == 0] = rng.choice([0, 0.25, np.nextafter(np.float32(0.5), 0)], size=np.sum(edges == 0))
        edges[edges < 0] = rng.choice(others, size=np.sum(edges < 0))
    assert scores(odd) == expected(originals)
    task = Edges()
    for batch, plain in zip(odd, batches, strict=True):
        found, known = (task.batch_statistics(part["edges"]) for part in (batch, plain))
        assert {name: int(number) for name, number in found.items()} == {n: int(k) for n, k in known.items()}
        target = Target(**task.target)
        np.testing.assert_array_equal(valid_pixels(batch["edges"], target), valid_pixels(plain["edges"], target))


def test_images_without_labels_are_left_out(split):
    batches, originals = split
    bare = [{**batches[0], "edges": batches[0]["edges"].copy()}, batches[1]]
    bare[0]["edges"][1] = -1
    assert scores(bare) == expected(originals[:1] + originals[2:])
