"""Images alone, as a network sees them in training without augmentation but the flip: any items, in any order."""

import dataclasses
from collections.abc import Sequence

import cv2
import grain
import numpy as np

from sgw_jax.data_pipelines.loader import Batches, Rows, Source, batches_over, check_source, read_example
from sgw_jax.data_pipelines.transforms import Example, Size, check_example, finish, seen_by_network


@dataclasses.dataclass(frozen=True)
class ImageRows:
    """Row -> {"image": ...} at the model's door, a pure function of the row's number; picklable.

    wanted: (item, whether mirrored) of every row; beyond the last the last is repeated.
    """

    source: Source
    size: Size
    fit: str
    wanted: Sequence[tuple[int, bool]]

    def example(self, row: int) -> Example:
        """The image of a row."""
        item, mirrored = self.wanted[min(row, len(self.wanted) - 1)]
        return read_example(self.source, item, lambda raw: self._seen(raw, mirrored))

    def _seen(self, raw: Example, mirrored: bool) -> Example:
        check_example(raw, {})
        image: np.ndarray = seen_by_network(raw["image"], self.size, self.fit)
        return finish({"image": cv2.flip(image, 1) if mirrored else image}, {}, self.size)


def image_batches(
    source: Source,
    wanted: Sequence[tuple[int, bool]],
    *,
    batch_size: int,
    size: Size,
    fit: str,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    num_threads: int = 2,
    prefetch: int = 4,
) -> Batches:
    """Batches of the images that are wanted, the last filled up with copies of the last image.

    Args:
      wanted: as of `ImageRows`.
      batch_size, size, fit, process_index, process_count, num_workers, num_threads, prefetch: as of `eval_batches`.

    Raises ValueError as `eval_batches` does.
    """
    check_source(source)
    rows = Rows(batch_size, process_index, process_count)
    images = ImageRows(source, size, fit, tuple(wanted))
    count = -(-len(images.wanted) // batch_size)
    dataset = grain.MapDataset.range(count * rows.block).map(rows.n).map(images.example).batch(rows.block)
    return batches_over(dataset, count, num_workers, num_threads, prefetch)
