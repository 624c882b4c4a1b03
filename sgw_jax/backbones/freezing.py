"""Which parameters of a network learn when its backbone is frozen: all of it, its lowest blocks, or all but LoRA's."""

import dataclasses
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from sgw_jax.layers.parameter_names import in_backbone, is_added, is_lora, layers_of, stage_depths


@dataclasses.dataclass(frozen=True)
class Freezing:
    """Parameters -> those that learn, for `make_train_step(..., trained=...)`.

    A nested dictionary without what is frozen; of a stack of blocks of which the lowest are frozen it has the rows
    above. What a model adds to a backbone, and everything outside it, learns.

    Attributes:
      layers: so many of the lowest blocks are frozen, LoRA's factors in them too, and with at least one the patches,
        class token, registers and position embedding below them; layers as `scale_by_layer` counts them.
      pretrained: all of the pretrained network is frozen, whatever the layer.
    """

    layers: int = 0
    pretrained: bool = False

    def __call__(self, params: Any) -> Any:
        leaves = flatten_dict(params, sep="/")
        inside = ((in_backbone(path), leaf.shape) for path, leaf in leaves.items())
        depths = stage_depths({path: shape for path, shape in inside if path is not None})
        learning = {}
        for path, leaf in leaves.items():
            rows = self._frozen(path, leaf, depths)
            if rows is not True:
                learning[path] = leaf[int(rows) :] if rows else leaf
        return unflatten_dict(learning, sep="/")

    def _frozen(self, path: str, leaf: Array, depths: dict[int, int]) -> int | bool:
        """How many of the leaf's first rows are frozen; True for all of it."""
        name = in_backbone(path)
        if name is None or (is_added(name) and not is_lora(name)):
            return False
        if self.pretrained and not is_lora(name):
            return True
        layers = layers_of(name, depths)
        if isinstance(layers, int):
            return self.layers > 0 and layers <= self.layers
        rows = sum(layer <= self.layers for layer in layers)
        return True if rows == leaf.shape[0] else rows
