"""Loads the authors' weights of the shared workspace (a PyTorch state_dict) into `SharedWorkspace`."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from sgw_jax.data_pipelines.errors import InputError

LINEAR = ("input_projector", "query_proj", "key_proj", "value_proj")
NORMS = ("attended_memory_layernorm", "attended_memory_layernorm2")
MLP = "attention_mlp"
GATES = (
    "input_gate_projector.w",
    "input_gate_projector.linear.weight",
    "input_gate_projector.linear.bias",
    "memory_gate_projector.weight",
    "memory_gate_projector.bias",
)
GATE_BIASES = ("input_bias", "forget_bias")


def shared_workspace_params(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The ``params`` of a `SharedWorkspace` from the authors' state_dict (arXiv 2103.01197, their released code).

    Names, with E the slots' width, L slots, h heads of key width d, inputs D wide, G = E ("unit") or 1 ("memory"):
    input_projector (E, D); query_proj, key_proj (h d, E); value_proj (E, E); attention_mlp.0, .1, ... (E, E), one
    layer under several names; attended_memory_layernorm and attended_memory_layernorm2 (E); and, all or none:
    input_gate_projector.w (E) and .linear (2G, E); memory_gate_projector.weight (L, E, 2G) and .bias (L, 2G);
    input_bias, forget_bias (). The authors' module has these last two without gates as well: without the projectors
    they are left out, for gate=None. torch keeps a linear map as (out, in): kernels are transposed.

    Args:
      state_dict: name -> array (anything `np.asarray` takes: NumPy, torch tensors on the CPU). A prefix from a larger
        model must be cut off first.

    Returns:
      The nested ``params``, NumPy float32.

    Raises:
      ValueError: names every tensor that is missing, unexpected or of another shape, and tied layers that differ.

    >>> import numpy as np
    >>> from sgw_jax import shared_workspace_params
    >>> maps = ("input_projector", "query_proj", "key_proj", "value_proj", "attention_mlp.0")
    >>> state_dict = {f"{name}.weight": np.eye(4) for name in maps}
    >>> state_dict |= {f"{name}.bias": np.zeros(4) for name in maps}
    >>> for norm in ("attended_memory_layernorm", "attended_memory_layernorm2"):
    ...     state_dict |= {f"{norm}.weight": np.ones(4), f"{norm}.bias": np.zeros(4)}
    >>> params = shared_workspace_params(state_dict)  # without gates: of SharedWorkspace(gate=None)
    >>> {name: value.shape for name, value in params["attention_mlp"].items()}
    {'kernel': (4, 4), 'bias': (4,)}
    """
    tensors = {name: np.asarray(value) for name, value in state_dict.items()}
    layers = sorted({name.split(".")[1] for name in tensors if name.startswith(f"{MLP}.")}, key=lambda n: (len(n), n))
    expected = _expected_shapes(tensors, layers)
    problems = [f"missing: {name} {shape}" for name, shape in expected.items() if name not in tensors]
    problems += [f"unexpected: {name} {tensors[name].shape}" for name in tensors if name not in expected]
    for name in expected.keys() & tensors.keys():
        found, wanted = tensors[name].shape, expected[name]
        if len(found) != len(wanted) or any(w not in (None, f) for f, w in zip(found, wanted, strict=True)):
            problems.append(f"shape of {name}: {found}, expected {wanted}")
    for layer in layers[1:]:
        for part in ("weight", "bias"):
            first, other = tensors.get(f"{MLP}.{layers[0]}.{part}"), tensors.get(f"{MLP}.{layer}.{part}")
            if first is not None and other is not None and not np.array_equal(first, other):
                problems.append(f"{MLP}.{layer}.{part} differs from layer {layers[0]}'s; the layers must be tied")
    if problems:
        raise InputError("shared_workspace_params: the state_dict does not fit.\n  " + "\n  ".join(sorted(problems)))

    def linear(name: str) -> dict[str, np.ndarray]:
        return {"kernel": _float32(tensors[f"{name}.weight"].T), "bias": _float32(tensors[f"{name}.bias"])}

    params: dict[str, Any] = {name: linear(name) for name in LINEAR}
    params[MLP] = linear(f"{MLP}.{layers[0]}")
    for name in NORMS:
        params[name] = {"scale": _float32(tensors[f"{name}.weight"]), "bias": _float32(tensors[f"{name}.bias"])}
    if GATES[0] in tensors:
        params["input_gate_projector"] = {
            "w": _float32(tensors["input_gate_projector.w"]),
            "linear": linear("input_gate_projector.linear"),
        }
        params["memory_gate_projector"] = {
            "kernel": _float32(tensors["memory_gate_projector.weight"]),  # (slot, in, out) already
            "bias": _float32(tensors["memory_gate_projector.bias"]),
        }
        params["input_bias"] = _float32(tensors["input_bias"])
        params["forget_bias"] = _float32(tensors["forget_bias"])
    return params


def _expected_shapes(tensors: Mapping[str, np.ndarray], layers: list[str]) -> dict[str, tuple[int | None, ...]]:
    """Every name with its shape, as far as the other tensors determine it (None where they do not)."""
    width = _axis(tensors, "value_proj.weight", 0)
    keys = _axis(tensors, "query_proj.weight", 0)
    shapes: dict[str, tuple[int | None, ...]] = {
        "input_projector.weight": (width, None),
        "query_proj.weight": (keys, width),
        "key_proj.weight": (keys, width),
        "value_proj.weight": (width, width),
        "input_projector.bias": (width,),
        "query_proj.bias": (keys,),
        "key_proj.bias": (keys,),
        "value_proj.bias": (width,),
    }
    for layer in layers or ["0"]:
        shapes |= {f"{MLP}.{layer}.weight": (width, width), f"{MLP}.{layer}.bias": (width,)}
    for name in NORMS:
        shapes |= {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    if any(name in tensors for name in GATES):
        slots = _axis(tensors, "memory_gate_projector.weight", 0)
        gates = _axis(tensors, "input_gate_projector.linear.weight", 0)
        gate_shapes = ((width,), (gates, width), (gates,), (slots, width, gates), (slots, gates))
        shapes |= dict(zip(GATES, gate_shapes, strict=True))
    if any(name in tensors for name in GATES + GATE_BIASES):
        shapes |= dict.fromkeys(GATE_BIASES, ())
    return shapes


def _axis(tensors: Mapping[str, np.ndarray], name: str, axis: int) -> int | None:
    return tensors[name].shape[axis] if name in tensors and tensors[name].ndim > axis else None


def _float32(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float32)
