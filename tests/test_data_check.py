"""The look at the data before step 1: what cannot be right stops a training before it writes, all at once, by name."""

import json
import os
import re
import struct
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import numpy as np
import pytest
import test_cityscapes
from PIL import Image
from rich.console import Console
from test_data_set_runs import ARCHIVES
from test_folder import save, write_split

from sgw_jax.__main__ import main
from sgw_jax.data_pipelines import readers
from sgw_jax.data_pipelines.cityscapes import Cityscapes
from sgw_jax.data_pipelines.file_names import near_names
from sgw_jax.data_pipelines.inspection.look import Inspection, look
from sgw_jax.data_pipelines.prepare import SOURCES
from sgw_jax.experiment.build import build_protocol
from sgw_jax.experiment.config_files import read_config
from sgw_jax.experiment.inspection import Look, asked_of, inspect, raise_errors
from sgw_jax.tasks import TASKS

SIZE = (32, 48)
SPLITS = {"train": ("train0", "train1"), "validation": ("validation0",), "test": ("test0",)}
IDS = [id_ for ids in SPLITS.values() for id_ in ids]
TINY = ("data.num_classes=4", "data.size=32,64", "channels=16", "backbones.vit.width=32", "backbones.vit.num_heads=2")

RNG = np.random.default_rng(0)
IMAGES = {id_: RNG.integers(0, 256, (*SIZE, 3), dtype=np.uint8) for id_ in IDS}
LABELS = RNG.integers(0, 4, SIZE).astype(np.uint8)
MASK = np.where(LABELS == 0, 255, 0).astype(np.uint8)
DEPTH = np.linspace(1, 6, LABELS.size, dtype=np.float32).reshape(SIZE)
NORMALS = RNG.normal(size=(*SIZE, 3))
GOOD = {"semseg": ("png", LABELS), "depth": ("npy", DEPTH), "normals": ("npy", NORMALS), "saliency": ("png", MASK)}


def write(root: Path, **tasks: tuple[str, np.ndarray]) -> Path:
    """A folder of four images in three splits, with the same labels of each task for all."""
    for split, ids in SPLITS.items():
        write_split(root, split, *ids)
    for id_ in IDS:
        save(root / f"images/{id_}.png", IMAGES[id_])
        for task, (suffix, values) in tasks.items():
            save(root / f"{task}/{id_}.{suffix}", values)
    return root


def options(root: Path, tasks: Iterable[str], *keys: str) -> list[str]:
    given = ("data.source=folder", f"data.root={root}", *TINY, *keys)
    return [f"--config=scenes:interaction=none,tasks={'+'.join(tasks)}", *(f"--config.{key}" for key in given)]


def found_in(root: Path, *tasks: str, keys: tuple[str, ...] = (), again: bool = True) -> Inspection:
    name, *overrides = options(root, tasks, *keys)
    config = read_config(name.removeprefix("--config="), overrides)
    protocol = build_protocol(config, root / "cache")
    looked = inspect(Look(config, protocol.tasks, protocol.data, root / "cache"), Console(quiet=True), again=again)
    assert looked is not None
    return looked.found


def errors(found: Inspection) -> str:
    return "\n".join(map(str, found.errors))


def warnings(found: Inspection) -> str:
    return "\n".join(map(str, found.warnings))


@pytest.fixture
def command(capsys, monkeypatch, tmp_path) -> Iterable[Callable[..., tuple[int, str, str]]]:
    """Runs a command in an empty directory: exit code, standard output, standard error."""
    cache_dir = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("COLUMNS", "120")
    capsys.readouterr()

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main([*arguments, f"--cache_dir={tmp_path / 'cache'}"])
        return code, *capsys.readouterr()

    yield run
    jax.config.update("jax_compilation_cache_dir", cache_dir)


# --- cases as they came: a training stops before anything is written


@pytest.mark.parametrize(
    ("tasks", "keys", "spoil", "parts"),
    [
        (
            ["semseg"],
            ["data.num_classes=2"],
            lambda root: [save(root / f"semseg/{id_}.png", MASK) for id_ in IDS],
            ["semseg/train0.png", "values are 0 and 255", "allowed: 0..1, and 255 = ignore", "second class as 1"],
        ),
        (
            ["semseg", "depth"],
            [],
            lambda root: save(root / "semseg/train1.png", np.where(LABELS == 3, 20, LABELS).astype(np.uint8)),
            ["semseg/train1.png", "value 20", "allowed: 0..3, and 255 = ignore", "config.data.num_classes=21"],
        ),
        (
            ["semseg", "depth"],
            [],
            lambda root: (root / "semseg/train1.png").rename(root / "semseg/train1.PNG"),
            ["semseg/train1.PNG", "'train1'", "allowed: <id> with one of .png", "Rename it to train1.png"],
        ),
    ],
    ids=["binary-labels-0-255", "class-beyond-num-classes", "label-suffix-case"],
)
def test_a_training_stops_before_it_writes(tasks, keys, spoil, parts, tmp_path, command):
    root = write(tmp_path / "data", **{task: GOOD[task] for task in tasks})
    spoil(root)
    workdir = tmp_path / "run"
    code, _, said = command("train", f"--workdir={workdir}", *options(root, tasks, *keys, "batch_size=8", "steps=100"))
    assert code == 1
    assert said.count("error:") == 1
    assert all(part in said for part in parts), said
    assert not workdir.exists()


def test_all_errors_are_listed_at_once(tmp_path, command):
    root = write(tmp_path / "data", semseg=GOOD["semseg"], saliency=("png", MASK // 255))
    save(root / "semseg/train0.png", LABELS + 9)
    (root / "images/train1.png").write_bytes(b"no picture")
    (root / "semseg/test0.png").rename(root / "semseg/test0_mask.png")
    save(root / "semseg/test0.png", LABELS)
    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    code, _, said = command("check", *options(root, ["semseg", "saliency"]), f"--html={page}", f"--json={numbers}")
    assert code == 1
    assert said.count("error:") == 1
    for part in (
        "value 9, 10, 11, 12",
        "images/train1.png",
        "cannot be decoded",
        "values of the whole split are 0 and 1",
    ):
        assert part in said
    found = json.loads(numbers.read_text(encoding="utf-8"))["findings"]
    assert sum(finding["error"] for finding in found) == 5  # the masks of three splits
    assert "test0_mask.png" in next(finding["found"] for finding in found if not finding["error"])
    assert "cannot be decoded" in page.read_text(encoding="utf-8")


# --- what is right is only shown


def test_check_prints_a_table_and_writes_numbers_and_a_page(tmp_path, command):
    root = write(tmp_path / "data", **GOOD)
    save(root / "semseg/train1.png", np.where(LABELS == 0, 255, LABELS).astype(np.uint8))
    page, numbers = tmp_path / "page.html", tmp_path / "numbers.json"
    code, said, told = command("check", *options(root, GOOD), f"--html={page}", f"--json={numbers}")
    assert code == 0
    assert "warning" not in told
    assert re.search(r"train +2 +32 x 48 +0", said)
    for part in ("4 of 4 classes", "1..6 m, mean 3.5 m", "% positive, 2 levels"):
        assert part in said
    stored = json.loads(numbers.read_text(encoding="utf-8"))
    train = stored["splits"]["train"]
    zeros = int((LABELS == 0).sum())
    assert train["sizes"] == [[*SIZE, 2]]
    assert train["tasks"]["semseg"]["levels"]["0"] == [zeros, 1, 0]
    assert train["tasks"]["semseg"]["levels"]["255"] == [zeros, 1, 1]
    assert train["tasks"]["semseg"]["valid"] == 2 * LABELS.size - zeros
    assert train["tasks"]["depth"]["spread"]["high"] == [6.0]
    again = json.loads(json.dumps(Inspection.from_dict(stored).to_dict()))
    assert again == {key: stored[key] for key in again}
    html = page.read_text(encoding="utf-8")
    assert html.count("<img") == 2 * (1 + len(GOOD))
    assert "://" not in html


def test_a_mixture_of_images_with_one_task_each_is_no_error(tmp_path):
    root = write(tmp_path, **GOOD)
    for split, ids in SPLITS.items():
        write_split(root, split, *ids, f"{split}_more")
        save(root / f"images/{split}_more.png", RNG.integers(0, 256, (*SIZE, 3), dtype=np.uint8))
        save(root / f"depth/{split}_more.npy", DEPTH)
        for id_ in ids:
            (root / f"depth/{id_}.npy").unlink()
    found = found_in(root, *GOOD)
    assert not found.findings
    assert found.splits["train"].tasks["depth"].images == 1
    assert found.splits["train"].tasks["semseg"].images == 2


def test_scenes_are_not_looked_at(command, tmp_path):
    code, _, said = command("check", "--config=scenes")
    assert code == 0
    assert "nothing to look at" in said
    assert not (tmp_path / "cache").exists()


def test_a_look_is_not_repeated_until_something_changes(tmp_path, monkeypatch):
    root = write(tmp_path, semseg=GOOD["semseg"])
    first = found_in(root, "semseg", again=False)

    def broken(*_, **__):
        raise AssertionError("looked again")

    with monkeypatch.context() as patch:
        patch.setattr("sgw_jax.experiment.inspection.look", broken)
        assert found_in(root, "semseg", again=False).to_dict() == first.to_dict()
        assert found_in(root, "semseg", keys=("data.workers=1",), again=False).to_dict() == first.to_dict()
        for change in (
            lambda: os.utime(root / "semseg/test0.png", (1, 1)),
            lambda: save(root / "semseg/x.png", LABELS),
        ):
            change()
            with pytest.raises(AssertionError, match="looked again"):
                found_in(root, "semseg", again=False)
    assert "files that no split lists: x.png" in warnings(found_in(root, "semseg", again=False))
    assert found_in(root, "semseg", keys=("data.check=sizes",), again=False).level == "sizes"


def test_sizes_alone_read_headers_alone(tmp_path):
    root = write(tmp_path, semseg=GOOD["semseg"])
    (root / "images/train0.png").write_bytes((root / "images/train0.png").read_bytes()[:100])
    (root / "semseg/train0.png").write_bytes(b"")
    found = found_in(root, "semseg", keys=("data.check=sizes",))
    assert not found.errors
    assert {split: facts.sizes for split, facts in found.splits.items()}["train"] == {SIZE: 2}
    assert "cannot be decoded" in errors(found_in(root, "semseg"))
    with pytest.raises(ValueError, match=r"config\.data\.check is 'some'; it must be one of .*'full'.*'sizes'"):
        found_in(root, "semseg", keys=("data.check=some",))


# --- values


def spoilt(root: Path, task: str, suffix: str, values: np.ndarray, *more: str) -> Inspection:
    """What is found where the labels of one task are these, in all splits."""
    return found_in(write(root, **{**GOOD, task: (suffix, values)}), *(more or (task,)))


FIRST = LABELS == 0


@pytest.mark.parametrize(
    ("task", "suffix", "values", "message"),
    [
        ("semseg", "png", np.full(SIZE, 255), "every pixel is 255, which is ignored.*another numbering"),
        ("semseg", "png", 0 * LABELS, "of 4 classes class 0 alone has labels"),
        ("semseg", "png", np.where(FIRST, 1, 255), "of 4 classes class 1 alone has labels"),
        ("semseg", "png", 85 * LABELS, "value 85 .in 2 images., 170 .in 2 images., but there are 4 classes"),
        ("saliency", "png", MASK // 255, "only values of the whole split are 0 and 1, .* 0.004.*Store 1 as 255"),
        ("saliency", "png", np.where(FIRST, 1, 255 * (LABELS == 1)), "0 and 1 and 255.*negative"),
        ("saliency", "png", MASK // 16, "no pixel of the split is positive; the greatest value is 0.059 .level 15."),
        ("saliency", "png", 0 * MASK, "no pixel of the split is positive"),
        ("saliency", "npy", np.full(SIZE, -1.0), "every pixel is negative"),
        ("depth", "npy", np.zeros(SIZE), "every pixel is 0 or not finite"),
        ("normals", "npy", 0.1 * np.ones((*SIZE, 3)), "every pixel is shorter than 1/2"),
    ],
)
def test_what_cannot_be_right_in_a_whole_split_is_an_error(tmp_path, task, suffix, values, message):
    values = values.astype(np.uint8) if suffix == "png" else values.astype(np.float32)
    found = spoilt(tmp_path, task, suffix, values)
    assert found.errors[0].where.endswith(f"train split, task {task!r}")
    assert re.search(message, errors(found)), errors(found)


@pytest.mark.parametrize(
    ("task", "suffix", "values", "message"),
    [
        ("semseg", "png", np.where(LABELS == 3, 255, LABELS), "1 of 4 classes have no label: class 3"),
        ("saliency", "png", 255 - MASK * (RNG.random(SIZE) < 0.1), "9[0-9].. % of the pixels are positive.*inverted"),
        ("depth", "npy", 1000 * DEPTH, "depth up to 6,000 m, 3,500 m on average.*millimetres"),
        ("depth", "npy", DEPTH / 6, "no depth exceeds 1 m.*shares"),
        ("depth", "npy", np.ones(SIZE), "every valid pixel is 1"),
        ("normals", "npy", np.abs(NORMALS) * [1, -1, 1], "mean of z is 0.*normals_axes=opengl"),
        ("normals", "npy", NORMALS / np.linalg.norm(NORMALS, axis=-1, keepdims=True) / 2 + 0.5, "no component .* nega"),
    ],
)
def test_what_is_not_likely_is_a_warning(tmp_path, task, suffix, values, message):
    values = values.astype(np.uint8) if suffix == "png" else values.astype(np.float32)
    found = spoilt(tmp_path, task, suffix, values)
    assert not found.errors
    assert re.search(message, warnings(found)), warnings(found)


def test_a_rule_looks_at_the_whole_split(tmp_path):
    """Class 0 and ignored pixels in one image, an empty mask in another: right, as long as others hold the rest."""
    root = write(tmp_path, semseg=GOOD["semseg"], saliency=GOOD["saliency"])
    save(root / "semseg/train0.png", MASK)
    save(root / "saliency/train0.png", MASK * 0)
    save(root / "semseg/train1.png", np.where(LABELS == 0, 1, LABELS).astype(np.uint8))
    assert not found_in(root, "semseg", "saliency").findings


def test_classes_that_are_evaluated_and_not_trained(tmp_path):
    root = write(tmp_path, semseg=GOOD["semseg"])
    for id_ in SPLITS["train"]:
        save(root / f"semseg/{id_}.png", np.minimum(LABELS, 2))
    found = found_in(root, "semseg")
    assert not found.errors
    assert "test split, task 'semseg': classes with labels here and none in training: class 3" in warnings(found)


class Drawn:
    """A source of images of one pixel, with one label each."""

    def __init__(self, labels: list[int]) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        image = np.full((1, 1, 3), index, np.uint8)
        return {"image": image, "semseg": np.full((1, 1), self.labels[index], np.uint8)}

    def fingerprint(self) -> dict[str, object]:
        return {}


def test_most_classes_of_a_published_data_set_are_there():
    """Cityscapes' train ids under the name of its label ids are read as six of the nineteen classes."""
    asked = {"semseg": asked_of(TASKS["semseg"](num_classes=19))}
    sources = {"train": Drawn([index % 6 for index in range(60)])}
    found = look(sources, asked, "full", None, fixed=True)
    assert "13 of 19 classes have no label" in errors(found)
    assert "train ids" in errors(found)
    assert not look(sources, asked, "full", None, fixed=False).errors


def test_train_ids_that_are_all_ignored(tmp_path):
    test_cityscapes.write_archive(tmp_path)
    for path in tmp_path.glob("gtFine/train/*/*.png"):
        save(path, np.zeros_like(np.asarray(Image.open(path))) + 5)
    asked = {"semseg": asked_of(TASKS["semseg"](num_classes=19))}
    found = look({"train": Cityscapes(tmp_path, "train", ("semseg",))}, asked, "full", None, fixed=True)
    assert "every pixel is 255, which is ignored" in errors(found)


# --- names of files


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train1.PNG", "Rename it to train1.png"),
        ("train1_mask.png", "Rename it to train1.png"),
        ("mask-train1.png", "Rename it to train1.png"),
        ("Train1.png", "Rename it to train1.png"),
        ("train1.jpg", "Store it as train1.png"),
        ("train1.npy", "Store it as train1.png"),
        ("train1.png.png", "Rename it to train1.png"),
    ],
)
def test_labels_of_another_name_are_not_taken_for_missing(tmp_path, name, message):
    root = write(tmp_path, semseg=GOOD["semseg"])
    (root / "semseg/train1.png").rename(root / "semseg" / name)
    found = found_in(root, "semseg", keys=("data.check=sizes",))
    assert f"semseg/{name}: image 'train1' would count as one without labels" in errors(found)
    assert message in errors(found)


def test_names_that_only_look_alike():
    """The longest id counts; a text is nobody's labels."""
    assert near_names(["a", "a_b"], ["a_b_mask.png"]) == {"a_b": "a_b_mask.png"}
    assert near_names(["a", "12"], ["ab.png", "a.txt", "112.png"]) == {}


def test_files_of_other_images_and_hidden_files_are_no_errors(tmp_path):
    root = write(tmp_path, semseg=GOOD["semseg"])
    (root / "semseg/train1.png").unlink()
    save(root / "images/train1_again.png", IMAGES["train0"])
    save(root / "semseg/train1_again.png", LABELS)  # of an image that no split lists
    for folder in ("images", "semseg", "splits"):
        (root / folder / "._train1.png").write_bytes(b"\0")
        (root / folder / ".DS_Store").write_bytes(b"\0")
    found = found_in(root, "semseg")
    assert not found.errors
    assert warnings(found).count("files that no split lists: train1_again.png") == 2
    assert "._" not in warnings(found)


def test_missing_images_are_told_what_is_there(tmp_path):
    root = write(tmp_path, semseg=GOOD["semseg"])
    (root / "images/train1.png").rename(root / "images/train1.PNG")
    with pytest.raises(ValueError, match=r"lacks 1 of the 2 images .*perhaps meant: train1.PNG, rename or convert"):
        found_in(root, "semseg")
    write_split(root, "train", "train0.png")
    with pytest.raises(ValueError, match="lists ids, which are file names without their suffix"):
        found_in(root, "semseg")


def test_lists_that_no_run_reads(tmp_path):
    root = write(tmp_path, semseg=GOOD["semseg"])
    (root / "splits/all.txt").write_text("train0\n")
    assert "splits/all.txt: no run reads it" in warnings(found_in(root, "semseg"))
    (root / "splits/validation.txt").rename(root / "splits/val.txt")
    found = found_in(root, "semseg")
    assert "splits/val.txt: a list of images that no run reads; allowed: train.txt, validation.txt, test.txt" in errors(
        found
    )
    assert "Rename it to validation.txt" in errors(found)
    write_split(root, "validation", "validation0")
    assert "splits/val.txt: no run reads it" in warnings(found_in(root, "semseg"))


def test_images_that_are_there_twice(tmp_path):
    root = write(tmp_path, semseg=GOOD["semseg"])
    for id_ in ("train1", "test0"):
        save(root / f"images/{id_}.png", IMAGES["train0"])
    said = warnings(found_in(root, "semseg"))
    assert re.search(r"train split: images that are there more than once: .*train0.png = .*train1.png", said)
    assert re.search(r"splits train and test: images that are in both: .*train0.png = .*test0.png", said)


def test_images_without_labels(tmp_path):
    root = write(tmp_path, semseg=GOOD["semseg"])
    (root / "semseg/train1.png").unlink()
    assert "train split: 1 of 2 images have no labels of any task: " in warnings(found_in(root, "semseg"))


# --- encodings


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("train0\n".encode("utf-16"), "train.txt, list of ids: it is no UTF-8 text but UTF-16"),
        ("train0\n".encode("utf-16-le"), "UTF-16"),
        ("train0\nhäuser\n".encode("latin-1"), "perhaps Latin-1: line 2 is then 'häuser'"),
        (b"._train0\ntrain0\n", "lists 1 hidden files, .*: ._train0; take these lines out"),
    ],
)
def test_lists_of_other_encodings_are_named(tmp_path, content, message):
    root = write(tmp_path, semseg=GOOD["semseg"])
    (root / "splits/train.txt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        found_in(root, "semseg")


def test_a_byte_order_mark_is_no_part_of_an_id(tmp_path):
    root = write(tmp_path, semseg=GOOD["semseg"])
    (root / "splits/train.txt").write_bytes("train0\r\ntrain1\r\n".encode("utf-8-sig"))
    assert not found_in(root, "semseg").findings


def png(samples: np.ndarray, bits: int, path: Path) -> None:
    """A grey PNG of fewer than 8 bits, which PIL does not write."""
    height, width = samples.shape
    rows = np.unpackbits(samples[..., None], axis=-1)[..., 8 - bits :].reshape(height, width * bits)
    lines = b"".join(b"\0" + row.tobytes() for row in np.packbits(rows, axis=-1))

    def chunk(name: bytes, content: bytes) -> bytes:
        body = name + content
        return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_grey_labels_of_few_bits_are_their_indices(tmp_path, bits):
    samples = np.arange(6 * 9, dtype=np.uint8).reshape(6, 9) % 2**bits
    png(samples, bits, tmp_path / "grey.png")
    np.testing.assert_array_equal(readers.read_labels(tmp_path / "grey.png"), samples)
    share = samples.astype(np.float32) / np.float32(2**bits - 1)
    np.testing.assert_allclose(readers.read_mask_picture(tmp_path / "grey.png"), share, rtol=1e-6)


def test_a_jpeg_is_no_label_map_whatever_its_name(tmp_path):
    root = write(tmp_path, semseg=GOOD["semseg"])
    Image.fromarray(LABELS).save(root / "semseg/train0.png", format="JPEG")
    found = found_in(root, "semseg")
    assert "semseg/train0.png" in errors(found)
    assert "it is a JPEG by its contents, whose compression changes labels" in errors(found)


@pytest.mark.parametrize("file", ["images/train0.png", "semseg/train0.png", "splits/validation.txt"])
def test_a_pipe_is_never_opened(tmp_path, file):
    root = write(tmp_path, semseg=GOOD["semseg"])
    (root / file).unlink()
    os.mkfifo(root / file)
    with pytest.raises(ValueError, match=rf"(?s){file}.*it is a named pipe; allowed: a regular file"):
        raise_errors(found_in(root, "semseg").findings)


@pytest.mark.parametrize("name", SOURCES)
def test_published_archives_are_looked_at_too(tmp_path, name):
    """Every item is read; the headers alone say the same of the sizes."""
    (write_one,) = [write_one for other, write_one in ARCHIVES.values() if other == name]
    write_one(tmp_path)
    source = SOURCES[name](tmp_path, "train")
    tasks = [TASKS[task]() for task in source.tasks]
    asked = {task.name: asked_of(task) for task in tasks}
    full, sizes = (
        look({"train": source}, asked, level, None, fixed=True).splits["train"] for level in ("full", "sizes")
    )
    assert set(full.tasks) == set(source.tasks)
    assert full.sizes == sizes.sizes
    assert sum(full.sizes.values()) == len(source)
