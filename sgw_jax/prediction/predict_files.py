"""Prediction over image files: files, folders and lists in, panels and arrays out, few of them in memory."""

import dataclasses
import functools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

import jax
import numpy as np
from jax.experimental import multihost_utils
from rich.console import Console

from sgw_jax.data_pipelines.consoles import messages, results
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.data_pipelines.progress import counted
from sgw_jax.data_pipelines.readers import first_few
from sgw_jax.pictures.panels import Drawn, Panel
from sgw_jax.prediction.arrays import write_npz, write_picture
from sgw_jax.prediction.background import in_background
from sgw_jax.prediction.confidence_maps import confidence_maps
from sgw_jax.prediction.image_files import (
    find_images,
    output_names,
    pixel_count,
    read_image,
    unreadable,
)
from sgw_jax.prediction.manifest import Manifest, manifest_of
from sgw_jax.prediction.options import Options
from sgw_jax.prediction.outputs import (
    NPZ,
    PANEL,
    Files,
    Form,
    Part,
    Picture,
    Store,
    Write,
    check_output,
    check_targets,
)
from sgw_jax.prediction.predictor import Predictor
from sgw_jax.prediction.shares import Share
from sgw_jax.prediction.source import Source


def predict_files(
    source: Source,
    inputs: Sequence[Path | str],
    output: Path | str,
    console: Console,
    *,
    options: Options | None = None,
    form: Form | None = None,
    share: Share | None = None,
    skip_bad: bool = False,
) -> list[str]:
    """Writes panels of images and their maps, and the maps, of every image that has none yet in `output`.

    A name is the file's stem; where several files share it, the folder comes before it. Images are read as they are
    needed, so there may be any number. Several processes of one program share the list further.

    Args:
      source: of the network.
      inputs: image files, and folders, whose images (SUFFIXES; not hidden ones, nor those of folders within) are taken
        sorted by name.
      output: directory for the results, made if missing. Those of an earlier call are kept, and never replaced:
        predictions.json says what they are of, and another network, other options or another image are refused.
      console: of progress and results.
      options: of prediction; None: `Options()`.
      form: of the results; None: `Form()`.
      share: of the images; None: all.
      skip_bad: leave out images that cannot be read, and list them at the end on standard error.

    Returns:
      The names that were written.

    Raises, before anything is written:
      FileNotFoundError: an input does not exist.
      ValueError: a folder without images, results that would replace an input or are of something else, an image of
        the share that cannot be read to its end (with `skip_bad`: all of them).
      CheckpointError: there is no complete checkpoint.
    """
    options, form, share = options or Options(), form or Form(), (share or Share()).of_process()
    files, output = find_images(inputs), Path(output)
    images = dict(zip(output_names(files), files, strict=True))
    check_output(output, inputs)
    predictor = source.load()
    drawn: list[Drawn] = [*predictor.tasks, *(confidence_maps(predictor.tasks) if options.confidence else [])]
    store = store_of(output, form, drawn, images)
    check_targets((target for name in images for target in store.targets(name)), inputs, files)
    settings = {"options": dataclasses.asdict(options), **dataclasses.asdict(form)}
    manifest = manifest_of(predictor, str(source), settings, drawn, images)
    manifest.after(Manifest.read(output), output, store.begun)

    mine = share.of(store.units)
    todo = [unit for unit in mine if not store.finished(unit)]
    if done := len(mine) - len(todo):
        there = f"{done} of {len(mine)} {'images' if form.format == 'files' else 'shards'}"
        console.print(f"{there} are there; {'going on' if todo else 'nothing to do'}.")
    bad = unreadable([images[name] for unit in todo for name in unit], console)
    _check_readable(bad, files, [images[name] for unit in mine for name in unit], skip_bad)
    todo = [kept for unit in todo if (kept := tuple(name for name in unit if images[name] not in bad))]

    if jax.process_index() == 0:
        manifest.write(output, store.begun)
    _wait_for_all("predict: predictions.json")
    names = [name for unit in todo for name in unit]
    writers = Writers(form.parts(drawn), drawn)
    pictures = _predicted(predictor, images, names, options, writers)
    written = list(counted(store.write(todo, pictures), "predict", len(names), console))
    store.clean(mine)
    _wait_for_all("predict: the end")
    part = "" if share.count == 1 else f"Share {share.index}/{share.count}: "
    line = f"{part}{len(written)} {form} in {output}, by step {predictor.step} of {source}."
    results(console).print(line, soft_wrap=True, markup=False)
    _say_what_is_missing(bad, len(bad) + len(written), writers.lost)
    return written


def store_of(output: Path, form: Form, drawn: Sequence[Drawn], images: Mapping[str, Path]) -> Store:
    """Where the results go.

    Args:
      output: directory.
      form: of the results.
      drawn: the maps.
      images: the files by the names of their results.

    Returns:
      The store.
    """
    parts = form.parts(drawn)
    if form.format == "files":
        return Files(output, parts, images)
    from sgw_jax.prediction.shards import Shards  # here: what it imports takes seconds

    return Shards(output, parts, images)


def _check_readable(bad: Mapping[Path, str], files: Sequence[Path], mine: Sequence[Path], skip_bad: bool) -> None:
    """Raises for images that cannot be read, unless they are to be left out and are not all there are."""
    if not bad or (skip_bad and len(bad) < len(files)):
        return
    raise InputError(
        f"{len(bad)} of {len(mine)} images cannot be read, and nothing was written: "
        f"{first_few(list(bad.values()), 3)}. Mend or remove them"
        f"{'' if len(bad) == len(files) else ', or leave them out with --skip_bad'}."
    )


class Writers:
    """Of a picture's maps: what writes its parts.

    Args:
      parts: of every picture.
      tasks: whose maps they are.
      drawn: all maps.
    """

    def __init__(self, parts: Sequence[Part], drawn: Sequence[Drawn]) -> None:
        self._parts, self._drawn = parts, {about.name: about for about in drawn}
        self._panel = Panel()
        self.lost: dict[str, int] = {}  # file -> values that it has no level for

    def of(self, name: str, file: Path, image: np.ndarray, maps: Mapping[str, np.ndarray]) -> dict[Part, Write]:
        """By part, what writes it to an open file.

        Args:
          name: of the picture's results.
          file: of the image.
          image: uint8 (H, W, 3).
          maps: by name.

        Returns:
          Functions of the open file.
        """

        def write(part: Part, opened: IO[bytes]) -> None:
            if part == PANEL:
                self._panel.draw(image, maps, list(self._drawn.values()), file.name).save(opened, format="PNG")
            elif part == NPZ:
                write_npz(opened, maps, self._drawn.values())
            elif part.suffix == ".npz":
                write_npz(opened, maps, [self._drawn[part.folder]])
            elif lost := write_picture(opened, maps[part.folder], self._drawn[part.folder]):
                self.lost[part.file(name)] = lost

        return {part: functools.partial(write, part) for part in self._parts}


def _predicted(
    predictor: Predictor, images: Mapping[str, Path], names: Sequence[str], options: Options, writers: Writers
) -> Iterator[Picture]:
    """The pictures in order, as they come out of the network."""
    held: deque[np.ndarray] = deque()  # images that the network has and whose maps are still to come

    def read() -> Iterator[np.ndarray]:
        for image in in_background(read_image, (images[name] for name in names), pixels=pixel_count):
            held.append(image)
            yield image

    stream = predictor.stream(read(), options)
    for name in names:  # without a zip, which would hold the maps while the next are made
        maps, image = next(stream), held.popleft()
        yield Picture(name, image.shape[0] * image.shape[1], writers.of(name, images[name], image, maps))
        del maps, image


def _say_what_is_missing(bad: Mapping[Path, str], total: int, lost: Mapping[str, int]) -> None:
    """On standard error, in every process: each knows of its own images alone."""
    errors = messages()
    if bad:
        errors.print(f"{len(bad)} of {total} images were left out, for they cannot be read:", soft_wrap=True)
        for reason in bad.values():
            errors.print(f"  {reason}", soft_wrap=True)
    if lost:
        named = first_few([f"{file} ({count} values)" for file, count in lost.items()], 3)
        errors.print(
            f"{len(lost)} pictures have no level for some values, which stand at the greatest (65.535 m of a depth), "
            f"or at 0 where they are no number: {named}. --arrays=npz keeps them.",
            soft_wrap=True,
        )


def _wait_for_all(what: str) -> None:
    """Several processes of one program wait for each other here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)
