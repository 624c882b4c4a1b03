"""Slots that last: the workspace of one frame of a video starts that of the next."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.model import MultiTaskModel


class CarriedSlots:
    """A network over the frames of a video, one call a frame, in order; in place of a predictor's own (`with_network`).

    Frame t starts from R_t = share * L_(t-1) + (1 - share) * R_0, where L_(t-1) are the slots that frame t - 1 left and
    R_0 those that the network starts an image from; the first frame starts from R_0, like an image. (Our decision: the
    paper's workspace lasts over the steps of a sequence, its networks for images have no sequence.) What is compiled is
    a pure function, slots in and slots out; this object holds them between calls.

    Args:
      network: with slots: KEM, sKEM or the shared workspace.
      variables: its collections.
      share: how much of the slots comes from the frame before, in (0, 1].

    Raises:
      ValueError: a network without slots, or one read from a StableHLO file; another share.
    """

    def __init__(self, network: Any, variables: Mapping[str, Any], share: float = 1.0):
        if not isinstance(network, MultiTaskModel) or not network.starts:
            kind = type(network.interaction if isinstance(network, MultiTaskModel) else network).__name__
            raise InputError(
                f"carry_slots needs a network whose interaction has slots (kem, skem, shared_workspace); this one's is "
                f"{kind}, in which nothing lasts from frame to frame. Leave the option out."
            )
        number = isinstance(share, int | float) and not isinstance(share, bool)
        if not (number and 0 < share <= 1):
            raise InputError(
                f"carry_slots is {share!r}; give the share of the slots that comes from the frame before, a number "
                "above 0 and at most 1."
            )
        self._network, self._variables, self._share = network, variables, float(share)
        self._initial = jax.jit(network.initial_slots, static_argnums=1)
        self._step = jax.jit(self._stepped)
        self._slots: dict[int, Array] | None = None

    def restart(self) -> None:
        """The next call is the first frame of another video."""
        self._slots = None

    def rows(self, batch: Float[np.ndarray, "batch height width 3"]) -> Iterator[tuple[Mapping[str, Array], int]]:
        """Raw predictions of a frame, as `MultiTaskModel` gives them, and the number of each row.

        Args:
          batch: a frame, normalised, in one row; or frames of one time of several videos.

        Returns:
          ({task: (batch, H, W, head width)} float32, row) of each row.
        """
        if self._slots is None:
            self._slots = self._initial(self._variables["params"], len(batch))
        predictions, self._slots = self._step(self._variables, batch, self._slots)
        yield from ((predictions, row) for row in range(len(batch)))

    def _stepped(
        self, variables: Mapping[str, Any], images: Array, slots: dict[int, Array]
    ) -> tuple[dict[str, Array], dict[int, Array]]:
        """Predictions, and what the next frame starts from."""
        predictions, left = self._network.apply(variables, images, slots=slots, return_slots=True)
        initial = self._network.initial_slots(variables["params"], images.shape[0])
        mixed = jax.tree.map(lambda new, old: self._share * new + (1 - self._share) * old, left, initial)
        return predictions, mixed
