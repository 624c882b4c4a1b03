"""Dense cross-task attention as an nnx module."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.functional.cross_attention import cross_task_attention
from sgw_jax.functional.tokens import by_name, check_features
from sgw_jax.nnx.parameters import Dense, Initializer, Norm, params_of


class CrossTaskAttention(nnx.Module):
    """Every task's tokens attend to all tasks' tokens: `sgw_jax.CrossTaskAttention`, which has the maths, on flax.nnx.

    Args:
      channels: C, of the features.
      num_heads: h; divides C.
      rngs: draws the kernels, from its stream ``params``; it is not kept.
      query_chunk: queries at a time; None: all.
      pre_norm: LayerNorm on F before the projections.
      dtype: of the computation; softmax stays float32.
      param_dtype: of the parameters.
      kernel_init: of the four kernels; None is LeCun's normal.
      kernel_metadata: of the kernels' `nnx.Param`, such as their sharding.

    Call:
      features: mapping task -> (batch, *space, C), or a list or tuple of maps, or the entries as keyword arguments.
      mask: mapping task -> (batch, *space) bool, False for padding, which is not attended to and keeps its features.

    Returns:
      The same mapping (or list or tuple): keys, order, shapes and dtype.

    Raises:
      ValueError: channels that do not divide by the heads; features that do not fit together, masks of other tasks or
        shapes.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from sgw_jax.nnx import CrossTaskAttention
    >>> attention = CrossTaskAttention(channels=8, num_heads=2, rngs=nnx.Rngs(0))
    >>> depth, edges = attention([jnp.ones((2, 4, 4, 8)), jnp.ones((2, 8, 8, 8))])
    >>> depth.shape, edges.shape
    ((2, 4, 4, 8), (2, 8, 8, 8))
    """

    def __init__(
        self,
        channels: int,
        num_heads: int = 1,
        *,
        rngs: nnx.Rngs,
        query_chunk: int | None = 1024,
        pre_norm: bool = False,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer | None = None,
        kernel_metadata: Mapping[str, Any] | None = None,
    ):
        if channels % num_heads:
            raise InputError(f"CrossTaskAttention: channels = {channels} do not divide by num_heads = {num_heads}.")
        self.num_heads, self.query_chunk, self.dtype = num_heads, query_chunk, dtype
        options: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype, "kernel_init": kernel_init}
        options |= {"kernel_metadata": kernel_metadata, "use_bias": False}
        self.query = Dense(channels, channels, **options)
        self.key = Dense(channels, channels, **options)
        self.value = Dense(channels, channels, **options)
        self.output = Dense(channels, channels, **options)
        if pre_norm:
            self.norm = Norm(channels, param_dtype=param_dtype)

    def __call__(
        self,
        features: Mapping[str, Float[Array, "batch *space channels"]] | Sequence[Array] | None = None,
        *,
        mask: Mapping[str, Bool[Array, " batch *space"]] | Sequence[Array] | None = None,
        **named: Float[Array, "batch *space channels"],
    ) -> Any:
        maps, as_given = by_name(features, named, "CrossTaskAttention")
        real = None if mask is None else by_name(mask, {}, "CrossTaskAttention")[0]
        check_features(maps, "CrossTaskAttention")
        options: dict[str, Any] = {"num_heads": self.num_heads, "query_chunk": self.query_chunk, "dtype": self.dtype}
        return as_given(cross_task_attention(params_of(self), maps, mask=real, **options))
