"""Images per second of the whole NYUD pipeline: raw files, ArrayRecord and a PyTorch DataLoader of the same transforms.

    python benchmarks/speed/loading_speed.py [--images=64] [--batches=16] [--workers 0 1 2]

Writes an archive of random but smooth pictures at the archive's size (425 x 560), prepares it, and reads batches of 8
with the published augmentation (zoom 0.5 to 2, crop 448 x 576, flip, photometric distortion). The PyTorch row, in the
same run, reads the same source through `torch.utils.data.DataLoader` with the same NumPy functions and needs the extra
[parity]; it is left out where torch is missing. The first batch of each row, which starts the workers, is not timed.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the checkout, where this runs as a script

from benchmarks.measure import Results
from sgw_jax.data_pipelines.colour import ColourDistortion
from sgw_jax.data_pipelines.loader import Stream, train_batches
from sgw_jax.data_pipelines.nyud import Nyud
from sgw_jax.data_pipelines.prepare import locally, prepare
from sgw_jax.data_pipelines.prepared import Prepared
from sgw_jax.data_pipelines.transforms import Augmentation, Target

SIZE, BATCH = (425, 560), 8
TARGETS = {
    "semseg": Target("labels", 255),
    "depth": Target("depth", 0.0),
    "normals": Target("vectors", 0.0),
    "edges": Target("mask", -1.0),
}
RECIPE = Augmentation((448, 576), (0.5, 2.0), True, ColourDistortion(), 0.75, "semseg")


class Examples:
    """The stream's examples as a map-style dataset of PyTorch."""

    def __init__(self, stream: Stream, length: int) -> None:
        self.stream, self.length = stream, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.stream.example(index)


def main(argv: Sequence[str] | None = None) -> int:
    """Writes the archive, times every row, prints the table and writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/loading_speed.json"))
    arguments = parser.parse_args(argv)
    console = Console()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        write_archive(Path(folder) / "archive", arguments.images)
        raw = {split: Nyud(Path(folder) / "archive", split) for split in ("train", "validation")}
        run = partial(locally, workers=0, console=console)
        directory = prepare("nyud", raw, Path(folder), run, any_size=True, console=console)
        for name, source in (("files", raw["train"]), ("ArrayRecord", Prepared(directory, "train"))):
            for workers in arguments.workers:
                batches = partial(ours, source, workers=workers, count=arguments.batches + 1)
                rows.append({"reader": "sgw_jax", "source": name, "workers": workers, **timed(batches)})
                batches = partial(torch_loader, source, workers=workers, count=arguments.batches + 1)
                found = timed(batches)
                if found:
                    rows.append({"reader": "torch", "source": name, "workers": workers, **found})
    table = Table("reader", "source", "worker processes", "images/s", title=f"NYUD pipeline, {SIZE[0]} x {SIZE[1]}")
    for row in rows:
        table.add_row(row["reader"], row["source"], str(row["workers"]), f"{row['images_per_second']:.1f}")
    console.print(table)
    Results("loading", arguments.out).write({"rows": rows})
    return 0


def write_archive(root: Path, images: int) -> None:
    """An archive in InvPT's format; smooth pictures, because noise would make PNG slower than photographs do."""
    rng = np.random.default_rng(0)
    for folder in ("images", "segmentation", "depth", "normals", "edge", "gt_sets"):
        (root / folder).mkdir(parents=True)

    def smooth(channels: int) -> np.ndarray:
        coarse = rng.random((12, 16, channels))
        return cv2.resize(coarse, SIZE[::-1], interpolation=cv2.INTER_CUBIC).reshape(*SIZE, channels).clip(0, 1)

    for index in range(images):
        grain = rng.normal(0, 4, (*SIZE, 3))
        picture = np.clip(255 * smooth(3) + grain, 0, 255).astype(np.uint8)
        labels = cv2.resize(rng.integers(0, 41, (12, 16), dtype=np.uint8), SIZE[::-1], interpolation=cv2.INTER_NEAREST)
        normals = smooth(3) - 0.5
        normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
        Image.fromarray(picture).save(root / f"images/{index}.png")
        Image.fromarray(labels).save(root / f"segmentation/{index}.png")
        np.save(root / f"depth/{index}.npy", (1 + 8 * smooth(1)[..., 0]).astype(np.float32))
        Image.fromarray(np.rint((normals + 1) * 127.5).astype(np.uint8)).save(root / f"normals/{index}.png")
        edges = cv2.Laplacian(labels.astype(np.float64), cv2.CV_64F) != 0
        Image.fromarray((255 * edges).astype(np.uint8)).save(root / f"edge/{index}.png")
    ids = "".join(f"{index}\n" for index in range(images))
    (root / "gt_sets/train.txt").write_text(ids, encoding="utf-8")
    (root / "gt_sets/val.txt").write_text("0\n", encoding="utf-8")


def ours(source: Any, workers: int, count: int) -> Iterator[Any]:
    """This library's batches."""
    with train_batches(
        source, TARGETS, RECIPE, batch_size=BATCH, seed=0, num_steps=count, num_workers=workers
    ) as batches:
        yield from batches


def torch_loader(source: Any, workers: int, count: int) -> Iterator[Any]:
    """The same examples through PyTorch's loader; nothing without torch."""
    try:
        from torch.utils.data import DataLoader
    except ImportError:
        return
    examples = Examples(Stream(source, TARGETS, RECIPE, 0), count * BATCH)
    yield from DataLoader(examples, batch_size=BATCH, num_workers=workers)


def timed(batches: Any) -> dict[str, float]:
    """Images per second after the first batch; empty if there was none."""
    iterator = iter(batches())
    if next(iterator, None) is None:
        return {}
    start, seen = time.perf_counter(), 0
    for _ in iterator:
        seen += BATCH
    return {"images_per_second": seen / (time.perf_counter() - start)}


if __name__ == "__main__":
    sys.exit(main())
