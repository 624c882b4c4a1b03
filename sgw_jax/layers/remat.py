"""Rematerialisation: what a block keeps for the backward pass and what it computes again."""

from typing import Any

import flax.linen as nn
import jax

from sgw_jax.data_pipelines.errors import InputError

# "full" keeps a block's input alone; "dots" also the results of its matrix products that have no batch axis (the
# projections and the MLP, not the attention scores), so that little more than norms and softmaxes are computed twice.
POLICIES: dict[str, Any] = {
    "none": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def rematerialised(block: type[nn.Module], policy: str) -> type[nn.Module]:
    """The block under a policy of `POLICIES`, for use inside a scan.

    Raises:
      ValueError: an unknown policy.
    """
    if policy not in POLICIES:
        raise InputError(f"remat is {policy!r}; it must be one of {list(POLICIES)}.")
    return block if policy == "none" else nn.remat(block, prevent_cse=False, policy=POLICIES[policy])
