"""The config.json of a model's folder: all that loading needs beside the tensors, and nothing of where it was made."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import sgw_jax
from sgw_jax.backbones.tensors import PretrainedError
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.json_files import read_object
from sgw_jax.data_pipelines.transforms import IMAGE_MEAN, IMAGE_STD
from sgw_jax.experiment.config_files import without_paths
from sgw_jax.export.trained import Trained

CONFIG = "config.json"
LIBRARY = "sgw_jax"  # also the hub's library_name, and the model_type in the place where every library has its own
VERSION = 1  # of the folder's form; a reader refuses later ones
FETCH = "Fetch or export it again."
KINDS: dict[str, type] = {"step": int, "tasks": list, "preprocessing": dict, "config": dict, "sha256": str}


def preprocessing(size: tuple[int, int]) -> dict[str, Any]:
    """What happens to an image before the network sees it; `Predictor` has the details.

    Said in the file, so that others can do the same, and compared when a folder is read: a network must not get pixels
    that another release normalises in another way.
    """
    return {
        "channels": "RGB",
        "size": list(size),
        "fit": "largest copy inside, centred",
        "rescale": 1 / 255,
        "mean": list(IMAGE_MEAN),
        "std": list(IMAGE_STD),
        "padding": 0.0,  # after normalisation: the mean colour
    }


@dataclasses.dataclass(frozen=True)
class Description:
    """What config.json holds. Tasks and configuration are plain data; sha256 is that of the files of tensors, one
    behind the other."""

    step: int
    tasks: list[dict[str, Any]]
    preprocessing: dict[str, Any]
    config: dict[str, Any]
    sha256: str

    @classmethod
    def of(cls, trained: Trained, sha256: str) -> Self:
        """Of a network whose tensors are written."""
        if trained.config is None or trained.step is None:
            raise InputError(
                "This predictor has no configuration, from which a folder's reader builds the network: it was put "
                "together by hand, or read from a program. Export one of sgw_jax.load or sgw_jax.from_pretrained."
            )
        config = json.loads(without_paths(trained.config).to_json())
        return cls(
            trained.step, [task.to_dict() for task in trained.tasks], preprocessing(trained.size), config, sha256
        )

    def to_json(self) -> str:
        """The file's text."""
        about = {"model_type": LIBRARY, "format_version": VERSION, "sgw_jax_version": sgw_jax.__version__}
        return json.dumps({**about, **dataclasses.asdict(self)}, indent=1, allow_nan=False) + "\n"

    @classmethod
    def read(cls, path: Path) -> Self:
        """Of a file.

        Raises:
          PretrainedError: it is missing or damaged, another library's, or of a later form than this release reads.
        """
        found = read_object(path, FETCH, PretrainedError)
        check_ours(found, path)
        for field in dataclasses.fields(cls):
            kind, value = KINDS[field.name], found.get(field.name)
            if type(value) is not kind:
                raise PretrainedError(
                    f"{path} is damaged: {field.name} is {value!r:.100} where a {kind.__name__} belongs. {FETCH}"
                )
        return cls(**{name: found[name] for name in KINDS})


def check_ours(found: Mapping[str, Any], path: object) -> None:
    """Raises unless what a config.json holds is a model of this library that this release reads.

    Raises:
      PretrainedError: names the file, what it says it is, and what to do.
    """
    kind, version = found.get("model_type"), found.get("format_version")
    if kind != LIBRARY:
        raise PretrainedError(
            f"{path}: model_type is {kind!r}; it must be {LIBRARY!r}. Another library's model is of use as a backbone: "
            "docs/backbones.md says which, and how."
        )
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise PretrainedError(f"{path} is damaged: format_version is {version!r}; it must be at least 1. {FETCH}")
    if version > VERSION:
        raise PretrainedError(
            f"{path} is of sgw_jax {found.get('sgw_jax_version')}: format_version is {version}, and sgw_jax "
            f"{sgw_jax.__version__} reads up to {VERSION}. Install a newer one: pip install -U sgw_jax."
        )


def check_preprocessing(found: Mapping[str, Any], size: tuple[int, int], path: Path) -> None:
    """Raises where a folder's images are prepared otherwise than this release does.

    Raises:
      PretrainedError: names what differs.
    """
    ours = preprocessing(size)
    for name in ours.keys() | found.keys():
        if found.get(name) != ours.get(name):
            raise PretrainedError(
                f"{path}: preprocessing.{name} is {found.get(name)!r}; this release does {ours.get(name)!r} for "
                f"config.data.size {size[0]} x {size[1]}. {FETCH}"
            )
