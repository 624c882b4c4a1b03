"""A rendering worker, started by rooms/cache.py: renders its share of a split, one byte to stdout per scene."""

import json
import os
import sys
from pathlib import Path

from sgw_jax.data_pipelines.rooms.cache import render_share
from sgw_jax.data_pipelines.rooms.record import Collection


def main() -> None:
    directory, split, length, size, seed = json.loads(sys.argv[1])
    collection = Collection(split, length, (size[0], size[1]), seed)
    render_share(Path(directory), collection, int(sys.argv[2]), int(sys.argv[3]), lambda: os.write(1, b"."))


if __name__ == "__main__":
    main()
