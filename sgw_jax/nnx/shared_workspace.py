"""The shared global workspace as an nnx module."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from sgw_jax.functional.shared_workspace import check_workspace, initial_slots, shared_workspace
from sgw_jax.layers.placement import Placement
from sgw_jax.nnx.parameters import Dense, Initializer, Norm, lecun_normal, params_of


class _InputGate(nnx.Module):
    def __init__(self, width: int, gates: int, **options: Any):
        self.w = nnx.Param(jax.random.normal(options["rngs"].params(), (width,), options["param_dtype"]))
        self.linear = Dense(width, gates, **options)


class _SlotGate(nnx.Module):
    def __init__(self, count: int, width: int, gates: int, rngs: nnx.Rngs, param_dtype: Any):
        self.kernel = nnx.Param(lecun_normal(batch_axis=0)(rngs.params(), (count, width, gates), param_dtype))
        self.bias = nnx.Param(jnp.zeros((count, gates), param_dtype))


class SharedWorkspace(nnx.Module):
    """A memory of slots that inputs compete to write to: `sgw_jax.SharedWorkspace`, which has the maths, on flax.nnx.

    Args:
      inputs: D, the width of the inputs.
      num_slots: L.
      num_heads: of keys and values.
      head_dim: of the values; E = num_heads x head_dim.
      rngs: draws the parameters, from its stream ``params``; it is not kept.
      key_dim: of queries and keys, per head; None means head_dim.
      top_k: weights a slot keeps per head; None: all.
      gate: "unit" (a gate per unit of a slot), "memory" (one per slot) or None.
      mlp_layers: how often the tied layer runs, at least 1.
      rounds: how often the write runs, at least 1.
      placement: how batch and tokens of the write are split over a mesh.
      dtype: of the computation; scores and softmax stay float32.
      param_dtype: of the parameters.
      kernel_init: of the linear maps' kernels; None is LeCun's normal.
      kernel_metadata: of the linear maps' kernels, such as their sharding.

    Call:
      inputs: (batch, N, D).
      slots: (batch, L, E), the state to start from; None is eye(L) padded to E.
      mask: (batch, N) bool, False for padding, which no slot reads and to which 0 is broadcast.

    Returns:
      (broadcast (batch, N, E), the new slots (batch, L, E)).

    Raises:
      ValueError: an unknown gate, a count below 1, slots of another shape.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from sgw_jax.nnx import SharedWorkspace
    >>> workspace = SharedWorkspace(inputs=7, num_slots=3, num_heads=2, head_dim=4, rngs=nnx.Rngs(0))
    >>> broadcast, slots = workspace(jnp.ones((2, 6, 7)))
    >>> broadcast.shape, slots.shape
    ((2, 6, 8), (2, 3, 8))
    """

    def __init__(
        self,
        inputs: int,
        num_slots: int,
        num_heads: int,
        head_dim: int,
        *,
        rngs: nnx.Rngs,
        key_dim: int | None = None,
        top_k: int | None = None,
        gate: Literal["unit", "memory"] | None = "unit",
        mlp_layers: int = 1,
        rounds: int = 1,
        placement: Placement | None = None,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer | None = None,
        kernel_metadata: Mapping[str, Any] | None = None,
    ):
        self.num_slots, self.num_heads, self.head_dim = num_slots, num_heads, head_dim
        self.key_dim = head_dim if key_dim is None else key_dim
        self.top_k, self.gate, self.mlp_layers, self.rounds = top_k, gate, mlp_layers, rounds
        self.placement, self.dtype = placement, dtype
        check_workspace(self, self.key_dim)
        width, keys = num_heads * head_dim, num_heads * self.key_dim
        of_dense: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype, "kernel_init": kernel_init}
        options = of_dense | {"kernel_metadata": kernel_metadata}
        self.input_projector = Dense(inputs, width, **options)
        self.query_proj = Dense(width, keys, **options)
        self.key_proj = Dense(width, keys, **options)
        self.value_proj = Dense(width, width, **options)
        self.attention_mlp = Dense(width, width, **options)
        self.attended_memory_layernorm = Norm(width, param_dtype=param_dtype)
        self.attended_memory_layernorm2 = Norm(width, param_dtype=param_dtype)
        if gate is not None:
            gates = 2 * (width if gate == "unit" else 1)
            self.input_gate_projector = _InputGate(width, gates, **of_dense)
            self.memory_gate_projector = _SlotGate(num_slots, width, gates, rngs, param_dtype)
            self.input_bias = nnx.Param(jnp.zeros((), param_dtype))
            self.forget_bias = nnx.Param(jnp.ones((), param_dtype))

    def __call__(
        self,
        inputs: Float[Array, "batch tokens width"],
        slots: Float[Array, "batch slots unit"] | None = None,
        mask: Bool[Array, "batch tokens"] | None = None,
    ) -> tuple[Float[Array, "batch tokens unit"], Float[Array, "batch slots unit"]]:
        shape = (inputs.shape[0], self.num_slots, self.num_heads * self.head_dim)
        names = ("num_heads", "top_k", "gate", "mlp_layers", "rounds", "placement", "dtype")
        options = {name: getattr(self, name) for name in names}
        start = initial_slots(shape, slots, self.dtype)
        return shared_workspace(params_of(self), inputs, slots=start, mask=mask, **options)
