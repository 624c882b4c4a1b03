"""The loader: position is the step alone, whatever the threads, workers, processes or start; errors; clean shutdown."""

import dataclasses
import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from sgw_jax.data_pipelines import loader, transforms
from sgw_jax.data_pipelines.colour import ColourDistortion
from sgw_jax.data_pipelines.evaluation import eval_batches
from sgw_jax.data_pipelines.transforms import Augmentation, Target

TARGETS = {
    "classes": Target("labels", 255),
    "depth": Target("depth", 0.0),
    "normals": Target("vectors", 0.0),
    "mask": Target("mask", -1.0),
}
AUGMENTATION = Augmentation((16, 24), (0.5, 2.0), True, ColourDistortion(), 0.75, "classes")
PLAIN = Augmentation((16, 24), flip=False)


@dataclasses.dataclass(frozen=True)
class Numbered:
    """Image i of `length` is filled with i; every third has no depth; reading item `broken` fails."""

    length: int
    broken: int = -1

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> transforms.Example:
        if index == self.broken:
            raise OSError("truncated")
        rng = np.random.default_rng(index)
        example = {
            "image": np.full((16, 24, 3), index, np.uint8),
            "classes": rng.integers(0, 5, (16, 24), dtype=np.uint8),
            "mask": rng.random((16, 24), dtype=np.float32),
        }
        return example if index % 3 == 0 else {**example, "depth": np.full((16, 24), index, np.float32)}

    def fingerprint(self) -> dict[str, object]:
        return {"name": "numbered", "split": "train", "length": self.length}

    def file_of(self, index: int) -> str:
        return f"/data/{index}.png"

    def size_of(self, index: int) -> transforms.Size:
        return 16, 24


def read(source, augmentation=AUGMENTATION, **arguments) -> list[transforms.Example]:
    arguments = {"batch_size": 4, "seed": 3, "num_steps": 8, "num_threads": 0, **arguments}
    with loader.train_batches(source, TARGETS, augmentation, **arguments) as batches:
        return list(batches)


def assert_same(one: list[transforms.Example], other: list[transforms.Example]) -> None:
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        assert left.keys() == right.keys()
        for name in left:
            np.testing.assert_array_equal(left[name], right[name], err_msg=name)
            assert left[name].dtype == right[name].dtype
            assert type(right[name]) is np.ndarray


def items(batches: list[transforms.Example]) -> list[int]:
    """Which item each row is, read back from the images of `Numbered`."""
    levels = transforms.normalise(np.arange(256, dtype=np.uint8).repeat(3).reshape(256, 1, 3))[:, 0, 0]
    corners = np.concatenate([batch["image"][:, 0, 0, 0] for batch in batches])
    return [int(np.flatnonzero(levels == corner)[0]) for corner in corners]


# --- the stream


def test_every_epoch_holds_every_item_once_in_its_own_order():
    order = items(read(Numbered(10), PLAIN, num_steps=10))
    epochs = [order[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


def test_row_r_of_step_s_is_item_n_of_the_stream():
    stream = loader.Stream(Numbered(10), TARGETS, AUGMENTATION, 3)
    for step, batch in enumerate(read(Numbered(10))):
        for row in range(4):
            for name, values in stream.example(4 * step + row).items():
                np.testing.assert_array_equal(batch[name][row], values)
    for n in range(30):
        assert stream.position(n) == (n // 10, loader.permutation(3, n // 10, 10)[n % 10])


def test_augmentation_is_keyed_by_seed_epoch_and_item():
    stream = loader.Stream(Numbered(10), TARGETS, AUGMENTATION, 3)
    again = loader.Stream(Numbered(10), TARGETS, AUGMENTATION, 3)
    other = loader.Stream(Numbered(10), TARGETS, AUGMENTATION, 4)
    seen = {}
    for n in range(40):
        epoch, item = stream.position(n)
        seen[epoch, item] = stream.example(n)["mask"].tobytes()
        assert again.example(n)["mask"].tobytes() == seen[epoch, item]
    assert len(set(seen.values())) == 40  # no two epochs draw the same numbers for an item
    elsewhere = {other.position(n): other.example(n)["mask"].tobytes() for n in range(40)}
    assert all(elsewhere[key] != seen[key] for key in seen)


def test_permutation_is_uniform_and_pure():
    first = np.array([loader.permutation(seed, epoch, 5)[0] for seed in range(50) for epoch in range(40)])
    counts = np.bincount(first, minlength=5)
    # chi-square with 4 degrees of freedom exceeds 23.5 with probability 1e-4; the seeds are fixed.
    assert ((counts - 400) ** 2 / 400).sum() < 23.5
    np.testing.assert_array_equal(loader.permutation(7, 1, 100), loader.permutation.__wrapped__(7, 1, 100))
    with pytest.raises(ValueError, match="read-only"):
        loader.permutation(7, 1, 100)[0] = 0


def test_permutation_is_the_same_for_ever():
    """A checkpoint's position means these numbers: a change of this order breaks every run that resumes."""
    assert loader.permutation(0, 0, 8).tolist() == [7, 6, 3, 2, 4, 1, 5, 0]
    assert loader.permutation(1, 2, 8).tolist() == [2, 5, 6, 1, 7, 4, 0, 3]


# --- the step alone


@pytest.mark.parametrize("start_step", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("length", [10, 4, 3])
def test_starting_at_a_step_is_skipping_to_it(length, start_step):
    assert_same(read(Numbered(length), start_step=start_step), read(Numbered(length))[start_step:])


@pytest.mark.parametrize("process_count", [2, 4])
def test_blocks_of_processes_make_the_global_batch(process_count):
    blocks = [read(Numbered(10), process_index=i, process_count=process_count) for i in range(process_count)]
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*blocks, strict=True)
    ]
    assert blocks[0][0]["image"].shape[0] == 4 // process_count
    assert_same(read(Numbered(10)), joined)


@pytest.mark.parametrize(("num_threads", "prefetch"), [(1, 1), (4, 3)])
def test_threads_change_nothing(num_threads, prefetch):
    assert_same(read(Numbered(10)), read(Numbered(10), num_threads=num_threads, prefetch=prefetch))


def test_workers_change_nothing():
    expected = read(Numbered(10), start_step=1)
    assert_same(expected, read(Numbered(10), start_step=1, num_workers=2, num_threads=1))


@pytest.mark.multiprocess
def test_a_failing_example_in_a_worker_is_named():
    source, size = Numbered(10, broken=9), (16, 24)
    with eval_batches(source, TARGETS, batch_size=4, size=size, num_workers=1, num_threads=0) as batches:
        assert items([next(batches), next(batches)]) == list(range(8))
        with pytest.raises(loader.ExampleError, match="item 9"):
            next(batches)


# --- evaluation


def test_evaluation_reads_every_item_once_in_order_unaugmented():
    with eval_batches(Numbered(10), TARGETS, batch_size=5, size=(20, 24)) as batches:
        read_back = list(batches)
    assert [batch.pop("item").tolist() for batch in read_back] == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]
    rows = [{name: values[row] for name, values in batch.items()} for batch in read_back for row in range(5)]
    assert_same([transforms.eval_example(Numbered(10)[i], TARGETS, (20, 24)) for i in range(10)], rows)


@pytest.mark.parametrize(("length", "process_count"), [(9, 1), (9, 2), (9, 4), (1, 4), (8, 4)])
def test_evaluation_fills_up_the_last_batch_with_nothing(length, process_count):
    blocks = []
    for index in range(process_count):
        with eval_batches(
            Numbered(length), TARGETS, batch_size=8, size=(16, 24), process_index=index, process_count=process_count
        ) as batches:
            assert len(batches) == -(-length // 8)
            blocks.append(list(batches))
    assert {len(block) for block in blocks} == {-(-length // 8)}
    joined = [
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        for parts in zip(*blocks, strict=True)
    ]
    rows = [{name: values[row] for name, values in batch.items()} for batch in joined for row in range(8)]
    assert [row.pop("item") for row in rows] == [*range(length), *[-1] * (len(rows) - length)]
    assert_same([transforms.eval_example(Numbered(length)[i], TARGETS, (16, 24)) for i in range(length)], rows[:length])
    for row in rows[length:]:
        assert np.all(row["image"] == 0)
        assert all(np.all(row[name] == target.fill) for name, target in TARGETS.items())


# --- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 6, "process_count": 4}, "batch_size is 6 .* over 4 processes"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"process_index": 2, "process_count": 2}, "process_index is 2; allowed: 0..1"),
        ({"start_step": 9}, "start_step is 9 and num_steps 8"),
        ({"seed": -1}, "seed is -1"),
        ({"num_threads": -1}, "num_threads is -1; allowed: 0 or more"),
        ({"prefetch": 0}, "prefetch is 0; allowed: 1 or more"),
        ({"num_workers": -1}, "num_workers is -1"),
    ],
)
def test_wrong_counts_are_named_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        read(Numbered(10), **arguments)


def test_an_empty_source_is_refused():
    with pytest.raises(ValueError, match="source numbered train is empty"):
        read(Numbered(0))
    with pytest.raises(ValueError, match="source numbered train is empty"):
        eval_batches(Numbered(0), TARGETS, batch_size=4, size=(16, 24))


@pytest.mark.parametrize("num_threads", [0, 2])
def test_a_failing_example_is_named(num_threads):
    with pytest.raises(
        loader.UnreadableExampleError, match=r"source numbered train, item 5, file /data/5.png: OSError: truncated"
    ):
        read(Numbered(10, broken=5), num_threads=num_threads)


def test_an_error_in_a_transform_names_the_example_too():
    with (
        eval_batches(Numbered(3), {"mask": Target("labels", 255)}, batch_size=1, size=(16, 24)) as batches,
        pytest.raises(loader.ExampleError, match=r"item 0, .*target 'mask' of kind 'labels' is float32"),
    ):
        next(batches)


def test_a_source_without_a_name_goes_by_its_type():
    class Anonymous:
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> transforms.Example:
            raise KeyError(index)

    with pytest.raises(loader.ExampleError, match=r"source Anonymous, item [01]: KeyError") as caught:
        read(Anonymous())
    assert not isinstance(caught.value, loader.UnreadableExampleError)  # a defect: commands show its trace


# --- the iterator


def test_batches_end_close_and_know_their_number():
    batches = loader.train_batches(Numbered(4), TARGETS, PLAIN, batch_size=2, seed=0, num_steps=5, start_step=2)
    assert len(batches) == 3
    assert len(list(batches)) == 3
    assert list(batches) == []
    batches = loader.train_batches(Numbered(4), TARGETS, PLAIN, batch_size=2, seed=0, num_steps=10**4)
    assert len(list(itertools.islice(batches, 3))) == 3
    batches.close()
    batches.close()
    assert list(batches) == []


def test_the_stream_is_picklable():
    stream = loader.Stream(Numbered(4), TARGETS, AUGMENTATION, 0)
    assert_same([stream.example(5)], [pickle.loads(pickle.dumps(stream)).example(5)])


SCRIPT = """
import sys

from sgw_jax.data_pipelines import loader
from test_loader import AUGMENTATION, TARGETS, Numbered

if __name__ == "__main__":
    batches = loader.train_batches(
        Numbered(10), TARGETS, AUGMENTATION, batch_size=4, seed=0, num_steps=10**6, num_workers=2
    )
    next(batches), next(batches)
    if sys.argv[1] == "close":
        batches.close()
    elif sys.argv[1] == "drop":
        del batches
"""


@pytest.mark.multiprocess
@pytest.mark.parametrize("end", ["close", "drop", "exit"])
def test_workers_dropped_half_way_leave_nothing_behind(end, tmp_path):
    script = tmp_path / "half_way.py"
    script.write_text(SCRIPT)
    tests = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}", "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, script, end], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")  # no traceback at exit, no "leaked shared_memory objects"
