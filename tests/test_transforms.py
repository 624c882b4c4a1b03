"""Transforms against independent NumPy references: geometry, resampling, colour, padding, the form at the door."""

import copy

import numpy as np
import pytest

from sgw_jax.data_pipelines import colour, transforms
from sgw_jax.data_pipelines.colour import ColourDistortion
from sgw_jax.data_pipelines.transforms import Augmentation, Target

TARGETS = {
    "classes": Target("labels", 255),
    "depth": Target("depth", 0.0),
    "disparity": Target("disparity", -1.0),
    "normals": Target("vectors", 0.0),
    "mask": Target("mask", -1.0),
}
LINEAR = {
    name: target if target.kind == "labels" else Target(target.kind, target.fill, "linear")
    for name, target in TARGETS.items()
}
EPS = np.finfo(np.float32).eps


def random_example(height: int = 20, width: int = 30, seed: int = 0) -> transforms.Example:
    rng = np.random.default_rng(seed)
    normals = rng.normal(size=(height, width, 3)) - (0, 0, 2)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    example = {
        "image": rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        "classes": rng.integers(0, 5, (height, width), dtype=np.uint8),
        "depth": rng.uniform(1, 9, (height, width)).astype(np.float32),
        "disparity": rng.uniform(0, 9, (height, width)).astype(np.float32),
        "normals": normals.astype(np.float32),
        "mask": rng.random((height, width), dtype=np.float32),
    }
    holes = rng.random((height, width)) < 0.2
    for name, nothing in (("classes", 255), ("depth", 0), ("disparity", -1), ("normals", 0), ("mask", -1)):
        example[name][holes] = nothing
    return example


def assert_same(one: transforms.Example, other: transforms.Example) -> None:
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_array_equal(one[name], other[name], err_msg=name)
        assert one[name].dtype == other[name].dtype


# --- the plain data


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("picture", 0.0), "allowed: labels, depth"),
        (("depth", 0.0, "cubic"), "allowed: nearest, linear"),
        (("labels", 255, "linear"), "nearest"),
        (("labels", 256), "0..255"),
        (("labels", 254.5), "0..255"),
        (("vectors", -1.0), "allowed: 0"),
        (("mask", 0.0), "negative"),
        (("depth", 3.0), "not finite"),
    ],
)
def test_a_wrong_target_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Target(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (0, 4)}, "Augmentation.size"),
        ({"size": (4.0, 4)}, "Augmentation.size"),
        ({"size": (4, 4), "scale": (2.0, 0.5)}, "Augmentation.scale"),
        ({"size": (4, 4), "cat_max_ratio": 0.75}, "set both"),
        ({"size": (4, 4), "cat_max_ratio": 1.5, "cat_max_target": "classes"}, "cat_max_ratio"),
    ],
)
def test_a_wrong_augmentation_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**arguments)


def test_a_crop_target_must_be_a_labels_target():
    augmentation = Augmentation((8, 8), cat_max_ratio=0.75, cat_max_target="depth")
    with pytest.raises(ValueError, match="kind labels, here \\['classes'\\]"):
        transforms.train_example(random_example(), np.random.default_rng(0), TARGETS, augmentation)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("image", lambda x: x.astype(np.float32), "image is float32"),
        ("image", lambda x: x[..., :1], "uint8 \\(H, W, 3\\)"),
        ("depth", lambda x: x.astype(np.float64), "'depth' of kind 'depth' is float64"),
        ("depth", lambda x: x[:-1], "allowed beside this image: float32 \\(20, 30\\)"),
        ("normals", lambda x: x[..., 0], "allowed beside this image: float32 \\(20, 30, 3\\)"),
        ("classes", lambda x: x.astype(np.int64), "allowed beside this image: uint8"),
    ],
)
def test_an_example_of_the_wrong_form_is_named(name, change, message):
    example = random_example()
    example[name] = change(example[name])
    with pytest.raises(ValueError, match=message):
        transforms.eval_example(example, TARGETS, (32, 32))


# --- resampling


def nearest_rows(source: int, output: int) -> list[set[int]]:
    """Source index floor(x * source / output) of every output index; where that is an exact integer, rounding of the
    factor may also give its predecessor."""
    return [{x * source // output, x * source // output - (x * source % output == 0)} for x in range(output)]


@pytest.mark.parametrize("size", [(20, 30), (11, 59), (40, 60), (33, 17)])
def test_nearest_takes_the_source_pixel_of_the_floor(size):
    index = np.arange(20 * 30, dtype=np.float32).reshape(20, 30) + 1
    example = {"image": np.zeros((20, 30, 3), np.uint8), "depth": index}
    out = transforms.resize(example, TARGETS, size)["depth"].astype(int) - 1
    rows, columns = nearest_rows(20, size[0]), nearest_rows(30, size[1])
    assert out.shape == size
    assert all(
        out[y, x] // 30 in rows[y] and out[y, x] % 30 in columns[x] for y in range(size[0]) for x in range(size[1])
    )


def linear_reference(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear interpolation in float64 with pixel centres aligned and the border repeated."""

    def matrix(source: int, output: int) -> np.ndarray:
        at = np.clip((np.arange(output) + 0.5) * source / output - 0.5, 0, source - 1)
        low = np.minimum(np.floor(at).astype(int), max(source - 2, 0))
        weights = np.zeros((output, source))
        weights[np.arange(output), low] += 1 - (at - low)
        weights[np.arange(output), np.minimum(low + 1, source - 1)] += at - low
        return weights

    rows, columns = matrix(values.shape[0], size[0]), matrix(values.shape[1], size[1])
    return np.einsum("yi,xj,ij...->yx...", rows, columns, values.astype(np.float64))


@pytest.mark.parametrize("size", [(11, 59), (40, 60), (33, 17), (10, 15)])
def test_linear_is_bilinear_between_pixel_centres(size):
    example = random_example()
    example["mask"] = np.abs(example["mask"])  # all valid
    out = transforms.resize(example, LINEAR, size)
    # 8-bit: OpenCV weighs in 11 bits twice (2 * 255 / 2048 levels) and rounds (1/2 a level).
    np.testing.assert_allclose(out["image"], linear_reference(example["image"], size), rtol=0, atol=0.75)
    # float32: weights are computed from coordinates up to 60 with one rounding, so off by 60 eps at most per axis.
    np.testing.assert_allclose(out["mask"], linear_reference(example["mask"], size), rtol=0, atol=2 * 64 * EPS)


@pytest.mark.parametrize("size", [(11, 59), (40, 60), (33, 17)])
@pytest.mark.parametrize("name", ["depth", "disparity", "mask", "normals"])
def test_linear_weighs_valid_pixels_only(name, size):
    example = random_example()
    hole = np.zeros((20, 30), bool)
    hole[3:11, 5:19] = True
    values = {"depth": 7.0, "disparity": 3.0, "mask": 0.25, "normals": np.array([0.6, 0.0, -0.8])}[name]
    example[name][...] = values
    example[name][hole] = TARGETS[name].fill
    out = transforms.resize(example, LINEAR, size)[name]
    valid = transforms.valid_pixels(out, TARGETS[name])
    share = linear_reference(~hole, size)
    decided = np.abs(share - 0.5) > 2 * 64 * EPS
    assert np.array_equal(valid[decided], share[decided] > 0.5)
    # A constant stays that constant next to the hole: nothing of the ignore value leaks in (divided by >= 1/2).
    assert np.abs(out[valid] - values).max() <= 16 * EPS * np.abs(values).max()


def test_linear_depth_lets_no_invalid_value_through():
    example = random_example()
    example["depth"][5:9, 5:9] = np.nan
    example["depth"][12:15, 5:9] = np.inf
    out = transforms.resize(example, LINEAR, (35, 41))["depth"]
    valid = out != 0
    low, high = np.nanmin(example["depth"][example["depth"] > 0]), 9
    assert np.isfinite(out).all()
    assert out[valid].min() >= low * (1 - 16 * EPS)
    assert out[valid].max() <= high


def test_linear_vectors_are_unit_or_zero():
    out = transforms.resize(random_example(seed=3), LINEAR, (37, 23))["normals"]
    length = np.linalg.norm(out.astype(np.float64), axis=-1)
    assert np.all((np.abs(length - 1) < 4 * EPS) | (length == 0))


def test_linear_vectors_that_cancel_have_no_direction():
    normals = np.array([[[0, 0, -1], [1e-5, 0, 1]]], np.float32)
    example = {"image": np.zeros((1, 2, 3), np.uint8), "normals": normals}
    assert np.all(transforms.resize(example, LINEAR, (1, 1))["normals"] == 0)


@pytest.mark.parametrize("size", [(11, 59), (40, 60), (9, 9)])
def test_nearest_makes_no_new_value(size):
    example = random_example()
    out = transforms.resize(example, TARGETS, size)
    for name in TARGETS:
        source = example[name].reshape(-1, *example[name].shape[2:])
        assert {tuple(np.ravel(v)) for v in out[name].reshape(-1, *source.shape[1:])} <= {
            tuple(np.ravel(v)) for v in source
        }


@pytest.mark.parametrize(("shape", "size", "expected"), [((40, 60), (20, 20), (13, 20)), ((8, 4), (32, 32), (32, 16))])
def test_resize_to_fit_keeps_the_aspect(shape, size, expected):
    image = np.full((*shape, 3), 77, np.uint8)
    out = transforms.resize_to_fit(image, size)
    assert out.shape == (*expected, 3)
    assert np.all(out == 77)


# --- zoom, crop, flip


@pytest.mark.parametrize("factor", [0.5, 1.0, 1.37, 2.0])
@pytest.mark.parametrize("targets", [TARGETS, LINEAR], ids=["nearest", "linear"])
def test_zoom_changes_size_depth_and_disparity_only(factor, targets):
    example = random_example()
    out, plain = (
        transforms.zoom(example, targets, factor),
        transforms.resize(example, targets, (int(20 * factor), int(30 * factor))),
    )
    for name in ("image", "classes", "normals", "mask"):
        np.testing.assert_array_equal(out[name], plain[name])
    np.testing.assert_array_equal(out["depth"], plain["depth"] / np.float32(factor))
    disparity = plain["disparity"]
    np.testing.assert_array_equal(out["disparity"], np.where(disparity == -1, -1, disparity * np.float32(factor)))


def test_zoom_never_shrinks_an_image_away():
    assert transforms.zoom(random_example(2, 3), TARGETS, 0.1)["image"].shape == (1, 1, 3)


def test_random_scale_is_uniform_in_its_range():
    example = {"image": np.zeros((2, 2, 3), np.uint8), "depth": np.ones((2, 2), np.float32)}
    rng = np.random.default_rng(0)
    factors = 1 / np.array(
        [transforms.random_scale(example, rng, TARGETS, (0.5, 2.0))["depth"][0, 0] for _ in range(2000)]
    )
    assert factors.min() >= 0.5 * (1 - EPS)
    assert factors.max() <= 2.0 * (1 + EPS)
    counts = np.histogram(factors, bins=10, range=(0.5, 2.0))[0]
    # chi-square with 9 degrees of freedom exceeds 33.7 with probability 1e-4; the seed is fixed.
    assert ((counts - 200) ** 2 / 200).sum() < 33.7


def corners_by_loop(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Bilinear with the corner pixels aligned, in float64: output i reads position i (old - 1) / (new - 1)."""
    out = np.zeros((*size, *values.shape[2:]))
    for row, column in np.ndindex(*size):
        y = row * (values.shape[0] - 1) / max(size[0] - 1, 1)
        x = column * (values.shape[1] - 1) / max(size[1] - 1, 1)
        top, left = int(y), int(x)
        bottom, right = min(top + 1, values.shape[0] - 1), min(left + 1, values.shape[1] - 1)
        above = values[top, left] * (1 - (x - left)) + values[top, right] * (x - left)
        below = values[bottom, left] * (1 - (x - left)) + values[bottom, right] * (x - left)
        out[row, column] = above * (1 - (y - top)) + below * (y - top)
    return out


@pytest.mark.parametrize("size", [(20, 30), (27, 45), (11, 8), (1, 1)])
def test_linear_with_corners_aligned_is_bilinear_between_them(size):
    example = random_example()
    everywhere = {**example, "mask": np.abs(example["mask"])}
    found = transforms.resize(everywhere, {"mask": LINEAR["mask"]}, size, corners=True)
    # The image is rounded to levels; the rest takes four float32 operations on numbers of size 1.
    expected = corners_by_loop(everywhere["image"].astype(float), size)
    assert np.abs(found["image"] - expected).max() <= 0.5 + 1e-4
    np.testing.assert_allclose(found["mask"], corners_by_loop(everywhere["mask"].astype(float), size), atol=8 * EPS)


def test_scale_crop_enlarges_a_window_and_divides_depth():
    """The drawn window is found again by its nearest-resampled labels, each pixel with a label of its own."""
    example = random_example(12, 16)
    example["classes"] = np.arange(12 * 16, dtype=np.uint8).reshape(12, 16)
    example["depth"] = example["classes"] + np.float32(1)
    example["disparity"] = example["depth"]
    windows = set()
    for seed in range(60):
        found = transforms.random_scale_crop(example, np.random.default_rng(seed), TARGETS, (2.0,))
        first = int(found["classes"][0, 0])
        top, left = divmod(first, 16)
        windows.add((top, left))
        window = example["classes"][top : top + 6, left : left + 8]
        np.testing.assert_array_equal(found["classes"], np.kron(window, np.ones((2, 2), np.uint8)))
        np.testing.assert_array_equal(found["depth"], (found["classes"] + np.float32(1)) / 2)
        np.testing.assert_array_equal(found["disparity"], (found["classes"] + np.float32(1)) * 2)
        assert found["image"].shape == example["image"].shape
    assert {top for top, _ in windows} == set(range(7))  # every place is reached: missed with probability 60 e^-8
    unchanged = transforms.random_scale_crop(example, np.random.default_rng(0), TARGETS, (1.0,))
    assert_same(unchanged, example)


def test_each_factor_of_scale_crop_is_as_likely():
    example = {"image": np.zeros((30, 30, 3), np.uint8), "depth": np.ones((30, 30), np.float32)}
    draws = [
        float(transforms.random_scale_crop(example, np.random.default_rng(s), TARGETS, (1.0, 1.2, 1.5))["depth"][0, 0])
        for s in range(300)
    ]
    values, counts = np.unique(np.array(draws, np.float32), return_counts=True)
    np.testing.assert_allclose(values, [1 / 1.5, 1 / 1.2, 1], rtol=EPS)
    assert counts.min() > 60  # 100 +- 8.2: five standard deviations


def test_flip_mirrors_and_negates_x():
    example = random_example()
    out = transforms.flip(example, TARGETS)
    for name in ("image", "classes", "depth", "disparity", "mask"):
        np.testing.assert_array_equal(out[name], example[name][:, ::-1])
    np.testing.assert_array_equal(out["normals"], example["normals"][:, ::-1] * np.float32([-1, 1, 1]))
    assert_same(transforms.flip(out, TARGETS), example)


def test_random_flip_flips_half_of_the_time():
    rng, example = np.random.default_rng(0), random_example(2, 2)
    flips = sum(
        transforms.random_flip(example, rng, TARGETS)["image"][0, 0, 0] != example["image"][0, 0, 0] for _ in range(400)
    )
    assert 150 < flips < 250  # 5 standard deviations


def test_a_crop_is_a_window_and_reaches_every_place():
    example, rng = random_example(5, 6), np.random.default_rng(0)
    example["depth"] = np.arange(30, dtype=np.float32).reshape(5, 6) + 1
    corners = set()
    for _ in range(200):
        out = transforms.random_crop(example, rng, TARGETS, (3, 4))
        top, left = divmod(int(out["depth"][0, 0]) - 1, 6)
        corners.add((top, left))
        for name in ("image", *TARGETS):
            np.testing.assert_array_equal(out[name], example[name][top : top + 3, left : left + 4])
    assert corners == {(y, x) for y in range(3) for x in range(3)}


@pytest.mark.parametrize(("size", "expected"), [((40, 50), (20, 30)), ((40, 10), (20, 10)), ((7, 50), (7, 30))])
def test_a_crop_leaves_a_smaller_dimension_alone(size, expected):
    assert (
        transforms.random_crop(random_example(), np.random.default_rng(0), TARGETS, size)["image"].shape[:2] == expected
    )


def test_cat_max_ratio_avoids_crops_of_one_class():
    labels = np.zeros((16, 200), np.uint8)
    labels[:, 60:68], labels[:8, 120:] = 1, 255  # two classes only around column 64
    example = {"image": np.zeros((16, 200, 3), np.uint8), "classes": labels}

    def share_of_balanced_crops(*balance) -> float:
        crops = [
            transforms.random_crop(example, np.random.default_rng(i), TARGETS, (16, 16), *balance) for i in range(300)
        ]
        counts = [np.bincount(crop["classes"].ravel(), minlength=256)[:255] for crop in crops]
        return float(np.mean([count.max() < 0.75 * count.sum() for count in counts]))

    # 185 places; a crop is balanced when it holds more than 4 of the 8 columns of class 1: lefts 49..63, 15 of 185.
    once = 15 / 185
    assert share_of_balanced_crops() == pytest.approx(once, abs=5 * (once * (1 - once) / 300) ** 0.5)
    eleven = 1 - (1 - once) ** 11
    spread = 5 * (eleven * (1 - eleven) / 300) ** 0.5
    assert share_of_balanced_crops(0.75, "classes") == pytest.approx(eleven, abs=spread)
    del example["classes"]
    assert transforms.random_crop(example, np.random.default_rng(0), TARGETS, (16, 16), 0.75, "classes")["image"].shape


# --- a plane seen by a camera, through the geometry


def planar_example(height: int, width: int, focal: float, normal: np.ndarray, offset: float) -> transforms.Example:
    """The plane normal . X = offset seen by a pinhole in the image's middle: depth = offset / (normal . ray)."""
    rays = camera_rays(np.arange(height), np.arange(width), focal, (height / 2, width / 2))
    depth = offset / (rays @ normal)
    assert np.all(depth > 0)
    return {
        "image": np.zeros((height, width, 3), np.uint8),
        "depth": depth.astype(np.float32),
        "normals": np.broadcast_to(normal, (height, width, 3)).astype(np.float32),
    }


def camera_rays(rows: np.ndarray, columns: np.ndarray, focal: float, centre: tuple[float, float]) -> np.ndarray:
    """Rays (x, y, 1) through pixel centres (row + 1/2, column + 1/2), float64 (rows, columns, 3)."""
    y, x = np.meshgrid((rows + 0.5 - centre[0]) / focal, (columns + 0.5 - centre[1]) / focal, indexing="ij")
    return np.stack([x, y, np.ones_like(x)], axis=-1)


PLANE = np.array([0.48, -0.36, -0.8])


def test_a_cropped_and_flipped_plane_is_the_mirrored_plane():
    height, width, focal, offset = 24, 36, 40.0, -3.0
    example = planar_example(height, width, focal, PLANE, offset)
    example["image"][..., 0], example["image"][..., 1] = np.arange(height)[:, None], np.arange(width)
    out = transforms.flip(transforms.random_crop(example, np.random.default_rng(4), TARGETS, (15, 17)), TARGETS)
    top, left = out["image"][0, -1, 0], out["image"][0, -1, 1]  # the window, read back from the mirrored image
    # The mirror exchanges columns 0 and 16 of the window, so the principal point's column p becomes 17 - p.
    centre = (height / 2 - top, 17 - (width / 2 - left))
    points = camera_rays(np.arange(15), np.arange(17), focal, centre) * out["depth"][..., None].astype(np.float64)
    np.testing.assert_array_equal(out["normals"], np.broadcast_to((PLANE * (-1, 1, 1)).astype(np.float32), (15, 17, 3)))
    # depth was rounded to float32 once: relative error EPS / 2 of offset.
    np.testing.assert_allclose(points @ (PLANE * (-1, 1, 1)), offset, rtol=EPS)


@pytest.mark.parametrize("factor", [0.5, 0.77, 1.0, 1.6, 2.0])
def test_a_zoomed_plane_is_the_plane_at_its_source_pixels(factor):
    height, width, focal, offset = 24, 36, 40.0, -3.0
    example = planar_example(height, width, focal, PLANE, offset)
    out = transforms.zoom(example, TARGETS, factor)
    rows, columns = out["depth"].shape
    np.testing.assert_array_equal(out["normals"], np.broadcast_to(PLANE.astype(np.float32), (rows, columns, 3)))
    # Undo the zoom's change of depth: the points lie on the plane along the rays of the nearest source pixels.
    source_rows, source_columns = (
        np.floor(np.arange(rows) * height / rows),
        np.floor(np.arange(columns) * width / columns),
    )
    rays = camera_rays(source_rows, source_columns, focal, (height / 2, width / 2))
    points = rays * out["depth"][..., None].astype(np.float64) * np.float64(np.float32(factor))
    np.testing.assert_allclose(points @ PLANE, offset, rtol=2 * EPS)  # two float32 roundings


@pytest.mark.parametrize("factor", [0.5, 1.25, 2.0])
@pytest.mark.parametrize("resample", ["nearest", "linear"])
def test_zooming_a_wall_is_stepping_closer(factor, resample):
    """A wall parallel to the image: the zoomed example is what the same camera sees from depth / factor."""
    wall = np.array([0.0, 0.0, -1.0])
    targets = {"depth": Target("depth", 0.0, resample), "normals": Target("vectors", 0.0, resample)}
    out = transforms.zoom(planar_example(24, 36, 40.0, wall, -3.0), targets, factor)
    closer = planar_example(*out["depth"].shape, 40.0, wall, -3.0 / factor)
    for name in targets:
        np.testing.assert_allclose(out[name], closer[name], rtol=4 * EPS, atol=0)


# --- colour


def test_no_distortion_is_the_identity():
    image = random_example()["image"]
    nothing = ColourDistortion(brightness=0, contrast=(1, 1), saturation=(1, 1), hue=0, probability=1)
    np.testing.assert_array_equal(colour.distort_colour(image, np.random.default_rng(0), nothing), image)


def test_brightness_shifts_and_contrast_scales_the_levels():
    image = np.arange(256, dtype=np.uint8).reshape(1, 256, 1).repeat(3, axis=2)
    only = {"contrast": (1, 1), "saturation": (1, 1), "hue": 0, "probability": 1}
    shifts = []
    for seed in range(50):
        out = colour.distort_colour(image, np.random.default_rng(seed), ColourDistortion(**only)).astype(int)
        shift = out[0, 128, 0] - 128
        np.testing.assert_array_equal(out, np.clip(image.astype(int) + shift, 0, 255))
        shifts.append(shift)
    assert -32 <= min(shifts) < -16
    assert 16 < max(shifts) <= 32
    only = {"brightness": 0, "contrast": (0.5, 1.5), "saturation": (1, 1), "hue": 0, "probability": 1}
    for seed in range(10):
        out = colour.distort_colour(image, np.random.default_rng(seed), ColourDistortion(**only)).astype(float)
        factor = out[0, 160, 0] / 160  # known to half a level in 160
        assert 0.5 <= factor <= 1.5
        expected = np.clip(image * factor, 0, 255)
        assert np.abs(out - expected).max() <= 0.5 + 255 * 0.5 / 160


def test_saturation_and_hue_leave_grey_alone_and_turn_red():
    grey = np.arange(256, dtype=np.uint8).reshape(1, 256, 1).repeat(3, axis=2)
    hue = ColourDistortion(brightness=0, contrast=(1, 1), saturation=(0.5, 1.5), hue=18, probability=1)
    for seed in range(20):
        np.testing.assert_array_equal(colour.distort_colour(grey, np.random.default_rng(seed), hue), grey)
    red = np.zeros((1, 1, 3), np.uint8) + np.array([200, 0, 0], np.uint8)
    turn = ColourDistortion(brightness=0, contrast=(1, 1), saturation=(1, 1), hue=18, probability=1)
    for seed in range(20):
        r, g, b = (int(v) for v in colour.distort_colour(red, np.random.default_rng(seed), turn)[0, 0])
        # A turn by h units of 2 degrees from red adds |h| / 30 of green (h > 0) or blue (h < 0); at most 18 / 30.
        assert r == 200
        assert 0 in (g, b)
        assert max(g, b) <= 200 * 18 / 30 + 1


def test_distortion_keeps_type_and_shape_and_draws_a_fixed_count():
    image = random_example()["image"]
    changed = 0
    for seed in range(30):
        one, other = np.random.default_rng(seed), np.random.default_rng(seed)
        out = colour.distort_colour(image, one, ColourDistortion())
        assert out.dtype == np.uint8
        assert out.shape == image.shape
        changed += not np.array_equal(out, image)
        np.testing.assert_array_equal(out, colour.distort_colour(image, other, ColourDistortion()))
    assert changed >= 20  # unchanged with probability 1/16


# --- the model's door


def test_normalise_is_the_formula():
    image = random_example()["image"]
    expected = (image.astype(np.float64) / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    out = transforms.normalise(image)
    assert out.dtype == np.float32
    np.testing.assert_allclose(out, expected, rtol=EPS)


@pytest.mark.parametrize("size", [(20, 30), (25, 31), (64, 40)])
def test_eval_example_pads_to_the_middle(size):
    example = random_example()
    out = transforms.eval_example(example, TARGETS, size)
    top, left = (size[0] - 20) // 2, (size[1] - 30) // 2
    inside = np.s_[top : top + 20, left : left + 30]
    margin = np.ones(size, bool)
    margin[inside] = False
    np.testing.assert_array_equal(out["image"][inside], transforms.normalise(example["image"]))
    assert np.all(out["image"][margin] == 0)
    for name, target in TARGETS.items():
        np.testing.assert_array_equal(out[name][inside].squeeze(), example[name])
        assert np.all(out[name][margin] == target.fill)


SHAPES = {
    "image": ((24, 32, 3), np.float32),
    "classes": ((24, 32), np.int32),
    "depth": ((24, 32, 1), np.float32),
    "disparity": ((24, 32, 1), np.float32),
    "normals": ((24, 32, 3), np.float32),
    "mask": ((24, 32, 1), np.float32),
}


@pytest.mark.parametrize("absent", [(), ("classes",), tuple(TARGETS)])
def test_shapes_and_types_at_the_door_do_not_depend_on_what_is_there(absent):
    example = {name: values for name, values in random_example().items() if name not in absent}
    example["extra"] = np.zeros(3)  # not asked for: dropped
    augmentation = Augmentation((24, 32), (0.5, 2.0), True, ColourDistortion(), 0.75, "classes")
    for out in (
        transforms.train_example(example, np.random.default_rng(0), TARGETS, augmentation),
        transforms.eval_example(example, TARGETS, (24, 32)),
        transforms.empty_example(TARGETS, (24, 32)),
    ):
        assert {name: (values.shape, values.dtype) for name, values in out.items()} == SHAPES
    out = transforms.eval_example(example, TARGETS, (24, 32))
    assert all(np.all(out[name] == TARGETS[name].fill) for name in absent)


def test_a_too_large_image_says_what_to_set():
    with pytest.raises(ValueError, match=r"20 x 30 .*larger than the size 20 x 29.*set a size"):
        transforms.eval_example(random_example(), TARGETS, (20, 29))


def test_train_example_is_pure():
    example = random_example(48, 64)
    before = copy.deepcopy(example)
    augmentation = Augmentation((32, 32), (0.5, 2.0), True, ColourDistortion(), 0.75, "classes")
    outs = []
    for seed in range(12):
        one = transforms.train_example(example, np.random.default_rng(seed), LINEAR, augmentation)
        assert_same(one, transforms.train_example(example, np.random.default_rng(seed), LINEAR, augmentation))
        one["image"][...], one["normals"][...] = 0, 0  # what comes out is no view of what went in
        outs.append(one)
    assert_same(example, before)
    assert len({out["depth"].tobytes() for out in outs}) == len(outs)


def test_read_only_inputs_are_accepted():
    example = random_example()
    for values in example.values():
        values.flags.writeable = False
    augmentation = Augmentation((16, 24), (0.5, 2.0), True, ColourDistortion(), 0.75, "classes")
    for seed in range(6):
        transforms.train_example(example, np.random.default_rng(seed), TARGETS, augmentation)
