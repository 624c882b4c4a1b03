"""MTAN's two sources of arrays: every field against the stored arrays, and errors that name the file."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from sgw_jax.data_pipelines.mtan import MtanCityscapes, MtanNYUv2
from sgw_jax.data_pipelines.transforms import Target, check_example

NYU_TARGETS = {"semseg": Target("labels", 255), "depth": Target("depth", 0.0), "normals": Target("vectors", 0.0)}
CITY_TARGETS = {"semseg": Target("labels", 255), "depth": Target("disparity", 0.0)}
HEIGHT, WIDTH = 9, 12
LENGTHS = {"train": 11, "val": 2}  # beyond 9, so that the order of numbers is not that of names


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, values)


def write(root: Path, num_classes: int, normals: bool, label: str = "label") -> Path:
    rng = np.random.default_rng(0)
    for split, length in LENGTHS.items():
        for i in range(length):
            save(root / split / f"image/{i}.npy", rng.uniform(size=(HEIGHT, WIDTH, 3)).astype(np.float32))
            labels = rng.integers(-1, num_classes, (HEIGHT, WIDTH))
            save(root / split / f"{label}/{i}.npy", labels.astype(np.float32))
            depth = np.maximum(rng.uniform(-1, 5, (HEIGHT, WIDTH, 1)), 0) * (1 if normals else 0.1)
            save(root / split / f"depth/{i}.npy", depth.astype(np.float32))
            if normals:
                vectors = rng.normal(size=(HEIGHT, WIDTH, 3))
                vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
                vectors[rng.uniform(size=(HEIGHT, WIDTH)) < 0.2] = 0
                save(root / split / f"normal/{i}.npy", vectors)
    return root


@pytest.fixture
def nyu(tmp_path: Path) -> Path:
    return write(tmp_path, 13, normals=True)


@pytest.fixture
def city(tmp_path: Path) -> Path:
    return write(tmp_path, 7, normals=False)


@pytest.mark.parametrize(("split", "folder"), [("train", "train"), ("validation", "val")])
def test_every_field_of_nyuv2(nyu, split, folder):
    source = MtanNYUv2(nyu, split)
    assert source.ids == tuple(map(str, range(LENGTHS[folder])))
    for i in range(len(source)):
        example = source[i]
        check_example(example, NYU_TARGETS)
        assert set(example) == {"image", *NYU_TARGETS}
        stored = {name: np.load(nyu / folder / name / f"{i}.npy") for name in ("image", "label", "depth", "normal")}
        # Half a level, and what 255 x in float32 may round.
        error = np.abs(example["image"] / 255.0 - stored["image"].astype(np.float64))
        assert error.max() <= 1 / 510 + np.finfo(np.float32).eps
        np.testing.assert_array_equal(example["semseg"], np.where(stored["label"] == -1, 255, stored["label"]))
        np.testing.assert_array_equal(example["depth"], stored["depth"][..., 0])
        zero = ~stored["normal"].any(-1)
        assert np.all(example["normals"][zero] == 0)
        # Rounding to float32, the length and the division: less than 1 eps each, of numbers below 1.
        np.testing.assert_allclose(example["normals"], stored["normal"], rtol=0, atol=4 * np.finfo(np.float32).eps)


def test_images_of_8_bits_come_back_exactly(nyu):
    levels = np.arange(HEIGHT * WIDTH * 3).reshape(HEIGHT, WIDTH, 3) % 256
    for dtype in (np.float32, np.float64):
        save(nyu / "train/image/0.npy", (levels / 255).astype(dtype))
        np.testing.assert_array_equal(MtanNYUv2(nyu, "train", [])[0]["image"], levels)


@pytest.mark.parametrize("label", ["label", "label_7"])
def test_every_field_of_cityscapes(tmp_path, label):
    root = write(tmp_path, 7, normals=False, label=label)
    source = MtanCityscapes(root, "train")
    for i in (0, 10):
        example = source[i]
        check_example(example, CITY_TARGETS)
        stored = np.load(root / f"train/{label}/{i}.npy")
        np.testing.assert_array_equal(example["semseg"], np.where(stored == -1, 255, stored))
        np.testing.assert_array_equal(example["depth"], np.load(root / f"train/depth/{i}.npy")[..., 0])
    assert source.files(10) == tuple(root / f"train/{folder}/10.npy" for folder in ("image", label, "depth"))


def test_the_number_of_classes_is_checked_against_the_labels(city):
    with pytest.raises(
        ValueError, match=r"0.npy, task 'semseg' of id '0': .*values 2.0, .*the integers 0..1, and -1 ="
    ):
        MtanCityscapes(city, "train", num_classes=2)[0]
    MtanCityscapes(city, "train", num_classes=19)[0]
    with pytest.raises(ValueError, match="num_classes is 8; allowed: 2, 7, 19"):
        MtanCityscapes(city, "train", num_classes=8)
    for i in range(LENGTHS["train"]):
        save(city / f"train/label_2/{i}.npy", np.full((HEIGHT, WIDTH), 1, np.int64))
    assert np.all(MtanCityscapes(city, "train", num_classes=2)[0]["semseg"] == 1)


# --- what is refused


def test_gaps_and_missing_files_are_named(nyu):
    (nyu / "train/depth/3.npy").unlink()
    (nyu / "train/normal/10.npy").unlink()
    with pytest.raises(ValueError, match=r"'train', lacks 2 of its 44 files: .*depth/3.npy, .*normal/10.npy; unpack"):
        MtanNYUv2(nyu, "train")
    assert set(MtanNYUv2(nyu, "train", ["semseg"])[3]) == {"image", "semseg"}
    (nyu / "train/image/4.npy").unlink()
    with pytest.raises(ValueError, match=r"train/image holds 10 images but lacks 4.npy; they must be numbered"):
        MtanNYUv2(nyu, "train")
    for path in (nyu / "val/image").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"val/image holds 0 images but lacks 0.npy"):
        MtanNYUv2(nyu, "validation")
    (nyu / "val/image").rmdir()
    with pytest.raises(ValueError, match=r"val/image: no such folder"):
        MtanNYUv2(nyu, "validation")


def test_wrong_arguments_are_named(city):
    with pytest.raises(ValueError, match="mtan_cityscapes: split is 'trainval'; allowed: train, validation"):
        MtanCityscapes(city, "trainval")
    with pytest.raises(ValueError, match="mtan_cityscapes has no labels of normals; allowed tasks: semseg, depth"):
        MtanCityscapes(city, "train", ["normals"])


FLAT = np.ones((HEIGHT, WIDTH), np.float32)


@pytest.mark.parametrize(
    ("folder", "values", "message"),
    [
        ("image", 255 * np.ones((HEIGHT, WIDTH, 3)), r"from 255.0 to 255.0; allowed: floats in \[0, 1\]"),
        ("image", np.full((HEIGHT, WIDTH, 3), np.nan), r"from nan to nan; allowed: floats in \[0, 1\]"),
        ("image", np.ones((3, HEIGHT, WIDTH)), r"float64 \(3, 9, 12\); allowed: floats \(H, W, 3\)"),
        ("label", 13 * FLAT, "values 13.0; allowed: the integers 0..12, and -1 = no class"),
        ("label", 0.5 * FLAT, "values 0.5; allowed: the integers 0..12"),
        ("label", FLAT[1:], "8 x 12 .*; allowed: its image's 9 x 12"),
        ("depth", -FLAT, "down to -1.0; allowed: metres"),
        ("normal", FLAT, r"float32 \(9, 12\); allowed: floats \(H, W, 3\)"),
    ],
)
def test_a_wrong_file_is_named(nyu, folder, values, message):
    save(nyu / f"train/{folder}/1.npy", values)
    source = MtanNYUv2(nyu, "train")
    with pytest.raises(ValueError, match=rf"{folder}/1.npy, .* of id '1': .*{message}"):
        source[1]
    source[0]


def test_a_truncated_file_is_named(nyu):
    source = MtanNYUv2(nyu, "train")
    for path in source.files(1):
        content = path.read_bytes()
        for keep in (0, len(content) // 2):
            path.write_bytes(content[:keep])
            with pytest.raises(ValueError, match=rf"{path.parent.name}/1.npy, .* of id '1': cannot be decoded"):
                source[1]
        path.write_bytes(content)
    source[1]


def test_pickle_and_fingerprint(city):
    source = MtanCityscapes(city, "train")
    copy = pickle.loads(pickle.dumps(source))
    for name, values in source[0].items():
        np.testing.assert_array_equal(copy[0][name], values)
    first = source.fingerprint()
    assert json.loads(json.dumps(first)) == copy.fingerprint()
    assert (first["name"], first["split"], first["length"], first["num_classes"]) == ("mtan_cityscapes", "train", 11, 7)
    assert copy.file_of(2) == str(city / "train/image/2.npy")
    assert MtanCityscapes(city, "train", num_classes=19).fingerprint() != first


def test_published_facts():
    assert len(MtanNYUv2.CLASSES) == 13
    assert MtanNYUv2.SPLIT_SIZES == {"train": 795, "validation": 654}
    assert MtanCityscapes.SPLIT_SIZES == {"train": 2975, "validation": 500}
