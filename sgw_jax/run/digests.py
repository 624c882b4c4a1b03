"""Digests of arrays: what the files of a checkpoint must give back, however the arrays lie over the devices."""

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, UInt32

from sgw_jax.sharding import from_all_processes, path_name

# Odd constants of well-mixed bits: the golden ratio's, and those of MurmurHash3's last step.
GOLDEN, FIRST, SECOND = np.array([0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35], np.uint32)


def digests(tree: Any) -> dict[str, str]:
    """Path -> digest of every array of a tree, 16 hexadecimal digits.

    An array's elements are read as unsigned words b_i of 32 bits (narrower ones padded with zeros, wider ones as two),
    i the position in the whole array. Its digest is sum_i w_i b_i modulo 2^32 for two sequences of odd weights w_i,
    pseudo-random in i. An odd weight times a change of one word is not 0 modulo 2^32, so that a change within one word,
    such as a flipped bit, is always seen; any other goes unseen with a chance of about 2^-63.

    The sums are exact and do not depend on how an array is split. Accelerators add up what they hold, and two words an
    array travel; on the CPU NumPy reads the same memory, and nothing is compiled.

    Args:
      tree: of arrays, each on one mesh or device. With several processes all of them must call it.
    """
    named = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
    on_host = {name: leaf for name, leaf in named.items() if _in_memory(leaf)}
    elsewhere = {name: on_devices(leaf) for name, leaf in named.items() if name not in on_host}
    sums = dict(zip(on_host, sums_on_host(list(on_host.values())), strict=True)) | jax.device_get(elsewhere)
    return {name: "".join(f"{word:08x}" for word in sums[name]) for name in named}


def on_devices(leaf: jax.Array) -> UInt32[Array, "2"]:
    """The sums of an array, by the devices that hold it, on all of them; arrays alike share one compiled program."""
    place = leaf.sharding
    return _program(place.mesh if isinstance(place, NamedSharding) else None)(leaf)


@functools.cache
def _program(mesh: Mesh | None) -> Callable[[jax.Array], UInt32[Array, "2"]]:
    def sums(leaf: jax.Array) -> UInt32[Array, "2"]:
        narrow = {1: jnp.uint8, 2: jnp.uint16}.get(leaf.dtype.itemsize, jnp.uint32)
        flag = leaf.dtype == jnp.bool_
        words = (leaf if flag else jax.lax.bitcast_convert_type(leaf, narrow)).astype(jnp.uint32)
        return _sums(jnp, words, [0] * words.ndim, words.shape)

    return jax.jit(sums, out_shardings=None if mesh is None else NamedSharding(mesh, P()))


def sums_on_host(leaves: Sequence[Any]) -> UInt32[np.ndarray, "arrays 2"]:
    """The sums of arrays in memory, with those of the other processes where an array lies with several."""
    sums = np.zeros((len(leaves), 2), np.uint32)
    for row, leaf in zip(sums, leaves, strict=True):
        for index, part in _parts(leaf):
            words, shape = _words(part), leaf.shape
            starts = [0 if axis.start is None else axis.start for axis in index] + [0] * (words.ndim - len(shape))
            row += _sums(np, words, starts, (*shape, *words.shape[len(shape) :]))
    shared = [isinstance(leaf, jax.Array) and not leaf.is_fully_addressable for leaf in leaves]
    if any(shared):
        sums[shared] = from_all_processes(sums[shared]).sum(axis=0, dtype=np.uint32)
    return sums


def _in_memory(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or next(iter(leaf.devices())).platform == "cpu"


def _parts(leaf: Any) -> list[tuple[tuple[slice, ...], np.ndarray]]:
    """Where each part of an array lies that this process is to count, and its elements; of copies one counts."""
    if not isinstance(leaf, jax.Array):
        return [((slice(None),) * np.ndim(leaf), np.asarray(leaf))]
    return [(shard.index, np.asarray(shard.data)) for shard in leaf.addressable_shards if shard.replica_id == 0]


def _words(part: np.ndarray) -> UInt32[np.ndarray, "..."]:
    width = part.dtype.itemsize
    words = part[..., None].view({1: np.uint8, 2: np.uint16}.get(width, np.uint32))
    return (words if width > 4 else words[..., 0]).astype(np.uint32, copy=False)


def _sums(xp: ModuleType, words: Any, starts: Sequence[int], shape: Sequence[int]) -> Any:
    """Both sums over a part that begins at `starts` of an array of words of that shape; xp: jax.numpy or numpy."""
    place = xp.zeros((1,) * max(words.ndim, 1), xp.uint32)
    for axis, (start, length) in enumerate(zip(starts, words.shape, strict=True)):
        stride = math.prod(shape[axis + 1 :])
        along = (start + xp.arange(length, dtype=xp.uint32)) * xp.asarray([stride % 2**32], xp.uint32)
        place = place + along.reshape((-1,) + (1,) * (words.ndim - axis - 1))
    weights = _mixed(place * GOLDEN + xp.uint32(1))
    first = xp.sum(words * (weights | 1), dtype=xp.uint32)
    return xp.stack([first, xp.sum(words * (_mixed(weights) | 1), dtype=xp.uint32)])


def _mixed(bits: Any) -> Any:
    """A bijection of 32 bits, each of which depends on all."""
    bits = (bits ^ (bits >> 16)) * FIRST
    bits = (bits ^ (bits >> 13)) * SECOND
    return bits ^ (bits >> 16)
