"""Panels of a video's frames: one layout and one range of colours for all, drawn once; a frame adds its pictures."""

from collections.abc import Mapping, Sequence

import numpy as np

from sgw_jax.pictures.panels import (
    NARROWEST,
    TOP,
    Drawn,
    Panel,
    arranged,
    coloured,
    scaled,
    size_remark,
    tile_size,
    title,
)


class Film:
    """Draws frames as `Panel` draws images, but so that nothing jumps from one frame to the next.

    Depth's range of colours is that of the samples, and what lies beyond it has the colours of its ends. (Our decision:
    a range of each frame's own would flicker, and a running one would make a colour stand for other metres a second
    later.) The classes of a legend are those of the samples, the most frequent first, and then the rest.

    Args:
      size: (height, width) of the frames.
      tasks: what is drawn.
      samples: task name -> decoded maps of some frames, of one width, below each other.
      name: what the first tile says beside the frames' size.
    """

    def __init__(
        self, size: tuple[int, int], tasks: Sequence[Drawn], samples: Mapping[str, np.ndarray], name: str = ""
    ):
        panel, self._tasks, self._samples, self._tile = Panel(), tuple(tasks), samples, tile_size(*size)
        width = max(self._tile[1], NARROWEST)
        blank = np.zeros((*self._tile, 3), np.uint8)
        legends = [panel.legend(task, samples[task.name], width, absent=True) for task in tasks]
        tiles = [
            panel.tile("Image", size_remark(size, name), blank, None, width),
            *(panel.tile(title(task), "", blank, legend, width) for task, legend in zip(tasks, legends, strict=True)),
        ]
        picture, self._places = arranged(tiles)
        self._base = np.asarray(picture)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of what `panel` returns."""
        return self._base.shape[0], self._base.shape[1]

    def panel(self, image: np.ndarray, maps: Mapping[str, np.ndarray]) -> np.ndarray:
        """The image and the tasks' pictures, uint8 (height, width, 3).

        Args:
          image: uint8, of the film's size.
          maps: task name -> decoded map of the image's height and width.

        Returns:
          The frame.
        """
        pictures = [scaled(image, self._tile)]
        for task in self._tasks:
            pictures.append(coloured(task, maps[task.name], self._tile, self._samples[task.name]))
        frame = self._base.copy()
        for (left, top), picture in zip(self._places, pictures, strict=True):
            frame[top + TOP : top + TOP + self._tile[0], left : left + self._tile[1]] = picture
        return frame

    def picture(self, task: Drawn, maps: Mapping[str, np.ndarray]) -> np.ndarray:
        """One task's map alone, at its full size.

        Args:
          task: which.
          maps: as of `panel`.

        Returns:
          uint8 (height, width, 3).
        """
        return task.draw(maps[task.name], like=self._samples[task.name])
