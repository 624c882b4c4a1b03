"""Sets written by `data_pipelines.prepare`: their records, in TFDS's format without TensorFlow, and the source."""

import io
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.json_files import json_object
from sgw_jax.data_pipelines.transforms import Example

VERSION = "1.0.0"
RECORD = "preparation.json"  # what was prepared, beside TFDS's own metadata
REMEDY = "Move the directory away and prepare again."


def features_of(example: Example) -> tfds.features.FeaturesDict:
    """The TFDS features of examples like this one; a target that an image lacks is stored with no rows.

    The image is a PNG, which is lossless; targets are arrays of their own dtype, compressed with zlib.
    """
    features: dict[str, Any] = {"image": tfds.features.Image(shape=(None, None, 3), encoding_format="png")}
    for name, values in example.items():
        if name != "image":
            shape = (None, None, *values.shape[2:])
            features[name] = tfds.features.Tensor(shape=shape, dtype=values.dtype, encoding="zlib")
    return tfds.features.FeaturesDict(features)


def encode(example: Example, features: tfds.features.FeaturesDict) -> bytes:
    """One record; the same example always gives the same bytes."""
    written, png = cv2.imencode(".png", example["image"][..., ::-1])  # bytes: TFDS encodes arrays by TensorFlow
    if not written:
        raise InputError(f"the image, {example['image'].dtype} {example['image'].shape}, cannot be written as PNG")
    row: dict[str, Any] = {"image": png.tobytes()}
    for name, feature in features.items():
        if name != "image":
            row[name] = example.get(name, np.zeros((0, 0, *feature.shape[2:]), feature.np_dtype))
    if stray := set(example) - set(features):
        raise InputError(f"the example has {sorted(stray)}, which the features {sorted(features)} do not name")
    serializer = tfds.core.example_serializer.ExampleSerializer(features.get_serialized_info())
    # `serialize_example` leaves the order of the fields to the process's hash seed.
    return serializer.get_tf_example(features.encode_example(row)).SerializeToString(deterministic=True)


class Prepared:
    """Source over a prepared set (picklable; opens files when an item is first read).

    Examples are those of the source that was prepared, bit by bit, and so is the fingerprint: a run that began on the
    archive's own files may go on here.

    Raises ValueError unless the directory holds a whole set with this split.
    """

    def __init__(self, directory: str | Path, split: str) -> None:
        self.directory, self.split = epath.Path(directory), split
        try:
            content = (self.directory / RECORD).read_bytes()
        except OSError as error:
            raise InputError(
                f"{self.directory} holds no prepared set: {RECORD} does not exist there. Give the directory that ends "
                f"in {VERSION}, which `sgw-jax prepare NAME --source=ARCHIVE --out=DIR` writes, or "
                "use --config.data.format=archive."
            ) from error
        splits = json_object(content, self.directory / RECORD, REMEDY, keys=("splits",))["splits"]
        if not isinstance(splits, dict) or split not in splits:
            raise InputError(f"{self.directory} has no split {split!r}; it has {sorted(splits)}.")
        self._record: Mapping[str, Any] = splits[split]
        self._start()

    def _start(self) -> None:
        self._lock = threading.Lock()
        self._data: Any = None
        self._encoded: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_data", "_encoded")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._start()

    def __len__(self) -> int:
        return self._record["length"]

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        with self._lock:
            if self._data is None:
                self._data = tfds.builder_from_directory(self.directory).as_data_source(self.split)
        try:
            stored = self._data[index]
        except Exception as error:  # TFDS and ArrayRecord raise several kinds for damaged files
            raise InputError(f"{self.file_of(index)}: cannot be read ({type(error).__name__}: {error})") from error
        return {name: values for name, values in stored.items() if values.size}

    def size_of(self, index: int) -> tuple[int, int]:
        """(height, width) of the item's image, by the header of the stored PNG."""
        with self._lock:
            if self._encoded is None:
                builder = tfds.builder_from_directory(self.directory)
                encoded = dict.fromkeys(builder.info.features, tfds.decode.SkipDecoding())
                self._encoded = builder.as_data_source(self.split, decoders=encoded)
        try:
            with Image.open(io.BytesIO(self._encoded[index]["image"])) as picture:
                return picture.height, picture.width
        except Exception as error:  # as in __getitem__
            raise InputError(f"{self.file_of(index)}: cannot be read ({type(error).__name__}: {error})") from error

    def file_of(self, index: int) -> str:
        """Where an item lies."""
        return f"{self.directory}, {self.split}, record {index}"

    def files(self, index: int) -> tuple[Path, ...]:
        """What says that the set is whole; the records lie beside it."""
        del index
        return (Path(self.directory / RECORD),)

    def fingerprint(self) -> dict[str, Any]:
        """That of the source that was prepared."""
        return dict(self._record["fingerprint"])
