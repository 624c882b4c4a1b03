"""KEM and sKEM as a function of arrays: slots retrieve from all tasks, write back, and what is written is broadcast."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.etf.projections import PROJECTIONS
from sgw_jax.functional.axes import auto_inside
from sgw_jax.functional.linear import layer_norm
from sgw_jax.functional.products import PRODUCTS, Tokens, cheaper, maps_of
from sgw_jax.functional.steps import Seen, broadcast, exchange, retrieve, retrieve_each, write
from sgw_jax.functional.tokens import TokenLayout, concatenate_mask, concatenate_tasks, split_tasks
from sgw_jax.layers.placement import Placement

Params = Mapping[str, Any]
Projection = Callable[[Array], tuple[Array, Array | None]]  # tokens -> (values, frame or None), whose product it is


class Extraction(NamedTuple):
    """What a call of `knowledge_extraction` returns. Under jit what nobody reads costs nothing.

    Attributes:
      features: the mapping, as it came in.
      slots: R^ of the last round, (batch, L, d_e).
      records: what happened, a list with an entry for each round: retrieve_weights (batch, heads, L, kept),
        retrieve_index likewise (absent without selection), readout (batch, L, d_e), write_weights (batch, heads,
        tokens, L) and update_ratio (batch,), which is ||F^|| / ||F||.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.functional import Extraction
    >>> Extraction({"depth": jnp.ones((1, 4, 8))}, slots=jnp.ones((1, 2, 8)), records={}).slots.shape
    (1, 2, 8)
    """

    features: dict[str, Array]
    slots: Float[Array, "batch slots width"]
    records: dict[str, list[Array]]


@auto_inside(lambda layouts, rows: Extraction(layouts, rows, rows))  # type: ignore[arg-type]
def knowledge_extraction(
    params: Params,
    features: Mapping[str, Float[Array, "batch *space channels"]],
    *,
    num_heads: int = 1,
    top_k: int | None = None,
    projection: Projection | None = None,
    values_from: Literal["projected", "features"] = "projected",
    temperature: float = 1.0,
    rounds: int = 1,
    balanced: bool = False,
    recall: float | None = None,
    products: Literal["cheaper", "tokens", "slots"] = "cheaper",
    placement: Placement | None = None,
    slots: Float[Array, "batch slots width"] | None = None,
    mask: Mapping[str, Bool[Array, " batch *space"]] | None = None,
    change: Callable[[Array], Array] | None = None,
    dtype: Any = jnp.float32,
) -> Extraction:
    """The module of arXiv 2410.03778 as a pure function; `sgw_jax.KEM` says what each option is for.

    Args:
      params: {"slots": (L, d_e), "retrieve": {"query": {"kernel": (d_e, d_e)}, "key": {"kernel": (C', d_e)}, "value":
        ...}, "write": {"query": {"kernel": (C', d_e)}, "key": {"kernel": (d_e, d_e)}, "value": {"kernel": (d_e, C)}}},
        C' the width of the projected features; and, for the options they stand for, "norm": {"scale", "bias"} (C,),
        "task_embedding_NAME" (C',) and "task_gate_NAME" (1,) of every task, "pair_gate_READER_from_SOURCE" (1,) of
        every pair of tasks, and what `exchange` takes as "exchange".
      features: task -> (batch, *space, C), floating-point, of one C, batch size and dtype.
      num_heads: h; divides d_e and C.
      top_k: tokens that a slot keeps per head; None: all.
      projection: tokens -> (values, frame or None), such as `etf_projection`'s; None is KEM.
      values_from: whether values are of the "projected" tokens or of the "features" as they are.
      temperature: divides the scores of the retrieval.
      rounds: how often retrieve and write run.
      balanced: slots retrieve from every task by itself, see `retrieve_each`; there are then T L of them, task by task
        in the order of the sorted names, and so are the tokens of the records.
      recall: expected share of the k best that a TPU finds, in (0, 1]; None: all, exactly.
      products: on which side the tokens' maps are applied, see products.py; "cheaper" counts.
      placement: how batch and tokens are split over a mesh; None leaves it to the partitioner.
      slots: the state to start from, (batch, L, d_e), if balanced (batch, T L, d_e), in place of ``params["slots"]``.
      mask: task -> (batch, *space) bool, True where a token is real; padding is not retrieved and keeps its features.
        None: all are.
      change: applied to R^ of every round before it is used: what would be if the slots held something else.
      dtype: of the computation; scores and softmax stay float32.

    Returns:
      An `Extraction`.

    Raises:
      ValueError: features that do not fit together, see `check_features`; masks of other tasks or shapes.

    >>> import functools
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from sgw_jax import KEM
    >>> from sgw_jax.functional import knowledge_extraction
    >>> features = {"depth": jnp.ones((1, 2, 2, 4)), "edges": jnp.ones((1, 2, 2, 4))}
    >>> params = jax.jit(KEM(num_slots=2).init)(jax.random.key(0), features)["params"]
    >>> found = jax.jit(functools.partial(knowledge_extraction, top_k=3))(params, features)
    >>> found.slots.shape, [weights.shape for weights in found.records["retrieve_weights"]]
    ((1, 2, 4), [(1, 1, 2, 3)])
    """
    parts = 1 if placement is None else placement.shards()
    # Under jit mappings come sorted: so are the groups of slots, whoever calls, for a state may go from one to another.
    maps = dict(sorted(features.items())) if balanced else features
    tokens, layout = concatenate_tasks(maps, "KEM", parts)
    real = None if mask is None else concatenate_mask(mask, layout, "KEM")
    if slots is None:
        initial = params["slots"].astype(dtype)
        initial = jnp.tile(initial, (len(layout.names) if balanced else 1, 1))
        slots = jnp.broadcast_to(initial, (tokens.shape[0], *initial.shape))
    to_retrieve, to_write = (maps_of(params[name], num_heads, dtype) for name in ("retrieve", "write"))
    gate = _by_task(params, "task_gate", layout, dtype)
    embedding = _by_task(params, "task_embedding", layout, dtype)
    pair_gates = _by_pair(params, layout, dtype)
    reading = slots.shape[1] // (len(layout.names) if balanced else 1)  # slots that a token is scored for
    width = slots.shape[2]

    records: dict[str, list[Array]] = {}

    def record(**values: Array | None) -> None:
        for name, value in values.items():
            if value is not None:
                records.setdefault(name, []).append(value)

    for _ in range(rounds):
        normed = layer_norm(params["norm"], tokens, dtype=dtype) if "norm" in params else tokens.astype(dtype)
        projected = Tokens(normed) if projection is None else Tokens(*projection(normed))
        side: str = products
        if products == "cheaper":
            as_they_are = values_from == "features"
            costs = {"selects": top_k is not None, "embeds": embedding is not None, "values_as_they_are": as_they_are}
            side = cheaper(projected, reading=reading, writing=slots.shape[1], heads=num_heads, width=width, **costs)
        chooser = projected.formed() if side == "tokens" or embedding is not None else projected
        source = Tokens(normed) if values_from == "features" else chooser
        if embedding is not None:  # among the vertices, if there are any
            chooser = Tokens(chooser.values + embedding)
        seen = Seen(chooser, source)

        how: dict[str, Any] = {"temperature": temperature, "recall": recall, "placement": placement, "mask": real}
        step = retrieve_each if balanced else retrieve
        found = step(slots, seen, to_retrieve, PRODUCTS[side], top_k, layout=layout, **how)
        in_order = balanced or found.tokens is not None
        slots = exchange(params["exchange"], found.readout, num_heads, dtype) if "exchange" in params else found.readout
        slots = slots if change is None else change(slots)
        written = write(seen, slots, to_write, PRODUCTS[side], pair_gates)
        update = written.update if gate is None else written.update * gate
        update = update if real is None else jnp.where(real[..., None], update, 0)
        record(
            retrieve_weights=found.weights if in_order else layout.by_index(found.weights, 3),
            retrieve_index=found.tokens,
            readout=slots,
            write_weights=layout.by_index(written.weights, 2),
            update_ratio=_norm(update) / _norm(tokens),
        )
        tokens = broadcast(tokens, update)
    mixed = split_tasks(tokens, layout)
    return Extraction({name: mixed[name] for name in features}, slots, records)


def _by_task(params: Params, option: str, layout: TokenLayout, dtype: Any) -> Float[Array, "tokens width"] | None:
    """The tasks' vectors of an option, each repeated over its task's tokens; None where the option is off."""
    if f"{option}_{layout.names[0]}" not in params:
        return None
    return layout.repeated([params[f"{option}_{name}"].astype(dtype) for name in layout.names])


def _by_pair(params: Params, layout: TokenLayout, dtype: Any) -> Float[Array, "tokens tasks"] | None:
    """The gate of each token on what it reads of each task; None where the option is off."""
    if pair_gate_name(layout.names[0], layout.names[0]) not in params:
        return None
    rows = [
        jnp.concatenate([params[pair_gate_name(reader, source)].astype(dtype) for source in layout.names])
        for reader in layout.names
    ]
    return layout.repeated(rows)


def pair_gate_name(reader: str, source: str) -> str:
    """The name of the parameter that gates what a task reads of another's slots."""
    return f"pair_gate_{reader}_from_{source}"


def _norm(tokens: Float[Array, "batch tokens width"]) -> Float[Array, " batch"]:
    return jnp.sqrt(jnp.sum(jnp.square(tokens.astype(jnp.promote_types(tokens.dtype, jnp.float32))), axis=(1, 2)))


def check_extraction(options: Any, channels: int, width: int) -> None:
    """Raises a ValueError unless the attributes of a KEM, linen's or NNX's, make sense for features of this width."""
    if options.etf_for not in ("all", "selection"):
        raise InputError(f"KEM: etf_for is {options.etf_for!r}; it must be 'all' or 'selection'.")
    if options.projection not in PROJECTIONS:
        raise InputError(f"KEM: projection is {options.projection!r}; it must be one of {list(PROJECTIONS)}.")
    if options.projection != "etf" and options.etf_vertices is None:
        raise InputError(
            f"KEM: projection is {options.projection!r} but etf_vertices is None; give the number of vertices whose "
            "rank the projection is to have."
        )
    if options.pair_gate and not options.balanced:
        raise InputError("KEM: pair_gate tells the slots of one task from those of another; it needs balanced=True.")
    if options.pair_gate and options.task_gate:
        raise InputError("KEM: task_gate and pair_gate both start at 0, and neither would learn; choose one.")
    if options.products not in ("cheaper", *PRODUCTS):
        raise InputError(f"KEM: products is {options.products!r}; it must be one of {['cheaper', *PRODUCTS]}.")
    if not options.temperature > 0:
        raise InputError(f"KEM: temperature is {options.temperature}; it must be positive.")
    if options.recall is not None and not 0 < options.recall <= 1:
        raise InputError(f"KEM: recall is {options.recall}; it must be in (0, 1], or None to select exactly.")
    counts = {
        "num_slots": options.num_slots,
        "num_heads": options.num_heads,
        "slot_dim": width,
        "rounds": options.rounds,
    }
    counts |= {} if options.top_k is None else {"top_k": options.top_k}
    for name, number in counts.items():
        if number < 1:
            raise InputError(
                f"KEM: {name} is {number}; it must be at least 1 (top_k=None for no selection, slot_dim=None for "
                "the width of the features)."
            )
    for name, size in (("slot_dim", width), ("the features' channels", channels)):
        if size % options.num_heads:
            raise InputError(f"KEM: {name} = {size} does not divide by num_heads = {options.num_heads}.")


def check_slots(slots: Any, shape: tuple[int, int, int], tasks: int | None = None) -> None:
    """Raises a ValueError if slots are given whose shape is not (batch, slots, width); ``tasks``: there are as many
    slots for each of them."""
    batch, number, width = shape
    wanted = batch, number * (tasks or 1), width
    if slots is not None and slots.shape != wanted:
        each = "num_slots" if tasks is None else "tasks x num_slots"
        raise InputError(
            f"KEM: the initial slots have shape {slots.shape}; they must have (batch, {each}, slot_dim) = {wanted}."
        )


def orthogonal_rows(key: Array, shape: tuple[int, int], dtype=jnp.float32) -> Array:
    """Orthogonal rows with entries of unit variance; blocks of them when there are more rows than columns."""
    rows, width = shape
    draw = jax.nn.initializers.orthogonal(scale=width**0.5)
    blocks = []
    while rows > 0:
        # In float32: narrower QR there is none.
        blocks.append(draw(key, (min(rows, width), width), jnp.float32).astype(dtype))
        key, rows = jax.random.fold_in(key, rows), rows - width
    return jnp.concatenate(blocks)
