"""The shared global workspace that KEM descends from (Goyal et al. 2021), numerically equal to the authors' code."""

from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from data_pipelines.errors import InputError
from sgw_jax.functional.tokens import concatenate_tasks, split_tasks
from sgw_jax.layers.attention import split_heads
from sgw_jax.layers.placement import Placement
from sgw_jax.layers.topk_attention import topk_attention

GATES = ("unit", "memory", None)
TORCH_EPSILON = 1e-5  # of torch's LayerNorm


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
      num_heads, head_dim: of the values; E is their product.
      key_dim: of queries and keys, per head; None means head_dim.
      top_k: weights a slot keeps per head; None (or >= N) is soft competition.
      gate: "unit" (a gate per unit of a slot), "memory" (one per slot) or None (next = mem).
      mlp_layers, rounds: as above, at least 1.
      dtype: of the computation; parameters, scores and softmax stay float32.
      placement: how batch and tokens are split over a mesh, see `Placement`; of the write.

    Call:
      inputs (batch, N, D); slots: (batch, L, E), the state to start from; None is the authors' eye(L) padded to E.

    Returns:
      (broadcast (batch, N, E), the new slots (batch, L, E)).

    Raises:
      ValueError: an unknown gate, a count below 1, slots of another shape.
    """

    num_slots: int
    num_heads: int
    head_dim: int
    key_dim: int | None = None
    top_k: int | None = None
    gate: Literal["unit", "memory"] | None = "unit"
    mlp_layers: int = 1
    rounds: int = 1
    dtype: jnp.dtype = jnp.float32
    placement: Placement | None = None

    @nn.compact
    def __call__(
        self, inputs: Float[Array, "batch tokens width"], slots: Float[Array, "batch slots unit"] | None = None
    ) -> tuple[Float[Array, "batch tokens unit"], Float[Array, "batch slots unit"]]:
        key_dim = self.head_dim if self.key_dim is None else self.key_dim
        self._check(key_dim)
        width = self.num_heads * self.head_dim
        state = (inputs.shape[0], self.num_slots, width)
        if slots is None:
            slots = jnp.broadcast_to(jnp.eye(self.num_slots, width, dtype=self.dtype), state)
        elif slots.shape != state:
            raise InputError(
                f"SharedWorkspace: the initial slots have shape {slots.shape}; they must have (batch, num_slots, "
                f"num_heads x head_dim) = {state}."
            )

        def dense(name: str, features: int) -> nn.Dense:
            return nn.Dense(features, dtype=self.dtype, name=name)

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(epsilon=TORCH_EPSILON, dtype=self.dtype, name=name)

        query = dense("query_proj", self.num_heads * key_dim)
        key = dense("key_proj", self.num_heads * key_dim)
        value = dense("value_proj", width)
        mlp = dense("attention_mlp", width)
        norms = norm("attended_memory_layernorm"), norm("attended_memory_layernorm2")

        def attend(to: Array, source: Array, top_k: int | None, placement: Placement | None = None) -> Array:
            q, k, v = (split_heads(x, self.num_heads) for x in (query(to), key(source), value(source)))
            options: dict[str, Any] = {"scale": 1.0, "normalise_over": "all", "placement": placement}
            attended, _, _ = topk_attention(q, k, v, top_k, **options)
            return attended.reshape(*attended.shape[:2], -1)

        tokens = dense("input_projector", width)(inputs.astype(self.dtype))
        memory = slots = slots.astype(self.dtype)
        for _ in range(self.rounds):
            memory = norms[0](memory + attend(memory, tokens, self.top_k, self.placement))
            thought = memory
            for _ in range(self.mlp_layers):
                thought = nn.relu(mlp(thought))
            memory = norms[1](memory + thought)
        if self.gate is not None:
            opened, kept = self._gates(slots, tokens)
            memory = opened * jnp.tanh(memory) + kept * slots
        return attend(tokens, memory, None), memory

    def _gates(self, slots: Array, tokens: Array) -> tuple[Array, Array]:
        """Input and forget gate, (batch, L, E) or (batch, L, 1), from the slots as they were before the rounds."""
        width = slots.shape[-1]
        gates = 2 * (width if self.gate == "unit" else 1)
        from_inputs = _InputGate(gates, self.dtype, name="input_gate_projector")(tokens)
        from_slots = _SlotGate(gates, self.dtype, name="memory_gate_projector")(jnp.tanh(slots))
        opened, kept = jnp.split(from_inputs[:, None] + from_slots, 2, axis=-1)
        open_bias = self.param("input_bias", nn.initializers.zeros, ())
        keep_bias = self.param("forget_bias", nn.initializers.ones, ())
        return jax.nn.sigmoid(opened + open_bias.astype(self.dtype)), jax.nn.sigmoid(
            kept + keep_bias.astype(self.dtype)
        )

    def _check(self, key_dim: int) -> None:
        if self.gate not in GATES:
            raise InputError(f"SharedWorkspace: gate is {self.gate!r}; it must be one of {GATES}.")
        names = ("num_slots", "num_heads", "head_dim", "mlp_layers", "rounds")
        counts = {name: getattr(self, name) for name in names} | {"key_dim": key_dim}
        counts |= {} if self.top_k is None else {"top_k": self.top_k}
        for name, number in counts.items():
            if number < 1:
                raise InputError(f"SharedWorkspace: {name} is {number}; it must be at least 1.")


class _InputGate(nn.Module):
    """``mean over tokens of relu(w * X)``, then a linear map."""

    gates: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, tokens: Float[Array, "batch tokens unit"]) -> Float[Array, "batch gates"]:
        scale = self.param("w", nn.initializers.normal(1.0), (tokens.shape[-1],)).astype(self.dtype)
        return nn.Dense(self.gates, dtype=self.dtype, name="linear")(jnp.mean(nn.relu(scale * tokens), axis=1))


class _SlotGate(nn.Module):
    """A matrix and a bias for each slot."""

    gates: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, slots: Float[Array, "batch slots unit"]) -> Float[Array, "batch slots gates"]:
        _, count, width = slots.shape
        kernel = self.param("kernel", nn.initializers.lecun_normal(batch_axis=0), (count, width, self.gates))
        bias = self.param("bias", nn.initializers.zeros, (count, self.gates))
        return jnp.einsum("ble,leg->blg", slots, kernel.astype(self.dtype)) + bias.astype(self.dtype)


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
    dtype: jnp.dtype = jnp.float32
    placement: Placement | None = None

    has_slots = True

    @nn.compact
    def __call__(
        self,
        features: Mapping[str, Float[Array, "batch *space channels"]],
        slots: Float[Array, "batch slots channels"] | None = None,
        return_slots: bool = False,
    ) -> dict[str, Array] | tuple[dict[str, Array], Array]:
        parts = 1 if self.placement is None else self.placement.shards()
        tokens, layout = concatenate_tasks(features, "SharedWorkspace", parts)
        channels = tokens.shape[-1]
        if self.num_heads < 1 or channels % self.num_heads:
            raise InputError(
                f"SharedWorkspace: the features' channels = {channels} do not divide by num_heads = {self.num_heads}."
            )
        workspace = SharedWorkspace(
            self.num_slots,
            self.num_heads,
            channels // self.num_heads,
            self.key_dim,
            self.top_k,
            self.gate,
            self.mlp_layers,
            self.rounds,
            self.dtype,
            self.placement,
            name="workspace",
        )
        normed = nn.LayerNorm(epsilon=TORCH_EPSILON, dtype=self.dtype, name="norm")(tokens)
        broadcast, slots = workspace(normed, slots)
        result = split_tasks(tokens + broadcast.astype(tokens.dtype), layout)
        return (result, slots) if return_slots else result
