"""Scalarisation: from a vector of task losses to one number, with a state that may learn.

All cost one backward pass and some T numbers; with micro-batches those that are not ``linear`` need a forward pass
more. None looks at gradients, so none promises anything about conflicts.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.multi_objective._arguments import check_positive

Losses = Float[Array, " tasks"]
Mask = Bool[Array, " tasks"]


class Scalarizer(NamedTuple):
    """A pair of pure functions, like an Optax transformation.

    Attributes:
      init: () -> state.
      apply: (losses (T,) float32, state, mask=None) -> (scalar, state). Call it inside the gradient, so that a gradient
        flows through the losses; what the state learns it learns in there, from losses held constant, at a rate of its
        own. ``mask``: False for tasks without labels in the batch, which count as if they did not exist.
      linear: the scalar is linear in the losses with weights that do not depend on them, so that gradients of
        micro-batches add up.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import SCALARIZERS
    >>> equal = SCALARIZERS["equal"](num_tasks=2)
    >>> total, state = equal.apply(jnp.array([1.0, 2.0]), equal.init())
    >>> float(total)
    3.0
    """

    init: Callable[[], Any]
    apply: Callable[..., tuple[Float[Array, ""], Any]]
    linear: bool = False


def weighted_sum(weights: Sequence[float]) -> Scalarizer:
    """``sum_t w_t L_t`` with fixed weights, in the order of the tasks: the field's default.

    Args:
      weights: w (T,).

    Returns:
      The scalariser.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import scalarize
    >>> scalariser = scalarize.weighted_sum([1.0, 0.5])
    >>> total, state = scalariser.apply(jnp.array([1.0, 4.0]), scalariser.init())
    >>> round(float(total), 3)
    3.0
    """
    fixed = tuple(float(weight) for weight in weights)

    def apply(losses: Losses, state: Any, mask: Mask | None = None) -> tuple[Array, Any]:
        kept = losses if mask is None else jnp.where(mask, losses, 0)
        return jnp.sum(jnp.asarray(fixed, losses.dtype) * kept), state  # not a dot: on a TPU that would be bfloat16

    return Scalarizer(init=lambda: (), apply=apply, linear=True)


def equal(num_tasks: int) -> Scalarizer:
    """``sum_t L_t``. The baseline to beat, with the losses' weights tuned (Kurin et al. 2022, arXiv 2201.04122; Xin et
    al. 2022, arXiv 2209.11379); not where scales are unknown and untuned: the largest gradient leads.

    Args:
      num_tasks: T.

    Returns:
      The scalariser.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import scalarize
    >>> scalariser = scalarize.equal(2)
    >>> total, state = scalariser.apply(jnp.array([1.0, 4.0]), scalariser.init())
    >>> round(float(total), 3)
    5.0
    """
    return weighted_sum([1.0] * num_tasks)


def uncertainty(num_tasks: int, *, learning_rate: float = 0.025, start: float = 0.0) -> Scalarizer:
    """``sum_t (e^-s_t L_t + s_t) / 2`` with learnt s (Kendall et al. 2018, arXiv 1705.07115).

    s takes a gradient step of ``learning_rate`` after each use, without decay; its optimum is log L_t. Losses must be
    positive, or s falls without end (a task of loss 0 keeps its s). Gradients of a task scale with e^-s_t / 2. Use it
    for scales that differ by a factor of ten; not for more in a short run: s moves by at most its rate in a step.

    Args:
      num_tasks: T.
      learning_rate: of what is learnt, a step a use.
      start: of every s.

    Returns:
      The scalariser.

    Raises:
      ValueError: a learning rate that is not positive.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import scalarize
    >>> scalariser = scalarize.uncertainty(2)
    >>> total, state = scalariser.apply(jnp.array([1.0, 4.0]), scalariser.init())
    >>> round(float(total), 3)
    2.5
    """
    check_positive("uncertainty", learning_rate=learning_rate)

    def apply(losses: Losses, state: Array, mask: Mask | None = None) -> tuple[Array, Array]:
        present = _present(losses, mask)
        total = jnp.sum(jnp.where(present, jnp.exp(-state) * losses + state, 0)) / 2
        known = jax.lax.stop_gradient(losses)
        slope = jnp.where(present & (known > 0), (1 - jnp.exp(-state) * known) / 2, 0)
        return total, state - learning_rate * jnp.clip(slope, -1, 1)  # a loss of 1000 at the start is no step of 1000

    return Scalarizer(init=lambda: jnp.full(num_tasks, start, jnp.float32), apply=apply)


def uw_so(num_tasks: int, *, temperature: float = 1.0) -> Scalarizer:
    """``sum_t w_t L_t``, ``w = softmax((1 / L) / temperature)`` held constant (Kirchdorfer et al. 2024, 2408.07985).

    The analytic optimum of uncertainty weighting, 1 / L, through a softmax whose temperature is tuned; weights sum to
    1. Use it where one number can be tuned; not untuned with losses near 0, the smallest of which takes all the weight.

    Args:
      num_tasks: T.
      temperature: of the softmax, positive.

    Returns:
      The scalariser.

    Raises:
      ValueError: a temperature that is not positive.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import scalarize
    >>> scalariser = scalarize.uw_so(2)
    >>> total, state = scalariser.apply(jnp.array([1.0, 4.0]), scalariser.init())
    >>> round(float(total), 3)
    1.962
    """
    check_positive("uw_so", temperature=temperature)
    del num_tasks

    def apply(losses: Losses, state: Any, mask: Mask | None = None) -> tuple[Array, Any]:
        present = _present(losses, mask)
        known = jnp.maximum(jax.lax.stop_gradient(losses), _tiny(losses))
        scores = jnp.where(present, 1 / jnp.where(present, known, 1), 0) / temperature
        # Not infinite at a loss of 0, of which there may be two.
        weights = _softmax(jnp.minimum(scores, float(jnp.finfo(scores.dtype).max)), present)
        return jnp.sum(weights * jnp.where(present, losses, 0)), state

    return Scalarizer(init=lambda: (), apply=apply)


def log_loss(num_tasks: int, *, eps: float = 1e-8) -> Scalarizer:
    """``sum_t log(L_t + eps)``: relative progress counts alike (half of DB-MTL, Lin et al. 2023, arXiv 2308.12029; the
    closed optimum of IMTL-L, Liu et al. 2021, openreview IMPnRXEWpvr). Use it for positive losses of unlike scales; not
    for losses that reach 0, whose gradient grows as 1 / L, nor for negative ones.

    Args:
      num_tasks: T.
      eps: bounds the logarithm.

    Returns:
      The scalariser.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import scalarize
    >>> scalariser = scalarize.log_loss(2)
    >>> total, state = scalariser.apply(jnp.array([1.0, 4.0]), scalariser.init())
    >>> round(float(total), 3)
    1.386
    """
    del num_tasks

    def apply(losses: Losses, state: Any, mask: Mask | None = None) -> tuple[Array, Any]:
        present = _present(losses, mask)
        return jnp.sum(jnp.where(present, jnp.log(jnp.where(present, losses, 1) + eps), 0)), state

    return Scalarizer(init=lambda: (), apply=apply)


def gls(num_tasks: int) -> Scalarizer:
    """The geometric mean ``(prod_t L_t)^(1/T)`` (Chennupati et al. 2019, arXiv 1902.08325), as exp(mean log L), which
    does not underflow. A loss of exactly 0 counts as the smallest positive float. As `log_loss`, with a step that
    shrinks as the losses do; not where one task nears 0, which slows down all others.

    Args:
      num_tasks: T.

    Returns:
      The scalariser.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import scalarize
    >>> scalariser = scalarize.gls(2)
    >>> total, state = scalariser.apply(jnp.array([1.0, 4.0]), scalariser.init())
    >>> round(float(total), 3)
    2.0
    """
    del num_tasks

    def apply(losses: Losses, state: Any, mask: Mask | None = None) -> tuple[Array, Any]:
        present = _present(losses, mask)
        logs = jnp.log(jnp.maximum(jnp.where(present, losses, 1), _tiny(losses)))
        return jnp.exp(jnp.sum(logs) / jnp.maximum(jnp.sum(present), 1)) * jnp.any(present), state

    return Scalarizer(init=lambda: (), apply=apply)


def dwa(num_tasks: int, *, steps_per_epoch: int, temperature: float = 2.0) -> Scalarizer:
    """``w = T softmax(r / temperature)``, r the ratio of a task's mean losses of the last two epochs (Liu et al. 2019,
    arXiv 1803.10704); equal weights in the first two. The state counts steps; an epoch is ``steps_per_epoch`` of them;
    a task without labels in a whole epoch keeps its last mean. Use it to help tasks that stall; not for unlike scales,
    which ratios do not see, nor for runs of a few epochs.

    Args:
      num_tasks: T.
      steps_per_epoch: steps whose mean loss is one of the two.
      temperature: of the softmax, positive.

    Returns:
      The scalariser.

    Raises:
      ValueError: a temperature that is not positive, steps_per_epoch < 1.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import scalarize
    >>> scalariser = scalarize.dwa(2, steps_per_epoch=100)
    >>> total, state = scalariser.apply(jnp.array([1.0, 4.0]), scalariser.init())
    >>> round(float(total), 3)
    5.0
    """
    check_positive("dwa", temperature=temperature)
    if steps_per_epoch < 1:
        raise InputError(f"dwa: steps_per_epoch is {steps_per_epoch}; it must be at least 1.")

    def init() -> tuple[Array, ...]:
        # Steps so far; sums and counts of this epoch; means of the last and of the one before.
        zeros = jnp.zeros(num_tasks)
        return jnp.zeros((), jnp.int32), zeros, zeros, zeros, zeros

    def apply(losses: Losses, state: tuple, mask: Mask | None = None) -> tuple[Array, Any]:
        step, sums, counts, last, earlier = state
        present = _present(losses, mask)
        ratio = jnp.where(earlier > 0, last / jnp.where(earlier > 0, earlier, 1), 1)
        weights = jnp.sum(present) * _softmax(ratio / temperature, present)
        weights = jnp.where(step < 2 * steps_per_epoch, present.astype(losses.dtype), weights)
        total = jnp.sum(weights * jnp.where(present, losses, 0))
        sums = sums + jnp.where(present, jax.lax.stop_gradient(losses), 0)
        counts = counts + present
        step = step + 1
        over = step % steps_per_epoch == 0
        means = sums / jnp.maximum(counts, 1)
        new = (
            step,
            jnp.where(over, 0, sums),
            jnp.where(over, 0, counts),
            jnp.where(over & (counts > 0), means, last),
            jnp.where(over, last, earlier),
        )
        return total, new

    return Scalarizer(init=init, apply=apply, linear=True)


def rlw(num_tasks: int, *, seed: int = 0) -> Scalarizer:
    """``w = softmax(normal draw)``, new in every step (Lin et al. 2022, arXiv 2111.10603); weights sum to 1.

    The draws follow from ``seed`` and a count in the state, so a resumed run draws the same. Use it as a control: what
    is no better than random weights balances nothing; not for unlike scales, as its mean is 1 / T for each task.

    Args:
      num_tasks: T.
      seed: of the draws.

    Returns:
      The scalariser.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import scalarize
    >>> scalariser = scalarize.rlw(2)
    >>> total, state = scalariser.apply(jnp.array([1.0, 4.0]), scalariser.init())
    >>> round(float(total), 3)
    1.387
    """

    def apply(losses: Losses, count: Array, mask: Mask | None = None) -> tuple[Array, Array]:
        present = _present(losses, mask)
        draw = jax.random.normal(jax.random.fold_in(jax.random.key(seed), count), (num_tasks,))
        return jnp.sum(_softmax(draw, present) * jnp.where(present, losses, 0)), count + 1

    return Scalarizer(init=lambda: jnp.zeros((), jnp.int32), apply=apply, linear=True)


def stch(
    num_tasks: int, *, mu: float = 1.0, preference: Sequence[float] | None = None, ideal: Sequence[float] | None = None
) -> Scalarizer:
    """``mu log sum_t exp(p_t (L_t - z_t) / mu)``, a smooth largest loss (Lin et al. 2024, arXiv 2402.19078).

    p: the preference (1/T each), z: ideal losses (0). As mu falls it becomes max_t p_t (L_t - z_t). (LibMTL's variant
    takes logarithms of losses over a nadir first: another function.) Use it with preferences, or where the worst task
    counts; not for losses of unlike scales unless ``preference`` brings them to one.

    Args:
      num_tasks: T.
      mu: how smooth, positive.
      preference: p (T,); None: 1/T each.
      ideal: z (T,); None: 0.

    Returns:
      The scalariser.

    Raises:
      ValueError: mu that is not positive, a preference or ideal of another length.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import scalarize
    >>> scalariser = scalarize.stch(2)
    >>> total, state = scalariser.apply(jnp.array([1.0, 4.0]), scalariser.init())
    >>> round(float(total), 3)
    2.201
    """
    check_positive("stch", mu=mu)
    weights = [1 / num_tasks] * num_tasks if preference is None else list(preference)
    points = [0.0] * num_tasks if ideal is None else list(ideal)
    if len(weights) != num_tasks or len(points) != num_tasks:
        raise InputError(f"stch: preference and ideal need {num_tasks} numbers; got {len(weights)} and {len(points)}.")

    def apply(losses: Losses, state: Any, mask: Mask | None = None) -> tuple[Array, Any]:
        present = _present(losses, mask)
        shares = jnp.where(present, jnp.asarray(weights, losses.dtype), 0)
        shares = shares * sum(weights) / jnp.maximum(jnp.sum(shares), _tiny(losses))
        scores = shares * (jnp.where(present, losses, 0) - jnp.asarray(points, losses.dtype)) / mu
        total = mu * jax.nn.logsumexp(jnp.where(present, scores, 0), b=present.astype(losses.dtype))
        return jnp.where(jnp.any(present), total, 0), state

    return Scalarizer(init=lambda: (), apply=apply)


def famo(num_tasks: int, *, learning_rate: float = 0.025, weight_decay: float = 1e-3, floor: float = 0.0) -> Scalarizer:
    """FAMO (Liu et al. 2023, arXiv 2306.03792): ``c sum_t z_t log(L_t - b)``, z = softmax(xi), c = 1 / sum z / (L - b).

    xi follows, by Adam, the tasks' progress log L(k - 1) - log L(k) so that the slowest is weighed most. The authors
    measure progress by a second forward pass on the same batch; here it is from one step to the next, on different
    batches: no extra cost, more noise [our decision]. b is ``floor``. Use it for equal relative progress at one
    backward pass; not with batches so small that a loss moves more between batches than between steps.

    Args:
      num_tasks: T.
      learning_rate: of what is learnt, a step a use.
      weight_decay: of xi.
      floor: b, below every loss.

    Returns:
      The scalariser.

    Raises:
      ValueError: a learning rate that is not positive.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import scalarize
    >>> scalariser = scalarize.famo(2)
    >>> total, state = scalariser.apply(jnp.array([1.0, 4.0]), scalariser.init())
    >>> round(float(total), 3)
    1.109
    """
    check_positive("famo", learning_rate=learning_rate)

    def init() -> tuple[Array, ...]:
        zeros = jnp.zeros(num_tasks)
        # xi; first and second moment; the last losses' logarithms (NaN before the first); the z they had; steps.
        before, used = (jnp.full(num_tasks, value, jnp.float32) for value in (jnp.nan, 1 / num_tasks))
        return zeros, zeros, zeros, before, used, jnp.zeros(())

    def apply(losses: Losses, state: tuple, mask: Mask | None = None) -> tuple[Array, Any]:
        xi, first, second, before, used, count = state
        present = _present(losses, mask)
        logs = jnp.log(jnp.maximum(jnp.where(present, losses - floor, 1), 1e-8))
        known = jax.lax.stop_gradient(logs)
        # The gradient of sum z (log before - log now) in xi is the softmax's: z * (delta - <z, delta>).
        delta = jnp.where(present & ~jnp.isnan(before), before - known, 0)
        gradient = used * (delta - jnp.sum(used * delta)) + weight_decay * xi
        learned = jnp.any(~jnp.isnan(before))
        count = count + learned
        first = jnp.where(learned, 0.9 * first + 0.1 * gradient, first)
        second = jnp.where(learned, 0.999 * second + 0.001 * gradient**2, second)
        corrected = first / (1 - 0.9 ** jnp.maximum(count, 1))
        root = jnp.sqrt(second / (1 - 0.999 ** jnp.maximum(count, 1))) + 1e-8
        xi = jnp.where(learned, xi - learning_rate * corrected / root, xi)
        z = _softmax(xi, present)
        size = jnp.where(present, jnp.maximum(jax.lax.stop_gradient(losses) - floor, 1e-8), 1)
        scale = 1 / jnp.maximum(jnp.sum(z / size), _tiny(losses))
        before = jnp.where(present, known, before)
        return scale * jnp.sum(z * logs), (xi, first, second, before, z, count)

    return Scalarizer(init=init, apply=apply)


def _present(losses: Losses, mask: Mask | None) -> Mask:
    return jnp.ones(losses.shape, bool) if mask is None else jnp.asarray(mask, bool)


def _softmax(scores: Array, present: Mask) -> Array:
    """Over the present tasks; zero if there is none."""
    weights = jax.nn.softmax(scores, where=present)
    return jnp.where(present, weights, 0)


def _tiny(values: Array) -> float:
    return float(jnp.finfo(values.dtype).tiny)


SCALARIZERS: dict[str, Callable[..., Scalarizer]] = {
    "equal": equal,
    "uncertainty": uncertainty,
    "uw_so": uw_so,
    "log_loss": log_loss,
    "gls": gls,
    "dwa": dwa,
    "rlw": rlw,
    "stch": stch,
    "famo": famo,
}
