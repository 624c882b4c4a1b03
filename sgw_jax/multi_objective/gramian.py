"""The Gramian of task gradients, and what it says of them: norms, cosines, conflicts."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from sgw_jax.data_pipelines.errors import InputError


def gramian(jacobian: Any) -> Float[Array, "tasks tasks"]:
    """``G[i, j] = <g_i, g_j>`` in float32, from a pytree whose leaves have a leading axis of tasks.

    Leaf by leaf and at full precision: nothing is ravelled or concatenated, so that sharded leaves stay where they are
    and only T x T numbers are summed over devices.

    Args:
      jacobian: a pytree, every leaf (T, ...).

    Returns:
      G (T, T).

    Raises:
      ValueError: no leaf, or leaves with different leading axes.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import gramian
    >>> gramian({"a": jnp.array([[1.0, 0.0], [3.0, 4.0]])}).tolist()
    [[1.0, 3.0], [3.0, 25.0]]
    """
    leaves = jax.tree.leaves(jacobian)
    tasks = {leaf.shape[:1] for leaf in leaves}
    if len(tasks) != 1 or tasks == {()}:
        raise InputError(f"gramian: every leaf needs the same leading axis of tasks; found {sorted(tasks)}.")
    # Not one matrix product per leaf: reshaping a leaf to (T, size) would gather its shards.
    axes = [tuple(range(1, leaf.ndim)) for leaf in leaves]
    parts = [
        jax.lax.dot_general(
            leaf,
            leaf,
            ((over, over), ((), ())),
            precision=jax.lax.Precision.HIGHEST,
            preferred_element_type=jnp.promote_types(leaf.dtype, jnp.float32),
        )
        for leaf, over in zip(leaves, axes, strict=True)
    ]
    return sum(parts[1:], start=parts[0])


def cosines(gramian: Float[Array, "tasks tasks"]) -> Float[Array, "tasks tasks"]:
    """``G[i, j] / (|g_i| |g_j|)``; 0 where a gradient is zero.

    Args:
      gramian: G (T, T).

    Returns:
      (T, T), in [-1, 1] up to rounding.

    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import cosines
    >>> cosines(jnp.array([[1.0, -1.0], [-1.0, 4.0]])).tolist()
    [[1.0, -0.5], [-0.5, 1.0]]
    """
    norms = jnp.sqrt(jnp.diagonal(gramian))
    scale = jnp.where(norms > 0, 1 / jnp.where(norms > 0, norms, 1), 0)
    return gramian * scale[:, None] * scale[None, :]


def conflict_rate(gramian: Float[Array, "tasks tasks"]) -> Float[Array, ""]:
    """The share of pairs of tasks with non-zero gradients whose gradients point apart (negative cosine); 0 of none.

    Args:
      gramian: G (T, T).

    Returns:
      A scalar in [0, 1].

    >>> import jax.numpy as jnp
    >>> from sgw_jax.multi_objective import conflict_rate
    >>> float(conflict_rate(jnp.array([[1.0, -1.0], [-1.0, 4.0]])))
    1.0
    """
    norms = jnp.diagonal(gramian) > 0
    pairs = jnp.triu(norms[:, None] & norms[None, :], 1)
    return jnp.sum(pairs & (gramian < 0)) / jnp.maximum(jnp.sum(pairs), 1)


class Standard(NamedTuple):
    """A Gramian by cosines: what every solver here works on, so that the size of the gradients does not matter.

    cosines: with ``eps`` on the diagonal; the rows of tasks that do not take part are those of the identity.
    norms: |g_i|, 1 for those tasks. active: which tasks take part: present and with a gradient that is not zero.
    present: which tasks have labels. preference: zero for absent tasks; of the present ones it has the asked sum.
    """

    cosines: Float[Array, "tasks tasks"]
    norms: Float[Array, " tasks"]
    active: Bool[Array, " tasks"]
    present: Bool[Array, " tasks"]
    preference: Float[Array, " tasks"]

    def stationary(self, weights: Float[Array, " tasks"], threshold: float = 1e-3) -> Bool[Array, ""]:
        """Whether the weighted gradients all but cancel: ``|sum w_i g_i| <= threshold sum |w_i g_i|``."""
        scaled = weights * self.norms * self.active
        return jnp.sqrt(jnp.maximum(scaled @ self.cosines @ scaled, 0)) <= threshold * jnp.sum(jnp.abs(scaled))


def standardise(
    gramian: Float[Array, "tasks tasks"],
    preference: Float[Array, " tasks"] | None,
    mask: Bool[Array, " tasks"] | None,
    eps: float,
    total: str,
) -> Standard:
    """The Gramian by cosines, and the preference renormalised over the present tasks.

    Args:
      preference: non-negative; None for equal ones.
      mask: False for tasks without labels, which are treated as if their rows did not exist.
      eps: added to the diagonal of the cosines; it bounds weights where gradients are collinear.
      total: "one": preferences sum to 1; "count": to the number of present tasks.

    Raises:
      ValueError: a Gramian that is not square, a preference or mask of another length.
    """
    tasks = gramian.shape[-1]
    if gramian.shape != (tasks, tasks):
        raise InputError(f"weights: the Gramian has shape {gramian.shape}; it must be (tasks, tasks).")
    for name, value in (("preference", preference), ("mask", mask)):
        if value is not None and jnp.shape(value) != (tasks,):
            raise InputError(f"weights: {name} has shape {jnp.shape(value)}; it must be ({tasks},).")
    gramian = gramian.astype(jnp.promote_types(gramian.dtype, jnp.float32))
    present = jnp.ones(tasks, bool) if mask is None else jnp.asarray(mask, bool)
    squares = jnp.diagonal(gramian)
    active = present & (squares > 0)
    norms = jnp.where(active, jnp.sqrt(jnp.where(active, squares, 1)), 1)
    both = active[:, None] & active[None, :] & ~jnp.eye(tasks, dtype=bool)
    regular = jnp.where(both, jnp.clip(gramian / norms[:, None] / norms[None, :], -1, 1), 0)
    regular += jnp.eye(tasks) * jnp.where(active, 1 + eps, 1)
    given = jnp.ones(tasks) if preference is None else jnp.asarray(preference, gramian.dtype)
    given = jnp.where(present, given, 0)
    count = jnp.sum(present) if total == "count" else 1
    given = given / jnp.maximum(jnp.sum(given), jnp.finfo(gramian.dtype).tiny) * count
    return Standard(regular, norms, active, present, given)
