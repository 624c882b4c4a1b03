"""Results as records of ArrayRecord shards: for many images, whose files would be too many for a file system.

A shard holds the pictures of so many images of the list, in order; which ones follows from its number alone, and it has
its name once it is closed. So a command that is repeated goes on with the shards that are missing, and none is in two.

    predictions-00003-of-00016.array_record

A record is a tf.train.Example of bytes: "name", "file" (the image's path) and the files that `outputs` would write:
"panel.png", "maps.npz", or "maps/depth.png" of each map. `stored.read_predictions` reads them.
"""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tensorflow_datasets.proto import tf_example_pb2, tf_feature_pb2

from sgw_jax.data_pipelines import atomic
from sgw_jax.data_pipelines.errors import InputError, files_named
from sgw_jax.prediction.background import in_background
from sgw_jax.prediction.outputs import NPZ, PANEL, TEMPORARY, WRITERS, Part, Picture, Unit

SHARD = 64  # images
KEYS = {PANEL: "panel.png", NPZ: "maps.npz"}  # of the parts without a folder


class Shards:
    """A `Store` of shards.

    Args:
      output: the directory.
      parts: of every picture.
      images: the files of all pictures by their names.
      size: of a shard, in images.
    """

    def __init__(self, output: Path, parts: Sequence[Part], images: Mapping[str, Path], size: int = SHARD) -> None:
        self.output, self.parts, self._images = output, tuple(parts), images
        names = list(images)
        self.units: Sequence[Unit] = [tuple(names[start : start + size]) for start in range(0, len(names), size)]
        self._number = {name: number for number, unit in enumerate(self.units) for name in unit}
        self._there = {path.name for path in output.glob("predictions-*.array_record")}

    def path(self, number: int) -> Path:
        """Of a shard."""
        return self.output / f"predictions-{number:05d}-of-{len(self.units):05d}.array_record"

    def targets(self, name: str) -> list[Path]:
        return [self.path(self._number[name])]

    def begun(self, name: str) -> Path | None:
        path = self.path(self._number[name])
        return path if path.name in self._there else None

    def finished(self, unit: Unit) -> bool:
        return self.begun(unit[0]) is not None

    def write(self, units: Sequence[Unit], pictures: Iterable[Picture]) -> Iterator[str]:
        with files_named("--output cannot be made"):
            self.output.mkdir(parents=True, exist_ok=True)
        records = in_background(self._record, pictures, WRITERS, lambda picture: picture.pixels)
        for unit in units:
            path = self.path(self._number[unit[0]])
            with files_named(f"{path} cannot be written"), atomic.replacing(path, contended=True) as unfinished:
                writer = ArrayRecordWriter(str(unfinished), "group_size:1")
                try:
                    for name in unit:
                        writer.write(next(records))
                        yield name
                finally:
                    writer.close()

    def clean(self, units: Sequence[Unit]) -> None:
        shards = {self.path(self._number[unit[0]]).name for unit in units}
        for there in self.output.glob("*.tmp"):
            found = TEMPORARY.fullmatch(there.name)
            if found and found[1] in shards:
                there.unlink(missing_ok=True)

    def _record(self, picture: Picture) -> bytes:
        content = {"name": picture.name.encode(), "file": str(self._images[picture.name]).encode()}
        for part, write in picture.parts.items():
            with io.BytesIO() as file:
                write(file)
                content[key(part)] = file.getvalue()
        return encode(content)


def key(part: Part) -> str:
    """Of a part in its record."""
    return KEYS.get(part) or f"maps/{part.folder}{part.suffix}"


def encode(content: Mapping[str, bytes]) -> bytes:
    """A record; the same content always gives the same bytes."""
    example = tf_example_pb2.Example()
    for name, value in content.items():
        example.features.feature[name].CopyFrom(
            tf_feature_pb2.Feature(bytes_list=tf_feature_pb2.BytesList(value=[value]))
        )
    return example.SerializeToString(deterministic=True)


def records(output: Path) -> Iterator[dict[str, bytes]]:
    """The content of every record of the shards that are complete.

    Args:
      output: the directory.

    Returns:
      Bytes by key, one record after another.

    Raises:
      ValueError: a shard that is damaged.
    """
    for path in sorted(output.glob("predictions-*.array_record")):
        try:
            reader = ArrayRecordReader(str(path))
            for index in range(reader.num_records()):
                example = tf_example_pb2.Example.FromString(reader.read([index])[0])
                yield {name: found.bytes_list.value[0] for name, found in example.features.feature.items()}
            reader.close()
        except Exception as error:  # ArrayRecord raises several kinds for damaged files
            raise InputError(
                f"{path}: cannot be read ({type(error).__name__}: {error}). Delete it; the command that wrote it "
                "writes it again."
            ) from error
