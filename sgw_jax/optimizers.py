"""The Optax chain: clipping, AdamW, Muon or SGD, decay mask, schedule, and rates by layer."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from sgw_jax.backbones.layer_rates import scale_by_layer, scale_lora
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.layers.parameter_names import is_kernel
from sgw_jax.sharding import path_name

OPTIMIZERS = ("adamw", "muon", "sgd")
SCHEDULES = ("poly", "cosine", "constant", "step")


def learning_rate_schedule(
    peak: float,
    total_steps: int,
    warmup_steps: int = 0,
    schedule: Literal["poly", "cosine", "constant", "step"] = "poly",
) -> optax.Schedule:
    """Linear warm-up, ``peak (step + 1) / warmup_steps``, then ``peak`` times a decay.

    With x in [0, 1] the share of the steps after the warm-up: "poly" is (1 - x)^0.9 (the field's recipe), "cosine" is
    (1 + cos(pi x)) / 2, "constant" is 1, "step" is 1 before x = 1/2 and 1/2 from there (LibMTL's).
    """
    if not 0 <= peak < math.inf:
        raise InputError(f"schedule: the peak is {peak}; it must not be negative.")
    if not 0 <= warmup_steps < total_steps:
        raise InputError(f"schedule: warmup_steps {warmup_steps} must be in [0, total_steps = {total_steps}).")
    steps = total_steps - warmup_steps
    decays = {
        "poly": lambda: optax.polynomial_schedule(peak, 0.0, power=0.9, transition_steps=steps),
        "cosine": lambda: optax.cosine_decay_schedule(peak, steps),
        "constant": lambda: optax.constant_schedule(peak),
        "step": lambda: optax.piecewise_constant_schedule(peak, {(steps + 1) // 2: 0.5}),
    }
    if schedule not in SCHEDULES:
        raise InputError(f"schedule: {schedule!r}; it must be one of {sorted(SCHEDULES)}.")
    if warmup_steps == 0:
        return decays[schedule]()
    # The first update is at step 0: starting at peak / warmup_steps keeps it from being lost.
    warmup = optax.linear_schedule(peak / warmup_steps, peak, max(warmup_steps - 1, 1))
    return optax.join_schedules([warmup, decays[schedule]()], [warmup_steps])


def learning_rates(schedule: optax.Schedule, steps: int) -> np.ndarray:
    """The rate of every step, on the host: asking the schedule itself would queue behind the steps in flight."""
    return np.asarray(jax.vmap(schedule)(jnp.arange(steps)))


def make_optimizer(
    learning_rate: optax.Schedule | float,
    *,
    name: Literal["adamw", "muon", "sgd"] = "adamw",
    weight_decay: float = 0.0,
    b1: float = 0.9,
    b2: float = 0.999,
    momentum: float = 0.9,
    muon_rms: float = 0.2,
    clip_norm: float | None = None,
    backbone_scale: float = 1.0,
    layer_decay: float = 1.0,
    lora_scale: float = 1.0,
) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW (Loshchilov and Hutter 2019), Muon or SGD with momentum, then the learning rate.

    Muon (Jordan et al. 2024, Optax's) replaces the momentum of every kernel by the nearest orthogonal matrix, five
    Newton-Schulz steps away, so that all directions of a matrix learn alike; what is no kernel gets Adam with Nesterov
    momentum. A kernel's entries then move by ``muon_rms`` times the learning rate (Liu et al. 2025, arXiv 2502.16982:
    0.2, about what Adam's do, so that one learning rate serves both).

    Weight decay is decoupled and applies to kernels alone. Updates of the backbone's pretrained layers are multiplied
    by ``backbone_scale`` (0 keeps them as they are; `make_train_step(..., trained=...)` spares their gradients too) and
    by ``layer_decay`` to the power of the number of layers above, see layer_rates.py, which equals learning rates of
    their own; those of LoRA's factors by ``lora_scale``; what a model adds to a backbone learns at the full rate.

    Raises:
      ValueError: an unknown name; ``clip_norm``, ``muon_rms`` or ``lora_scale`` that is not positive (None is no
        clipping); a learning rate, ``weight_decay`` or ``backbone_scale`` below 0; ``b1``, ``b2`` or ``momentum``
        outside [0, 1), ``layer_decay`` outside (0, 1].
    """
    inner = {
        "adamw": lambda: optax.scale_by_adam(b1=b1, b2=b2),
        "muon": lambda: _scale_by_muon(muon_rms, b1, b2),
        "sgd": lambda: optax.trace(decay=momentum) if momentum else optax.identity(),
    }
    if name not in OPTIMIZERS:
        raise InputError(f"optimizer: name {name!r}; it must be one of {sorted(OPTIMIZERS)}.")
    if clip_norm is not None and not 0 < clip_norm < math.inf:
        raise InputError(f"optimizer: clip_norm is {clip_norm}; it must be positive, or None for no clipping.")
    if isinstance(learning_rate, int | float) and not 0 <= learning_rate < math.inf:
        raise InputError(f"optimizer: learning_rate is {learning_rate}; it must not be negative.")
    if not 0 < muon_rms < math.inf:
        raise InputError(f"optimizer: muon_rms is {muon_rms}; it must be positive.")
    if not 0 <= weight_decay < math.inf:
        raise InputError(f"optimizer: weight_decay is {weight_decay}; it must not be negative.")
    for average, decay in (("b1", b1), ("b2", b2), ("momentum", momentum)):
        if not 0 <= decay < 1:
            raise InputError(f"optimizer: {average} is {decay}; it must be in [0, 1).")
    steps = [] if clip_norm is None else [optax.clip_by_global_norm(clip_norm)]
    steps.append(inner[name]())
    if weight_decay:
        steps.append(optax.add_decayed_weights(weight_decay, mask=decay_mask))
    if (backbone_scale, layer_decay) != (1.0, 1.0):
        steps.append(scale_by_layer(backbone_scale, layer_decay))
    if lora_scale != 1.0:
        steps.append(scale_lora(lora_scale))
    steps.append(optax.scale_by_learning_rate(learning_rate))
    return optax.chain(*steps)


def _scale_by_muon(rms: float, b1: float, b2: float) -> optax.GradientTransformation:
    """The direction alone, as `optax.scale_by_adam` gives it: rate and decay come later in the chain, for all alike."""
    descend = optax.contrib.muon(
        1.0, consistent_rms=rms, adam_b1=b1, adam_b2=b2, muon_weight_dimension_numbers=_matrix_axes
    )
    return optax.chain(descend, optax.scale(-1.0))


def _matrix_axes(params: Any) -> Any:
    """Which axes of a leaf make a matrix, for Muon: kernels end in (in, out) or (height, width, in, out), behind the
    leading axis of a scanned stack where there is one; None for every other leaf."""

    def axes(path: Any, leaf: Any) -> optax.contrib.MuonDimensionNumbers | None:
        if not is_kernel(path_name(path)) or leaf.ndim < 2:
            return None
        inputs = (leaf.ndim - 4, leaf.ndim - 3, leaf.ndim - 2) if leaf.ndim >= 4 else (leaf.ndim - 2,)
        return optax.contrib.MuonDimensionNumbers(inputs, leaf.ndim - 1)

    return jax.tree_util.tree_map_with_path(axes, params)


def decay_mask(params: Any) -> Any:
    """True for the leaves that weight decay shrinks: kernels. All else keeps its scale."""
    return jax.tree_util.tree_map_with_path(lambda path, _: is_kernel(path_name(path)), params)
