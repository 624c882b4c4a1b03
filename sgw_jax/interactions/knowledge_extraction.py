"""KEM, the knowledge extraction module (and sKEM): slots retrieve from all tasks by top-k attention and write back."""

from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from data_pipelines.errors import InputError
from sgw_jax.etf import project
from sgw_jax.interactions.tokens import TokenLayout, concatenate_tasks, split_tasks
from sgw_jax.layers.attention import split_heads
from sgw_jax.layers.placement import Placement
from sgw_jax.layers.topk_attention import apply_weights, attention_scores, topk_attention
from sgw_jax.projections import PROJECTIONS


class _Kernel(nn.Module):
    """The kernel of a linear map without bias, by the names and draws of nn.Dense."""

    outputs: int

    @nn.compact
    def __call__(self, inputs: int) -> Float[Array, "inputs outputs"]:
        return self.param("kernel", nn.initializers.lecun_normal(), (inputs, self.outputs), jnp.float32)


class _Maps(nn.Module):
    """Query, key and value maps of an attention.

    Call: the widths of their inputs -> three kernels (inputs, heads, outputs / heads).
    """

    heads: int
    outputs: tuple[int, int, int]
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, *inputs: int) -> tuple[Array, Array, Array]:
        query, key, value = (
            split_heads(_Kernel(outputs, name=name)(width).astype(self.dtype), self.heads)
            for name, outputs, width in zip(("query", "key", "value"), self.outputs, inputs, strict=True)
        )
        return query, key, value


class _Tokens(NamedTuple):
    """Tokens as ``values``, or as ``values frame`` where there is a frame."""

    values: Float[Array, "batch tokens channels"]
    frame: Float[Array, "channels vertices"] | None = None

    @property
    def width(self) -> int:
        return (self.values if self.frame is None else self.frame).shape[-1]

    def as_one_head(self) -> Float[Array, "batch tokens 1 channels"]:
        """The values alone: frame and map are left to `pulled_back` and `map_of_sums`."""
        return self.values[:, :, None]

    def pulled_back(
        self, rows: Float[Array, "batch slots heads dim"], kernel: Float[Array, "width heads dim"]
    ) -> Float[Array, "batch heads*slots 1 channels"]:
        """Rows whose products with `as_one_head` are those of ``rows`` with the map of the tokens."""
        rows = jnp.einsum("blhd,khd->bhlk", rows, kernel)
        # The frame follows the kernel instead of joining it: fewer products, and jax 0.10.2's CPU compiler makes wrong
        # numbers of F (M W) in front of a softmax (test_full_size_widths_are_compiled_right).
        rows = rows if self.frame is None else project(rows, self.frame.T)
        return rows.reshape(len(rows), -1, 1, rows.shape[-1])

    def map_of_sums(
        self, sums: Float[Array, "batch heads slots channels"], kernel: Float[Array, "width heads dim"]
    ) -> Float[Array, "batch slots heads dim"]:
        """Of weighted sums of `as_one_head`: what the same weights make of the map of the tokens."""
        return jnp.einsum("bhlk,khd->blhd", project(sums, self.frame), kernel)


class KEM(nn.Module):
    """Knowledge extraction module (arXiv 2410.03778): a few slots carry all that passes between tasks.

    The tokens of all T tasks are concatenated to F (batch, n_s, C). Slots R (L, d_e) are learned; h heads, d = d_e / h:

      1. retrieve   R^ = topk-softmax((R W_qr)(F W_kr)^T / sqrt(d)) (F W_vr)            [paper]
      2. write      F^ = softmax((F W_qw)(R^ W_kw)^T / sqrt(d)) (R^ W_vw)               [paper]
      3. broadcast  F <- F + F^, and each task takes its own tokens back                [paper; residual weight 1]

    Cost: linear in the tokens, where dense cross-task attention is O(n_s^2 d_e). The paper's order of products maps
    every token three times, O(n_s C d_e + L n_s d_e). But what meets the tokens comes from a few slots, so that
    W_kr, W_vr and W_qw can be applied to the slots' side instead: (R W_qr)(F W_kr)^T = (R W_qr W_kr^T) F^T, and so on.
    The result is the same up to rounding, at O(h L n_s C), and no mapped copy of the tokens is made or kept for the
    backward pass [ours]. sKEM's frame M follows the maps to the slots' side; only task embeddings, which are added
    among its vertices, need projected tokens. Whichever takes fewer products is used: this, unless h is large.
    sKEM is KEM with ``etf_vertices`` set: F is projected onto a fixed simplex ETF before it enters W_kr, W_vr and
    W_qw, so that the choice of tokens is stable; the residual still adds to the un-projected F [paper].

    Shapes (our decision; the paper is silent): W_qr, W_kw (d_e, d_e); W_kr, W_vr, W_qw (C or K, d_e); W_vw (d_e, C).
    No biases, no output projection; d_e and C must divide by the heads. Slots start as orthogonal rows with entries of
    unit variance, far apart, because slots that retrieve the same tokens are a failure to watch. top_k is a
    constant, not a share of n_s: a share would lose the bottleneck.

    Attributes:
      num_slots: L.
      num_heads: h.
      top_k: tokens that a slot keeps per head; None (or >= n_s) is plain softmax.
      slot_dim: d_e; None means the features' channels C.
      etf_vertices: K; None is KEM, a number is sKEM.
      etf_for: "all" (the paper's reading) projects keys, values and queries; "selection" takes values from F.
      etf_seed: of the frame.
      projection: "etf", or a control that replaces it: "direction" (f / ||f|| alone), "orthonormal" (a fixed random
        frame of the same rank K - 1) or "learned" (a learned one); see projections.py. Needs ``etf_vertices``.
      pre_norm: LayerNorm on F before all of it (not on the residual) [ours, off in the paper].
      task_embedding: a learned vector per task added to the tokens that make keys and queries [ours, off].
      task_gate: a learned scalar per task on F^, starting at 0, so that the module starts as the identity and a task
        takes of the workspace what helps it (as ReZero, Bachlechner et al. 2021) [ours, off; measured in
        docs/results.md].
      temperature: the scores of the retrieval are divided by it [ours, 1]. Among thousands of tokens the k best scores
        lie close together, so that at 1 a slot all but averages what it keeps.
      recall: None selects the k best exactly; a number in (0, 1] lets a TPU find them approximately, with this expected
        share of them (`jax.lax.approx_max_k`) [ours, None].
      placement: how batch and tokens are split over a mesh, see `Placement`. Each shard then finds its own k best
        tokens and only those and sums of the size of the slots are exchanged, whatever the number of tokens; values
        and gradients are those of one device. None leaves the splitting to the partitioner, which gathers the scores.
      rounds: how often retrieve and write run, with the same weights; the slots of a round query the next [ours, 1].
      dtype: of the computation; parameters, scores and softmax stay float32.

    Call:
      features: mapping task -> (batch, *space, C); tasks may differ in *space, not in C.
      slots: initial slot state (batch, L, d_e) in place of the learned one, so that a workspace can persist over
        scales or frames.
      return_slots: also return R^ of the last round.

    Returns:
      The same mapping: keys, order, shapes and dtype; with ``return_slots`` a pair (mapping, (batch, L, d_e)).

    Collections: ``params`` (slots, retrieve/{query,key,value}/kernel, write/{query,key,value}/kernel; with the options
    also task_embedding_NAME, task_gate_NAME and norm), ``constants`` (the fixed frame, if any) and, when made mutable,
    ``diagnostics``: retrieve_weights, retrieve_index, write_weights, readout (R^) and update_ratio (||F^|| / ||F||) of
    every round.

    Raises:
      ValueError: no task, tasks of different channels, batch size or dtype, widths that do not divide by the heads,
        an unknown ``etf_for`` or ``projection``, a temperature that is not positive, a count below 1, ``slots`` of
        another shape, an impossible ETF (see `simplex_etf`).
    """

    num_slots: int
    num_heads: int = 1
    top_k: int | None = None
    slot_dim: int | None = None
    etf_vertices: int | None = None
    etf_for: Literal["all", "selection"] = "all"
    etf_seed: int = 0
    projection: Literal["etf", "direction", "orthonormal", "learned"] = "etf"
    pre_norm: bool = False
    task_embedding: bool = False
    task_gate: bool = False
    temperature: float = 1.0
    rounds: int = 1
    recall: float | None = None
    placement: Placement | None = None
    dtype: jnp.dtype = jnp.float32

    has_slots = True

    @nn.compact
    def __call__(
        self,
        features: Mapping[str, Float[Array, "batch *space channels"]],
        slots: Float[Array, "batch slots slot_dim"] | None = None,
        return_slots: bool = False,
    ) -> dict[str, Array] | tuple[dict[str, Array], Array]:
        parts = 1 if self.placement is None else self.placement.shards()
        tokens, layout = concatenate_tasks(features, "KEM", parts)
        channels = tokens.shape[-1]
        width = channels if self.slot_dim is None else self.slot_dim
        self._check(channels, width)

        initial = self.param("slots", _orthogonal_rows, (self.num_slots, width))
        if slots is None:
            slots = jnp.broadcast_to(initial.astype(self.dtype), (tokens.shape[0], *initial.shape))
        elif slots.shape != (tokens.shape[0], *initial.shape):
            raise InputError(
                f"KEM: the initial slots have shape {slots.shape}; they must have (batch, num_slots, slot_dim) = "
                f"{(tokens.shape[0], *initial.shape)}."
            )
        retrieve = _Maps(self.num_heads, (width, width, width), self.dtype, name="retrieve")
        write = _Maps(self.num_heads, (width, width, channels), self.dtype, name="write")
        norm = nn.LayerNorm(dtype=self.dtype, name="norm") if self.pre_norm else lambda x: x
        projection = self._projection()
        gate = self._per_task("task_gate", 1, layout) if self.task_gate else None

        embedding: Array | None = None
        for _ in range(self.rounds):
            normed = norm(tokens).astype(self.dtype)
            found = projection(normed)
            folded = self._folds(found, width)
            chooser = found if folded and not self.task_embedding else _Tokens(project(*found))
            source = _Tokens(normed) if self.etf_for == "selection" else chooser
            if self.task_embedding:  # among the vertices, if there are any
                if embedding is None:
                    embedding = self._per_task("task_embedding", chooser.width, layout)
                chooser = _Tokens(chooser.values + embedding)
            slots = self._retrieve(retrieve, slots, chooser, source, folded, layout)
            update = self._write(write, chooser, slots, folded, layout)
            update = update if gate is None else update * gate
            self._record("update_ratio", _norm(update) / _norm(tokens))
            tokens = tokens + update.astype(tokens.dtype)

        result = split_tasks(tokens, layout)
        return (result, slots) if return_slots else result

    def _projection(self) -> Callable[[Array], _Tokens]:
        if self.etf_vertices is None:
            return _Tokens
        module = PROJECTIONS[self.projection](self.etf_vertices, self.etf_seed, name=self.projection)
        return lambda tokens: _Tokens(*module.factors(tokens))

    def _folds(self, tokens: _Tokens, width: int) -> bool:
        """Whether a round takes fewer products for a token with its maps on the slots' side; d_e is ``width``."""
        channels, mapped, rows = tokens.values.shape[-1], tokens.width, self.num_heads * self.num_slots
        sums = 2 if self.top_k is not None else 3  # over all tokens: the scores of both steps, and what is retrieved
        folded = sums * rows * (mapped if self.task_embedding else channels)
        sources = channels if self.etf_for == "selection" else mapped
        unfolded = (2 * mapped + sources + sums * self.num_slots) * width
        if tokens.frame is not None and not self.task_embedding:
            unfolded += channels * mapped
        return folded <= unfolded

    def _retrieve(
        self, maps: _Maps, slots: Array, chooser: _Tokens, source: _Tokens, folded: bool, layout: TokenLayout
    ) -> Array:
        for_query, for_key, for_value = maps(slots.shape[-1], chooser.width, source.width)
        query = _by_head(slots, for_query)
        if folded:
            query, key, value = chooser.pulled_back(query, for_key), chooser.as_one_head(), source.as_one_head()
        else:
            key, value = _by_head(chooser.values, for_key), _by_head(source.values, for_value)
        scale = 1 / (self.temperature * for_query.shape[-1] ** 0.5)
        options = {"scale": scale, "recall": self.recall, "placement": self.placement, "located": layout.locate}
        readout, weights, index = topk_attention(query, key, value, self.top_k, **options)
        if folded:
            shape = (len(slots), self.num_heads, self.num_slots, -1)
            readout = source.map_of_sums(readout.reshape(shape), for_value)
            weights, index = weights.reshape(shape), None if index is None else index.reshape(shape)
        readout = readout.reshape(*readout.shape[:2], -1)
        self._record("retrieve_weights", layout.by_index(weights, 3) if index is None else weights)
        if index is not None:
            self._record("retrieve_index", index)
        self._record("readout", readout)
        return readout

    def _write(self, maps: _Maps, chooser: _Tokens, slots: Array, folded: bool, layout: TokenLayout) -> Array:
        for_query, for_key, for_value = maps(chooser.width, slots.shape[-1], slots.shape[-1])
        key, value = _by_head(slots, for_key), _by_head(slots, for_value)
        scale = for_query.shape[-1] ** -0.5
        if folded:
            scores = attention_scores(chooser.as_one_head(), chooser.pulled_back(key, for_query), scale)
            scores = scores.reshape(*scores.shape[::2], self.num_heads, self.num_slots).swapaxes(1, 2)
        else:
            scores = attention_scores(_by_head(chooser.values, for_query), key, scale)
        weights = nn.softmax(scores, axis=-1)
        self._record("write_weights", layout.by_index(weights, 2))
        update = apply_weights(weights, value)
        return update.reshape(*update.shape[:2], -1)

    def _per_task(self, option: str, width: int, layout: TokenLayout) -> Float[Array, "tokens width"]:
        """A learned vector per task, from 0, repeated over the task's tokens.

        A parameter per task name, not rows of one table: jit sorts the keys of a mapping, which must not swap rows.
        """
        zeros = nn.initializers.zeros
        vectors = [
            self.param(f"{option}_{name}", zeros, (width,), jnp.float32).astype(self.dtype) for name in layout.names
        ]
        rows = zip(vectors, layout.part_lengths, strict=True)
        part = jnp.concatenate([jnp.broadcast_to(vector, (length, width)) for vector, length in rows])
        return jnp.tile(part, (layout.parts, 1))

    def _record(self, name: str, value: Array) -> None:
        if not self.is_initializing():  # else `init` would return it, and a later `apply` add to it
            self.sow("diagnostics", name, value)

    def _check(self, channels: int, width: int) -> None:
        if self.etf_for not in ("all", "selection"):
            raise InputError(f"KEM: etf_for is {self.etf_for!r}; it must be 'all' or 'selection'.")
        if self.projection not in PROJECTIONS:
            raise InputError(f"KEM: projection is {self.projection!r}; it must be one of {list(PROJECTIONS)}.")
        if self.projection != "etf" and self.etf_vertices is None:
            raise InputError(
                f"KEM: projection is {self.projection!r} but etf_vertices is None; give the number of vertices whose "
                "rank the projection is to have."
            )
        if not self.temperature > 0:
            raise InputError(f"KEM: temperature is {self.temperature}; it must be positive.")
        if self.recall is not None and not 0 < self.recall <= 1:
            raise InputError(f"KEM: recall is {self.recall}; it must be in (0, 1], or None to select exactly.")
        counts = {"num_slots": self.num_slots, "num_heads": self.num_heads, "slot_dim": width, "rounds": self.rounds}
        counts |= {} if self.top_k is None else {"top_k": self.top_k}
        for name, number in counts.items():
            if number < 1:
                raise InputError(
                    f"KEM: {name} is {number}; it must be at least 1 (top_k=None for no selection, slot_dim=None for "
                    "the width of the features)."
                )
        for name, size in (("slot_dim", width), ("the features' channels", channels)):
            if size % self.num_heads:
                raise InputError(f"KEM: {name} = {size} does not divide by num_heads = {self.num_heads}.")


def _by_head(
    inputs: Float[Array, "batch rows channels"], kernel: Float[Array, "channels heads dim"]
) -> Float[Array, "batch rows heads dim"]:
    return jnp.einsum("brc,chd->brhd", inputs.astype(kernel.dtype), kernel)


def _norm(tokens: Float[Array, "batch tokens width"]) -> Float[Array, " batch"]:
    return jnp.sqrt(jnp.sum(jnp.square(tokens.astype(jnp.promote_types(tokens.dtype, jnp.float32))), axis=(1, 2)))


def _orthogonal_rows(key: Array, shape: tuple[int, int], dtype=jnp.float32) -> Array:
    """Orthogonal rows with entries of unit variance; blocks of them when there are more rows than columns."""
    rows, width = shape
    block = nn.initializers.orthogonal(scale=width**0.5)(key, (min(rows, width), width), dtype)
    if rows <= width:
        return block
    rest = jax.random.fold_in(key, rows)
    return jnp.concatenate([block, _orthogonal_rows(rest, (rows - width, width), dtype)])
