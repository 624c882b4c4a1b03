"""KEM and sKEM as a function of arrays: slots retrieve from all tasks, write back, and what is written is broadcast."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.etf.projections import PROJECTIONS
from sgw_jax.functional.axes import auto_inside
from sgw_jax.functional.linear import layer_norm
from sgw_jax.functional.products import PRODUCTS, Maps, Products, Tokens, by_head, cheaper, maps_of
from sgw_jax.functional.tokens import TokenLayout, concatenate_mask, concatenate_tasks, split_tasks
from sgw_jax.layers.placement import Placement
from sgw_jax.layers.topk_attention import apply_weights, topk_attention

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


class Seen(NamedTuple):
    """The tokens as the slots see them: what makes keys and queries, and what makes values."""

    chooser: Tokens
    source: Tokens


class Retrieved(NamedTuple):
    """R^ (batch, L, d_e), and behind it the weights (batch, heads, L, kept) of which tokens (None: of all)."""

    readout: Float[Array, "batch slots width"]
    weights: Float[Array, "batch heads slots kept"]
    tokens: Int[Array, "batch heads slots kept"] | None


class Written(NamedTuple):
    """F^ (batch, tokens, C) and the weights (batch, heads, tokens, L) behind it."""

    update: Float[Array, "batch tokens channels"]
    weights: Float[Array, "batch heads tokens slots"]


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
    recall: float | None = None,
    products: Literal["cheaper", "tokens", "slots"] = "cheaper",
    placement: Placement | None = None,
    slots: Float[Array, "batch slots width"] | None = None,
    mask: Mapping[str, Bool[Array, "batch *space"]] | None = None,
    change: Callable[[Array], Array] | None = None,
    dtype: Any = jnp.float32,
) -> Extraction:
    """The module of arXiv 2410.03778 as a pure function; `sgw_jax.KEM` says what each option is for.

    Args:
      params: {"slots": (L, d_e), "retrieve": {"query": {"kernel": (d_e, d_e)}, "key": {"kernel": (C', d_e)}, "value":
        ...}, "write": {"query": {"kernel": (C', d_e)}, "key": {"kernel": (d_e, d_e)}, "value": {"kernel": (d_e, C)}}},
        C' the width of the projected features; and, for the options they stand for, "norm": {"scale", "bias"} (C,),
        "task_embedding_NAME" (C',) and "task_gate_NAME" (1,) of every task.
      features: task -> (batch, *space, C), floating-point, of one C, batch size and dtype.
      num_heads: h; divides d_e and C.
      top_k: tokens that a slot keeps per head; None: all.
      projection: tokens -> (values, frame or None), such as `etf_projection`'s; None is KEM.
      values_from: whether values are of the "projected" tokens or of the "features" as they are.
      temperature: divides the scores of the retrieval.
      rounds: how often retrieve and write run.
      recall: expected share of the k best that a TPU finds, in (0, 1]; None: all, exactly.
      products: on which side the tokens' maps are applied, see products.py; "cheaper" counts.
      placement: how batch and tokens are split over a mesh; None leaves it to the partitioner.
      slots: the state to start from, (batch, L, d_e), in place of ``params["slots"]``.
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
    tokens, layout = concatenate_tasks(features, "KEM", parts)
    real = None if mask is None else concatenate_mask(mask, layout, "KEM")
    if slots is None:
        initial = params["slots"].astype(dtype)
        slots = jnp.broadcast_to(initial, (tokens.shape[0], *initial.shape))
    to_retrieve, to_write = (maps_of(params[name], num_heads, dtype) for name in ("retrieve", "write"))
    gate = _by_task(params, "task_gate", layout, dtype)
    embedding = _by_task(params, "task_embedding", layout, dtype)

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
            side = cheaper(projected, slots=slots.shape[1], heads=num_heads, width=slots.shape[2], **costs)
        chooser = projected.formed() if side == "tokens" or embedding is not None else projected
        source = Tokens(normed) if values_from == "features" else chooser
        if embedding is not None:  # among the vertices, if there are any
            chooser = Tokens(chooser.values + embedding)
        seen = Seen(chooser, source)

        found = retrieve(
            *(slots, seen, to_retrieve, PRODUCTS[side], top_k),
            temperature=temperature,
            recall=recall,
            placement=placement,
            layout=layout,
            mask=real,
        )
        slots = found.readout if change is None else change(found.readout)
        written = write(seen, slots, to_write, PRODUCTS[side])
        update = written.update if gate is None else written.update * gate
        update = update if real is None else jnp.where(real[..., None], update, 0)
        record(
            retrieve_weights=layout.by_index(found.weights, 3) if found.tokens is None else found.weights,
            retrieve_index=found.tokens,
            readout=slots,
            write_weights=layout.by_index(written.weights, 2),
            update_ratio=_norm(update) / _norm(tokens),
        )
        tokens = broadcast(tokens, update)
    return Extraction(split_tasks(tokens, layout), slots, records)


def retrieve(
    slots: Float[Array, "batch slots width"],
    seen: Seen,
    maps: Maps,
    products: Products,
    top_k: int | None,
    *,
    temperature: float = 1.0,
    recall: float | None = None,
    placement: Placement | None = None,
    layout: TokenLayout | None = None,
    mask: Bool[Array, "batch tokens"] | None = None,
) -> Retrieved:
    """``R^ = topk-softmax((R W_qr)(F W_kr)^T / (temperature sqrt(d))) (F W_vr)`` (the paper's first step).

    Args:
      slots: R (batch, L, d_e).
      seen: the tokens, as what makes keys and as what makes values.
      maps: W_qr, W_kr and W_vr, cut into heads.
      products: on which side W_kr and W_vr are applied: a value of `PRODUCTS`.
      top_k: tokens that a slot keeps per head; None: all.
      temperature: as in the formula.
      recall: expected share of the k best that a TPU finds; None: all, exactly.
      placement: how batch and tokens are split over a mesh.
      layout: where each task's tokens lie; needed where ``placement`` splits them.
      mask: (batch, tokens), False for padding, which no slot retrieves.

    Returns:
      R^ (batch, L, d_e), the weights (batch, heads, L, kept) behind it, and of which tokens they are (None: of all).

    Raises:
      ValueError: tokens that the shards of ``placement`` do not divide.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.functional import retrieve
    >>> from sgw_jax.functional.knowledge_extraction import Seen
    >>> from sgw_jax.functional.products import PRODUCTS, Maps, Tokens
    >>> tokens, kernel = Tokens(jnp.ones((1, 6, 4))), jnp.ones((4, 1, 4))
    >>> maps = Maps(kernel, kernel, kernel)
    >>> found = retrieve(jnp.ones((1, 2, 4)), Seen(tokens, tokens), maps, PRODUCTS["tokens"], top_k=3)
    >>> found.readout.shape, found.weights.shape, found.tokens.shape
    ((1, 2, 4), (1, 1, 2, 3), (1, 1, 2, 3))
    """

    def attend(query: Array, key: Array, value: Array) -> tuple[Array, Array, Array | None]:
        scale = 1 / (temperature * maps.query.shape[-1] ** 0.5)
        located = None if layout is None else layout.locate
        options: dict[str, Any] = {"scale": scale, "recall": recall, "placement": placement, "located": located}
        return topk_attention(query, key, value, top_k, mask=mask, **options)

    readout, weights, index = products.retrieve(slots, seen.chooser, seen.source, maps, attend)
    return Retrieved(readout.reshape(*readout.shape[:2], -1), weights, index)


def write(seen: Seen, slots: Float[Array, "batch slots width"], maps: Maps, products: Products) -> Written:
    """``F^ = softmax((F W_qw)(R^ W_kw)^T / sqrt(d)) (R^ W_vw)`` (the paper's second step).

    Args:
      seen: the tokens, whose choosers make the queries.
      slots: R^ (batch, L, d_e).
      maps: W_qw, W_kw and W_vw, cut into heads.
      products: on which side W_qw is applied: a value of `PRODUCTS`.

    Returns:
      F^ (batch, tokens, C) and the weights (batch, heads, tokens, L) behind it.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.functional import write
    >>> from sgw_jax.functional.knowledge_extraction import Seen
    >>> from sgw_jax.functional.products import PRODUCTS, Maps, Tokens
    >>> tokens, kernel = Tokens(jnp.ones((1, 6, 4))), jnp.ones((4, 1, 4))
    >>> written = write(Seen(tokens, tokens), jnp.ones((1, 2, 4)), Maps(kernel, kernel, kernel), PRODUCTS["tokens"])
    >>> written.update.shape, written.weights.shape
    ((1, 6, 4), (1, 1, 6, 2))
    """
    scale = maps.query.shape[-1] ** -0.5
    scores = products.scores(seen.chooser, maps.query, by_head(slots, maps.key), scale)
    weights = jax.nn.softmax(scores, axis=-1)
    update = apply_weights(weights, by_head(slots, maps.value))
    return Written(update.reshape(*update.shape[:2], -1), weights)


def broadcast(
    tokens: Float[Array, "batch tokens channels"], update: Float[Array, "batch tokens channels"]
) -> Float[Array, "batch tokens channels"]:
    """``F <- F + F^`` (the paper's third step, residual weight 1), in the dtype of the tokens.

    Args:
      tokens: F (batch, tokens, C).
      update: F^, of the same shape.

    Returns:
      F + F^ (batch, tokens, C): each task takes its own tokens back.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.functional import broadcast
    >>> broadcast(jnp.ones((1, 1, 2)), jnp.array([[[0.5, -1.0]]])).tolist()
    [[[1.5, 0.0]]]
    """
    return tokens + update.astype(tokens.dtype)


def _by_task(params: Params, option: str, layout: TokenLayout, dtype: Any) -> Float[Array, "tokens width"] | None:
    """The tasks' vectors of an option, each repeated over its task's tokens; None where the option is off."""
    if f"{option}_{layout.names[0]}" not in params:
        return None
    vectors = [params[f"{option}_{name}"].astype(dtype) for name in layout.names]
    rows = zip(vectors, layout.part_lengths, strict=True)
    part = jnp.concatenate([jnp.broadcast_to(vector, (length, *vector.shape)) for vector, length in rows])
    return jnp.tile(part, (layout.parts, 1))


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


def check_slots(slots: Any, shape: tuple[int, int, int]) -> None:
    """Raises a ValueError if slots are given whose shape is another."""
    if slots is not None and slots.shape != shape:
        raise InputError(
            f"KEM: the initial slots have shape {slots.shape}; they must have (batch, num_slots, slot_dim) = {shape}."
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
