"""predictions.json: what the results in a directory were made by and of which images, so that a call only goes on.

Nothing is ever replaced [our decision]: results of another network, of other options or of another image under a name
are refused before anything is written. Who wants them anew deletes them.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np
from flax.traverse_util import flatten_dict

import sgw_jax
from sgw_jax.data_pipelines.atomic import alone, replacing
from sgw_jax.data_pipelines.errors import InputError, files_named
from sgw_jax.data_pipelines.json_files import read_object
from sgw_jax.pictures.panels import Drawn
from sgw_jax.prediction.arrays import classes
from sgw_jax.prediction.predictor import Predictor

NAME, LOCK = "predictions.json", ".predictions.lock"
FORMAT, VERSION = "sgw_jax predictions", 1
KEYS = ("format", "version", "made_by", "settings", "maps", "images")
REMEDY = "Give another --output, or delete what is there."


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What the file holds.

    Attributes:
      made_by: for people: the package's version, the network and its step.
      settings: what all results in a directory have in common: the network's digest, options, form.
      maps: by name: the kind of its values and, of labels, the classes' names.
      images: by the name of the results: the image's file, absolute, and its size in bytes, if it could be asked.
    """

    made_by: Mapping[str, Any]
    settings: Mapping[str, Any]
    maps: Mapping[str, Any]
    images: Mapping[str, Any]

    @classmethod
    def read(cls, output: Path) -> Self | None:
        """That of a directory.

        Args:
          output: it.

        Returns:
          The manifest; None if there is none.

        Raises:
          ValueError: it is damaged, or a later release's.
        """
        path = output / NAME
        if not os.path.lexists(path):
            return None
        found = read_object(path, REMEDY, keys=KEYS)
        if found["format"] != FORMAT or found["version"] != VERSION:
            raise InputError(
                f"{path} is of the format {found['format']!r}, version {found['version']!r}; this release knows "
                f"{FORMAT!r}, version {VERSION}. {REMEDY}"
            )
        made_by, settings, maps, images = parts = [found[name] for name in KEYS[2:]]
        sound = all(isinstance(part, dict) for part in parts) and {"network", "arrays", "format"} <= settings.keys()
        if not (sound and _have(maps, "kind") and _have(images, "file", "bytes")):
            raise InputError(f"{path} is not what it should be: a part of it is missing. {REMEDY}")
        return cls(made_by, settings, maps, images)

    def after(self, earlier: Self | None, output: Path, begun: Callable[[str], Path | None]) -> Self:
        """The manifest with the images of an earlier one.

        Args:
          earlier: that of the directory.
          output: the directory.
          begun: a path of the results of a name that is there already, if any is.

        Returns:
          It.

        Raises:
          ValueError: what is there is of another network, form or image.
        """
        there: Mapping[str, Any] = {} if earlier is None else earlier.images
        if earlier is not None:
            self._check_settings(earlier, output)
            self._check_case(earlier, output)
        for name, image in self.images.items():
            path = begun(name)
            if path is None or there.get(name) == image:
                continue
            if name not in there:
                raise InputError(
                    f"{path} is there, but {NAME} does not say of which image. Give another --output, or move it away."
                )
            raise InputError(
                f"{path} is of {_said(there[name])}, and would now be of {_said(image)}. Give another --output, or "
                "delete the results of this name."
            )
        return dataclasses.replace(self, images={**there, **self.images})

    def _check_settings(self, earlier: Self, output: Path) -> None:
        found, wanted = _leaves(earlier.settings), _leaves(self.settings)
        if found.get("network") != wanted["network"]:
            raise InputError(
                f"{output} holds predictions of another network: {_network(earlier.made_by)}, and now "
                f"{_network(self.made_by)}. {REMEDY}"
            )
        if differ := [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]:
            said = ", ".join(f"{name} is {found.get(name)} there and {wanted.get(name)} here" for name in differ)
            raise InputError(f"{output} holds predictions of another call: {said}. {REMEDY}")
        if self.settings["format"] == "array_record" and list(earlier.images) != list(self.images):
            raise InputError(
                f"{output} holds records of another list of images ({len(earlier.images)} there, {len(self.images)} "
                f"here), which shards cannot be added to. {REMEDY}"
            )

    def _check_case(self, earlier: Self, output: Path) -> None:
        """Some file systems take names for equal that differ by case alone."""
        there = {name.casefold(): name for name in earlier.images}
        for name in self.images:
            if (other := there.get(name.casefold(), name)) != name:
                raise InputError(
                    f"{output} holds results of the name {other}, which differs from {name} by case alone. Give "
                    "another --output."
                )

    def write(self, output: Path, begun: Callable[[str], Path | None]) -> None:
        """Writes the file, unless it says all this already; several processes may do so at once.

        Args:
          output: the directory, made if missing.
          begun: as of `after`.

        Raises:
          ValueError: as of `after`.
          OSError: it cannot be written.
        """
        with files_named(f"--output={output}"):
            output.mkdir(parents=True, exist_ok=True)
            with alone(output / LOCK, lambda: None, needed=False):  # two different calls at once are rare
                earlier = self.read(output)
                whole = self.after(earlier, output, begun)
                if earlier is None or earlier.images != whole.images:
                    content = {"format": FORMAT, "version": VERSION, **dataclasses.asdict(whole)}
                    with replacing(output / NAME, contended=True) as temporary:
                        temporary.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding="utf-8")


def manifest_of(
    predictor: Predictor, title: str, settings: Mapping[str, Any], drawn: Iterable[Drawn], images: Mapping[str, Path]
) -> Manifest:
    """The manifest of a call.

    Args:
      predictor: the network.
      title: where it comes from.
      settings: all else that the results depend on, as JSON has it.
      drawn: the maps.
      images: the files by the names of their results.

    Returns:
      It.
    """
    maps = {}
    for about in drawn:
        kind = about.target["kind"]
        maps[about.name] = {"kind": kind, **({"classes": classes(about)} if kind == "labels" else {})}
    return Manifest(
        {"sgw_jax": sgw_jax.__version__, "network": title, "step": predictor.step},
        {"network": network_digest(predictor), **settings},
        maps,
        {name: {"file": os.path.abspath(file), "bytes": _size(file)} for name, file in images.items()},
    )


def network_digest(predictor: Predictor) -> str:
    """SHA-256 over tasks, size and every array by its name: the same for a run, its folder and its StableHLO file.

    Args:
      predictor: of it.

    Returns:
      In hexadecimal.
    """
    about = {"tasks": [task.to_dict() for task in predictor.tasks], "size": predictor.size}
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name, leaf in sorted(flatten_dict(dict(predictor.variables), sep="/").items()):
        array = np.ascontiguousarray(leaf)
        digest.update(f"\0{name}\0{array.dtype}{array.shape}\0".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _have(entries: Mapping[str, Any], *keys: str) -> bool:
    """Whether all entries are objects with these keys."""
    return all(isinstance(entry, dict) and entry.keys() >= set(keys) for entry in entries.values())


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:  # a link that leads nowhere: reading it says so
        return None


def _leaves(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {str(name): value for name, value in flatten_dict(dict(settings), sep=".").items()}


def _network(made_by: Mapping[str, Any]) -> str:
    step = made_by.get("step")
    return f"{made_by.get('network')}{'' if step is None else f', step {step}'}"


def _said(image: Mapping[str, Any]) -> str:
    return f"{image['file']} ({image['bytes']} bytes)"
