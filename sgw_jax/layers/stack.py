"""A stack of equal blocks as one scan, or as two where the lowest blocks are frozen."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sgw_jax.data_pipelines.errors import InputError


def scan_blocks(block: nn.Module, carry: Any, per_block: Any, *shared: Any, length: int, frozen: int = 0) -> Any:
    """Carries a value through ``length`` blocks; their parameters are one tree with a leading axis of blocks.

    ``block(carry, own, *shared) -> (carry, output)``. Compile time does not grow with the length, and FSDP gathers one
    block at a time. The gradient ends above the ``frozen`` lowest blocks: they run as a scan of their own, through
    which nothing is differentiated, so that a program that takes no gradient of their parameters has no backward pass
    of them and keeps nothing for it. The parameters do not depend on it.

    Args:
      block: not yet called; it names the parameters.
      carry: what goes from block to block.
      per_block: a tree of arrays with a leading axis of blocks, such as drop path rates.
      shared: what every block gets.
      length: number of blocks.
      frozen: at most ``length``.

    Returns:
      (carry, outputs), the outputs as a list by block.
    """
    if block.is_initializing() or frozen == 0:
        carry, outputs = _scan(length)(block, carry, per_block, *shared)
        return carry, _listed(outputs, length)
    low = nn.map_variables(_scan(frozen), "params", lambda tree: jax.lax.stop_gradient(_rows(tree, 0, frozen)))
    carry, outputs = low(block, jax.lax.stop_gradient(carry), _rows(per_block, 0, frozen), *shared)
    below = _listed(outputs, frozen)
    if frozen == length:
        return carry, below
    high = nn.map_variables(_scan(length - frozen), "params", lambda tree: _rows(tree, frozen, length))
    carry, outputs = high(block, carry, _rows(per_block, frozen, length), *shared)
    return carry, [*below, *_listed(outputs, length - frozen)]


def drop_rates(last: float, length: int, frozen: int = 0) -> Float[Array, " length"]:
    """Of drop path: linear from 0 at the first block to ``last`` at the last, and 0 in the frozen ones, which thereby
    compute the same in training and evaluation."""
    return jnp.where(jnp.arange(length) < frozen, 0.0, jnp.linspace(0.0, last, length))


def frozen_of(frozen: int, first: int, length: int) -> int:
    """How many of a backbone's ``frozen`` lowest blocks lie in a stack of ``length`` that begins at block ``first``."""
    return min(max(frozen - first, 0), length)


def check_frozen(kind: str, frozen: int, length: int, unit: int = 1) -> None:
    """Raises a ValueError unless so many of a backbone's ``length`` blocks can be frozen: multiples of ``unit``."""
    if not 0 <= frozen <= length or frozen % unit:
        pairs = f", a multiple of {unit} (blocks come in pairs)" if unit > 1 else ""
        raise InputError(
            f"{kind}: frozen_layers is {frozen}; it has {length} blocks, of which 0 to {length} can be frozen{pairs}; "
            "in a configuration the key is config.optimizer.frozen_layers (backbone_scale=0 freezes all)."
        )


def _scan(length: int) -> Callable[..., Any]:
    def scanned(block: nn.Module, carry: Any, own: Any, *shared: Any) -> Any:
        lifted = nn.scan(
            lambda module, carry, own, *shared: module(carry, own, *shared),
            variable_axes={"params": 0},
            split_rngs={"params": True, "drop_path": True},
            in_axes=(0, *(nn.broadcast for _ in shared)),
            length=length,
        )
        return lifted(block, carry, own, *shared)

    return scanned


def _rows(tree: Any, first: int, end: int) -> Any:
    return jax.tree.map(lambda leaf: leaf[first:end], tree)


def _listed(outputs: Any, length: int) -> list[Any]:
    return [jax.tree.map(lambda leaf, i=i: leaf[i], outputs) for i in range(length)]
