"""What happens to one example between the source and the model's door: pure NumPy functions, explicit randomness.

An example is a dict with "image" uint8 (H, W, 3) and any subset of the targets, each a NumPy array (H, W), or
(H, W, 3) for vectors. How a target moves is plain data, a `Target`; no function here knows a task's name. Sizes are
(height, width). Inputs are never written to.

The recipe is the one of ATRC and InvPT: scale, crop, flip, colour, normalise, pad; MTAN and LibMTL crop first and
enlarge the crop (`random_scale_crop`). Two of its traits are kept on
purpose. Zooming by s divides depth by s and leaves normals alone: the camera keeps its focal length and steps closer,
which is exact only for surfaces parallel to the image. Nearest resampling reads source pixel floor(x * source / output)
(cv2.INTER_NEAREST) whereas linear resampling aligns pixel centres, so the two differ by up to half a source pixel.
"""

import dataclasses
from collections.abc import Mapping

import cv2
import numpy as np

from sgw_jax.data_pipelines.batch_names import RESERVED
from sgw_jax.data_pipelines.colour import ColourDistortion, distort_colour
from sgw_jax.data_pipelines.errors import InputError

Example = dict[str, np.ndarray]
Size = tuple[int, int]

KINDS = ("labels", "depth", "disparity", "vectors", "mask")
FITS = ("resize", "pad")
IMAGE_MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB, of values in [0, 1]
IMAGE_STD = (0.229, 0.224, 0.225)
CROP_RETRIES = 10


@dataclasses.dataclass(frozen=True)
class Target:
    """How one target moves under augmentation.

    kind: "labels" uint8 (H, W); "depth", "disparity" float32 (H, W); "vectors" float32 (H, W, 3), unit length, camera
        frame x right, y down, z forward; "mask" float32 (H, W) in [0, 1].
    fill: the ignore value, which padding and absent targets get: labels 255 (say), depth 0, vectors 0, mask -1.
        A pixel is invalid where labels equal `fill`, where depth or disparity is non-finite or equals `fill`, where a
        vector is zero, where a mask is negative or not finite.
    resample: "nearest" or, but for labels, "linear": weighs valid pixels only and is valid where they hold at least
        half of the weight (our decision); vectors are renormalised.
    """

    kind: str
    fill: float
    resample: str = "nearest"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"Target.kind is {self.kind!r}; allowed: {', '.join(KINDS)}")
        if self.resample not in ("nearest", "linear"):
            raise InputError(f"Target.resample is {self.resample!r}; allowed: nearest, linear")
        if self.kind == "labels" and self.resample != "nearest":
            raise InputError("Target.resample of labels is 'linear', but class indices have no mean; use 'nearest'")
        fills = {
            "labels": (self.fill in range(256), "an integer in 0..255"),
            "depth": (not (np.isfinite(self.fill) and self.fill > 0), "0, a negative number or not finite"),
            "disparity": (not (np.isfinite(self.fill) and self.fill > 0), "0, a negative number or not finite"),
            "vectors": (self.fill == 0, "0"),
            "mask": (self.fill < 0, "a negative number"),
        }
        right, allowed = fills[self.kind]
        if not right:
            raise InputError(f"Target.fill of kind {self.kind!r} is {self.fill!r}; allowed: {allowed}")


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """The training recipe as plain data.

    size: the output's (height, width): larger images are cropped to it at random, smaller ones padded, centred.
    fit: "resize" makes every image the largest copy inside `size` before all else (`fit_inside`), so that there is
        nothing to crop but what a zoom leaves over; "pad" keeps the scale of the pixels.
    scale: range of the uniform zoom; (1.0, 1.0) is none. scale_crop: factors of `random_scale_crop`, which then comes
        first; () is none. flip: mirror with probability 1/2. colour: None is none.
    cat_max_ratio: redraw a crop, up to 10 times, until it holds two classes of the labels target `cat_max_target` and
        none covers this share of the labelled pixels (0.75 in ATRC and InvPT). None takes the first crop.
    """

    size: Size
    scale: tuple[float, float] = (1.0, 1.0)
    flip: bool = True
    colour: ColourDistortion | None = None
    cat_max_ratio: float | None = None
    cat_max_target: str | None = None
    scale_crop: tuple[float, ...] = ()
    fit: str = "pad"

    def __post_init__(self) -> None:
        check_size("Augmentation.size", self.size)
        check_fit(self.fit)
        low, high = self.scale
        if not 0 < low <= high < np.inf:
            raise InputError(f"Augmentation.scale is ({low}, {high}); allowed: 0 < low <= high")
        if any(not 1 <= factor < np.inf for factor in self.scale_crop):
            raise InputError(f"Augmentation.scale_crop is {self.scale_crop}; allowed: numbers of at least 1")
        if (self.cat_max_ratio is None) != (self.cat_max_target is None):
            raise InputError(
                f"Augmentation has cat_max_ratio={self.cat_max_ratio} and cat_max_target={self.cat_max_target}; "
                "set both, the second to the name of a labels target, or neither"
            )
        if self.cat_max_ratio is not None and not 0 < self.cat_max_ratio <= 1:
            raise InputError(f"Augmentation.cat_max_ratio is {self.cat_max_ratio}; allowed: in (0, 1]")


def train_example(
    example: Example, rng: np.random.Generator, targets: Mapping[str, Target], augmentation: Augmentation
) -> Example:
    """A source's example, augmented, at the model's door (`finish`)."""
    check_crop_target(targets, augmentation)
    check_example(example, targets)
    if augmentation.fit == "resize":
        example = fit_inside(example, targets, augmentation.size)
    if augmentation.scale_crop:
        example = random_scale_crop(example, rng, targets, augmentation.scale_crop)
    example = random_scale(example, rng, targets, augmentation.scale)
    example = random_crop(
        example, rng, targets, augmentation.size, augmentation.cat_max_ratio, augmentation.cat_max_target
    )
    if augmentation.flip:
        example = random_flip(example, rng, targets)
    if augmentation.colour is not None:
        example = {**example, "image": distort_colour(example["image"], rng, augmentation.colour)}
    return finish(example, targets, augmentation.size)


def eval_example(example: Example, targets: Mapping[str, Target], size: Size) -> Example:
    """A source's example at the model's door, unchanged but for normalisation and centred padding to `size`."""
    check_example(example, targets)
    return finish(example, targets, size)


def check_example(example: Example, targets: Mapping[str, Target]) -> None:
    """Raises ValueError unless the image and the targets present have a source's dtypes and shapes (`Target`)."""
    if taken := sorted(set(RESERVED) & set(targets)):
        raise InputError(f"a target is named {taken[0]!r}, which a batch uses itself; rename the target")
    if "image" not in example:
        raise InputError(f"the example has no 'image', only {sorted(example)}")
    image = example["image"]
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise InputError(f"image is {image.dtype} {image.shape}; allowed: uint8 (H, W, 3)")
    for name, target in targets.items():
        if name in example:
            dtype = np.dtype(np.uint8 if target.kind == "labels" else np.float32)
            shape = image.shape[:2] + ((3,) if target.kind == "vectors" else ())
            values = example[name]
            if values.dtype != dtype or values.shape != shape:
                raise InputError(
                    f"target {name!r} of kind {target.kind!r} is {values.dtype} {values.shape}; "
                    f"allowed beside this image: {dtype} {shape}"
                )


def check_size(name: str, size: Size) -> None:
    """Raises ValueError unless `size` is two positive integers."""
    if len(size) != 2 or not all(isinstance(length, int | np.integer) and length > 0 for length in size):
        raise InputError(f"{name} is {size!r}; allowed: two positive integers (height, width)")


def check_fit(fit: str) -> None:
    """Raises ValueError unless `fit` is one of `FITS`."""
    if fit not in FITS:
        raise InputError(f"data.fit is {fit!r}; allowed: {', '.join(FITS)}")


def check_crop_target(targets: Mapping[str, Target], augmentation: Augmentation) -> None:
    """Raises ValueError unless `cat_max_target`, if set, names a labels target."""
    name = augmentation.cat_max_target
    labels = sorted(name for name, target in targets.items() if target.kind == "labels")
    if name is not None and name not in labels:
        raise InputError(
            f"Augmentation.cat_max_target is {name!r}; allowed: a target of kind labels, here {labels}, "
            "or None together with cat_max_ratio=None"
        )


def valid_pixels(values: np.ndarray, target: Target) -> np.ndarray:
    """Where a target carries information: bool (H, W)."""
    if target.kind == "labels":
        return values != target.fill
    if target.kind == "vectors":
        return np.any(values != 0, axis=-1)
    if target.kind == "mask":
        return np.isfinite(values) & (values >= 0)
    return np.isfinite(values) & (values != target.fill)


def resize(example: Example, targets: Mapping[str, Target], size: Size, corners: bool = False) -> Example:
    """Resamples to `size` without changing what the values mean: the image linearly, a target by its `resample`.

    Linear resampling aligns the centres of the pixels, or with `corners` those of the corner pixels (torch's
    align_corners=True); nearest resampling is the same in both.
    """
    if example["image"].shape[:2] == tuple(size):
        return dict(example)
    resized = {"image": _linear(example["image"], size, corners)}
    for name, target in _present(example, targets):
        if target.resample == "linear":
            resized[name] = _resize_valid(example[name], target, size, corners)
        else:
            resized[name] = cv2.resize(example[name], size[::-1], interpolation=cv2.INTER_NEAREST)
    return resized


def _linear(values: np.ndarray, size: Size, corners: bool) -> np.ndarray:
    if not corners:
        return cv2.resize(values, size[::-1], interpolation=cv2.INTER_LINEAR)
    resampled = values.astype(np.float32)
    for axis, (old, new) in enumerate(zip(values.shape[:2], size, strict=True)):
        place = np.arange(new) * ((old - 1) / max(new - 1, 1))
        before = np.minimum(place.astype(int), max(old - 2, 0))
        after = np.minimum(before + 1, old - 1)
        share = np.expand_dims((place - before).astype(np.float32), tuple(range(1, values.ndim - axis)))
        one, other = np.take(resampled, before, axis), np.take(resampled, after, axis)
        resampled = one + share * (other - one)
    return np.rint(resampled).astype(np.uint8) if values.dtype == np.uint8 else resampled


def _resize_valid(values: np.ndarray, target: Target, size: Size, corners: bool) -> np.ndarray:
    """sum_i w_i v_i x_i / sum_i w_i v_i over the four neighbours, v = 1 where valid; invalid if the divisor < 1/2."""
    valid = valid_pixels(values, target)
    weight = _linear(valid.astype(np.float32), size, corners)
    if target.kind == "vectors":
        valid, weight = valid[..., None], weight[..., None]
    summed = _linear(np.where(valid, values, np.float32(0)), size, corners)
    mean = summed / np.maximum(weight, np.float32(0.5))
    keep = weight >= 0.5
    if target.kind == "vectors":
        length = np.linalg.norm(mean, axis=-1, keepdims=True)
        keep &= length > 1e-3  # opposite neighbours cancel: no direction is left
        mean = mean / np.maximum(length, np.float32(1e-3))
    return np.where(keep, mean, np.float32(target.fill))


def fit_factor(own: Size, size: Size) -> float:
    """What brings `own` to the largest size inside `size` that keeps its aspect."""
    return min(size[0] / own[0], size[1] / own[1])


def fitted_size(own: Size, size: Size) -> Size:
    """The largest size inside `size` with the aspect of `own`, in whole pixels."""
    factor = fit_factor(own, size)
    return max(1, min(size[0], round(own[0] * factor))), max(1, min(size[1], round(own[1] * factor)))


def resize_to_fit(image: np.ndarray, size: Size) -> np.ndarray:
    """The largest copy of an image (h, w, ...) inside `size` that keeps its aspect; area averages where it shrinks."""
    own = (image.shape[0], image.shape[1])
    interpolation = cv2.INTER_AREA if fit_factor(own, size) < 1 else cv2.INTER_LINEAR
    return cv2.resize(image, fitted_size(own, size)[::-1], interpolation=interpolation)


def fit_inside(example: Example, targets: Mapping[str, Target], size: Size) -> Example:
    """The largest copy of an example inside `size` that keeps its aspect: another grid of pixels over the same view.

    Unlike under a `zoom` the camera stays where it is and so do distances. The image is that of `resize_to_fit`;
    targets are resampled as they say, all with the centres of the pixels aligned (nearest ones too), because
    evaluation brings predictions back to the image's own size by the same rule.
    """
    own = (example["image"].shape[0], example["image"].shape[1])
    inner = fitted_size(own, size)
    if inner == own:
        return dict(example)
    fitted = {"image": resize_to_fit(example["image"], size)}
    for name, target in _present(example, targets):
        if target.resample == "linear":
            fitted[name] = _resize_valid(example[name], target, inner, corners=False)
        else:
            rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for old, new in zip(own, inner, strict=True))
            fitted[name] = np.ascontiguousarray(example[name][rows[:, None], columns])
    return fitted


def seen_by_network(image: np.ndarray, size: Size, fit: str) -> np.ndarray:
    """What of an image enters a network of `size` in evaluation, before padding: all of it.

    With fit "resize" the largest copy inside `size`; with "pad" the image as it is, shrunk only where it is larger.
    """
    larger = image.shape[0] > size[0] or image.shape[1] > size[1]
    return resize_to_fit(image, size) if fit == "resize" or larger else image


def zoom(example: Example, targets: Mapping[str, Target], factor: float) -> Example:
    """The view `factor` times closer: dimension d becomes int(d * factor); depth / factor, disparity * factor."""
    height, width = example["image"].shape[:2]
    size = (max(1, int(height * factor)), max(1, int(width * factor)))
    return _closer(resize(example, targets, size), targets, factor)


def _closer(example: Example, targets: Mapping[str, Target], factor: float) -> Example:
    """Distances as a camera sees them that stands `factor` times closer."""
    moved = dict(example)
    for name, target in _present(example, targets):
        if target.kind in ("depth", "disparity") and factor != 1:
            values, change = example[name], np.divide if target.kind == "depth" else np.multiply
            valid = valid_pixels(values, target)  # a fill of -1 stays -1
            moved[name] = change(values, np.float32(factor), out=values.copy(), where=valid)
    return moved


def random_scale(
    example: Example, rng: np.random.Generator, targets: Mapping[str, Target], scale: tuple[float, float]
) -> Example:
    """`zoom` by a factor uniform in the range `scale`."""
    return zoom(example, targets, rng.uniform(*scale))


def random_scale_crop(
    example: Example, rng: np.random.Generator, targets: Mapping[str, Target], factors: tuple[float, ...]
) -> Example:
    """A random window of int(d / s) per dimension d, enlarged to the image's own size; s is one of `factors`.

    The augmentation of MTAN and LibMTL, s in {1, 1.2, 1.5}: linear resampling aligns the corner pixels, depth is
    divided by s.
    """
    factor = factors[rng.integers(len(factors))]
    size = example["image"].shape[:2]
    window = random_crop(example, rng, targets, (int(size[0] / factor), int(size[1] / factor)))
    return _closer(resize(window, targets, size, corners=True), targets, factor)


def random_crop(
    example: Example,
    rng: np.random.Generator,
    targets: Mapping[str, Target],
    size: Size,
    cat_max_ratio: float | None = None,
    cat_max_target: str | None = None,
) -> Example:
    """A window of `size`, uniform over its places; a dimension smaller than the window stays as it is.

    With `cat_max_ratio`, redrawn as `Augmentation` says (the last draw is taken as it is); an example without labels
    of `cat_max_target` takes the first draw.
    """
    height, width = example["image"].shape[:2]
    spare_rows, spare_columns = max(height - size[0], 0), max(width - size[1], 0)
    if spare_rows == spare_columns == 0:
        return dict(example)
    for _ in range(1 + CROP_RETRIES):
        top, left = rng.integers(spare_rows + 1), rng.integers(spare_columns + 1)
        window = np.s_[top : top + size[0], left : left + size[1]]
        if cat_max_ratio is None or cat_max_target is None or cat_max_target not in example:
            break
        if _balanced(example[cat_max_target][window], targets[cat_max_target], cat_max_ratio):
            break
    names = ["image", *(name for name, _ in _present(example, targets))]
    return {name: example[name][window] for name in names}


def _balanced(labels: np.ndarray, target: Target, cat_max_ratio: float) -> bool:
    """Whether two classes are there and the largest has less than this share of the labelled pixels."""
    counts = np.bincount(labels[valid_pixels(labels, target)], minlength=256)
    return bool(np.count_nonzero(counts) > 1 and counts.max() < cat_max_ratio * counts.sum())


def random_flip(
    example: Example, rng: np.random.Generator, targets: Mapping[str, Target], probability: float = 0.5
) -> Example:
    """`flip` with this probability."""
    return flip(example, targets) if rng.random() < probability else dict(example)


def flip(example: Example, targets: Mapping[str, Target]) -> Example:
    """The mirror image, left and right exchanged; vectors' x changes sign."""
    flipped = {"image": cv2.flip(example["image"], 1)}
    for name, target in _present(example, targets):
        flipped[name] = cv2.flip(example[name], 1)
        if target.kind == "vectors":
            flipped[name] *= np.array([-1, 1, 1], np.float32)
    return flipped


def normalise(image: np.ndarray) -> np.ndarray:
    """(image / 255 - IMAGE_MEAN) / IMAGE_STD per channel: uint8 (H, W, 3) -> float32 (H, W, 3)."""
    return cv2.LUT(image, normalised_levels()[None])


def normalised_levels() -> np.ndarray:
    """What `normalise` makes of the levels 0 to 255: float32 (256, 3)."""
    levels = (np.arange(256)[:, None] / 255 - np.array(IMAGE_MEAN)) / np.array(IMAGE_STD)
    return levels.astype(np.float32)


def pad(values: np.ndarray, size: Size, fill: float, corner: bool = False) -> np.ndarray:
    """`values` (h, w, ...) in the middle of (height, width, ...) of `fill`, or in its upper left corner.

    An odd margin is smaller above and left.
    """
    height, width = values.shape[:2]
    top, left = (0, 0) if corner else margin((height, width), size)
    padded = np.full((*size, *values.shape[2:]), fill, values.dtype)
    padded[top : top + height, left : left + width] = values
    return padded


def margin(inner: Size, size: Size) -> Size:
    """(rows above, columns left of) an inner rectangle in the middle of `size`."""
    return (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2


def finish(example: Example, targets: Mapping[str, Target], size: Size, corner: bool = False) -> Example:
    """What the model takes: the image normalised, everything padded to `size` (`pad`), absent targets all `fill`.

    image float32 (H, W, 3), 0 (the mean colour) in the padding; labels int32 (H, W); depth, disparity, mask float32
    (H, W, 1); vectors float32 (H, W, 3). Raises ValueError when the image is larger than `size`.
    """
    height, width = example["image"].shape[:2]
    if height > size[0] or width > size[1]:
        raise InputError(
            f"the image is {height} x {width} (height x width), larger than the size {size[0]} x {size[1]} that it is "
            "padded to; set a size (height, width) that no image of the source exceeds"
        )
    return {"image": pad(normalise(example["image"]), size, 0, corner), **padded(example, targets, size, corner)}


def padded(example: Example, targets: Mapping[str, Target], size: Size, corner: bool = False) -> Example:
    """The targets alone as `finish` has them."""
    found = {}
    for name, target in targets.items():
        if name not in example:
            found[name] = _nothing(target, size)
        elif target.kind == "labels":
            found[name] = pad(example[name].astype(np.int32), size, target.fill, corner)
        elif target.kind == "vectors":
            found[name] = pad(example[name], size, target.fill, corner)
        else:
            found[name] = pad(example[name][..., None], size, target.fill, corner)
    return found


def empty_example(targets: Mapping[str, Target], size: Size, canvas: Size | None = None) -> Example:
    """An example at the model's door that carries no information: a zero image of `size` and targets of `fill` alone,
    of the size `canvas` if that is given."""
    return {"image": np.zeros((*size, 3), np.float32), **padded({}, targets, canvas or size)}


def _nothing(target: Target, size: Size) -> np.ndarray:
    if target.kind == "labels":
        return np.full(size, target.fill, np.int32)
    return np.full((*size, 3 if target.kind == "vectors" else 1), target.fill, np.float32)


def _present(example: Example, targets: Mapping[str, Target]) -> list[tuple[str, Target]]:
    return [(name, target) for name, target in targets.items() if name in example]
