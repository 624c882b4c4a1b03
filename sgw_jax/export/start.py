"""What --init_from names: a run's directory, a model's folder, or a model of the hub."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array

from sgw_jax.export.description import CONFIG, Description
from sgw_jax.export.folder import read_description, read_weights, weights_shapes
from sgw_jax.export.hub import is_hub_name, locate
from sgw_jax.layers.parameter_names import PARAMS
from sgw_jax.run.warm_start import Start, run_start


class FolderStart:
    """The parameters of a model's folder, which are read when they are asked for."""

    def __init__(self, folder: Path, name: str):
        self._folder = folder
        self._about: Description = read_description(folder)
        self.title = f"{name}, step {self._about.step}"

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The parameters' shapes by their paths."""
        prefix = f"{PARAMS}/"
        found = weights_shapes(self._folder)
        return {name.removeprefix(prefix): shape for name, shape in found.items() if name.startswith(prefix)}

    def parameters(self, wanted: Mapping[str, Any]) -> dict[str, Array]:
        """These of them, each where its sharding puts it; every process reads the whole file.

        Args:
          wanted: shapes, dtypes and shardings by path.
        """
        tensors = read_weights(self._folder, self._about)

        def placed(name: str, leaf: Any) -> Array:
            value = tensors[f"{PARAMS}/{name}"]
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda at: value[at].astype(leaf.dtype))

        return {name: placed(name, leaf) for name, leaf in wanted.items()}


@contextlib.contextmanager
def starting_point(init_from: Path | str | None) -> Iterator[Start | None]:
    """What training begins from; None is nothing. A directory is a run's unless it holds a config.json.

    Raises:
      UserError: it is neither, or is damaged; what of the hub cannot be had.
    """
    if init_from is None:
        yield None
        return
    place = Path(init_from)
    if (place / CONFIG).exists() or (not place.exists() and is_hub_name(str(init_from))):
        yield FolderStart(locate(str(init_from)), str(init_from))
        return
    with run_start(place) as start:
        yield start
