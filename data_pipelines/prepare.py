"""Writes an archive once as sharded ArrayRecord files in TFDS's format, checked, resumable, whole or not there at all.

    sgw-jax prepare nyud --source=ARCHIVE --out=DIR [--workers=8]
    sgw-jax prepare cityscapes --source=ARCHIVE --out=DIR --pipeline=beam --runner=DataflowRunner ...

The set appears as DIR/NAME/1.0.0 when it is whole; until then its shards gather in DIR/NAME/1.0.0.partial. A shard is a
pure function of the source and its number and appears when it is complete, so the same command goes on after any
interruption, and one process, several, and Apache Beam write the same bytes. A whole set is left as it is.

TFDS reads the result: `tfds.builder_from_directory("DIR/NAME/1.0.0").as_data_source("train")`. It is written through
TFDS's features, shard names and metadata, not by a builder's `download_and_prepare`, which starts from nothing after an
interruption.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter
from rich.console import Console

from sgw_jax.data_pipelines.atomic import publish, replacing, write_atomically
from sgw_jax.data_pipelines.cityscapes import Cityscapes
from sgw_jax.data_pipelines.consoles import messages, print_error, results
from sgw_jax.data_pipelines.errors import InputError, UserError, files_named
from sgw_jax.data_pipelines.json_files import read_object
from sgw_jax.data_pipelines.mtan import MtanCityscapes, MtanNYUv2
from sgw_jax.data_pipelines.nyud import Nyud
from sgw_jax.data_pipelines.pascal_context import PascalContext
from sgw_jax.data_pipelines.paths import user_path
from sgw_jax.data_pipelines.prepared import RECORD, VERSION, encode, features_of
from sgw_jax.data_pipelines.progress import counted
from sgw_jax.data_pipelines.transforms import Example

SOURCES: Mapping[str, Callable[[Path, str], Any]] = {
    "nyud": Nyud,
    "pascal_context": PascalContext,
    "cityscapes": Cityscapes,
    "mtan_nyuv2": MtanNYUv2,
    "mtan_cityscapes": MtanCityscapes,
}
SPLITS = ("train", "validation")
SHARD = 64  # images
SHOWN = 20  # of the files that are named in an error

Shard = tuple[str, int]  # split and number


class PrepareError(InputError):
    """The archive is not what it should be, or the output holds something else."""


def main(argv: Sequence[str] | None = None, sources: Mapping[str, Callable[[Path, str], Any]] = SOURCES) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(
        "sgw-jax prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("name", choices=sources)
    parser.add_argument("--source", type=_path, required=True, help="directory of the unpacked archive")
    parser.add_argument("--out", type=_path, required=True, help=f"where NAME/{VERSION} is written")
    parser.add_argument("--pipeline", choices=("local", "beam"), default="local")
    parser.add_argument("--workers", type=int, default=0, help="processes; 0 = this one (default: %(default)s)")
    parser.add_argument("--any_size", action="store_true", help="accept splits of other than the published sizes")
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.pipeline != "beam":
        parser.error(f"unknown arguments {rest}; flags of Beam need --pipeline=beam")
    console = messages()
    try:
        if arguments.pipeline == "beam":
            run = functools.partial(by_beam, flags=rest)
        else:
            run = functools.partial(locally, workers=arguments.workers, console=console)
        with files_named(f"--source={arguments.source}"):
            by_split = {split: sources[arguments.name](arguments.source, split) for split in SPLITS}
        with files_named(f"--out={arguments.out}"):
            prepare(arguments.name, by_split, arguments.out, run, any_size=arguments.any_size, console=console)
    except UserError as error:
        print_error(str(error))
        return 1
    return 0


def _path(text: str) -> Path:
    return Path(user_path(text))


def prepare(
    name: str,
    sources: Mapping[str, Any],
    out: Path,
    run: Callable[[Callable[[Shard], None], list[Shard]], None],
    *,
    any_size: bool = False,
    console: Console,
    shard_size: int = SHARD,
) -> Path:
    """Writes the sources by split and returns the directory of the set.

    Raises PrepareError, before anything is written, for unreadable files (all are looked at), sizes other than
    the published ones, and an output that was made from other data.
    """
    whole = out / name / VERSION
    partial = whole.with_name(f"{VERSION}.partial")
    plan = {
        "shard_size": shard_size,
        "splits": {s: {"length": len(source), "fingerprint": source.fingerprint()} for s, source in sources.items()},
    }
    plan = json.loads(json.dumps(plan))  # as it will be read back
    for place in (whole, partial):
        _check_same(place, plan)
    if whole.exists():
        console.print(f"{whole} is whole already; nothing to do.", soft_wrap=True)
        return whole
    for split, source in sources.items():
        check_source(source, split, any_size)

    partial.mkdir(parents=True, exist_ok=True)
    write_atomically(partial / RECORD, json.dumps(plan, indent=1))
    features = features_of(_everything({}, sources.values()))
    shards = [(split, shard) for split, source in sources.items() for shard in range(-(-len(source) // shard_size))]
    missing = [shard for shard in shards if not shard_path(partial, name, sources, shard, shard_size).exists()]
    if len(missing) < len(shards):
        console.print(f"{len(shards) - len(missing)} of {len(shards)} shards are there; going on.")
    run(functools.partial(write_shard, name, dict(sources), features, partial, shard_size), missing)
    _write_metadata(name, sources, partial, features, shard_size)
    for leftover in partial.glob("*.tmp"):  # of processes that were killed
        leftover.unlink()
    publish(partial, whole)
    results(console).print(
        f"{whole}: " + ", ".join(f"{len(source)} {split}" for split, source in sources.items()), soft_wrap=True
    )
    return whole


def check_source(source: Any, split: str, any_size: bool) -> None:
    """Raises PrepareError unless every file of every item can be opened and the split has its published size."""
    bad = []
    for file in dict.fromkeys(file for index in range(len(source)) for file in source.files(index)):
        try:
            with open(file, "rb") as opened:
                if not opened.read(1):
                    bad.append(f"{file} (empty)")
        except OSError as error:
            bad.append(f"{file} ({error.strerror})")
    if bad:
        more = f"\n  and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
        listed = "\n  ".join(bad[:SHOWN])
        raise PrepareError(f"{len(bad)} files of split {split!r} cannot be read:\n  {listed}{more}")
    published = source.SPLIT_SIZES.get(split)
    if published is not None and len(source) != published and not any_size:
        raise PrepareError(
            f"split {split!r} has {len(source)} images, the published one {published}; complete the archive, or say "
            "--any_size if this is meant."
        )


def _check_same(place: Path, plan: Mapping[str, Any]) -> None:
    if not place.exists():
        return
    record = place / RECORD
    remedy = "Move the directory away, or give another --out."
    there = read_object(record, remedy, PrepareError) if record.exists() else {}
    if there != plan:
        keys = {key for key, _ in _leaves(there).items() ^ _leaves(plan).items()}
        raise PrepareError(
            f"{place} was made from other data; it differs in {sorted(keys)}. Move it away, or give another --out."
        )


def _leaves(tree: Any, prefix: str = "") -> dict[str, str]:
    if isinstance(tree, dict) and tree:
        return {k: v for name, item in tree.items() for k, v in _leaves(item, f"{prefix}{name}.").items()}
    return {prefix.removesuffix("."): json.dumps(tree)}


def _everything(found: Example, sources: Iterable[Any]) -> Example:
    """An example with every target that the sources have: each from the first image that has it."""
    for source in sources:
        for index in range(len(source)):
            if set(source.tasks) <= set(found):
                break
            found = {**source[index], **found}
    return found


def shard_path(partial: Path, name: str, sources: Mapping[str, Any], shard: Shard, shard_size: int) -> Path:
    """TFDS's name of a shard."""
    split, number = shard
    count = -(-len(sources[split]) // shard_size)
    return partial / f"{name}-{split}.array_record-{number:05d}-of-{count:05d}"


def write_shard(
    name: str,
    sources: Mapping[str, Any],
    features: tfds.features.FeaturesDict,
    partial: Path,
    shard_size: int,
    shard: Shard,
) -> None:
    """Writes one shard, which appears when it is complete."""
    path = shard_path(partial, name, sources, shard, shard_size)
    source = sources[shard[0]]
    start = shard[1] * shard_size
    with replacing(path, contended=True) as unfinished:
        writer = ArrayRecordWriter(str(unfinished), "group_size:1")
        try:
            for index in range(start, min(start + shard_size, len(source))):
                try:
                    record = encode(source[index], features)
                except UserError as error:
                    named = f"item {index} of {shard[0]!r}, file {source.file_of(index)}"
                    raise PrepareError(f"{named}: {error}") from error
                writer.write(record)
        finally:
            writer.close()


def locally(write: Callable[[Shard], None], shards: list[Shard], workers: int, console: Console) -> None:
    """By this process, or by several (`workers` > 0) on this machine."""
    for _ in counted(_each(write, shards, workers), "shards", len(shards), console):
        pass


def _each(write: Callable[[Shard], None], shards: list[Shard], workers: int) -> Iterator[None]:
    if workers == 0:
        yield from map(write, shards)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            for future in as_completed([pool.submit(write, shard) for shard in shards]):
                yield future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def by_beam(write: Callable[[Shard], None], shards: list[Shard], flags: Sequence[str]) -> None:
    """One shard is one element; the runner and its workers are chosen by Beam's own flags."""
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions

    with beam.Pipeline(options=PipelineOptions(list(flags))) as pipeline:
        _ = pipeline | beam.Create(shards) | beam.Reshuffle() | beam.Map(write)


def _write_metadata(
    name: str,
    sources: Mapping[str, Any],
    partial: Path,
    features: tfds.features.FeaturesDict,
    shard_size: int,
) -> None:
    template = tfds.core.ShardedFileTemplate(
        data_dir=partial,
        dataset_name=name,
        filetype_suffix="array_record",
        template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
    )
    splits = []
    for split, source in sources.items():
        count = -(-len(source) // shard_size)
        paths = [shard_path(partial, name, sources, (split, shard), shard_size) for shard in range(count)]
        lengths = [min(shard_size, len(source) - shard * shard_size) for shard in range(count)]
        size = sum(path.stat().st_size for path in paths)
        splits.append(
            tfds.core.SplitInfo(
                name=split, shard_lengths=lengths, num_bytes=size, filename_template=template.replace(split=split)
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=str(partial), features=features, split_infos=splits, filename_template=template, check_data=False
    )


if __name__ == "__main__":
    sys.exit(main())
