"""KEM and sKEM as an nnx module."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.etf.projections import factors_of, projected_width
from sgw_jax.etf.simplex import orthonormal_frame
from sgw_jax.functional.knowledge_extraction import (
    Extraction,
    check_extraction,
    check_slots,
    knowledge_extraction,
    orthogonal_rows,
    pair_gate_name,
)
from sgw_jax.functional.tokens import by_name, check_features
from sgw_jax.layers.placement import Placement
from sgw_jax.nnx.parameters import Attention, Exchange, Initializer, Norm, params_of


class _LearnedFrame(nnx.Module):
    def __init__(self, channels: int, rank: int, seed: int, param_dtype: Any):
        self.kernel = nnx.Param(jnp.asarray(orthonormal_frame(channels, rank, seed=seed), param_dtype))


class KEM(nnx.Module):
    """The knowledge extraction module: `sgw_jax.KEM`, which has the maths, on flax.nnx.

    `extract` is the call that also returns what happened.

    Args:
      channels: C, of the features.
      num_slots: L.
      num_heads: h.
      top_k: tokens that a slot keeps per head; None: all.
      rngs: draws the parameters, from its stream ``params``; it is not kept.
      slot_dim: d_e; None means C.
      etf_vertices: K; None is KEM, a number is sKEM.
      etf_for: what the frame projects: "all", or "selection" (values are of F).
      etf_seed: of the frame.
      projection: "etf", or a control that replaces it: "direction", "orthonormal", "learned".
      pre_norm: LayerNorm on F before all of it.
      task_embedding: a learned vector per task added to what makes keys and queries.
      task_gate: a learned scalar per task on the update, starting at 0.
      balanced: slots retrieve from every task by itself.
      slot_exchange: the slots attend to each other before tokens read them.
      pair_gate: a learned scalar per pair of tasks, starting at 0, on what one reads of the other's slots.
      tasks: names of the tasks; only ``task_embedding``, ``task_gate`` and ``pair_gate`` need them, for their
        parameters.
      temperature: divides the scores of the retrieval.
      rounds: how often retrieve and write run, with the same weights.
      recall: expected share of the k best that a TPU finds, in (0, 1]; None: all, exactly.
      products: on which side the maps of the tokens are applied: "tokens", "slots" or "cheaper".
      placement: how batch and tokens are split over a mesh.
      dtype: of the computation; scores and softmax stay float32.
      param_dtype: of the parameters.
      kernel_init: of the six kernels; None is LeCun's normal.
      kernel_metadata: of the six kernels' `nnx.Param`, such as their sharding.

    Call:
      features: mapping task -> (batch, *space, C), or a list or tuple of maps, or the entries as keyword arguments.
      slots: the state to start from, (batch, L, d_e), if balanced (batch, T L, d_e), in place of the learned one.
      return_slots: also return R^ of the last round.
      mask: mapping task -> (batch, *space) bool, False for padding, which is not retrieved and keeps its features.
      change: applied to R^ of every round before it is used.

    Returns:
      The same mapping (or list or tuple): keys, order, shapes and dtype; with ``return_slots`` a pair with the slots
      (batch, L, d_e).

    Raises:
      ValueError: as `sgw_jax.KEM`; ``task_embedding``, ``task_gate`` or ``pair_gate`` without ``tasks``.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> from sgw_jax.nnx import KEM
    >>> kem = KEM(channels=8, num_slots=4, top_k=3, rngs=nnx.Rngs(0))
    >>> features = {"depth": jnp.ones((2, 4, 4, 8)), "edges": jnp.ones((2, 8, 8, 8))}
    >>> {name: value.shape for name, value in kem(features).items()}
    {'depth': (2, 4, 4, 8), 'edges': (2, 8, 8, 8)}
    """

    def __init__(
        self,
        channels: int,
        num_slots: int,
        num_heads: int = 1,
        top_k: int | None = None,
        *,
        rngs: nnx.Rngs,
        slot_dim: int | None = None,
        etf_vertices: int | None = None,
        etf_for: Literal["all", "selection"] = "all",
        etf_seed: int = 0,
        projection: Literal["etf", "direction", "orthonormal", "learned"] = "etf",
        pre_norm: bool = False,
        task_embedding: bool = False,
        task_gate: bool = False,
        balanced: bool = False,
        slot_exchange: bool = False,
        pair_gate: bool = False,
        tasks: Sequence[str] = (),
        temperature: float = 1.0,
        rounds: int = 1,
        recall: float | None = None,
        products: Literal["cheaper", "tokens", "slots"] = "cheaper",
        placement: Placement | None = None,
        dtype: Any = jnp.float32,
        param_dtype: Any = jnp.float32,
        kernel_init: Initializer | None = None,
        kernel_metadata: Mapping[str, Any] | None = None,
    ):
        self.num_slots, self.num_heads, self.top_k = num_slots, num_heads, top_k
        self.slot_dim = channels if slot_dim is None else slot_dim
        self.etf_vertices, self.etf_for, self.etf_seed, self.projection = etf_vertices, etf_for, etf_seed, projection
        self.task_gate, self.balanced, self.pair_gate = task_gate, balanced, pair_gate
        self.temperature, self.rounds, self.recall = temperature, rounds, recall
        self.products, self.placement, self.dtype = products, placement, dtype
        width = self.slot_dim
        check_extraction(self, channels, width)
        if (task_embedding or task_gate or pair_gate) and not tasks:
            raise InputError(
                "KEM: task_embedding, task_gate and pair_gate have parameters per task; give tasks=[names]."
            )
        chosen = projected_width(projection, etf_vertices, channels)
        source = channels if etf_for == "selection" else chosen
        options: dict[str, Any] = {"rngs": rngs, "param_dtype": param_dtype, "kernel_init": kernel_init}
        options |= {"kernel_metadata": kernel_metadata}
        self.slots = nnx.Param(orthogonal_rows(rngs.params(), (num_slots, width), param_dtype))
        self.retrieve = Attention((width, width), (chosen, width), (source, width), **options)
        self.write = Attention((chosen, width), (width, width), (width, channels), **options)
        if pre_norm:
            self.norm = Norm(channels, param_dtype=param_dtype)
        if etf_vertices is not None and projection == "learned":
            self.learned = _LearnedFrame(channels, etf_vertices - 1, etf_seed, param_dtype)
        for option, wanted, size in (("task_embedding", task_embedding, chosen), ("task_gate", task_gate, 1)):
            for name in tasks if wanted else ():
                setattr(self, f"{option}_{name}", nnx.Param(jnp.zeros((size,), param_dtype)))
        for pair in itertools.product(tasks, tasks) if pair_gate else ():
            setattr(self, pair_gate_name(*pair), nnx.Param(jnp.zeros((1,), param_dtype)))
        if slot_exchange:
            self.exchange = Exchange(width, **options)

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
        maps, as_given = by_name(features, named, "KEM")
        real = None if mask is None else by_name(mask, {}, "KEM")[0]
        found = self.extract(maps, slots, mask=real, change=change)
        result = as_given(found.features)
        return (result, found.slots) if return_slots else result

    def extract(
        self,
        features: Mapping[str, Float[Array, "batch *space channels"]],
        slots: Float[Array, "batch slots slot_dim"] | None = None,
        *,
        mask: Mapping[str, Bool[Array, " batch *space"]] | None = None,
        change: Callable[[Array], Array] | None = None,
    ) -> Extraction:
        """The call, with attention weights, chosen tokens and read-outs.

        Args:
          features: mapping task -> (batch, *space, C).
          slots: as of a call, and so are the others.
          mask: mapping task -> (batch, *space) bool.
          change: applied to R^ of every round before it is used.

        Returns:
          The features, the slots and what happened.
        """
        check_features(features, "KEM")
        shape = next(iter(features.values())).shape[0], self.num_slots, self.slot_dim
        check_slots(slots, shape, len(features) if self.balanced else None)
        params = params_of(self)
        learned = params.get("learned", {}).get("kernel")
        return knowledge_extraction(
            params,
            features,
            num_heads=self.num_heads,
            top_k=self.top_k,
            projection=factors_of(self.projection, self.etf_vertices, self.etf_seed, learned),
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
