"""The NYUD source: the three archives are told apart and read exactly, and everything else is refused by name."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from sgw_jax.data_pipelines.evaluation import eval_batches
from sgw_jax.data_pipelines.nyud import ARCHIVES, Nyud
from sgw_jax.data_pipelines.transforms import Target, check_example

TARGETS = {
    "semseg": Target("labels", 255),
    "depth": Target("depth", 0.0),
    "normals": Target("vectors", 0.0),
    "edges": Target("mask", -1.0),
}
HEIGHT, WIDTH = 16, 24
FOLDERS = {"semseg": "segmentation", "depth": "depth", "normals": "normals", "edges": "edge"}


def save(path: Path, values: np.ndarray, key: str = "") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    elif path.suffix == ".mat":
        savemat(path, {key: values})
    else:
        Image.fromarray(values).save(path)


def write_archive(root: Path, archive: str) -> dict[str, dict[str, np.ndarray]]:
    """Ids a, b (train) and c (validation); returns the stored arrays, by id and task."""
    rng = np.random.default_rng(0)
    suffixes = ARCHIVES[archive]
    stored: dict[str, dict[str, np.ndarray]] = {}
    for id_ in "abc":
        normals = rng.normal(size=(HEIGHT, WIDTH, 3))
        normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
        bits = rng.integers(0, 2, (HEIGHT, WIDTH))
        depth = rng.uniform(0.5, 9, (HEIGHT, WIDTH)).astype(np.float32)
        depth[0, :2] = 0, np.nan
        stored[id_] = {
            "image": rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8),
            "semseg": rng.permuted(np.arange(HEIGHT * WIDTH) % 41).reshape(HEIGHT, WIDTH).astype(np.uint8),
            "depth": depth,
            "normals": normals if suffixes["normals"] == ".npy" else np.rint((normals + 1) * 127.5).astype(np.uint8),
            "edges": bits.astype(np.float32) if suffixes["edge"] == ".npy" else (255 * bits).astype(np.uint8),
        }
        save(root / "images" / (id_ + suffixes["images"]), stored[id_]["image"])
        for task, folder in FOLDERS.items():
            save(root / folder / (id_ + suffixes[folder]), stored[id_][task], folder)
    (root / "gt_sets").mkdir()
    (root / "gt_sets/train.txt").write_text("a\nb\n")
    (root / "gt_sets/val.txt").write_text("c\n")
    return stored


@pytest.mark.parametrize("archive", ARCHIVES)
def test_every_field_of_every_archive(tmp_path, archive):
    stored = write_archive(tmp_path, archive)
    for split, ids in (("train", "ab"), ("validation", "c")):
        source = Nyud(tmp_path, split)
        assert source.archive == archive
        assert source.ids == tuple(ids)
        assert len(source) == len(ids)
        for i, id_ in enumerate(ids):
            example, truth = source[i], stored[id_]
            check_example(example, TARGETS)
            assert set(example) == {"image", *TARGETS}
            if archive == "invpt":
                np.testing.assert_array_equal(example["image"], truth["image"])
            labels = truth["semseg"].astype(int)
            assert example["semseg"].dtype == np.uint8
            np.testing.assert_array_equal(example["semseg"], np.where(labels == 0, 255, labels - 1))
            np.testing.assert_array_equal(example["depth"], truth["depth"])
            np.testing.assert_array_equal(example["edges"], truth["edges"] / max(truth["edges"].max(), 1))
            with Image.open(source.file_of(i)) as image:
                np.testing.assert_array_equal(example["image"], np.asarray(image))
            if archive == "astmt":  # a JPEG's loss is not ours: what it decodes to is the truth
                with Image.open(tmp_path / f"normals/{id_}.jpg") as picture:
                    vectors = np.asarray(picture) / 127.5 - 1
            else:
                vectors = truth["normals"] if archive == "mti_net" else truth["normals"] / 127.5 - 1
            length = np.linalg.norm(vectors, axis=-1, keepdims=True)
            expected = np.where(length >= 0.5, vectors / np.maximum(length, 0.5), 0)
            # Components below 1.8 lose at most 2 eps to rounding; division by a length of at least 1/2 doubles it.
            np.testing.assert_allclose(example["normals"], expected, rtol=0, atol=8 * np.finfo(np.float32).eps)


def test_the_archive_is_described(tmp_path):
    write_archive(tmp_path, "astmt")
    assert Nyud(tmp_path, "train").describe() == (
        "NYUD-v2, archive 'astmt' (NYUD_MT.tgz of ASTMT): images .jpg, segmentation .mat, depth .mat, normals .jpg, "
        "edge .png."
    )


def test_the_zero_normal_of_8_bits_is_invalid(tmp_path):
    write_archive(tmp_path, "invpt")
    pixels = np.full((HEIGHT, WIDTH, 3), (255, 128, 127), np.uint8)
    pixels[0, 0], pixels[0, 1], pixels[0, 2] = 127, 128, (127, 128, 127)
    save(tmp_path / "normals/a.png", pixels)
    normals = Nyud(tmp_path, "train")[0]["normals"]
    assert np.all(normals[0, :3] == 0)
    assert np.all(normals[1:] != 0)
    save(tmp_path / "depth/a.npy", np.zeros((HEIGHT, WIDTH, 1)))  # (H, W, 1) and float64 are read too
    assert Nyud(tmp_path, "train")[0]["depth"].shape == (HEIGHT, WIDTH)


def test_targets_of_another_size_are_resized_to_the_image(tmp_path):
    stored = write_archive(tmp_path, "invpt")["a"]
    height, width = 20, 36
    save(tmp_path / "images/a.png", np.zeros((height, width, 3), np.uint8))
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:] = 127
    pixels[:, WIDTH // 2 :] = 128, 128, 0
    save(tmp_path / "normals/a.png", pixels)
    example = Nyud(tmp_path, "train")[0]
    check_example(example, TARGETS)
    rows, columns = np.arange(height) * HEIGHT // height, np.arange(width) * WIDTH // width  # cv2.INTER_NEAREST
    np.testing.assert_array_equal(example["depth"], stored["depth"][rows][:, columns])
    np.testing.assert_array_equal(example["edges"], (stored["edges"] / 255)[rows][:, columns])
    labels = stored["semseg"].astype(int)[rows][:, columns]
    np.testing.assert_array_equal(example["semseg"], np.where(labels == 0, 255, labels - 1))
    length = np.linalg.norm(example["normals"], axis=-1)
    assert np.all((length == 0) | (abs(length - 1) < 4 * np.finfo(np.float32).eps))
    assert np.all(example["normals"][:, : width // 2 - 3] == 0)  # cubic resampling reaches two source pixels
    assert np.all(example["normals"][:, width // 2 + 3 :, 2] < -0.99)


def cubic(values: np.ndarray, length: int) -> np.ndarray:
    """Cubic convolution along the first axis: Keys' kernel with OpenCV's a = -3/4, pixel centres, borders repeated."""
    at = (np.arange(length) + 0.5) * len(values) / length - 0.5
    result = np.zeros((length, *values.shape[1:]))
    for tap in range(-1, 3):
        place = np.floor(at).astype(int) + tap
        x = abs(at - place)
        near = (2 - 0.75) * x**3 - (3 - 0.75) * x**2 + 1
        far = -0.75 * (x**3 - 5 * x**2 + 8 * x - 4)
        weight = np.where(x <= 1, near, far)
        result += weight[:, None, None] * values[np.clip(place, 0, len(values) - 1)]
    return result


def test_normals_are_resized_by_cubic_convolution(tmp_path):
    write_archive(tmp_path, "mti_net")
    angle = np.linspace(0, 1, HEIGHT)[:, None] + np.linspace(0, 1.5, WIDTH)  # varies, but no vector gets short
    normals = np.stack([np.sin(angle), np.sin(2 * angle) / 4, -np.cos(angle / 2)], axis=-1)
    save(tmp_path / "normals/a.npy", normals)
    size = (2 * HEIGHT, 3 * WIDTH)
    save(tmp_path / "images/a.jpg", np.zeros((*size, 3), np.uint8))
    expected = cubic(cubic(normals, size[0]).swapaxes(0, 1), size[1]).swapaxes(0, 1)
    expected /= np.linalg.norm(expected, axis=-1, keepdims=True)
    # 16 sums of eps/2 each, weights of absolute sum below 1.4 per axis, lengths above 0.7: 8 * 1.4^2 / 0.7 < 32 eps.
    tolerance = 16 * 2 * np.finfo(np.float32).eps
    np.testing.assert_allclose(Nyud(tmp_path, "train")[0]["normals"], expected, rtol=0, atol=tolerance)


def test_only_the_tasks_asked_for_are_needed(tmp_path):
    write_archive(tmp_path, "mti_net")
    for folder in ("edge", "normals"):
        for path in (tmp_path / folder).iterdir():
            path.unlink()
        (tmp_path / folder).rmdir()
    source = Nyud(tmp_path, "train", ("depth", "semseg"))
    assert source.archive == "mti_net"  # astmt's segmentation is .mat
    assert set(source[0]) == {"image", "semseg", "depth"}
    assert source.files(1) == tuple(tmp_path / p for p in ("images/b.jpg", "segmentation/b.png", "depth/b.npy"))
    with pytest.raises(ValueError, match=r"has no folder normals, edge, which NYUD needs"):
        Nyud(tmp_path, "train")
    for folder in ("segmentation", "depth"):
        (tmp_path / folder).rename(tmp_path / f"no_{folder}")
    with pytest.raises(ValueError, match=r"holds images .jpg, which fits mti_net and astmt; known archives: 'invpt'"):
        Nyud(tmp_path, "train", ())


# --- what is refused


def test_an_unknown_or_mixed_archive_is_refused(tmp_path):
    write_archive(tmp_path, "invpt")
    save(tmp_path / "edge/z.npy", np.zeros((2, 2)))
    (tmp_path / "images/notes.txt").write_text("ignored")
    known = r"known archives: 'invpt'.*; 'mti_net'.*; 'astmt', NYUD_MT.tgz of ASTMT: images .jpg, .*unpack one"
    with pytest.raises(ValueError, match=rf"edge .npy and .png, which fits no NYUD archive; {known}"):
        Nyud(tmp_path, "train")
    for path in (tmp_path / "edge").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match=r"images .png, .*edge no file, which fits no NYUD archive"):
        Nyud(tmp_path, "train")


def test_missing_files_are_all_counted(tmp_path):
    write_archive(tmp_path, "invpt")
    (tmp_path / "gt_sets/train.txt").write_text("".join(f"m{i:02d}\n" for i in range(3)))
    first = r"images/m00.png, .*segmentation/m00.png, .*depth/m00.npy, .*normals/m00.png, .*edge/m00.png, .*images/m01"
    with pytest.raises(
        ValueError, match=rf"NYUD, split 'train', lacks 15 of its 15 files: .*{first}.* and 5 more; unpack"
    ):
        Nyud(tmp_path, "train")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("val",), "split is 'val'; allowed: train, validation"),
        (("train", ("depth", "saliency")), "no labels of saliency; allowed tasks: semseg, depth, normals, edges"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, message):
    write_archive(tmp_path, "invpt")
    with pytest.raises(ValueError, match=message):
        Nyud(tmp_path, *arguments)


def test_wrong_lists_are_named(tmp_path):
    write_archive(tmp_path, "invpt")
    (tmp_path / "gt_sets/train.txt").write_text("a\nb\na\n")
    with pytest.raises(ValueError, match="lists 1 ids more than once: a"):
        Nyud(tmp_path, "train")
    (tmp_path / "gt_sets/train.txt").unlink()
    with pytest.raises(ValueError, match=r"train.txt: no such split file; splits in .*: val"):
        Nyud(tmp_path, "train")


@pytest.mark.parametrize(
    ("archive", "file", "values", "message"),
    [
        (
            "invpt",
            "segmentation/a.png",
            np.full((4, 4), 41, np.uint8),
            r"values 41; allowed: the integers 1..40, and 0",
        ),
        ("astmt", "segmentation/a.mat", np.full((4, 4), 1.5), r"values 1.5; allowed: the integers 1..40"),
        ("astmt", "segmentation/a.mat", None, r"a MATLAB file of other; allowed: the variable segmentation"),
        ("astmt", "depth/a.mat", np.full((4, 4), -2.0), "down to -2.0; allowed: metres"),
        ("mti_net", "edge/a.npy", np.full((4, 4), 255.0), r"up to 255.0; allowed: floats in \[0, 1\]"),
        ("mti_net", "normals/a.npy", np.zeros((4, 4)), r"float64 \(4, 4\); allowed: numbers \(H, W, 3\)"),
        ("invpt", "images/a.png", np.zeros((4, 4), np.uint16), "allowed: 8-bit RGB or grey"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, archive, file, values, message):
    write_archive(tmp_path, archive)
    if values is None:
        save(tmp_path / file, np.zeros(1), "other")
    else:
        save(tmp_path / file, values, file.split("/")[0])
    source = Nyud(tmp_path, "train")
    with pytest.raises(ValueError, match=rf"{file}, .* of id 'a': .*{message}"):
        source[0]
    source[1]


@pytest.mark.parametrize("archive", ARCHIVES)
def test_a_truncated_file_is_named(tmp_path, archive):
    write_archive(tmp_path, archive)
    source = Nyud(tmp_path, "train")
    for path in source.files(0):
        content = path.read_bytes()
        for keep in (0, len(content) // 2):
            path.write_bytes(content[:keep])
            with pytest.raises(ValueError, match=rf"{path.name}, .* of id 'a': cannot be decoded"):
                source[0]
        path.write_bytes(content)
    source[0]


def test_pickle_fingerprint_and_loader(tmp_path):
    write_archive(tmp_path, "invpt")
    source = Nyud(tmp_path, "train")
    copy = pickle.loads(pickle.dumps(source))
    for name, values in source[0].items():
        np.testing.assert_array_equal(copy[0][name], values)
    first = source.fingerprint()
    assert json.loads(json.dumps(first)) == copy.fingerprint()
    assert {key: first[key] for key in ("name", "archive", "split", "length")} == {
        "name": "nyud", "archive": "invpt", "split": "train", "length": 2,
    }  # fmt: skip
    (tmp_path / "gt_sets/train.txt").write_text("b\na\n")
    assert Nyud(tmp_path, "train").fingerprint()["ids"] != first["ids"]
    with eval_batches(source, TARGETS, batch_size=2, size=(HEIGHT, WIDTH)) as batches:
        assert next(batches)["normals"].shape == (2, HEIGHT, WIDTH, 3)


def test_published_facts():
    assert len(Nyud.CLASSES) == len(set(Nyud.CLASSES)) == 40
    assert Nyud.SPLIT_SIZES == {"train": 795, "validation": 654}
    assert len({tuple(suffixes.values()) for suffixes in ARCHIVES.values()}) == 3
