"""Where a backbone divides: below the taps the pretrained network, above them what the library adds to it."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from sgw_jax.data_pipelines import batch_names

# Maps of the pretrained network by name, each (batch, h, w, width): all that what is added sees of it.
Taps = Mapping[str, Array]

TAPS = "taps"


def known_taps(backbone: nn.Module, taps: Taps | None, compute: Callable[[], dict[str, Array]]) -> Taps:
    """The taps that are given, or those computed now, which are sown as the intermediate ``taps``.

    No parameter that `parameter_names.is_added` names has a part in them. So those of a pretrained network that is
    frozen are a function of the image alone, and may be computed once (run/backbone_cache.py).

    Args:
      backbone: whose taps they are.
      taps: what ``compute`` gave before for the same image, or None.
      compute: makes them.
    """
    if taps is not None:
        return taps
    taps = compute()
    backbone.sow("intermediates", TAPS, taps)
    return taps


def taps_of(batch: Mapping[str, Any]) -> dict[str, Any]:
    """What a call of the model is told of the batch's taps, ``taps/NAME`` each: of a frozen backbone, read from a cache
    (data_pipelines/tap_cache.py), bfloat16 as its 16 bits. Nothing where there are none."""
    found = {
        name.removeprefix(batch_names.TAPS): value for name, value in batch.items() if name.startswith(batch_names.TAPS)
    }
    typed = {
        name: jax.lax.bitcast_convert_type(value, jnp.bfloat16) if value.dtype == jnp.uint16 else value
        for name, value in found.items()
    }
    return {"taps": typed} if typed else {}
