"""LoRA's factors apart from the network: merged into its matrices, or saved alone."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax.traverse_util import flatten_dict, unflatten_dict

from sgw_jax.data_pipelines.atomic import write_atomically
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.layers.lora import LoRA
from sgw_jax.layers.parameter_names import KERNEL, LORA, is_lora

__all__ = ["factors_of", "load_factors", "merged", "save_factors"]


def merged(params: Mapping[str, Any], lora: LoRA) -> dict[str, Any]:
    """The parameters of the network without LoRA that computes the same: W + (alpha / rank) A B in place of W, A and B.

    Args:
      params: nested; leaves of a stack of blocks have its axis before their own.
      lora: what they were trained with.
    """
    tree: dict[str, Any] = {
        key: merged(value, lora) if isinstance(value, Mapping) else value for key, value in params.items()
    }
    if LORA not in tree:
        return tree
    factors = tree.pop(LORA)
    product = jnp.einsum("...mir,...mro->...imo", factors["a"], factors["b"], precision="highest")
    kernel = tree[KERNEL]
    return {**tree, KERNEL: kernel + (lora.alpha / lora.rank) * product.reshape(kernel.shape)}


def factors_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """LoRA's parameters alone, {"backbone/blocks/mlp/hidden/lora/a": array}."""
    return {path: leaf for path, leaf in flatten_dict(params, sep="/").items() if is_lora(path)}


def save_factors(path: Path | str, params: Mapping[str, Any], lora: LoRA) -> None:
    """Writes LoRA's parameters, and rank, alpha and targets, as one safetensors file: megabytes where the network has
    hundreds."""
    arrays = {name: np.asarray(leaf) for name, leaf in factors_of(params).items()}
    if not arrays:
        raise InputError(f"{path}: the parameters hold no LoRA.")
    write_atomically(Path(path), safetensors.numpy.save(arrays, {LORA: json.dumps(dataclasses.asdict(lora))}))


def load_factors(path: Path | str, params: Mapping[str, Any]) -> tuple[dict[str, Any], LoRA]:
    """The parameters with the factors of a file of `save_factors` put where they belong, whether or not there were any.

    Raises:
      ValueError: no such file; factors that do not fit a kernel of ``params``.
    """
    try:
        with safetensors.safe_open(path, "numpy") as file:
            described = json.loads(file.metadata()[LORA])
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
    except (OSError, safetensors.SafetensorError, KeyError, TypeError) as error:
        raise InputError(f"{path} is no file of LoRA's factors ({error}); `save_factors` writes them.") from error
    leaves = flatten_dict(params, sep="/")
    for name, value in arrays.items():
        *parents, _, last = name.split("/")
        kernel = leaves.get("/".join([*parents, KERNEL]))
        side = {"a": -2, "b": -1}[last]
        sizes = value.shape[side] * (value.shape[-3] if last == "b" else 1)
        if kernel is None or kernel.shape[side] != sizes or kernel.shape[:-2] != value.shape[:-3]:
            raise InputError(f"{path}: {name} of shape {value.shape} fits no kernel of this network.")
        leaves[name] = value
    return unflatten_dict(leaves, sep="/"), LoRA(**{**described, "targets": tuple(described["targets"])})
