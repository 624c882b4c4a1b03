"""A network's compiled call for batches of one size, over all devices of this process where the batch divides."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

BATCH = "batch"


class Appliable(Protocol):
    """A module, or what stands for one."""

    def apply(self, variables: Any, images: Any, /) -> Any:
        """Raw predictions by task."""


class Rows(Protocol):
    """What a predictor asks of its network."""

    def rows(self, batch: Float[np.ndarray, "batch height width 3"]) -> Iterator[tuple[Mapping[str, Array], int]]:
        """(raw predictions, the row's number in them) of each row of normalised images."""
        ...


class Network:
    """What makes raw predictions of normalised images.

    Each device computes its rows with the program that one device alone would run for as many, and none waits for
    another (shard_map) [our decision: a compiler that divides the program itself may choose to exchange activations].

    Args:
      model: the network.
      variables: its collections.
      batch_size: rows of every batch. If the number of local devices divides it, they share it; else the default
        device has all.
    """

    def __init__(self, model: Appliable, variables: Mapping[str, Any], batch_size: int):
        devices = jax.local_devices()
        self._sharding: NamedSharding | None = None
        self._variables = variables
        if len(devices) == 1 or batch_size % len(devices):
            self._apply = jax.jit(model.apply)
            return
        mesh = Mesh(np.asarray(devices), (BATCH,))
        self._sharding = NamedSharding(mesh, P(BATCH))
        self._variables = jax.device_put(variables, NamedSharding(mesh, P()))
        shared = jax.shard_map(model.apply, mesh=mesh, in_specs=(P(), P(BATCH)), out_specs=P(BATCH), check_vma=False)
        self._apply = jax.jit(shared)

    def rows(self, batch: Float[np.ndarray, "batch height width 3"]) -> Iterator[tuple[Mapping[str, Array], int]]:
        """(raw predictions on one device, the row's number in them) of each row; of several devices' one at a time."""
        if self._sharding is None:
            raw = self._apply(self._variables, batch)
            yield from ((raw, row) for row in range(len(batch)))
            return
        raw = self._apply(self._variables, jax.device_put(batch, self._sharding))
        home = self._sharding.mesh.devices.flat[0]
        shares = {name: _in_order(values) for name, values in raw.items()}
        for device in range(self._sharding.mesh.size):
            share = jax.device_put({name: values[device] for name, values in shares.items()}, home)
            yield from ((share, row) for row in range(len(next(iter(share.values())))))


def _in_order(values: Array) -> list[Array]:
    """The devices' shares, from the first row on."""
    shards = sorted(values.addressable_shards, key=lambda shard: shard.index[0].start or 0)
    return [shard.data for shard in shards]
