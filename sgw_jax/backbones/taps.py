"""Where a backbone divides: below the taps the pretrained network, above them what the library adds to it."""

from collections.abc import Callable, Mapping

import flax.linen as nn
from jaxtyping import Array

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
