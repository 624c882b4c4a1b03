"""The folder source: what each kind's files decode to, and errors that name file, id and task."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sgw_jax.data_pipelines import loader
from sgw_jax.data_pipelines.evaluation import eval_batches
from sgw_jax.data_pipelines.folder import Folder
from sgw_jax.data_pipelines.transforms import Target, check_example

TARGETS = {
    "classes": Target("labels", 255),
    "depth": Target("depth", 0.0),
    "disparity": Target("disparity", -1.0),
    "normals": Target("vectors", 0.0),
    "edges": Target("mask", -1.0),
}
HEIGHT, WIDTH = 6, 9


def save(path: Path, values: np.ndarray, **options) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, values)
    else:
        Image.fromarray(values).save(path, **options)


def write_split(root: Path, split: str, *ids: str) -> None:
    (root / "splits").mkdir(parents=True, exist_ok=True)
    (root / "splits" / f"{split}.txt").write_text("".join(f"{id_}\n" for id_ in ids))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Ids a, b, c; c has the image alone."""
    rng = np.random.default_rng(0)
    write_split(tmp_path, "train", "a", "b", "c")
    for id_, suffix in (("a", ".png"), ("b", ".jpg"), ("c", ".jpeg")):
        save(tmp_path / "images" / (id_ + suffix), rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    for id_ in "ab":
        save(tmp_path / f"classes/{id_}.png", rng.integers(0, 9, (HEIGHT, WIDTH), dtype=np.uint8))
        save(tmp_path / f"depth/{id_}.npy", rng.uniform(1, 5, (HEIGHT, WIDTH)))
        save(tmp_path / f"disparity/{id_}.npy", rng.uniform(0, 5, (HEIGHT, WIDTH)).astype(np.float32))
        normals = rng.normal(size=(HEIGHT, WIDTH, 3))
        save(tmp_path / f"normals/{id_}.npy", normals / np.linalg.norm(normals, axis=-1, keepdims=True))
        save(tmp_path / f"edges/{id_}.png", rng.integers(0, 2, (HEIGHT, WIDTH), dtype=np.uint8) * 255)
    return tmp_path


def only(name: str) -> dict[str, Target]:
    return {name: TARGETS[name]}


# --- what files decode to


def test_examples_have_the_form_of_a_source(root):
    source = Folder(root, "train", TARGETS)
    assert len(source) == 3
    assert source.ids == ("a", "b", "c")
    for i in range(3):
        check_example(source[i], TARGETS)
    assert set(source[0]) == set(source[1]) == {"image", *TARGETS}
    assert set(source[2]) == {"image"}
    np.testing.assert_array_equal(source[0]["depth"], np.load(root / "depth/a.npy").astype(np.float32))
    np.testing.assert_array_equal(source[0]["image"], np.asarray(Image.open(root / "images/a.png")))
    assert source.file_of(1) == str(root / "images/b.jpg")


def test_targets_not_asked_for_are_not_read(root):
    (root / "depth/a.npy").write_bytes(b"damaged")
    assert set(Folder(root, "train", only("edges"))[0]) == {"image", "edges"}


def test_a_grey_image_has_three_equal_channels(root):
    grey = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH)
    save(root / "images/a.png", grey)
    np.testing.assert_array_equal(Folder(root, "train", {})[0]["image"], np.stack([grey] * 3, axis=-1))


@pytest.mark.parametrize("palette", [False, True])
def test_labels_are_the_index_of_grey_and_palette_files(root, palette):
    labels = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH)
    labels[0, 0] = 255
    picture = Image.fromarray(labels)
    if palette:
        picture.putpalette(list(range(255, -1, -1)) * 3)
    picture.save(root / "classes/a.png")
    np.testing.assert_array_equal(Folder(root, "train", only("classes"))[0]["classes"], labels)


def test_depth_in_16_bits_is_millimetres(root):
    (root / "depth/a.npy").unlink()
    millimetres = np.full((HEIGHT, WIDTH), 2345, np.uint16)
    millimetres[0, :2] = 0, 65535
    save(root / "depth/a.png", millimetres)
    depth = Folder(root, "train", only("depth"))[0]["depth"]
    assert depth.dtype == np.float32
    np.testing.assert_array_equal(depth, (millimetres / 1000).astype(np.float32))


def test_depth_and_disparity_keep_their_ignore_values(root):
    depth = np.array([[0, np.nan, np.inf, -np.inf, 2]], np.float64).repeat(HEIGHT, axis=0)
    image = np.zeros((HEIGHT, 5, 3), np.uint8)
    save(root / "images/a.png", image)
    save(root / "depth/a.npy", depth[..., None])  # (H, W, 1) is (H, W)
    np.testing.assert_array_equal(Folder(root, "train", only("depth"))[0]["depth"], depth.astype(np.float32))
    save(root / "disparity/a.npy", np.full((HEIGHT, 5), -1.0))
    assert np.all(Folder(root, "train", only("disparity"))[0]["disparity"] == -1)


def test_vectors_of_8_bits_are_unit_to_their_precision(root):
    (root / "normals/a.npy").unlink()
    rng = np.random.default_rng(1)
    normals = rng.normal(size=(HEIGHT, WIDTH, 3))
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    encoded = np.rint((normals + 1) * 255 / 2).astype(np.uint8)
    encoded[0, 0], encoded[0, 1], encoded[0, 2] = 127, 128, (127, 127, 190)  # |n| = 0.007, 0.007, 0.49: invalid
    save(root / "normals/a.png", encoded)
    decoded = Folder(root, "train", only("normals"))[0]["normals"].astype(np.float64)
    assert np.all(decoded[0, :3] == 0)
    valid = np.ones((HEIGHT, WIDTH), bool)
    valid[0, :3] = False
    np.testing.assert_allclose(np.linalg.norm(decoded[valid], axis=-1), 1, rtol=4 * np.finfo(np.float32).eps)
    exact = encoded[valid].astype(np.float64) * 2 / 255 - 1
    exact /= np.linalg.norm(exact, axis=-1, keepdims=True)
    # 2 v / 255 - 1 loses up to 2 eps to rounding, and lengths are near 1.
    np.testing.assert_allclose(decoded[valid], exact, rtol=0, atol=8 * np.finfo(np.float32).eps)
    # Rounding moves each component by 1/255 at most, the vector by sqrt(3)/255; renormalising at most doubles it.
    assert np.linalg.norm(decoded[valid] - normals[valid], axis=-1).max() <= 2 * 3**0.5 / 255


def test_vector_arrays_are_made_unit_or_zero(root):
    normals = np.zeros((HEIGHT, WIDTH, 3))
    normals[0, 0], normals[0, 1], normals[0, 2], normals[0, 3] = (
        (0, 0, -0.9),
        (0.3, 0, 0),
        (np.nan, 0, -1),
        (np.inf, 0, 0),
    )
    save(root / "normals/a.npy", normals)
    expected = np.zeros((HEIGHT, WIDTH, 3))
    expected[0, 0] = 0, 0, -1
    np.testing.assert_array_equal(Folder(root, "train", only("normals"))[0]["normals"], expected)


def test_masks_are_grey_levels_or_floats(root):
    levels = np.arange(HEIGHT * WIDTH, dtype=np.uint8).reshape(HEIGHT, WIDTH)
    levels[0, 0] = 255
    save(root / "edges/a.png", levels)
    (root / "edges/b.png").unlink()
    save(root / "edges/b.npy", np.array([[-1, 0, 0.25, 1, 1, 1, 1, 1, 1]]).repeat(HEIGHT, axis=0))
    source = Folder(root, "train", only("edges"))
    np.testing.assert_array_equal(source[0]["edges"], (levels / 255).astype(np.float32))
    assert source[1]["edges"][0, :4].tolist() == [-1, 0, 0.25, 1]


# --- what is refused when the source is made


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "train.txt is empty"),
        (["a", "b", "a"], "train.txt lists 1 ids more than once: a;"),
        (["x/a"], "ids with a folder in them: x/a"),
        (["a", "missing"], "lacks 1 of the 2 images of split 'train': missing;"),
        ([f"m{i:02d}" for i in range(25)], "lacks 25 of the 25 images .*: m00, .*, m09 and 15 more;"),
    ],
)
def test_a_wrong_split_is_named(root, lines, message):
    write_split(root, "train", *lines)
    with pytest.raises(ValueError, match=message):
        Folder(root, "train", TARGETS)


def test_a_missing_split_lists_those_that_exist(root):
    with pytest.raises(ValueError, match=r"val.txt: no such split file; splits in .*: train"):
        Folder(root, "val", TARGETS)


def test_a_missing_folder_and_an_empty_one_are_named(root):
    with pytest.raises(ValueError, match=r"saliency: no such folder; it holds the files of task 'saliency'"):
        Folder(root, "train", {"saliency": Target("mask", -1.0)})
    (root / "saliency").mkdir()
    save(root / "saliency/other.png", np.zeros((HEIGHT, WIDTH), np.uint8))
    with pytest.raises(ValueError, match=r"saliency has no file for any of the 3 ids .*\(mask\) needs .*\.npy, \.png"):
        Folder(root, "train", {"saliency": Target("mask", -1.0)})
    write_split(root, "val", "c")
    with pytest.raises(ValueError, match="depth has no file for any of the 1 ids of split 'val'"):
        Folder(root, "val", only("depth"))


def test_two_files_for_one_id_are_refused(root):
    save(root / "depth/a.png", np.ones((HEIGHT, WIDTH), np.uint16))
    with pytest.raises(ValueError, match=r"a.npy and a.png for id 'a' \(task 'depth'\)"):
        Folder(root, "train", TARGETS)
    save(root / "images/b.png", np.ones((HEIGHT, WIDTH, 3), np.uint8))
    with pytest.raises(ValueError, match=r"b.png and b.jpg for id 'b' \(images\)"):
        Folder(root, "train", {})


def test_a_target_named_like_the_folders_own_parts_is_refused(root):
    with pytest.raises(ValueError, match="'images'"):
        Folder(root, "train", {"images": Target("mask", -1.0)})


# --- what is refused when an item is read

FLOATS = np.ones((HEIGHT, WIDTH))
LEVELS = np.ones((HEIGHT, WIDTH), np.uint8)


@pytest.mark.parametrize(
    ("file", "values", "message"),
    [
        ("images/a.png", np.zeros((HEIGHT, WIDTH, 4), np.uint8), "mode 'RGBA'; allowed: 8-bit RGB or grey"),
        ("images/a.png", np.zeros((HEIGHT, WIDTH), np.uint16), "mode 'I;16'; allowed: 8-bit RGB or grey"),
        ("classes/a.png", np.zeros((HEIGHT, WIDTH, 3), np.uint8), "mode 'RGB'; allowed: a PNG of 8 bits or fewer"),
        ("classes/a.png", np.zeros((HEIGHT, WIDTH), np.uint16), "mode 'I;16'; allowed: a PNG of 8 bits or fewer"),
        ("classes/a.png", LEVELS[:, :-1], "is 6 x 8 .*; allowed: its image's 6 x 9"),
        ("depth/a.npy", FLOATS.T, "is 9 x 6 .*; allowed: its image's 6 x 9"),
        ("depth/a.npy", FLOATS.astype(int), r"int64 \(6, 9\); allowed: floats \(H, W\)"),
        ("depth/a.npy", np.ones((HEIGHT, WIDTH, 2)), r"float64 \(6, 9, 2\); allowed: floats \(H, W\)"),
        ("depth/a.npy", -FLOATS, "down to -1.0; allowed: metres"),
        ("depth/a.npy", np.array([{"a": 1}], dtype=object), "cannot be decoded .*allow_pickle"),
        ("normals/a.npy", FLOATS, r"float64 \(6, 9\); allowed: floats \(H, W, 3\)"),
        ("edges/a.png", LEVELS.astype(np.uint16), "mode 'I;16'; allowed: a grey PNG of up to 8 bits"),
        ("edges/a.npy", 255 * FLOATS, r"up to 255.0; allowed: floats in \[0, 1\]"),
        ("edges/a.npy", np.nan * FLOATS, r"up to nan; allowed: floats in \[0, 1\]"),
    ],
)
def test_a_wrong_file_is_named(root, file, values, message):
    folder, name = file.split("/")
    for old in (root / folder).glob("a.*"):
        old.unlink()
    save(root / file, values)
    source = Folder(root, "train", only(folder) if folder in TARGETS else {})
    what = f"task '{folder}' .* of id 'a'" if folder in TARGETS else "image of id 'a'"
    with pytest.raises(ValueError, match=rf"{folder}/{name}, {what}: .*{message}"):
        source[0]
    source[1]


@pytest.mark.parametrize("file", ["images/a.png", "images/b.jpg", "classes/a.png", "depth/a.npy", "edges/a.png"])
@pytest.mark.parametrize("keep", [0, 0.5])
def test_a_truncated_file_is_named(root, file, keep):
    content = (root / file).read_bytes()
    (root / file).write_bytes(content[: int(keep * len(content))])
    source = Folder(root, "train", TARGETS)
    with pytest.raises(ValueError, match=f"{file}, .* of id '{Path(file).stem}': cannot be decoded"):
        source[source.ids.index(Path(file).stem)]


# --- as a source


def test_fingerprint_changes_with_ids_and_files(root):
    def digest(targets=TARGETS, split: str = "train") -> object:
        return Folder(root, split, targets).fingerprint()["digest"]

    first = Folder(root, "train", TARGETS).fingerprint()
    assert {key: first[key] for key in ("name", "split", "length")} == {"name": "folder", "split": "train", "length": 3}
    assert digest() == first["digest"] == digest(dict(reversed(TARGETS.items())))
    write_split(root, "other", "b", "a", "c")
    digests = [first["digest"], digest(only("depth")), digest(split="other")]
    save(root / "depth/a.npy", np.ones((HEIGHT, WIDTH), np.float32))  # half the bytes
    digests.append(digest())
    (root / "edges/b.png").unlink()
    digests.append(digest())
    assert len(set(digests)) == 5


def test_a_pickled_folder_reads_the_same(root):
    source = Folder(root, "train", TARGETS)
    copy = pickle.loads(pickle.dumps(source))
    assert copy.fingerprint() == source.fingerprint()
    for name, values in source[0].items():
        np.testing.assert_array_equal(copy[0][name], values)


def test_the_loader_reads_a_folder_and_names_its_files(root):
    source = Folder(root, "train", TARGETS)
    with eval_batches(source, TARGETS, batch_size=2, size=(8, 12)) as batches:
        first, second = batches
    assert first["depth"].shape == (2, 8, 12, 1)
    assert np.all(second["depth"] == 0)  # c has no depth, and no fourth image exists
    sizes = [source.size_of(index) for index in range(3)]
    (root / "images/b.jpg").write_bytes(b"")
    with pytest.raises(loader.ExampleError, match=r"source folder train, item 1, file .*images/b.jpg: .*id 'b'"):
        eval_batches(source, TARGETS, batch_size=2, size=(8, 12))  # which looks at all sizes first
    message = r"source folder train, item 1, file .*images/b.jpg: .*images/b.jpg, image of id 'b'"
    with (
        eval_batches(source, TARGETS, batch_size=2, size=(8, 12), sizes=sizes) as batches,
        pytest.raises(loader.ExampleError, match=message),
    ):
        next(batches)
