"""Dense cross-task attention: every task's tokens attend to the tokens of all tasks (the baseline KEM argues with)."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, overload

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.functional.cross_attention import cross_task_attention
from sgw_jax.functional.tokens import by_name, check_features
from sgw_jax.layers.parameters import DenseParameters, Initializer, NormParameters

Maps = TypeVar("Maps", bound=Mapping[str, Array] | Sequence[Array])  # what comes in goes out


class CrossTaskAttention(nn.Module):
    """``F <- F + softmax((F W_q)(F W_k)^T / sqrt(C / h)) (F W_v) W_o`` over the tokens F of all tasks together.

    Cost O(n_s^2 C); memory O(n_s x query_chunk), because queries are taken a chunk at a time. No biases, as in KEM.

    Attributes:
      num_heads: h; must divide C.
      query_chunk: queries per chunk; None for all at once.
      pre_norm: LayerNorm on F before the projections.
      dtype: of the computation; softmax stays float32.
      param_dtype: of the parameters.
      kernel_init: of the four kernels.
      kernel_axes: logical names of the kernels' axes for partitioning, as in `KEM`.

    Call:
      features: mapping task -> (batch, *space, C), or a list or tuple of maps, or the entries as keyword arguments.
      mask: mapping task -> (batch, *space) bool, False for tokens that are padding: they are not attended to, and keep
        their features.

    Returns:
      The same mapping (or list or tuple): keys, order, shapes and dtype.

    Raises:
      ValueError: no task, tasks of different channels, batch size or dtype, channels that do not divide by the heads,
        masks of other tasks or shapes.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from sgw_jax import CrossTaskAttention
    >>> features = {"depth": jnp.ones((2, 4, 4, 8)), "edges": jnp.ones((2, 8, 8, 8))}
    >>> attention = CrossTaskAttention(num_heads=2)
    >>> variables = jax.jit(attention.init)(jax.random.key(0), features)
    >>> mixed = jax.jit(attention.apply)(variables, features)
    >>> {name: value.shape for name, value in mixed.items()}
    {'depth': (2, 4, 4, 8), 'edges': (2, 8, 8, 8)}
    """

    num_heads: int = 1
    query_chunk: int | None = 1024
    pre_norm: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    kernel_axes: tuple[str | None, str | None] | None = None

    @property
    def fixed_size(self) -> str:
        """Why a program for images of any size cannot be made; "" where it can."""
        return "" if self.query_chunk is None else f"cross attention takes query_chunk = {self.query_chunk} at a time"

    @overload
    def __call__(self, features: Maps, *, mask: Any = None) -> Maps: ...

    @overload
    def __call__(self, features: None = None, *, mask: Any = None, **named: Array) -> dict[str, Array]: ...

    @nn.compact
    def __call__(
        self,
        features: Mapping[str, Float[Array, "batch *space channels"]] | Sequence[Array] | None = None,
        *,
        mask: Mapping[str, Bool[Array, " batch *space"]] | Sequence[Array] | None = None,
        **named: Float[Array, "batch *space channels"],
    ) -> Any:
        features, as_given = by_name(features, named, "CrossTaskAttention")
        mask = None if mask is None else by_name(mask, {}, "CrossTaskAttention")[0]
        check_features(features, "CrossTaskAttention")
        channels = next(iter(features.values())).shape[-1]
        if channels % self.num_heads:
            raise InputError(
                f"CrossTaskAttention: the features' channels = {channels} do not divide by "
                f"num_heads = {self.num_heads}."
            )
        square = (channels, channels, False, self.kernel_init, self.param_dtype, self.kernel_axes)
        maps = ("query", "key", "value", "output")
        params: dict[str, Any] = {name: DenseParameters(*square, name=name)() for name in maps}
        if self.pre_norm:
            params["norm"] = NormParameters(channels, self.param_dtype, name="norm")()
        options: dict[str, Any] = {"num_heads": self.num_heads, "query_chunk": self.query_chunk, "dtype": self.dtype}
        return as_given(cross_task_attention(params, features, mask=mask, **options))
