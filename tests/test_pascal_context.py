"""The PASCAL-Context source: every target against values computed here, and errors that name the file."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from skimage.morphology import thin

from sgw_jax.data_pipelines.pascal_context import NORMALS_CLASSES, PART_INDEX, PascalContext
from sgw_jax.data_pipelines.transforms import Target, check_example

TARGETS = {
    "semseg": Target("labels", 255),
    "human_parts": Target("labels", 255),
    "edges": Target("mask", -1.0),
    "normals": Target("vectors", 0.0),
    "saliency": Target("mask", -1.0),
}
HEIGHT, WIDTH = 14, 18
EPS = np.finfo(np.float32).eps


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def save_mat(path: Path, **variables) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    savemat(path, variables)


def box(top: int, bottom: int, left: int, right: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def annotation(*things: tuple[int, list[tuple[str, np.ndarray]]]) -> np.ndarray:
    """PASCAL-Parts' MATLAB structs of objects (class index, parts)."""
    objects = np.zeros((1, len(things)), [(key, object) for key in ("class", "class_ind", "mask", "parts")])
    for i, (index, parts) in enumerate(things):
        records = np.zeros((1, len(parts)), [("part_name", object), ("mask", object)])
        for j, (name, mask) in enumerate(parts):
            records[0, j] = (name, mask)
        whole = np.zeros((HEIGHT, WIDTH), np.uint8)
        objects[0, i] = (f"class {index}", index, whole, records if parts else np.zeros((0, 0)))
    anno = np.zeros((1, 1), [("imname", object), ("objects", object)])
    anno[0, 0] = ("a", objects if things else np.zeros((0, 0)))
    return anno


PERSON = annotation(
    (13, [("head", box(0, 14, 0, 18))]),  # a horse's head
    (15, [("torso", box(4, 10, 2, 8)), ("lhand", box(8, 12, 6, 10)), ("hair", box(2, 5, 3, 7))]),
    (15, []),
    (15, [("rfoot", box(9, 13, 1, 4))]),
)


def write_archive(tmp_path: Path) -> Path:
    """Train a, b (b has no person, and its semseg is in pascal-context alone); validation c."""
    rng = np.random.default_rng(0)
    for id_ in "abc":
        save(tmp_path / f"JPEGImages/{id_}.jpg", rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
        labels = rng.choice(np.array([*range(21), 255], np.uint8), (HEIGHT, WIDTH))
        save(tmp_path / f"semseg/pascal-context/{id_}.png", labels)
        if id_ != "b":
            save(tmp_path / f"semseg/VOC12/{id_}.png", labels[::-1])
        classes = np.repeat(rng.integers(1, 460, (HEIGHT, 3), dtype=np.uint16), WIDTH // 3, axis=1)
        classes[:5, :9] = 284  # person: counts
        classes[5:9, 9:] = 360  # sky: does not
        save_mat(tmp_path / f"pascal-context/trainval/{id_}.mat", LabelMap=classes)
        save_mat(tmp_path / f"human_parts/{id_}.mat", anno=annotation((9, [])) if id_ == "b" else PERSON)
        save(tmp_path / f"normals_distill/{id_}.png", rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
        save(tmp_path / f"sal_distill/{id_}.png", rng.integers(0, 256, (HEIGHT, WIDTH), dtype=np.uint8))
    (tmp_path / "ImageSets/Context").mkdir(parents=True)
    (tmp_path / "ImageSets/Context/train.txt").write_text("a\nb\n")
    (tmp_path / "ImageSets/Context/val.txt").write_text("c\n")
    return tmp_path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_archive(tmp_path)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture)


def class_map(root: Path, id_: str) -> np.ndarray:
    from scipy.io import loadmat

    return loadmat(root / f"pascal-context/trainval/{id_}.mat")["LabelMap"].astype(np.int64)


def test_examples_have_the_form_of_a_source(root):
    source = PascalContext(root, "train")
    assert len(source) == 2
    for i in range(2):
        check_example(source[i], TARGETS)
        assert set(source[i]) == {"image", *TARGETS}
        np.testing.assert_array_equal(source[i]["image"], pixels(Path(source.file_of(i))))
    assert PascalContext(root, "validation").ids == ("c",)


def test_voc_wins_over_pascal_context(root):
    source = PascalContext(root, "train", ["semseg"])
    np.testing.assert_array_equal(source[0]["semseg"], pixels(root / "semseg/VOC12/a.png"))
    np.testing.assert_array_equal(source[1]["semseg"], pixels(root / "semseg/pascal-context/b.png"))
    assert source.files(0) == (root / "JPEGImages/a.jpg", root / "semseg/VOC12/a.png")
    palette = Image.fromarray(pixels(root / "semseg/VOC12/a.png"))
    palette.putpalette(list(range(256)) * 3)
    palette.save(root / "semseg/VOC12/a.png")
    np.testing.assert_array_equal(PascalContext(root, "train")[0]["semseg"], pixels(root / "semseg/VOC12/a.png"))


def test_edges_are_the_thinned_laplacian_of_the_class_map(root):
    for i, id_ in enumerate("ab"):
        padded = np.pad(class_map(root, id_), 1, mode="reflect")
        laplacian = padded[:-2, 1:-1] + padded[2:, 1:-1] + padded[1:-1, :-2] + padded[1:-1, 2:] - 4 * padded[1:-1, 1:-1]
        edges = PascalContext(root, "train", ["edges"])[i]["edges"]
        np.testing.assert_array_equal(edges, thin(laplacian != 0))
        assert 0 < edges.sum() < np.count_nonzero(laplacian)
    save_mat(root / "pascal-context/trainval/a.mat", LabelMap=np.full((HEIGHT, WIDTH), 7, np.uint16))
    assert np.all(PascalContext(root, "train", ["edges"])[0]["edges"] == 0)


def test_a_straight_border_becomes_a_line_of_one_pixel(root):
    save_mat(root / "pascal-context/trainval/a.mat", LabelMap=np.where(box(0, HEIGHT, 0, 9), 3, 400).astype(np.uint16))
    edges = PascalContext(root, "train", ["edges"])[0]["edges"]
    assert np.all(edges[2:-2].sum(1) == 1)


def test_human_parts_are_painted_in_order(root):
    expected = np.zeros((HEIGHT, WIDTH), int)
    expected[4:10, 2:8] = 2
    expected[8:12, 6:10] = 4
    expected[2:5, 3:7] = 1
    expected[9:13, 1:4] = 6
    source = PascalContext(root, "train", ["human_parts"])
    np.testing.assert_array_equal(source[0]["human_parts"], expected)
    assert np.all(source[1]["human_parts"] == 255)


@pytest.mark.parametrize("anno", [annotation(), annotation((15, [])), annotation((15, [("head", box(0, 0, 0, 0))]))])
def test_an_image_without_painted_parts_is_ignored(root, anno):
    save_mat(root / "human_parts/a.mat", anno=anno)
    parts = PascalContext(root, "train", ["human_parts"])[0]["human_parts"]
    assert parts.shape == (HEIGHT, WIDTH)
    assert np.all(parts == 255)


def test_normals_count_on_their_classes_alone(root):
    for i, id_ in enumerate("ab"):
        vectors = pixels(root / f"normals_distill/{id_}.png") / 127.5 - 1
        length = np.linalg.norm(vectors, axis=-1, keepdims=True)
        valid = (length >= 0.5) & np.isin(class_map(root, id_), NORMALS_CLASSES)[..., None]
        normals = PascalContext(root, "train", ["normals"])[i]["normals"]
        # Components below 1.8 lose at most 2 eps to rounding; division by a length of at least 1/2 doubles it.
        expected = np.where(valid, vectors / np.maximum(length, 0.5), 0)
        np.testing.assert_allclose(normals, expected, rtol=0, atol=8 * EPS)
        assert np.all(normals[5:9, 9:] == 0)
        assert np.any(normals[:5, :9] != 0)


def test_saliency_is_above_a_half(root):
    save(root / "sal_distill/a.png", np.full((HEIGHT, WIDTH), 127, np.uint8))
    save(root / "sal_distill/b.png", np.full((HEIGHT, WIDTH), 128, np.uint8))
    source = PascalContext(root, "train", ["saliency"])
    assert np.all(source[0]["saliency"] == 0)
    assert np.all(source[1]["saliency"] == 1)


def test_targets_of_another_size_are_resized_to_the_image(root):
    before = PascalContext(root, "train")[0]
    height, width = 2 * HEIGHT, 3 * WIDTH
    save(root / "JPEGImages/a.jpg", np.zeros((height, width, 3), np.uint8))
    after = PascalContext(root, "train")[0]
    check_example(after, TARGETS)
    for task in ("semseg", "human_parts", "edges", "saliency"):
        np.testing.assert_array_equal(after[task], before[task].repeat(2, axis=0).repeat(3, axis=1))
    length = np.linalg.norm(after["normals"], axis=-1)
    assert np.all((length == 0) | (abs(length - 1) < 4 * EPS))


# --- what is refused


def test_missing_files_are_all_counted(root):
    (root / "semseg/pascal-context/b.png").unlink()
    (root / "pascal-context/trainval/a.mat").unlink()
    with pytest.raises(ValueError, match=r"split 'train', lacks 2 of its 12 files: .*trainval/a.mat, .*context/b.png;"):
        PascalContext(root, "train")
    assert len(PascalContext(root, "train", ["human_parts", "saliency"])) == 2
    with pytest.raises(ValueError, match="PASCAL-Context: split is 'val'; allowed: train, validation"):
        PascalContext(root, "val")
    with pytest.raises(ValueError, match="no labels of depth; allowed tasks: semseg, human_parts, edges,"):
        PascalContext(root, "train", ["depth"])


def test_wrong_lists_are_named(root):
    listed = root / "ImageSets/Context/train.txt"
    listed.write_text("a\na\n")
    with pytest.raises(ValueError, match="lists 1 ids more than once: a"):
        PascalContext(root, "train")
    listed.unlink()
    with pytest.raises(ValueError, match=r"train.txt: no such split file; splits in .*: val"):
        PascalContext(root, "train")


def test_wrong_contents_are_named(root):
    save_mat(root / "human_parts/a.mat", anno=annotation((15, [("wing", box(0, 1, 0, 1)), ("beak", box(0, 1, 0, 1))])))
    save(root / "semseg/pascal-context/b.png", np.full((HEIGHT, WIDTH), 21, np.uint8))
    source = PascalContext(root, "train", ["semseg", "human_parts"])
    with pytest.raises(
        ValueError, match=r"human_parts/a.mat, task 'human_parts' of id 'a': .*parts beak, wing; allowed"
    ):
        source[0]
    with pytest.raises(ValueError, match=r"b.png, task 'semseg' of id 'b': .*values 21; allowed: 0..20, and 255"):
        source[1]
    save(root / "normals_distill/a.png", np.zeros((HEIGHT, WIDTH - 1, 3), np.uint8))
    with pytest.raises(ValueError, match=r"normals_distill/a.png, .* is 14 x 17 .*allowed: 14 x 18, as LabelMap in"):
        PascalContext(root, "train", ["normals"])[0]
    save_mat(root / "pascal-context/trainval/a.mat", Other=np.zeros((2, 2)))
    with pytest.raises(ValueError, match=r"a.mat, class map of id 'a': .*of Other; allowed: the variable LabelMap"):
        PascalContext(root, "train", ["edges"])[0]


def test_a_truncated_file_is_named(root):
    source = PascalContext(root, "train")
    for path in source.files(0):
        content = path.read_bytes()
        for keep in (0, len(content) // 2):
            path.write_bytes(content[:keep])
            with pytest.raises(ValueError, match=rf"{path.name}, .* of id 'a': cannot be decoded"):
                source[0]
        path.write_bytes(content)
    source[0]


def test_pickle_and_fingerprint(root):
    source = PascalContext(root, "train")
    copy = pickle.loads(pickle.dumps(source))
    for name, values in source[0].items():
        np.testing.assert_array_equal(copy[0][name], values)
    first = source.fingerprint()
    assert json.loads(json.dumps(first)) == copy.fingerprint()
    assert (first["name"], first["split"], first["length"]) == ("pascal_context", "train", 2)
    assert PascalContext(root, "validation").fingerprint()["ids"] != first["ids"]


def test_published_facts():
    assert len(PascalContext.CLASSES) == len(set(PascalContext.COLOURS)) == 21
    assert PascalContext.CLASSES[15] == "person"
    colours = dict(zip(PascalContext.CLASSES, PascalContext.COLOURS, strict=True))
    assert colours["background"] == (0, 0, 0)
    assert colours["aeroplane"] == (128, 0, 0)
    assert colours["person"] == (192, 128, 128)
    assert colours["tvmonitor"] == (0, 64, 128)
    assert len(PART_INDEX) == 24
    assert set(PART_INDEX.values()) == set(range(1, len(PascalContext.PART_CLASSES)))
    assert len(set(NORMALS_CLASSES)) == len(NORMALS_CLASSES) == 170
    # person, wall, floor, ceiling, table, car, cat, dog, tvmonitor; then sky, grass, ground, water, road, unknown
    assert {284, 440, 158, 68, 397, 59, 65, 113, 427} <= set(NORMALS_CLASSES)
    assert not {360, 187, 189, 445, 324, 431} & set(NORMALS_CLASSES)
    assert PascalContext.SPLIT_SIZES == {"train": 4998, "validation": 5105}
