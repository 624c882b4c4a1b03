"""What is written of a picture, and how as files of its own; a file is whole or not there.

    NAME.png         the panel
    NAME.npz         all maps, --arrays=npz
    MAP/NAME.png     a map each, --arrays=png; MAP/NAME.npz of a kind that no picture can hold

Both ways are what `sgw-jax score --predictions` takes. A picture is finished when all of its files are there, so there
is no other mark that could be lost, and what somebody deletes is made anew.
"""

import contextlib
import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal, NamedTuple, Protocol

from sgw_jax.data_pipelines import atomic
from sgw_jax.data_pipelines.errors import InputError, files_named
from sgw_jax.experiment.ranges import OneOf
from sgw_jax.pictures.panels import Drawn
from sgw_jax.prediction.arrays import suffix
from sgw_jax.prediction.background import in_background
from sgw_jax.prediction.image_files import real_path

ARRAYS, FORMATS = ("npz", "png", "none"), ("files", "array_record")
TEMPORARY = re.compile(r"(.+)\.\d+\.tmp")  # of `atomic.replacing`
WRITERS = 2  # threads: compression takes most of the time

Write = Callable[[IO[bytes]], None]
Unit = tuple[str, ...]  # the names of pictures that appear together


class Part(NamedTuple):
    """A file of every picture.

    Attributes:
      folder: a map's name; "" for the panel and for the npz of all maps.
      suffix: of the file.
    """

    folder: str
    suffix: str

    def file(self, name: str) -> str:
        """Below the output, of the picture of this name."""
        return f"{self.folder}/{name}{self.suffix}" if self.folder else f"{name}{self.suffix}"


PANEL, NPZ = Part("", ".png"), Part("", ".npz")


def part_of(name: str, kind: str) -> Part:
    """The file of one map.

    Args:
      name: of the map.
      kind: of its values.

    Returns:
      The part.

    Raises:
      ValueError: a name that cannot be a folder's.
    """
    if name in (".", "..") or "/" in name or os.sep in name:
        raise InputError(f"The map {name!r} cannot have a folder of its name; choose --arrays=npz.")
    return Part(name, suffix(kind))


@dataclass(frozen=True)
class Form:
    """What is written of every picture.

    Args:
      arrays: "npz": all maps in one file; "png": a picture each; "none".
      format: "files", or "array_record": records of shards.
      panels: whether there is a picture of the image and its maps.

    Raises:
      ValueError: another value, or nothing to write.
    """

    arrays: Literal["npz", "png", "none"] = "npz"
    format: Literal["files", "array_record"] = "files"
    panels: bool = True

    def __post_init__(self) -> None:
        OneOf(ARRAYS).check("--arrays", self.arrays)
        OneOf(FORMATS).check("--format", self.format)
        if self.arrays == "none" and not self.panels:
            raise InputError(
                "Neither arrays nor panels: nothing is left to write; leave one of --arrays=none and --no_panels out."
            )

    def __str__(self) -> str:
        found = {"panels (png)": self.panels, f"arrays ({self.arrays})": self.arrays != "none"}
        return " and ".join(name for name, written in found.items() if written)

    def parts(self, drawn: Iterable[Drawn]) -> tuple[Part, ...]:
        """Of every picture: the arrays and then the panel.

        Args:
          drawn: the maps.

        Returns:
          The parts, in the order in which they are written.

        Raises:
          ValueError: a map's name that cannot be a folder's.
        """
        found = [NPZ] if self.arrays == "npz" else []
        if self.arrays == "png":
            found = [part_of(about.name, about.target["kind"]) for about in drawn]
        return (*found, *([PANEL] if self.panels else []))


class Picture(NamedTuple):
    """One that was predicted and is to be written.

    Attributes:
      name: of its files.
      pixels: of the image.
      parts: what writes each.
    """

    name: str
    pixels: int
    parts: Mapping[Part, Write]


class Store(Protocol):
    """Where results go.

    Attributes:
      units: all pictures, those together that appear together.
    """

    units: Sequence[Unit]

    def targets(self, name: str) -> list[Path]:
        """The paths that the picture's results go to."""

    def begun(self, name: str) -> Path | None:
        """A path of the picture's that is there already."""

    def finished(self, unit: Unit) -> bool:
        """Whether all of it is there."""

    def write(self, units: Sequence[Unit], pictures: Iterable[Picture]) -> Iterator[str]:
        """Writes the pictures, which are those of the units in order, and gives their names as they are written."""

    def clean(self, units: Sequence[Unit]) -> None:
        """Removes what killed processes left of these units."""


class Files:
    """A `Store` of files.

    Args:
      output: the directory.
      parts: of every picture.
      names: of all pictures.
    """

    def __init__(self, output: Path, parts: Sequence[Part], names: Iterable[str]) -> None:
        self.output, self.parts = output, tuple(parts)
        self.units: Sequence[Unit] = [(name,) for name in names]
        self._there = set(self._listed())

    def targets(self, name: str) -> list[Path]:
        return [self.output / part.file(name) for part in self.parts]

    def begun(self, name: str) -> Path | None:
        found = (part.file(name) for part in self.parts)
        return next((self.output / file for file in found if file in self._there), None)

    def finished(self, unit: Unit) -> bool:
        return all(part.file(name) in self._there for name in unit for part in self.parts)

    def write(self, units: Sequence[Unit], pictures: Iterable[Picture]) -> Iterator[str]:
        del units
        for folder in {part.folder for part in self.parts}:
            with files_named("--output cannot be made"):
                (self.output / folder).mkdir(parents=True, exist_ok=True)

        def write(picture: Picture) -> str:
            for part, written in picture.parts.items():
                with replacing(self.output / part.file(picture.name)) as file:
                    written(file)
            return picture.name

        yield from in_background(write, pictures, WRITERS, lambda picture: picture.pixels)

    def clean(self, units: Sequence[Unit]) -> None:
        files = {part.file(name) for unit in units for name in unit for part in self.parts}
        for there in self._listed():
            found = TEMPORARY.fullmatch(there)
            if found and found[1] in files:
                (self.output / there).unlink(missing_ok=True)

    def _listed(self) -> Iterator[str]:
        """Every file of the output and of its folders, in one look at each: millions of questions would take hours."""
        for folder in dict.fromkeys(part.folder for part in self.parts):
            place = self.output / folder
            if place.is_dir():
                with files_named(f"{place} cannot be listed"):
                    names = os.listdir(place)
                yield from (f"{folder}/{name}" if folder else name for name in names)


def check_output(output: Path, inputs: Sequence[Path | str]) -> None:
    """Raises where the output is no directory, or is an input, so that results would be taken for images."""
    if output.exists() and not output.is_dir():
        raise InputError(f"--output: {output} is a file; give a directory.")
    if real_path(output) in {real_path(Path(path)) for path in inputs if Path(path).is_dir()}:
        raise InputError(f"--output: {output} is also an input, which the results would join; give another.")


def check_targets(targets: Iterable[Path], inputs: Sequence[Path | str], files: Iterable[Path]) -> None:
    """Raises where a result would replace a file that is an input, or be taken for one the next time.

    Args:
      targets: where the results go.
      inputs: as the user named them.
      files: that they are.

    Raises:
      ValueError: names the target.
    """
    there = {real_path(file) for file in files}
    folders = {real_path(Path(path)) for path in inputs if Path(path).is_dir()}
    real = functools.cache(real_path)  # of the few folders of many results
    for target in targets:
        if real(target.parent) / target.name in there:
            raise InputError(f"--output: {target} would replace the input {target.name}; give another.")
        if real(target.parent) in folders:
            raise InputError(f"--output: {target} would join the input {target.parent}; give another.")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to by `atomic.replacing`."""
    with (
        files_named(f"{path} cannot be written"),
        atomic.replacing(path, contended=True) as temporary,
        temporary.open("wb") as file,
    ):
        yield file
