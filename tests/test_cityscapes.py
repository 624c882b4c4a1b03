"""The Cityscapes source: labels and disparity against values computed here, and errors that name the file."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sgw_jax.data_pipelines.cityscapes import LABEL_IDS, Cityscapes
from sgw_jax.data_pipelines.transforms import Target, check_example

TARGETS = {"semseg": Target("labels", 255), "depth": Target("disparity", -1.0)}
HEIGHT, WIDTH = 8, 16
IDS = ("aachen/aachen_000000_000019", "aachen/aachen_000001_000019", "bochum/bochum_000000_000313")


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def paths(root: Path, split: str, id_: str) -> tuple[Path, Path, Path]:
    return (
        root / f"leftImg8bit/{split}/{id_}_leftImg8bit.png",
        root / f"gtFine/{split}/{id_}_gtFine_labelIds.png",
        root / f"disparity/{split}/{id_}_disparity.png",
    )


def write_archive(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    for split, id_ in [*(("train", id_) for id_ in IDS), ("val", "ulm/ulm_000000_000000")]:
        image, labels, disparity = paths(tmp_path, split, id_)
        save(image, rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
        ids = rng.permuted(np.arange(HEIGHT * WIDTH) % 34).reshape(HEIGHT, WIDTH).astype(np.uint8)
        ids[0, 0] = 255
        save(labels, ids)
        stored = rng.integers(2, 2**16, (HEIGHT, WIDTH)).astype(np.uint16)
        stored[rng.uniform(size=stored.shape) < 0.3] = 0
        stored[0, :3] = 1, 65535, 0
        save(disparity, stored)
    return tmp_path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_archive(tmp_path)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture)


def test_examples_have_the_form_of_a_source(root):
    source = Cityscapes(root, "train")
    assert source.ids == IDS
    for i, id_ in enumerate(IDS):
        check_example(source[i], TARGETS)
        assert source.file_of(i) == str(paths(root, "train", id_)[0])
        assert set(source.files(i)) == set(paths(root, "train", id_))
        np.testing.assert_array_equal(source[i]["image"], pixels(paths(root, "train", id_)[0]))
    assert Cityscapes(root, "validation").ids == ("ulm/ulm_000000_000000",)


def test_the_19_classes_and_void(root):
    # The official table, by hand: number -> place among the evaluated classes.
    evaluated = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13,
                 27: 14, 28: 15, 31: 16, 32: 17, 33: 18}  # fmt: skip
    for i, id_ in enumerate(IDS):
        stored = pixels(paths(root, "train", id_)[1])
        expected = np.array([evaluated.get(int(number), 255) for number in stored.ravel()]).reshape(stored.shape)
        np.testing.assert_array_equal(Cityscapes(root, "train", ["semseg"])[i]["semseg"], expected)


def test_disparity_in_pixels(root):
    for i, id_ in enumerate(IDS):
        _, labels, stored = (pixels(path) for path in paths(root, "train", id_))
        raw = stored.astype(np.float64)
        exact = np.where(labels == 23, 0, np.where(raw == 0, -1, (raw - 1) / 256))
        published = np.where(labels == 10, 0, np.where(raw <= 1, -1, (raw - 1) / 256))
        assert (exact != published).any()
        np.testing.assert_array_equal(Cityscapes(root, "train", ["depth"])[i]["depth"], exact)
        np.testing.assert_array_equal(Cityscapes(root, "train", protocol="published")[i]["depth"], published)


def test_only_the_files_of_the_tasks_are_needed(root):
    for id_ in IDS:
        paths(root, "train", id_)[2].unlink()
    source = Cityscapes(root, "train", ["semseg"])
    assert set(source[0]) == {"image", "semseg"}
    assert source.files(0) == paths(root, "train", IDS[0])[:2]
    with pytest.raises(
        ValueError, match=r"Cityscapes, split 'train', lacks 3 of its 9 files: .*000000_000019_disparity"
    ):
        Cityscapes(root, "train", ["depth"])
    for path in (root / "gtFine/train/bochum").iterdir():
        path.unlink()
    (root / "gtFine/train/bochum").rmdir()
    with pytest.raises(ValueError, match=r"lacks 1 of its 6 files: .*bochum_000000_000313_gtFine_labelIds.png; unpack"):
        Cityscapes(root, "train", ["semseg"])
    assert set(Cityscapes(root, "train", [])[2]) == {"image"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, "split is 'test'; allowed: train, validation"),
        ({"tasks": ["normals"]}, "no labels of normals; allowed tasks: semseg, depth"),
        ({"protocol": "exakt"}, "protocol is 'exakt'; allowed: exact, published"),
    ],
)
def test_wrong_arguments_are_named(root, options, message):
    with pytest.raises(ValueError, match=message):
        Cityscapes(root, **{"split": "train", **options})


def test_an_empty_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"leftImg8bit/val holds no <city>/<id>_leftImg8bit.png; unpack"):
        Cityscapes(tmp_path, "validation")


@pytest.mark.parametrize(
    ("part", "values", "message"),
    [
        (1, np.full((HEIGHT, WIDTH), 34, np.uint8), "values 34; allowed: the official label numbers 0..33, and 255"),
        (1, np.zeros((HEIGHT, WIDTH, 3), np.uint8), "mode 'RGB'; allowed: a PNG of 8 bits or fewer"),
        (1, np.zeros((HEIGHT, WIDTH - 1), np.uint8), "8 x 15 .*; allowed: its image's 8 x 16"),
        (2, np.zeros((HEIGHT, WIDTH), np.uint8), "mode 'L'; allowed: a 16-bit grey PNG"),
        (2, np.zeros((HEIGHT + 1, WIDTH), np.uint16), "9 x 16 .*; allowed: its image's 8 x 16"),
    ],
)
def test_a_wrong_file_is_named(root, part, values, message):
    path = paths(root, "train", IDS[1])[part]
    save(path, values)
    source = Cityscapes(root, "train")
    with pytest.raises(ValueError, match=rf"{path.name}, .* of id '{IDS[1]}': .*{message}"):
        source[1]
    source[0]


@pytest.mark.parametrize("part", [0, 1, 2])
def test_a_truncated_file_is_named(root, part):
    path = paths(root, "train", IDS[1])[part]
    content = path.read_bytes()
    for keep in (0, len(content) // 2):
        path.write_bytes(content[:keep])
        with pytest.raises(ValueError, match=rf"{path.name}, .* of id '{IDS[1]}': cannot be decoded"):
            Cityscapes(root, "train")[1]


def test_pickle_and_fingerprint(root):
    source = Cityscapes(root, "train")
    copy = pickle.loads(pickle.dumps(source))
    for name, values in source[0].items():
        np.testing.assert_array_equal(copy[0][name], values)
    first = source.fingerprint()
    assert json.loads(json.dumps(first)) == copy.fingerprint()
    assert (first["name"], first["split"], first["length"]) == ("cityscapes", "train", 3)
    assert Cityscapes(root, "train", protocol="published").fingerprint() != first


def test_published_facts():
    assert len(LABEL_IDS) == len(Cityscapes.CLASSES) == len(set(Cityscapes.COLOURS)) == 19
    assert Cityscapes.CLASSES[LABEL_IDS.index(23)] == "sky"
    assert Cityscapes.SPLIT_SIZES == {"train": 2975, "validation": 500}
