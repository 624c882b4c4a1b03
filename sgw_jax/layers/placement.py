"""Where a layer's inputs lie on a mesh: what a layer that works shard by shard has to know."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh

from sgw_jax.data_pipelines.errors import InputError


@dataclasses.dataclass(frozen=True)
class Placement:
    """Over which axes of a mesh the batch and the tokens are split.

    Attributes:
      batch: axes that split the batch, together.
      tokens: axis that splits the tokens (image rows); None, none does.
      mesh: None takes the mesh in force (`jax.set_mesh`). Without one, on one device, or inside a `shard_map` over
        these axes, the layer is an ordinary one: one network can be trained on a pod and loaded on a laptop.
      strict: whether an axis that the mesh in force does not have is an error; if not, it splits nothing.

    Raises:
      ValueError: an axis that the mesh lacks (of the mesh in force: in the layer's call); one axis for both.

    >>> from sgw_jax import KEM, Placement
    >>> placement = Placement(batch=("data",), tokens="rows")
    >>> placement.shards()  # without a mesh in force
    1
    >>> kem = KEM(num_slots=4, placement=placement)
    """

    batch: tuple[str, ...] = ()
    tokens: str | None = None
    mesh: Mesh | None = None
    strict: bool = True

    def __post_init__(self) -> None:
        if isinstance(self.batch, str) or self.tokens in self.batch:
            raise InputError(
                f"Placement: batch is {self.batch!r} and tokens {self.tokens!r}; give a tuple of axes that split the "
                "batch, and another axis, or None, for the tokens."
            )
        if self.mesh is not None:
            self._check(self.mesh)

    def _check(self, mesh: Mesh | AbstractMesh) -> None:
        """Raises for an axis that the mesh does not have; no mesh at all (one device, a laptop) splits nothing."""
        wanted = (*self.batch, *([] if self.tokens is None else [self.tokens]))
        unknown = [axis for axis in wanted if axis not in mesh.axis_names]
        if unknown and mesh.axis_names:
            raise InputError(
                f"Placement: the mesh has no axis {', '.join(map(repr, unknown))}; its axes are {mesh.axis_names}. "
                "Name those in batch and tokens, or make the mesh with these names."
            )

    def axes(self, batch_size: int) -> "Axes | None":
        """What can be split for a batch of this size; None if nothing.

        Rows that do not divide (one image for prediction) are left whole on every device.
        """
        mesh = jax.sharding.get_abstract_mesh() if self.mesh is None else self.mesh
        if self.strict:
            self._check(mesh)
        kinds = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))

        def free(axis: str | None) -> bool:
            return kinds.get(axis) == AxisType.Auto and mesh.shape[axis] > 1

        batch = tuple(axis for axis in self.batch if free(axis))
        if batch_size % math.prod(mesh.shape[axis] for axis in batch):
            batch = ()
        tokens = self.tokens if free(self.tokens) else None
        return Axes(batch, tokens, mesh) if batch or tokens else None

    def shards(self) -> int:
        """In how many parts the mesh in force splits the tokens."""
        axes = self.axes(1)
        return 1 if axes is None else axes.shards


@dataclasses.dataclass(frozen=True)
class Axes:
    """A placement on the mesh in force."""

    batch: tuple[str, ...]
    tokens: str | None
    mesh: Mesh | AbstractMesh

    @property
    def shards(self) -> int:
        """In how many parts the tokens are split."""
        return 1 if self.tokens is None else self.mesh.shape[self.tokens]

    def on_shards(self, function: Callable, in_specs: Any, out_specs: Any) -> Callable:
        """``function`` of what each device holds; other axes of the mesh stay the partitioner's."""
        names = {*self.batch, *([] if self.tokens is None else [self.tokens])}
        return jax.shard_map(function, mesh=self.mesh, in_specs=in_specs, out_specs=out_specs, axis_names=names)
