"""Equal weights, DB-MTL and GradNorm: what needs no more of the Gramian than the gradients' lengths."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.multi_objective._arguments import check_positive
from sgw_jax.multi_objective._weighting import WeightedAggregator, Weighting, from_weighting
from sgw_jax.multi_objective.gramian import standardise


def equal_weights(
    gramian: Float[Array, "tasks tasks"],
    *,
    preference: Float[Array, " tasks"] | None = None,
    mask: Bool[Array, " tasks"] | None = None,
) -> Float[Array, " tasks"]:
    """The preference itself, summing to T (all ones by default): the gradient of the sum of the losses.

    Cost: none beyond the Jacobian's; one backward pass if you add the losses instead (`scalarize.equal`), so this is
    for logging cosines under plain training. Scale: linear in each row, so the largest gradient leads. Promise: none.
    At stationarity: the weights do not change. With tuned weights of the losses it is a strong baseline (Kurin et al.
    2022, arXiv 2201.04122; Xin et al. 2022, arXiv 2209.11379): use it first; not where scales are unknown and untuned.

    Args:
      gramian: G (T, T) of the tasks' gradients.
      preference: (T,), not negative; None: equal ones.
      mask: (T,), False for tasks without labels in the batch; their weight is 0.

    Returns:
      The weights (T,), in the tasks' order.

    Raises:
      ValueError: a Gramian that is not square; a preference or mask of another length.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import weights
    >>> gramian = jnp.array([[1.0, -1.0], [-1.0, 4.0]])  # two tasks in conflict
    >>> [round(float(weight), 2) for weight in weights.equal(gramian)]
    [1.0, 1.0]
    """
    return standardise(gramian, preference, mask, 0.0, "count").preference


def db_mtl_weights(
    gramian: Float[Array, "tasks tasks"],
    *,
    losses: Float[Array, " tasks"],
    preference: Float[Array, " tasks"] | None = None,
    mask: Bool[Array, " tasks"] | None = None,
) -> Float[Array, " tasks"]:
    """Gradients of log L_i, all made as long as the longest: ``w_i = max_k (|g_k| / L_k) / |g_i|`` (Lin et al. 2023,
    arXiv 2308.12029), without its average over steps.

    Preference: sums to T. Cost: the norms alone. Scale: the update does not depend on any loss's scale (losses must be
    positive; one that is not does not set the common length). Promise: equal lengths, nothing about conflicts. At
    stationarity of one task (|g_i| to 0) its weight grows without bound, as published, while its part of the update
    keeps the common length; a zero gradient is left out. Use it when scales differ by orders of magnitude; not where a
    task may be done early, as its noise then counts as much as the others' gradients.

    Args:
      gramian: G (T, T) of the tasks' gradients.
      losses: L (T,).
      preference: (T,), not negative; None: equal ones.
      mask: (T,), False for tasks without labels in the batch; their weight is 0.

    Returns:
      The weights (T,), in the tasks' order.

    Raises:
      ValueError: a Gramian that is not square; a preference or mask of another length.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import weights
    >>> gramian = jnp.array([[1.0, -1.0], [-1.0, 4.0]])  # two tasks in conflict
    >>> [round(float(weight), 2) for weight in weights.db_mtl(gramian, losses=jnp.array([1.0, 0.5]))]
    [4.0, 2.0]
    """
    found = standardise(gramian, preference, mask, 0.0, "count")
    usable = found.active & (losses > 0)
    relative = jnp.where(usable, found.norms / jnp.where(usable, losses, 1), 0)
    return jnp.where(found.active, found.preference * jnp.max(relative) / found.norms, 0)


def gradnorm(
    num_tasks: int,
    *,
    alpha: float = 1.5,
    learning_rate: float = 0.025,
    preference: Float[Array, " tasks"] | None = None,
) -> WeightedAggregator:
    """GradNorm (Chen et al. 2018, arXiv 1711.02257): weights learnt so that gradients have comparable lengths.

    w = T softmax(theta); each update first descends ``sum_i |w_i n_i - target_i|`` in theta by one gradient step of
    ``learning_rate``, with n_i = |g_i| and ``target_i = p_i mean(w n) (r_i / mean r)^alpha``, r_i = L_i / L_i(0), held
    constant; L(0) are the losses of the first update (of a task that came later, of its first). Its own rate, no weight
    decay (LibMTL's goes through the model's optimiser). The update needs ``losses``.

    Preference: sums to T; it multiplies the lengths aimed at [ours]. Cost: the norms alone. Scale: balances it, in some
    hundred steps. Promise: none about conflicts. At stationarity: bounded, weights are between 0 and T. Use it where
    tasks learn at different speeds in a long run; not in a short one, which its weights hardly leave equal.

    Args:
      num_tasks: T.
      alpha: how much more a slow task's gradient is to be; 0: all alike.
      learning_rate: of theta.
      preference: (T,), not negative; None: equal ones.

    Returns:
      The aggregator; its state holds theta and the first losses.

    Raises:
      ValueError: a negative alpha, a learning rate that is not positive; (update) no losses; a Jacobian of another
        number of tasks.

    >>> from sgw_jax.multi_objective import gradnorm
    >>> gradnorm(num_tasks=2).init({}).weights.shape
    (2,)
    """
    check_positive("gradnorm", learning_rate=learning_rate)
    if not alpha >= 0:
        raise InputError(f"gradnorm: alpha is {alpha}; it must not be negative.")

    def init(number: int) -> tuple[Array, Array]:
        return jnp.zeros(num_tasks), jnp.full(num_tasks, jnp.nan, jnp.float32)

    def apply(matrix: Array, state: Any, *, losses: Any = None, mask: Any = None, key: Any = None) -> Any:
        del key
        if losses is None:
            raise InputError("gradnorm: the update needs losses=.")
        theta, first = state
        found = standardise(matrix, preference, mask, 0.0, "count")
        first = jnp.where(jnp.isnan(first) & found.present, losses, first)
        norms = jnp.where(found.active, found.norms, 0)
        count = jnp.maximum(jnp.sum(found.present), 1)
        progress = jnp.where(found.present, losses / jnp.where(found.present & (first > 0), first, 1), 0)
        relative = progress / jnp.maximum(jnp.sum(progress) / count, jnp.finfo(norms.dtype).tiny)

        def weights(theta: Array) -> Array:
            return count * jax.nn.softmax(theta, where=found.present)  # zeros if no task is there

        def distance(theta: Array) -> Array:
            lengths = weights(theta) * norms
            mean = jnp.sum(lengths) / count
            target = jax.lax.stop_gradient(found.preference * mean * relative**alpha)
            # By the mean length, so that the step does not depend on the losses' scale.
            scale = jax.lax.stop_gradient(jnp.maximum(mean, jnp.finfo(norms.dtype).tiny))
            return jnp.sum(jnp.abs(lengths - target)) / scale

        theta = theta - learning_rate * jax.grad(distance)(theta)
        return weights(theta), (theta, first)

    return from_weighting(Weighting(init, apply), num_tasks)
