"""KEM, the knowledge extraction module (and sKEM), in linen: parameters and options of functional/'s."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, TypeVar, overload

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sgw_jax.etf.projections import PROJECTIONS
from sgw_jax.functional.knowledge_extraction import (
    Projection,
    check_extraction,
    check_slots,
    knowledge_extraction,
    orthogonal_rows,
    pair_gate_name,
)
from sgw_jax.functional.tokens import by_name, check_features
from sgw_jax.layers.parameters import (
    AttentionParameters,
    ExchangeParameters,
    Initializer,
    NormParameters,
    with_axes,
)
from sgw_jax.layers.placement import Placement

Maps = TypeVar("Maps", bound=Mapping[str, Array] | Sequence[Array])  # what comes in goes out


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
    among its vertices, need projected tokens. Whichever takes fewer products is used: this, unless h is large
    (`products`).
    sKEM is KEM with ``etf_vertices`` set: F is projected onto a fixed simplex ETF before it enters W_kr, W_vr and
    W_qw, so that the choice of tokens is stable; the residual still adds to the un-projected F [paper].

    Shapes (our decision; the paper is silent): W_qr, W_kw (d_e, d_e); W_kr, W_vr, W_qw (C or K, d_e); W_vw (d_e, C).
    No biases, no output projection; d_e and C must divide by the heads. Slots start as orthogonal rows with entries of
    unit variance, far apart, because slots that retrieve the same tokens are a failure to watch. top_k is a
    constant, not a share of n_s: a share would lose the bottleneck.

    Nothing is causal: every token takes of every other, as images need it.

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
        docs/accuracy.md].
      balanced: slots retrieve from every task by itself, L slots and ``top_k`` tokens for each, so that no task is
        crowded out; tokens read all T L of them, which lie by the sorted names of the tasks [ours, off; as the
        next two measured in docs/exchange.md, where none of them gained anything].
      slot_exchange: the slots attend to each other before tokens read them, behind a gate that starts at 0; see
        `sgw_jax.functional.exchange` [ours, off].
      pair_gate: each task reads the slots of every task by itself, behind a learned scalar for each pair, starting at
        0, in place of one softmax over all slots. Needs ``balanced`` [ours, off].
      temperature: the scores of the retrieval are divided by it [ours, 1]. Among thousands of tokens the k best scores
        lie close together, so that at 1 a slot all but averages what it keeps.
      recall: None selects the k best exactly; a number in (0, 1] lets a TPU find them approximately, with this expected
        share of them (`jax.lax.approx_max_k`) [ours, None].
      placement: how batch and tokens are split over a mesh, see `Placement`. Each shard then finds its own k best
        tokens and only those and sums of the size of the slots are exchanged, whatever the number of tokens; values
        and gradients are those of one device. None leaves the splitting to the partitioner, which gathers the scores.
      products: on which side the maps of the tokens are applied: "tokens", "slots", or whichever is "cheaper".
      rounds: how often retrieve and write run, with the same weights; the slots of a round query the next [ours, 1].
      dtype: of the computation; scores and softmax stay float32.
      param_dtype: of the parameters.
      kernel_init: of the six kernels.
      kernel_axes: logical names of the kernels' axes for partitioning (`flax.linen.logical_to_mesh`), such as
        ("embed", "heads"); None names none.

    Call:
      features: mapping task -> (batch, *space, C); tasks may differ in *space, not in C. A list or tuple of maps will
        do, and so will the entries as keyword arguments, which is how `nn.Sequential` passes a mapping on.
      slots: initial slot state (batch, L, d_e), if balanced (batch, T L, d_e), in place of the learned one, so that a
        workspace can persist over scales or frames.
      return_slots: also return R^ of the last round.
      mask: mapping task -> (batch, *space) bool, False for tokens that are padding: they are not retrieved, and keep
        their features.
      change: applied to R^ of every round before it is used, to ask what would be if the slots held something else.

    Returns:
      The same mapping (or list or tuple): keys, order, shapes and dtype; with ``return_slots`` a pair with the slots
      (batch, L, d_e), if balanced (batch, T L, d_e).

    Collections:
      params: slots, retrieve/{query,key,value}/kernel, write/{query,key,value}/kernel; with the options also
        task_embedding_NAME, task_gate_NAME, pair_gate_NAME_from_NAME, exchange and norm.
      constants: the fixed frame, if any; a host need not keep it, see `SimplexETF`.
      intermediates: when made mutable, retrieve_weights, retrieve_index, write_weights, readout (R^) and update_ratio
        (||F^|| / ||F||) of every round.

    Raises:
      ValueError: no task, tasks of different channels, batch size or dtype, widths that do not divide by the heads,
        an unknown ``etf_for`` or ``projection``, a temperature that is not positive, a count below 1, ``pair_gate``
        without ``balanced`` or with ``task_gate``, ``slots`` of another shape, an impossible ETF (see `simplex_etf`).

    >>> import functools
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from sgw_jax import KEM
    >>> features = {"depth": jnp.ones((2, 4, 4, 8)), "edges": jnp.ones((2, 8, 8, 8))}
    >>> kem = KEM(num_slots=4, top_k=3)  # sKEM: etf_vertices=6
    >>> variables = jax.jit(kem.init)(jax.random.key(0), features)
    >>> mixed = jax.jit(kem.apply)(variables, features)
    >>> {name: value.shape for name, value in mixed.items()}
    {'depth': (2, 4, 4, 8), 'edges': (2, 8, 8, 8)}
    >>> recorded = jax.jit(functools.partial(kem.apply, mutable=["intermediates"]))
    >>> _, records = recorded(variables, features)
    >>> records["intermediates"]["retrieve_index"][0].shape  # batch, heads, slots, kept
    (2, 1, 4, 3)
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
    balanced: bool = False
    slot_exchange: bool = False
    pair_gate: bool = False
    temperature: float = 1.0
    rounds: int = 1
    recall: float | None = None
    products: Literal["cheaper", "tokens", "slots"] = "cheaper"
    placement: Placement | None = None
    dtype: Any = jnp.float32
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
        change: Callable[[Array], Array] | None = None,
    ) -> Maps: ...

    @overload
    def __call__(
        self,
        features: Maps,
        slots: Array | None = None,
        *,
        return_slots: Literal[True],
        mask: Any = None,
        change: Callable[[Array], Array] | None = None,
    ) -> tuple[Maps, Array]: ...

    @overload
    def __call__(
        self,
        features: Maps,
        slots: Array | None,
        return_slots: Literal[True],
        *,
        mask: Any = None,
        change: Callable[[Array], Array] | None = None,
    ) -> tuple[Maps, Array]: ...

    @overload
    def __call__(
        self,
        features: None = None,
        slots: Array | None = None,
        return_slots: Literal[False] = False,
        *,
        mask: Any = None,
        change: None = None,
        **named: Array,
    ) -> dict[str, Array]: ...

    @nn.compact
    def __call__(
        self,
        features: Mapping[str, Float[Array, "batch *space channels"]] | Sequence[Array] | None = None,
        slots: Float[Array, "batch slots slot_dim"] | None = None,
        return_slots: bool = False,
        *,
        mask: Mapping[str, Bool[Array, " batch *space"]] | Sequence[Array] | None = None,
        change: Callable[[Array], Array] | None = None,
        **named: Float[Array, "batch *space channels"],
    ) -> Any:
        features, as_given = by_name(features, named, "KEM")
        mask = None if mask is None else by_name(mask, {}, "KEM")[0]
        check_features(features, "KEM")
        first = next(iter(features.values()))
        batch, channels = first.shape[0], first.shape[-1]
        width = channels if self.slot_dim is None else self.slot_dim
        check_extraction(self, channels, width)
        check_slots(slots, (batch, self.num_slots, width), len(features) if self.balanced else None)
        projection, chosen = self._projection(channels)
        source = channels if self.etf_for == "selection" else chosen
        rows = with_axes(orthogonal_rows, None if self.kernel_axes is None else (None, self.kernel_axes[1]))
        options = (self.kernel_init, self.param_dtype, self.kernel_axes)
        params: dict[str, Any] = {
            "slots": self.param("slots", rows, (self.num_slots, width), self.param_dtype),
            "retrieve": AttentionParameters(
                (width, width), (chosen, width), (source, width), *options, name="retrieve"
            )(),
            "write": AttentionParameters((chosen, width), (width, width), (width, channels), *options, name="write")(),
        }
        if self.pre_norm:
            params["norm"] = NormParameters(channels, self.param_dtype, name="norm")()
        # A parameter per task name, not rows of one table: jit sorts the keys of a mapping, which must not swap rows.
        for option, size in (("task_embedding", chosen), ("task_gate", 1)):
            if getattr(self, option):
                for name in features:
                    path = f"{option}_{name}"
                    params[path] = self.param(path, nn.initializers.zeros, (size,), self.param_dtype)
        if self.pair_gate:
            for path in (pair_gate_name(reader, source) for reader in features for source in features):
                params[path] = self.param(path, nn.initializers.zeros, (1,), self.param_dtype)
        if self.slot_exchange:
            params["exchange"] = ExchangeParameters(width, *options, name="exchange")()

        found = knowledge_extraction(
            params,
            features,
            num_heads=self.num_heads,
            top_k=self.top_k,
            projection=projection,
            values_from="features" if self.etf_for == "selection" else "projected",
            temperature=self.temperature,
            rounds=self.rounds,
            balanced=self.balanced,
            recall=self.recall,
            products=self.products,
            placement=self.placement,
            slots=slots,
            mask=mask,
            change=change,
            dtype=self.dtype,
        )
        if not self.is_initializing():  # else `init` would return them, and a later `apply` add to them
            for name, rounds in found.records.items():
                for value in rounds:
                    self.sow("intermediates", name, value)
        result = as_given(found.features)
        return (result, found.slots) if return_slots else result

    def initial_slots(self, params: Mapping[str, Any], batch: int) -> Float[Array, "batch slots slot_dim"]:
        """The learned slots, which a call without slots starts from.

        Args:
          params: the module's.
          batch: how often they are repeated.

        Returns:
          (batch, L, d_e) of the computation's dtype.
        """
        slots = params["slots"].astype(self.dtype)
        return jnp.broadcast_to(slots, (batch, *slots.shape))

    def _projection(self, channels: int) -> tuple[Projection | None, int]:
        """Tokens -> (values, frame), and the width of their product."""
        if self.etf_vertices is None:
            return None, channels
        module = PROJECTIONS[self.projection](self.etf_vertices, self.etf_seed, name=self.projection)
        return module.factors, module.width(channels)
