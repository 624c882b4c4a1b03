"""Preparation: what is read back is what the source gave, shards survive interruptions, nothing half is seen."""

import functools
import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from rich.console import Console

from sgw_jax.data_pipelines import prepare as command
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.prepare import PrepareError, main, prepare
from sgw_jax.data_pipelines.prepared import VERSION, Prepared

LENGTHS = {"train": 7, "validation": 4}
SHARD = 3


class Tiny:
    """Sizes, targets and missing targets that vary from image to image."""

    SPLIT_SIZES = LENGTHS
    tasks = ("semseg", "depth", "normals", "saliency")

    def __init__(self, root, split):
        self.root, self.split = Path(root), split

    def __len__(self):
        return len(list(self.root.glob(f"{self.split}_*.txt")))

    def __getitem__(self, index):
        rng = np.random.default_rng([index, len(self.split), int(self.files(index)[0].read_text(encoding="utf-8"))])
        shape = (5 + index, 8)
        example = {
            "image": rng.integers(0, 256, (*shape, 3), dtype=np.uint8),
            "semseg": rng.integers(0, 256, shape, dtype=np.uint8),
            "depth": rng.random(shape, dtype=np.float32),
            "normals": rng.normal(size=(*shape, 3)).astype(np.float32),
            "saliency": rng.random(shape, dtype=np.float32),
        }
        example["depth"][0, :3] = np.nan, np.inf, -1
        for name, period in (("semseg", 3), ("depth", 2), ("saliency", 4)):
            if index % period == 0:  # the first image lacks three of the four
                del example[name]
        return example

    def files(self, index):
        return (self.root / f"{self.split}_{index}.txt",)

    def file_of(self, index):
        return str(self.files(index)[0])

    def fingerprint(self):
        return {"name": "tiny", "split": self.split, "length": len(self)}


class Broken(Tiny):
    """An image that cannot be decoded."""

    def __getitem__(self, index):
        if self.split == "train" and index == 5:
            raise InputError("bad bytes")
        return super().__getitem__(index)


@pytest.fixture
def archive(tmp_path):
    root = tmp_path / "archive"
    root.mkdir()
    for split, length in LENGTHS.items():
        for index in range(length):
            (root / f"{split}_{index}.txt").write_text("1", encoding="utf-8")
    return root


def quiet():
    return Console(file=io.StringIO(), width=200)


def run(archive, out, kind=Tiny, shards=command.locally, workers=0, console=None, **options):
    sources = {split: kind(archive, split) for split in LENGTHS}
    console = console or quiet()
    each = functools.partial(shards, workers=workers, console=console)
    return prepare("tiny", sources, out, each, console=console, shard_size=SHARD, **options)


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def assert_equal_examples(found, expected):
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name].dtype == values.dtype
        np.testing.assert_array_equal(found[name], values, err_msg=name)


@pytest.mark.parametrize("split", LENGTHS)
def test_what_is_read_back_is_what_the_source_gave(archive, tmp_path, split):
    directory = run(archive, tmp_path / "out")
    source, prepared = Tiny(archive, split), Prepared(directory, split)
    prepared = pickle.loads(pickle.dumps(prepared))
    assert len(prepared) == len(source)
    assert prepared.fingerprint() == source.fingerprint()
    for index in range(len(source)):
        assert prepared.size_of(index) == source[index]["image"].shape[:2]
        assert_equal_examples(prepared[index], source[index])
    assert_equal_examples(pickle.loads(pickle.dumps(prepared))[1], source[1])  # after files were opened, too
    assert str(directory) in prepared.file_of(2)
    with pytest.raises(IndexError):
        prepared[len(source)]


def test_tfds_reads_the_set(archive, tmp_path):
    builder = tfds.builder_from_directory(run(archive, tmp_path / "out"))
    assert (builder.name, str(builder.version)) == ("tiny", VERSION)
    assert {name: info.num_examples for name, info in builder.info.splits.items()} == LENGTHS
    assert builder.info.splits["train"].shard_lengths == [3, 3, 1]
    rows = builder.as_data_source("train")
    np.testing.assert_array_equal(rows[4]["image"], Tiny(archive, "train")[4]["image"])


def test_an_interrupted_preparation_goes_on_and_is_not_seen_before_it_is_whole(archive, tmp_path):
    expected = contents(run(archive, tmp_path / "whole"))
    out, written = tmp_path / "out", []

    def first_two(write, shards, workers, console):
        for shard in shards[:2]:
            write(shard)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(archive, out, shards=first_two)
    assert [path.name for path in (out / "tiny").iterdir()] == [f"{VERSION}.partial"]
    with pytest.raises(ValueError, match=r"holds no prepared set: preparation.json does not exist"):
        Prepared(out / "tiny" / VERSION, "train")

    def rest(write, shards, workers, console):
        for shard in shards:
            written.append(shard)
            write(shard)

    console = quiet()
    directory = run(archive, out, shards=rest, console=console)
    assert written == [("train", 2), ("validation", 0), ("validation", 1)]
    assert "2 of 5 shards are there; going on" in console.file.getvalue()
    assert contents(directory) == expected


def test_a_whole_set_is_left_alone_and_other_data_is_refused(archive, tmp_path):
    out = tmp_path / "out"
    before = contents(run(archive, out))
    console = quiet()
    directory = run(archive, out, shards=lambda *_, **__: pytest.fail("nothing was missing"), console=console)
    assert "is whole already" in console.file.getvalue()
    (archive / "train_7.txt").write_text("1", encoding="utf-8")
    with pytest.raises(PrepareError, match=r"made from other data; it differs in \['splits.train.fingerprint.length'"):
        run(archive, out, any_size=True)
    assert contents(directory) == before


def test_several_processes_write_the_same_bytes(archive, tmp_path):
    one = run(archive, tmp_path / "one")
    assert contents(run(archive, tmp_path / "two", workers=2)) == contents(one)


def test_every_unreadable_file_is_named_before_anything_is_written(archive, tmp_path):
    (archive / "train_2.txt").write_text("", encoding="utf-8")
    (archive / "train_4.txt").unlink()
    (archive / "train_4.txt").mkdir()
    with pytest.raises(PrepareError, match=r"2 files of split 'train' cannot be read") as caught:
        run(archive, tmp_path / "out")
    assert "train_2.txt (empty)" in str(caught.value)
    assert "train_4.txt (Is a directory)" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_split_of_another_size_needs_to_be_meant(archive, tmp_path):
    (archive / "validation_3.txt").unlink()
    with pytest.raises(PrepareError, match="'validation' has 3 images, the published one 4"):
        run(archive, tmp_path / "out")
    assert len(Prepared(run(archive, tmp_path / "out", any_size=True), "validation")) == 3


def test_an_image_that_cannot_be_decoded_is_named(archive, tmp_path):
    with pytest.raises(PrepareError, match=r"item 5 of 'train', file .*train_5.txt: bad bytes"):
        run(archive, tmp_path / "out", kind=Broken)
    assert not list((tmp_path / "out" / "tiny").rglob("*.tmp"))


def test_a_split_that_is_not_there_is_named(archive, tmp_path):
    directory = run(archive, tmp_path / "out")
    with pytest.raises(ValueError, match=r"has no split 'test'; it has \['train', 'validation'\]"):
        Prepared(directory, "test")


def test_the_command_reads_an_archive_and_says_what_is_wrong(archive, tmp_path, capsys):
    arguments = ["tiny", f"--source={archive}", f"--out={tmp_path / 'out'}"]
    assert main(arguments, {"tiny": Tiny}) == 0
    assert len(Prepared(tmp_path / "out" / "tiny" / VERSION, "train")) == LENGTHS["train"]
    (archive / "train_6.txt").unlink()
    assert main(arguments, {"tiny": Tiny}) == 1
    assert "made from other data" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*arguments, "--runner=DirectRunner"], {"tiny": Tiny})
    assert "need --pipeline=beam" in capsys.readouterr().err


KILLED = """
import functools, os, signal, sys
sys.path.insert(0, {tests!r})
from test_prepare import Tiny, run, command

def two_and_a_half(write, shards, workers, console):
    for shard in shards[:2]:
        write(shard)
    read = Tiny.__getitem__
    def die(self, index):
        if index == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(self, index)
    Tiny.__getitem__ = die
    write(shards[2])

run(sys.argv[1], __import__("pathlib").Path(sys.argv[2]), shards=two_and_a_half)
"""


@pytest.mark.slow
def test_kill_9_in_the_middle_of_a_shard(archive, tmp_path):
    script = KILLED.format(tests=str(Path(__file__).parent))
    done = subprocess.run([sys.executable, "-c", script, str(archive), str(tmp_path / "out")], check=False)
    assert done.returncode == -9
    whole = contents(run(archive, tmp_path / "whole"))
    found = contents(run(archive, tmp_path / "out"))
    assert found == whole


@pytest.mark.slow
def test_beam_writes_the_same_bytes(archive, tmp_path):
    pytest.importorskip("apache_beam")
    expected = contents(run(archive, tmp_path / "local"))

    def by_beam(write, shards, workers, console):
        command.by_beam(write, shards, ["--runner=DirectRunner"])

    assert contents(run(archive, tmp_path / "beam", shards=by_beam)) == expected
    record = json.loads(expected["preparation.json"])
    assert record["splits"]["train"]["length"] == LENGTHS["train"]
