"""The tensors of a pretrained file: taken by name and shape, with an account of what was missing, wrong or left."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from sgw_jax.data_pipelines.errors import InputError


class PretrainedError(InputError):
    """A file that is not what it should be, or not for this model."""


class Tensors:
    """The tensors of a file by name; keeps account of what was asked for and what was wrong."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self._tensors = tensors
        self.taken: set[str] = set()
        self.ignored: set[str] = set()
        self.missing: list[str] = []
        self.wrong: list[str] = []

    def __call__(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor in float32; zeros where there is none of that name and shape, which is reported at the end."""
        found = self._tensors.get(name)
        if found is None:
            self.missing.append(name)
        else:
            self.taken.add(name)
            if found.shape == shape:
                return np.asarray(found, np.float32)
            self.wrong.append(f"{name} {found.shape} instead of {shape}")
        return np.zeros(shape, np.float32)

    def ignore(self, *names: str) -> None:
        self.ignored |= set(names) & set(self._tensors)

    def norm(self, name: str, width: int) -> dict[str, np.ndarray]:
        return {"scale": self(f"{name}.weight", (width,)), "bias": self(f"{name}.bias", (width,))}

    def dense(self, name: str, inputs: int, outputs: int) -> dict[str, np.ndarray]:
        """torch's Linear stores (out, in)."""
        return {"kernel": self(f"{name}.weight", (outputs, inputs)).T, "bias": self(f"{name}.bias", (outputs,))}

    def joined(self, prefix: str, width: int) -> dict[str, np.ndarray]:
        """Query, key and value side by side, as `SelfAttention` and `WindowAttention` have them."""
        parts = [self.dense(prefix + name, width, width) for name in ("query", "key", "value")]
        return {key: np.concatenate([part[key] for part in parts], -1) for key in ("kernel", "bias")}

    def patches(self, name: str, patch: int, width: int, channels: int = 3) -> dict[str, np.ndarray]:
        """torch's Conv2d stores (out, in, height, width)."""
        kernel = self(f"{name}.weight", (width, channels, patch, patch)).transpose(2, 3, 1, 0)
        return {"kernel": kernel, "bias": self(f"{name}.bias", (width,))}


def stacked(layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Trees of equal structure as one, layers along a new first axis."""
    first = layers[0]
    return {
        key: stacked([layer[key] for layer in layers])
        if isinstance(first[key], dict)
        else np.stack([layer[key] for layer in layers])
        for key in first
    }
