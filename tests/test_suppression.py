"""Non-maximum suppression against loops over its definition, known cases and the original's results."""

import time
from pathlib import Path

import numpy as np
import pytest

from sgw_jax.evaluation import boundary
from sgw_jax.evaluation.suppression import orientation

MAPS = Path(__file__).parents[2] / "shared" / "data" / "edges_nms.npz"


def mirrored(place, length):
    """The pixel that stands at a place outside: ... 1 0 | 0 1 .. n-1 | n-1 n-2 ..."""
    place %= 2 * length
    return min(place, 2 * length - 1 - place)


def slope(values, y, x, axis):
    """The difference of the two neighbours, halved, or at an end of the one and the pixel."""
    place, length = (y, x)[axis], values.shape[axis]
    low, high = max(place - 1, 0), min(place + 1, length - 1)
    ends = [(p, x) if axis == 0 else (y, p) for p in (low, high)]
    return (values[ends[1]] - values[ends[0]]) / (high - low) if high > low else 0.0


def suppressed_by_loop(edges, radius, border, multiplier):
    """(the result, its orientation, how far each pixel is from being judged otherwise), in float64."""
    height, width = edges.shape
    triangle = {step: (5 - abs(step)) / 25 for step in range(-4, 5)}
    smooth, along, down, angle = (np.zeros(edges.shape) for _ in range(4))
    for y, x in np.ndindex(edges.shape):
        smooth[y, x] = sum(
            a * b * edges[mirrored(y + i, height), mirrored(x + j, width)]
            for i, a in triangle.items()
            for j, b in triangle.items()
        )
    for y, x in np.ndindex(edges.shape):
        along[y, x], down[y, x] = slope(smooth, y, x, 1), slope(smooth, y, x, 0)
    for y, x in np.ndindex(edges.shape):
        xx, xy, yy = slope(along, y, x, 1), slope(down, y, x, 1), slope(down, y, x, 0)
        angle[y, x] = np.arctan(yy * np.sign(-xy) / (xx + 1e-5)) % np.pi

    def at(y, x):
        y, x = min(max(y, 0), height - 1.001), min(max(x, 0), width - 1.001)
        top, left = int(y), int(x)
        b, r = y - top, x - left
        upper = (1 - r) * edges[top, left] + r * edges[top, left + 1]
        return (1 - b) * upper + b * ((1 - r) * edges[top + 1, left] + r * edges[top + 1, left + 1])

    found, margin = edges.copy(), np.full(edges.shape, np.inf)
    for y, x in np.ndindex(edges.shape):
        for d in range(-radius, radius + 1):
            if d:
                beside = at(y + d * np.sin(angle[y, x]), x + d * np.cos(angle[y, x]))
                margin[y, x] = min(margin[y, x], abs(edges[y, x] * multiplier - beside))
                if edges[y, x] * multiplier < beside:
                    found[y, x] = 0
    border = min(border, width // 2, height // 2)
    for y, x in np.ndindex(edges.shape):
        for distance in (y, height - 1 - y, x, width - 1 - x):
            if distance < border:
                found[y, x] *= distance / border
    return found, angle, margin


@pytest.mark.parametrize(
    ("shape", "options"),
    [((14, 17), (1, 5, 1.01)), ((9, 8), (1, 5, 1.01)), ((12, 15), (2, 3, 1.1)), ((13, 11), (1, 0, 1))],
)
def test_suppression_is_its_definition(shape, options):
    """Against loops in float64, at every pixel that is not too near to its neighbours for float32 to judge.

    A bilinear neighbour in [0, 1] moves by at most 2 per pixel of place, and places move by the error of the angle.
    """
    edges = np.random.default_rng(sum(shape)).random(shape).astype(np.float32)
    expected, angle, margin = suppressed_by_loop(edges.astype(np.float64), *options)
    apart = np.abs(orientation(edges) - angle)
    sure = margin > 2 * options[0] * np.minimum(apart, np.pi - apart) + 8 * np.finfo(np.float32).eps
    assert np.mean(sure) > 0.95
    # Kept values are the map's own, times at most two ramps: two roundings each.
    found = boundary.suppress(edges, *options)
    np.testing.assert_allclose(found[sure], expected[sure], rtol=4 * np.finfo(np.float32).eps, atol=0)


def test_the_crest_of_a_ridge_is_kept():
    """A ridge five pixels wide becomes its middle column, at its height, but for the border."""
    edges = np.zeros((30, 41))
    edges[:, 18:23] = [0.2, 0.5, 0.8, 0.5, 0.2]
    found = boundary.suppress(edges)
    np.testing.assert_array_equal(found[5:-5, 20], np.float32(0.8))
    assert not found[:, :20].any()
    assert not found[:, 21:].any()
    np.testing.assert_allclose(found[:6, 20], np.float32(0.8) * np.arange(6) / 5, rtol=2 * np.finfo(np.float32).eps)


def test_levels_are_read_as_shares_of_255():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    np.testing.assert_array_equal(boundary.suppress(levels), boundary.suppress(levels / 255))
    # Float32 values of the levels are the nearest ones, so a level that is a threshold stays equal to it.
    assert all(np.float32(level / 255) == np.float32(level) / np.float32(255) for level in range(256))
    target = np.ones((16, 16), bool)
    options = {"max_dist": 0.0, "thin_lines": False, "thresholds": (0.2, 0.4, 0.6, 0.8)}
    flat = [np.full((16, 16), level, np.uint8) for level in (51, 102, 153, 204)]
    inside = 6 * 6  # what no border damps
    for place, levels in enumerate(flat):
        strict = boundary.image_counts(levels, target, suppressed=True, **options)[place, 1]
        inclusive = boundary.image_counts(levels, target, suppressed=True, inclusive=True, **options)[place, 1]
        assert (strict, inclusive) == (0, inside)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2)])
def test_maps_too_small_for_a_border(shape):
    found = boundary.suppress(np.full(shape, 0.5))
    assert found.shape == shape
    assert set(np.unique(found)) <= {0, 0.5}


@pytest.mark.skipif(not MAPS.exists(), reason="the maps of the original, ../shared/data/edges_nms.npz, are not here")
@pytest.mark.parametrize("name", ["camera", "astronaut"])
def test_the_original_gives_the_same(name):
    maps = np.load(MAPS)
    np.testing.assert_allclose(
        boundary.suppress(maps[f"{name}/prediction"]), maps[f"{name}/suppressed"], rtol=0, atol=1e-6
    )
    # Where the map is flat, orientations are of rounding errors; two pixels of 12,610 at most.
    apart = np.abs(orientation(maps[f"{name}/prediction"] / 255) - maps[f"{name}/orientation"])
    assert np.sum(np.minimum(apart, np.pi - apart) > 1e-4) <= 2


def test_suppression_comes_before_the_thresholds():
    rng = np.random.default_rng(0)
    prediction, target = rng.random((20, 30)), rng.random((20, 30)) < 0.1
    options = {"max_dist": 0.05, "thresholds": (0.1, 0.5, 0.8)}
    by_hand = boundary.evaluate([boundary.suppress(prediction)], [target], **options)
    assert boundary.evaluate([prediction], [target], suppress=True, **options) == by_hand
    assert boundary.evaluate([prediction], [target], **options) != by_hand


@pytest.mark.slow
def test_suppression_takes_a_moment():
    edges = np.random.default_rng(0).random((321, 481))
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        boundary.suppress(edges)
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.2
