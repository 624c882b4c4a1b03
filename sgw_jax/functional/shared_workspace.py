"""The shared global workspace that KEM descends from (Goyal et al. 2021) as a function of arrays."""

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.functional.axes import auto_inside
from sgw_jax.functional.linear import dense, layer_norm
from sgw_jax.functional.tokens import concatenate_mask, concatenate_tasks, split_tasks
from sgw_jax.layers.attention import split_heads
from sgw_jax.layers.placement import Placement
from sgw_jax.layers.topk_attention import topk_attention

GATES = ("unit", "memory", None)
TORCH_EPSILON = 1e-5  # of torch's LayerNorm

Params = Mapping[str, Any]


@auto_inside(lambda layouts, rows: (rows, rows))
def shared_workspace(
    params: Params,
    inputs: Float[Array, "batch tokens width"],
    *,
    slots: Float[Array, "batch slots unit"],
    num_heads: int,
    top_k: int | None = None,
    gate: Literal["unit", "memory"] | None = "unit",
    mlp_layers: int = 1,
    rounds: int = 1,
    placement: Placement | None = None,
    mask: Bool[Array, "batch tokens"] | None = None,
    dtype: Any = jnp.float32,
) -> tuple[Float[Array, "batch tokens unit"], Float[Array, "batch slots unit"]]:
    """Write, gate and broadcast of arXiv 2103.01197, section 2; `sgw_jax.SharedWorkspace` has the formulas.

    Args:
      params: the linear maps input_projector, query_proj, key_proj, value_proj and attention_mlp ({"kernel", "bias"}),
        the norms attended_memory_layernorm and attended_memory_layernorm2 ({"scale", "bias"}); with a gate also
        input_gate_projector ({"w" (E,), "linear"}), memory_gate_projector ({"kernel" (L, E, gates), "bias"}),
        input_bias and forget_bias ().
      inputs: (batch, N, D).
      slots: the state to start from, (batch, L, E).
      num_heads: h; divides E and the width of the keys.
      top_k: weights that a slot keeps per head; None: all.
      gate: of what there is a gate for each: "unit", "memory" (a slot) or None.
      mlp_layers: how often the tied layer runs.
      rounds: how often the write runs.
      placement: how batch and tokens of the write are split over a mesh.
      mask: (batch, N), False for tokens that are padding: no slot reads them, and their broadcast is 0.
      dtype: of the computation; scores and softmax stay float32.

    Returns:
      (broadcast (batch, N, E), the new slots (batch, L, E)).

    Raises:
      ValueError: tokens that the shards of ``placement`` do not divide.

    >>> import functools
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from sgw_jax import SharedWorkspace
    >>> from sgw_jax.functional import shared_workspace
    >>> tokens, slots = jnp.ones((1, 5, 4)), jnp.ones((1, 2, 4))
    >>> module = SharedWorkspace(num_slots=2, num_heads=2, head_dim=2)
    >>> params = jax.jit(module.init)(jax.random.key(0), tokens)["params"]
    >>> mix = jax.jit(functools.partial(shared_workspace, num_heads=2))
    >>> broadcast, slots = mix(params, tokens, slots=slots)
    >>> broadcast.shape, slots.shape
    ((1, 5, 4), (1, 2, 4))
    """

    def attend(to: Array, source: Array, keep: int | None, **options: Any) -> Array:
        inputs = (("query_proj", to), ("key_proj", source), ("value_proj", source))
        q, k, v = (split_heads(dense(params[name], x, dtype=dtype), num_heads) for name, x in inputs)
        attended, _, _ = topk_attention(q, k, v, keep, scale=1.0, normalise_over="all", **options)
        return attended.reshape(*attended.shape[:2], -1)

    def norm(name: str, x: Array) -> Array:
        return layer_norm(params[name], x, epsilon=TORCH_EPSILON, dtype=dtype)

    tokens = dense(params["input_projector"], inputs, dtype=dtype)
    memory = slots = slots.astype(dtype)
    for _ in range(rounds):
        written = attend(memory, tokens, top_k, placement=placement, mask=mask)
        memory = norm("attended_memory_layernorm", memory + written)
        thought = memory
        for _ in range(mlp_layers):
            thought = jax.nn.relu(dense(params["attention_mlp"], thought, dtype=dtype))
        memory = norm("attended_memory_layernorm2", memory + thought)
    if gate is not None:
        opened, kept = _gates(params, slots, tokens, mask, dtype)
        memory = opened * jnp.tanh(memory) + kept * slots
    broadcast = attend(tokens, memory, None)
    return broadcast if mask is None else jnp.where(mask[..., None], broadcast, 0), memory


@auto_inside(lambda layouts, rows: (layouts, rows))
def workspace_interaction(
    params: Params,
    features: Mapping[str, Float[Array, "batch *space channels"]],
    *,
    slots: Float[Array, "batch slots channels"],
    mask: Mapping[str, Bool[Array, " batch *space"]] | None = None,
    placement: Placement | None = None,
    dtype: Any = jnp.float32,
    **options: Any,
) -> tuple[dict[str, Array], Float[Array, "batch slots channels"]]:
    """``F <- F + broadcast(LN(F))`` over the tokens F of all tasks, and the new slots.

    Args:
      params: {"norm": {"scale", "bias"}, "workspace": those of `shared_workspace`}.
      features: task -> (batch, *space, C), floating-point, of one C, batch size and dtype.
      slots: the state to start from, (batch, L, C).
      mask: task -> (batch, *space) bool, False for padding, which no slot reads and which keeps its features.
      placement: how batch and tokens are split over a mesh.
      dtype: of the computation.
      options: passed on to `shared_workspace`.

    Returns:
      (the same mapping, the new slots (batch, L, C)).

    Raises:
      ValueError: features that do not fit together, see `check_features`; masks of other tasks or shapes.

    >>> import functools
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from sgw_jax import INTERACTIONS
    >>> from sgw_jax.functional import workspace_interaction
    >>> features = {"depth": jnp.ones((1, 2, 2, 4)), "edges": jnp.ones((1, 3, 4))}
    >>> module = INTERACTIONS["shared_workspace"](num_slots=2)
    >>> params = jax.jit(module.init)(jax.random.key(0), features)["params"]
    >>> mix = jax.jit(functools.partial(workspace_interaction, num_heads=1))
    >>> mixed, slots = mix(params, features, slots=jnp.ones((1, 2, 4)))
    >>> {name: value.shape for name, value in mixed.items()}, slots.shape
    ({'depth': (1, 2, 2, 4), 'edges': (1, 3, 4)}, (1, 2, 4))
    """
    parts = 1 if placement is None else placement.shards()
    tokens, layout = concatenate_tasks(features, "SharedWorkspace", parts)
    real = None if mask is None else concatenate_mask(mask, layout, "SharedWorkspace")
    normed = layer_norm(params["norm"], tokens, epsilon=TORCH_EPSILON, dtype=dtype)
    options |= {"slots": slots, "mask": real, "placement": placement, "dtype": dtype}
    broadcast, slots = shared_workspace(params["workspace"], normed, **options)
    return split_tasks(tokens + broadcast.astype(tokens.dtype), layout), slots


def _gates(params: Params, slots: Array, tokens: Array, mask: Array | None, dtype: Any) -> tuple[Array, Array]:
    """Input and forget gate, (batch, L, E) or (batch, L, 1), from the slots as they were before the rounds."""
    of_inputs, of_slots = params["input_gate_projector"], params["memory_gate_projector"]
    seen = jax.nn.relu(of_inputs["w"].astype(dtype) * tokens)
    if mask is None:
        mean = jnp.mean(seen, axis=1)
    else:
        real = jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1).astype(dtype)
        mean = jnp.sum(jnp.where(mask[..., None], seen, 0), axis=1) / real
    from_inputs = dense(of_inputs["linear"], mean, dtype=dtype)
    from_slots = jnp.einsum("ble,leg->blg", jnp.tanh(slots), of_slots["kernel"].astype(dtype))
    both = from_inputs[:, None] + (from_slots + of_slots["bias"].astype(dtype))
    opened, kept = jnp.split(both, 2, axis=-1)
    biases = (params[name].astype(dtype) for name in ("input_bias", "forget_bias"))
    opened, kept = (jax.nn.sigmoid(x + bias) for x, bias in zip((opened, kept), biases, strict=True))
    return opened, kept


def initial_slots(
    shape: tuple[int, int, int], slots: Float[Array, "batch slots unit"] | None, dtype: Any
) -> Float[Array, "batch slots unit"]:
    """The slots to start from: those given, or the authors' eye(L) padded to E.

    Raises:
      ValueError: slots of another shape.
    """
    if slots is None:
        return jnp.broadcast_to(jnp.eye(*shape[1:], dtype=dtype), shape)
    if slots.shape != shape:
        raise InputError(
            f"SharedWorkspace: the initial slots have shape {slots.shape}; they must have (batch, num_slots, num_heads "
            f"x head_dim) = {shape}."
        )
    return slots


def check_workspace(options: Any, key_dim: int) -> None:
    """Raises a ValueError unless the attributes of a SharedWorkspace, linen's or NNX's, make sense."""
    if options.gate not in GATES:
        raise InputError(f"SharedWorkspace: gate is {options.gate!r}; it must be one of {GATES}.")
    names = ("num_slots", "num_heads", "head_dim", "mlp_layers", "rounds")
    counts = {name: getattr(options, name) for name in names} | {"key_dim": key_dim}
    counts |= {} if options.top_k is None else {"top_k": options.top_k}
    for name, number in counts.items():
        if number < 1:
            raise InputError(f"SharedWorkspace: {name} is {number}; it must be at least 1.")
