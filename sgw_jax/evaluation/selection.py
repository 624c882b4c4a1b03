"""How stable a selection of tokens is: overlap with that of a perturbed input, and between images."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from sgw_jax.data_pipelines.errors import InputError


def jaccard(first: Int[Array, "*batch kept"], second: Int[Array, "*batch other"]) -> Float[Array, "*batch"]:
    """Intersection over union of sets given as lists of distinct integers, in float32; leading axes broadcast."""
    shape = jnp.broadcast_shapes(first.shape[:-1], second.shape[:-1])
    sizes = first.shape[-1] + second.shape[-1]
    both = jnp.concatenate([jnp.broadcast_to(a, (*shape, a.shape[-1])) for a in (first, second)], axis=-1)
    both = jnp.sort(both, axis=-1)  # no set repeats an element: equal neighbours are one of each
    shared = jnp.sum(both[..., 1:] == both[..., :-1], axis=-1)
    return shared.astype(jnp.float32) / (sizes - shared)


def selection_overlap(
    clean: Int[Array, "batch heads slots kept"], perturbed: Int[Array, "batch heads slots kept"]
) -> Float[Array, " batch"]:
    """Stability of selection: an image's mean Jaccard overlap of the tokens kept for it and for a perturbed copy of it.

    Averaged over heads and slots; 1 = the same tokens, and about k / (2 n_s) for two random choices of k << n_s.
    Beside it belongs `selection_between_images`: a selection that ignores its input is stable under anything.

    Args:
      clean, perturbed: indices of the kept tokens, what a KEM sows as ``retrieve_index``.

    Raises ValueError for different shapes.
    """
    if clean.shape != perturbed.shape:
        raise InputError(
            f"selection_overlap: the selections have shapes {clean.shape} and {perturbed.shape}; give two of the same."
        )
    overlap = jaccard(clean, perturbed)
    return jnp.mean(overlap, axis=tuple(range(1, overlap.ndim)))


def selection_between_images(
    index: Int[Array, "batch heads slots kept"], valid: Bool[Array, " batch"] | None = None
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """(sum, int32 count) over ordered pairs of different images: how static the selection is, sum / count.

    A pair's value is the Jaccard overlap of what the same head and slot keeps in the two images, averaged over heads
    and slots; 1 = the same tokens for every image. Only images of one batch are compared, so over a data set this
    averages over a sample of its pairs. A batch with one image adds nothing.

    Args:
      index: indices of the kept tokens, what a KEM sows as ``retrieve_index``.
      valid: which rows count; None, all.
    """
    # One image against all at a time: memory of two selections, not of batch^2.
    overlap = jax.lax.map(lambda one: jnp.mean(jaccard(index, one), axis=(1, 2)), index)
    real = jnp.ones(len(index), bool) if valid is None else valid
    pair = real[:, None] & real[None, :] & ~jnp.eye(len(index), dtype=bool)
    return jnp.sum(jnp.where(pair, overlap, 0)), jnp.sum(pair, dtype=jnp.int32)
