"""Batches of a source over grain, where the position in the data is the step alone.

Row r of step s is item n = s * batch_size + r of an infinite stream. With N = len(source): epoch = n // N, item =
permutation(seed, epoch, N)[n % N], and its augmentation is drawn from a generator keyed by (seed, epoch, item). So no
state of an iterator is ever saved: starting at step s builds the same stream from there, and any number of threads,
workers or processes gives the same batches. Each process reads its contiguous block of the rows.
"""

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any, Protocol, Self, TypeVar

import cv2
import grain
import numpy as np
from absl import flags

from sgw_jax.data_pipelines.errors import InputError, UserError
from sgw_jax.data_pipelines.tap_cache import TapCache, with_taps
from sgw_jax.data_pipelines.transforms import (
    Augmentation,
    Example,
    Target,
    check_crop_target,
    train_example,
)

Found = TypeVar("Found")

# The first key of every random stream, so that no two uses of one seed share numbers.
PERMUTATION, AUGMENTATION = 0, 1


class Source(Protocol):
    """A data set by random access: picklable and cheap to construct.

    `source[i]` is a dict with "image" uint8 (H, W, 3) and any subset of the targets (data_pipelines/transforms.py). A
    source may have `file_of(i) -> str`, which errors then name, `ids`, the items' names, by which predictions are
    found, and `size_of(i)`, the (height, width) of an image without reading it. For the look before a run it may have
    `files(i)`, all that an item is read from, and `target_file(i, task)`, the labels' own. `fingerprint()` says, as
    JSON-able data, which data this is: a run goes on only with the same.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...

    def fingerprint(self) -> dict[str, Any]: ...


class ExampleError(RuntimeError):
    """An example could not be read or transformed; the message names source, item and, if known, file."""


class UnreadableExampleError(ExampleError, UserError):
    """The example's files or their contents are at fault, not the program that reads them."""


@functools.lru_cache(maxsize=32)
def permutation(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order of the items in an epoch: int64 (length,), read-only, a pure function of its arguments.

    The stable argsort of raw 64-bit words, whose stream NumPy keeps across versions (it does not keep
    `Generator.permutation`'s). Equal words, with probability below length**2 / 2**64, only cost a trace of uniformity.
    """
    words = _bit_generator(seed, PERMUTATION, epoch).random_raw(length)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order


def _bit_generator(seed: int, *key: int) -> np.random.Philox:
    return np.random.Philox(np.random.SeedSequence(seed, spawn_key=key))


@dataclasses.dataclass(frozen=True)
class Stream:
    """The infinite stream of training examples: `example` is a pure function of n.

    taps: of a frozen backbone, by item, which every example then has too (data_pipelines/tap_cache.py). first: where
        the source's items begin among them.
    """

    source: Source
    targets: Mapping[str, Target]
    augmentation: Augmentation
    seed: int
    taps: TapCache | None = None
    first: int = 0

    def position(self, n: int) -> tuple[int, int]:
        """(epoch, item) of the stream's n-th example."""
        epoch, place = divmod(n, len(self.source))
        return epoch, int(permutation(self.seed, epoch, len(self.source))[place])

    def example(self, n: int) -> Example:
        """The stream's n-th example, augmented, at the model's door."""
        epoch, item = self.position(n)
        rng = np.random.Generator(_bit_generator(self.seed, AUGMENTATION, epoch, item))

        def augmented(raw: Example) -> Example:
            return with_taps(train_example(raw, rng, self.targets, self.augmentation), self.taps, self.first + item)

        return read_example(self.source, item, augmented)


def read_example(source: Source, item: int, transform: Callable[[Example], Example]) -> Example:
    """The item, transformed; errors are those of `read_item`."""
    return read_item(source, item, lambda source, item: transform(source[item]))


def read_item(source: Source, item: int, reader: Callable[[Source, int], Found]) -> Found:
    """``reader(source, item)``; what goes wrong becomes an `ExampleError` that names source, item and file."""
    try:
        return reader(source, item)
    except Exception as error:
        file = f", file {source.file_of(item)}" if hasattr(source, "file_of") else ""
        said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        kind = UnreadableExampleError if isinstance(error, UserError | OSError) else ExampleError
        raise kind(f"{_name(source)}, item {item}{file}: {said}") from error


def _name(source: Source) -> str:
    fingerprint = source.fingerprint() if hasattr(source, "fingerprint") else {}
    parts = [str(fingerprint[key]) for key in ("name", "split") if key in fingerprint]
    return f"source {' '.join(parts) or type(source).__name__}"


@dataclasses.dataclass(frozen=True)
class Rows:
    """Which rows of the stream a process reads: of every global batch its contiguous block."""

    batch_size: int
    process_index: int
    process_count: int

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.process_count < 1 or self.batch_size % self.process_count:
            raise InputError(
                f"batch_size is {self.batch_size} (all processes together) over {self.process_count} processes; "
                "allowed: a positive multiple of the number of processes"
            )
        if not 0 <= self.process_index < self.process_count:
            raise InputError(f"process_index is {self.process_index}; allowed: 0..{self.process_count - 1}")

    @property
    def block(self) -> int:
        """Rows of a batch that this process reads."""
        return self.batch_size // self.process_count

    def n(self, row: int) -> int:
        """The stream's index of this process's row number `row`, counted from step 0."""
        step, place = divmod(row, self.block)
        return step * self.batch_size + self.process_index * self.block + place


class Batches(Iterator[Example]):
    """An iterator over a fixed number of batches that owns its threads and workers.

    They start with the first batch and stop at the end, by `close()`, on leaving a `with` block, when the object is
    dropped and when the interpreter exits.
    """

    def __init__(self, dataset: grain.IterDataset, length: int) -> None:
        self._length = length
        self._batches = _generate(dataset)
        self._finalizer = weakref.finalize(self, self._batches.close)

    def __len__(self) -> int:
        """How many batches the iterator yields from its beginning."""
        return self._length

    def __next__(self) -> Example:
        return next(self._batches)

    def close(self) -> None:
        """Stops threads and workers; the iterator is then at its end. A second call does nothing."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _generate(dataset: grain.IterDataset) -> Generator[Example]:
    """A generator so that closing it also lets go of grain's iterator, which must not outlive the interpreter."""
    iterator = iter(dataset)
    array_type: type = np.ndarray
    try:
        for batch in iterator:
            array_type = type(batch["image"])
            if array_type is not np.ndarray:
                # From workers: in shared memory that lives as long as the array. Copied, it is freed at once.
                batch = {name: np.array(values, subok=False) for name, values in batch.items()}
            yield batch
    finally:
        iterator.close()
        del iterator
        _await_freed_memory(array_type)


def _await_freed_memory(array_type: type) -> None:
    """Waits for grain's background thread, which frees shared memory: cut short at exit, Python warns of leaks."""
    pool = getattr(array_type, "_del_thread_pool", None)
    if pool is not None:
        with contextlib.suppress(ValueError):  # the pool is closed: the interpreter is already on its way out
            pool.apply(int)  # one thread, first come first served: all earlier requests are done when this returns


def train_batches(
    source: Source,
    targets: Mapping[str, Target],
    augmentation: Augmentation,
    *,
    batch_size: int,
    seed: int,
    num_steps: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    num_threads: int = 2,
    prefetch: int = 4,
    taps: TapCache | None = None,
) -> Batches:
    """The batches of steps start_step, ..., num_steps - 1: dicts of arrays (batch_size / process_count, ...).

    batch_size: rows of the global batch, over all processes. seed: a non-negative integer. num_workers: 0 reads with
    `num_threads` threads of this process, `prefetch` batches ahead; more starts as many processes (spawned: the main
    module needs its `if __name__ == "__main__"` guard), each with its threads. None of the three changes a batch.
    taps: as of `Stream`.

    Raises ValueError for an empty source and for counts that do not fit; an example that cannot be read raises
    ExampleError when its batch is reached.
    """
    check_source(source)
    check_crop_target(targets, augmentation)
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise InputError(f"seed is {seed!r}; allowed: a non-negative integer")
    if not 0 <= start_step <= num_steps:
        raise InputError(f"start_step is {start_step} and num_steps {num_steps}; allowed: 0 <= start_step <= num_steps")
    rows = Rows(batch_size, process_index, process_count)
    stream = stream_of(source, targets, augmentation, int(seed), taps)
    dataset = (
        grain.MapDataset.range(start_step * rows.block, num_steps * rows.block)
        .map(rows.n)
        .map(stream.example)
        .batch(rows.block)
    )
    return batches_over(dataset, num_steps - start_step, num_workers, num_threads, prefetch)


def stream_of(
    source: Any, targets: Mapping[str, Target], augmentation: Augmentation, seed: int, taps: TapCache | None = None
) -> Any:
    """The training examples by their number: the source's own stream where it has one (mixture.py), else a `Stream`."""
    if hasattr(source, "stream"):
        return source.stream(dict(targets), augmentation, seed, taps)
    return Stream(source, dict(targets), augmentation, seed, taps)


def check_source(source: Source) -> None:
    """Raises ValueError for a source without an example."""
    if len(source) == 0:
        raise InputError(f"{_name(source)} is empty; a source needs at least one example")


def batches_over(dataset: grain.MapDataset, length: int, num_workers: int, num_threads: int, prefetch: int) -> Batches:
    """The batches that a grain data set has by their numbers, read ahead by threads or workers (`train_batches`)."""
    limits = {"num_workers": (num_workers, 0), "num_threads": (num_threads, 0), "prefetch": (prefetch, 1)}
    for name, (value, least) in limits.items():
        if value < least:
            raise InputError(f"{name} is {value}; allowed: {least} or more")
    reading: Any = dataset.to_iter_dataset(grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=prefetch))
    if num_workers > 0:
        if not flags.FLAGS.is_parsed():  # grain's workers read absl flags, which only absl's own main parses
            flags.FLAGS(["data_pipelines"], known_only=True)
        options = grain.MultiprocessingOptions(num_workers=num_workers, per_worker_buffer_size=1)
        reading = reading.mp_prefetch(options, worker_init_fn=_single_threaded_opencv)
    return Batches(reading, length)


def _single_threaded_opencv(worker_index: int, worker_count: int) -> None:
    """The workers are the parallelism: OpenCV's own threads on top would only compete."""
    cv2.setNumThreads(0)
