"""The shared global workspace that KEM descends from (Goyal et al. 2021), numerically equal to the authors' code."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar, overload

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.functional.shared_workspace import check_workspace, initial_slots, shared_workspace, workspace_interaction
from sgw_jax.functional.tokens import by_name, check_features
from sgw_jax.layers.parameters import DenseParameters, Initializer, NormParameters
from sgw_jax.layers.placement import Placement


class SharedWorkspace(nn.Module):
    """A memory of L slots that inputs compete to write to and that is broadcast back (arXiv 2103.01197, section 2).

    Numerically the authors' relational memory, given their weights (see shared_workspace_checkpoint.py). With
    E = num_heads x head_dim the width of a slot, X = inputs W_in + b and A the attention below:

      write      mem <- LN_1(mem + A(mem, X)),  mem <- LN_2(mem + MLP(mem)),  ``rounds`` times with the same weights
      gate       next = i * tanh(mem) + f * m_0, with i and f sigmoids of m_0 and of the mean over tokens of relu(w * X)
      broadcast  A(X, next), without gate, residual or norm

    A(a, b) = softmax(q(a) k(b)^T) v(b) by head, with biases, WITHOUT the factor 1 / sqrt(key_dim) and without an output
    projection. In the write the softmax runs over the tokens; with ``top_k`` the k largest weights of each slot are
    kept as they are, NOT renormalised (the "hard competition"); in the broadcast it runs over the slots, all of them.
    The MLP is one tied layer, ``mlp_layers`` times, with a ReLU after every time.

    Attributes:
      num_slots: L.
      num_heads: of keys and values.
      head_dim: of the values; E = num_heads x head_dim.
      key_dim: of queries and keys, per head; None means head_dim.
      top_k: weights a slot keeps per head; None (or >= N) is soft competition.
      gate: "unit" (a gate per unit of a slot), "memory" (one per slot) or None (next = mem).
      mlp_layers: how often the tied layer runs, at least 1.
      rounds: how often the write runs, at least 1.
      dtype: of the computation; scores and softmax stay float32.
      placement: how batch and tokens of the write are split over a mesh, see `Placement`.
      param_dtype: of the parameters.
      kernel_init: of the linear maps' kernels.
      kernel_axes: logical names of the kernels' axes for partitioning, as in `KEM`.

    Call:
      inputs: (batch, N, D).
      slots: (batch, L, E), the state to start from; None is the authors' eye(L) padded to E.
      mask: (batch, N) bool, False for tokens that are padding, which no slot reads and to which 0 is broadcast.

    Returns:
      (broadcast (batch, N, E), the new slots (batch, L, E)).

    Raises:
      ValueError: an unknown gate, a count below 1, slots of another shape.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from sgw_jax import SharedWorkspace
    >>> workspace = SharedWorkspace(num_slots=3, num_heads=2, head_dim=4, top_k=5)
    >>> tokens = jnp.ones((2, 6, 7))
    >>> variables = jax.jit(workspace.init)(jax.random.key(0), tokens)
    >>> broadcast, slots = jax.jit(workspace.apply)(variables, tokens)
    >>> broadcast.shape, slots.shape
    ((2, 6, 8), (2, 3, 8))
    """

    num_slots: int
    num_heads: int
    head_dim: int
    key_dim: int | None = None
    top_k: int | None = None
    gate: Literal["unit", "memory"] | None = "unit"
    mlp_layers: int = 1
    rounds: int = 1
    dtype: Any = jnp.float32
    placement: Placement | None = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    kernel_axes: tuple[str | None, str | None] | None = None

    def __call__(
        self,
        inputs: Float[Array, "batch tokens width"],
        slots: Float[Array, "batch slots unit"] | None = None,
        mask: Bool[Array, "batch tokens"] | None = None,
    ) -> tuple[Float[Array, "batch tokens unit"], Float[Array, "batch slots unit"]]:
        start = self.start(inputs.shape[0], slots)
        return shared_workspace(self.parameters(inputs.shape[-1]), inputs, slots=start, mask=mask, **self.options())

    def start(self, batch: int, slots: Array | None) -> Float[Array, "batch slots unit"]:
        """The slots to start from: those given, or the authors'."""
        return initial_slots((batch, self.num_slots, self.num_heads * self.head_dim), slots, self.dtype)

    def options(self) -> dict[str, Any]:
        """Of the function behind the module."""
        names = ("num_heads", "top_k", "gate", "mlp_layers", "rounds", "placement", "dtype")
        return {name: getattr(self, name) for name in names}

    @nn.compact
    def parameters(self, inputs: int) -> dict[str, Any]:
        """Of a workspace for inputs of this width, in the structure of `functional.shared_workspace`."""
        key_dim = self.head_dim if self.key_dim is None else self.key_dim
        check_workspace(self, key_dim)
        width, keys = self.num_heads * self.head_dim, self.num_heads * key_dim
        maps = {
            "input_projector": (inputs, width),
            "query_proj": (width, keys),
            "key_proj": (width, keys),
            "value_proj": (width, width),
            "attention_mlp": (width, width),
        }
        params: dict[str, Any] = {
            name: DenseParameters(*sizes, True, self.kernel_init, self.param_dtype, self.kernel_axes, name=name)()
            for name, sizes in maps.items()
        }
        for name in ("attended_memory_layernorm", "attended_memory_layernorm2"):
            params[name] = NormParameters(width, self.param_dtype, name=name)()
        if self.gate is not None:
            gates = 2 * (width if self.gate == "unit" else 1)
            of_inputs = _InputGate(width, gates, self.kernel_init, self.param_dtype, name="input_gate_projector")
            params["input_gate_projector"] = of_inputs()
            of_slots = _SlotGate(self.num_slots, width, gates, self.param_dtype, name="memory_gate_projector")
            params["memory_gate_projector"] = of_slots()
            for name, start in (("input_bias", nn.initializers.zeros), ("forget_bias", nn.initializers.ones)):
                params[name] = self.param(name, start, (), self.param_dtype)
        return params


class _InputGate(nn.Module):
    """Parameters of ``mean over tokens of relu(w * X)`` and of the linear map behind it."""

    width: int
    gates: int
    kernel_init: Initializer
    param_dtype: Any

    @nn.compact
    def __call__(self) -> dict[str, Any]:
        scale = self.param("w", nn.initializers.normal(1.0), (self.width,), self.param_dtype)
        linear = DenseParameters(self.width, self.gates, True, self.kernel_init, self.param_dtype, name="linear")
        return {"w": scale, "linear": linear()}


class _SlotGate(nn.Module):
    """A matrix and a bias for each slot."""

    count: int
    width: int
    gates: int
    param_dtype: Any

    @nn.compact
    def __call__(self) -> dict[str, Array]:
        start, shape = nn.initializers.lecun_normal(batch_axis=0), (self.count, self.width, self.gates)
        bias = self.param("bias", nn.initializers.zeros, (self.count, self.gates), self.param_dtype)
        return {"kernel": self.param("kernel", start, shape, self.param_dtype), "bias": bias}


Maps = TypeVar("Maps", bound=Mapping[str, Array] | Sequence[Array])  # what comes in goes out

# What `WorkspaceInteraction` hands on as it is.
WORKSPACE_OPTIONS = (
    *("num_slots", "num_heads", "key_dim", "top_k", "gate", "mlp_layers", "rounds", "dtype", "placement"),
    *("param_dtype", "kernel_init", "kernel_axes"),
)


class WorkspaceInteraction(nn.Module):
    """``F <- F + broadcast(LN(F))`` over the tokens F of all tasks together; the slots restart unless given.

    The residual and the norm are what the authors' transformer has around its workspace. The slots are as wide as the
    features: head_dim = C / num_heads.

    Attributes: as those of `SharedWorkspace`.

    Call: mapping task -> (batch, *space, C) and, if wanted, the slots (batch, num_slots, C) to start from; returns the
    same mapping, shapes and key order, with ``return_slots`` a pair with the new slots.
    """

    num_slots: int = 8
    num_heads: int = 1
    key_dim: int | None = None
    top_k: int | None = None
    gate: Literal["unit", "memory"] | None = "unit"
    mlp_layers: int = 1
    rounds: int = 1
    dtype: Any = jnp.float32
    placement: Placement | None = None
    param_dtype: Any = jnp.float32
    kernel_init: Initializer = nn.initializers.lecun_normal()
    kernel_axes: tuple[str | None, str | None] | None = None

    has_slots = True

    @overload
    def __call__(
        self,
        features: Maps,
        slots: Array | None = None,
        return_slots: Literal[False] = False,
        *,
        mask: Any = None,
    ) -> Maps: ...

    @overload
    def __call__(
        self,
        features: Maps,
        slots: Array | None = None,
        *,
        return_slots: Literal[True],
        mask: Any = None,
    ) -> tuple[Maps, Array]: ...

    @overload
    def __call__(
        self,
        features: Maps,
        slots: Array | None,
        return_slots: Literal[True],
        *,
        mask: Any = None,
    ) -> tuple[Maps, Array]: ...

    @overload
    def __call__(
        self,
        features: None = None,
        slots: Array | None = None,
        return_slots: Literal[False] = False,
        *,
        mask: Any = None,
        **named: Array,
    ) -> dict[str, Array]: ...

    @nn.compact
    def __call__(
        self,
        features: Mapping[str, Float[Array, "batch *space channels"]] | Sequence[Array] | None = None,
        slots: Float[Array, "batch slots channels"] | None = None,
        return_slots: bool = False,
        *,
        mask: Mapping[str, Bool[Array, " batch *space"]] | Sequence[Array] | None = None,
        **named: Float[Array, "batch *space channels"],
    ) -> Any:
        features, as_given = by_name(features, named, "SharedWorkspace")
        mask = None if mask is None else by_name(mask, {}, "SharedWorkspace")[0]
        check_features(features, "SharedWorkspace")
        first = next(iter(features.values()))
        batch, channels = first.shape[0], first.shape[-1]
        if self.num_heads < 1 or channels % self.num_heads:
            raise InputError(
                f"SharedWorkspace: the features' channels = {channels} do not divide by num_heads = {self.num_heads}."
            )
        options = {field: getattr(self, field) for field in WORKSPACE_OPTIONS}
        workspace = SharedWorkspace(head_dim=channels // self.num_heads, name="workspace", **options)
        params = {
            "norm": NormParameters(channels, self.param_dtype, name="norm")(),
            "workspace": workspace.parameters(channels),
        }
        start = workspace.start(batch, slots)
        mixed, slots = workspace_interaction(params, features, slots=start, mask=mask, **workspace.options())
        result = as_given(mixed)
        return (result, slots) if return_slots else result

    def initial_slots(self, params: Mapping[str, Any], batch: int) -> Float[Array, "batch slots channels"]:
        """The slots that a call without slots starts from: the authors', which nothing learns.

        Args:
          params: the module's.
          batch: how often they are repeated.

        Returns:
          (batch, num_slots, C) of the computation's dtype.
        """
        return initial_slots((batch, self.num_slots, params["norm"]["scale"].shape[-1]), None, self.dtype)
