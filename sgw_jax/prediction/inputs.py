"""What the inputs of a prediction are: images, or videos."""

import os
from collections.abc import Sequence
from pathlib import Path

from sgw_jax.data_pipelines.errors import MissingFileError
from sgw_jax.prediction.image_files import SUFFIXES as IMAGES

VIDEOS = (".avi", ".mkv", ".mov", ".mp4", ".webm")


def apart(inputs: Sequence[Path | str]) -> tuple[list[Path], list[Path]]:
    """The inputs that are or hold images, and the files that are videos, by their suffixes alone.

    A folder stands for both: its videos (VIDEOS; not hidden ones, nor those of folders within) are taken sorted by
    name, and it is an input of images unless it holds videos alone.

    Args:
      inputs: files and folders.

    Returns:
      (inputs of `find_images`, video files, each once).

    Raises:
      FileNotFoundError: a video that does not exist.
    """
    images: list[Path] = []
    videos: list[Path] = []
    for path in map(Path, inputs):
        if path.is_dir():
            here = sorted(file for file in path.iterdir() if file.name[0] != ".")
            videos += (found := [file for file in here if file.suffix.lower() in VIDEOS])
            if not found or any(file.suffix.lower() in IMAGES for file in here):
                images.append(path)
        elif path.suffix.lower() not in VIDEOS:
            images.append(path)
        elif path.exists():
            videos.append(path)
        else:
            raise MissingFileError(f"{path} does not exist; give files of images or videos, or directories of them.")
    once: dict[str, Path] = {}
    for file in videos:
        once.setdefault(os.path.realpath(file), file)
    return images, list(once.values())
