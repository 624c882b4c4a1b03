"""How far features have collapsed (NC1..NC4), and the loss that pulls them to an ETF.

Neural collapse over a data set takes two passes, because a scatter that is summed about a far-away point cancels:

    first = add_all(collapse_sums(f, y, K) for every batch);   means = class_means(first)
    second = add_all(collapse_sums(f, y, K, means) ...);       differ = add_all(disagreement_sums(f, y, p, means) ...)
    collapse_values(second, classifier, differ)

Features (..., d) and integer labels (...) share their leading axes: the caller brings the two to one resolution.
Label 255 is ignored, whatever the feature there holds, NaN included. Sums are float32 (float64 for float64 features)
and add up over batches, devices and processes; the values are float64 on the host.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.etf.simplex import direction

IGNORE = 255

Sums = dict[str, Any]


def collapse_sums(
    features: Float[Array, "*batch dim"],
    labels: Int[Array, "*batch"],
    num_classes: int,
    centres: Float[Array, "*classes dim"] | None = None,
) -> Sums:
    """What NC1..NC3 need to know of a batch, as additive sums about fixed points: m_c, one for each class.

    Rounding leaves an error of about eps32 * mean |f - m_c|^2 in the within-class covariance. With m_c the class means
    (of a first pass, or of any sample of the data) this is negligible however far away the features lie and however
    far they have collapsed. One common point, such as the mean of some features, removes a common offset only: the
    relative error is then eps32 times the ratio of total to within-class variance. None is the origin; it suffices for
    the class means that a second pass starts from, which that pass corrects.

    Args:
      num_classes: K; labels lie in [0, K) or are 255.
      centres: m_c, (K, d), or one point (d,) for all; the same in all batches. NaN rows, which `class_means` has for
        absent classes, are taken as the origin.

    Returns: with e = f - m_c of a sample's class,
      counts int32 (K,): samples per class.   sums (K, d): sum of e per class.   scatter (d, d): sum of e e^T.
      centres (K, d) and parts = 1: centres / parts are still the m_c after any number of such sums have been added.
      labelled int32: how many labels are not 255; `collapse_values` raises if some of them are not in [0, K).

    Raises ValueError for shapes that do not fit, and for num_classes outside [2, 255].
    """
    features, labels = _aligned("collapse_sums", features, labels)
    if not 2 <= num_classes <= IGNORE:
        raise InputError(f"collapse_sums: num_classes is {num_classes}; give an integer in [2, {IGNORE}].")
    dim, wide = features.shape[-1], features.dtype
    start = jnp.zeros(dim, wide) if centres is None else jnp.asarray(centres, wide)
    if start.shape not in ((dim,), (num_classes, dim)):
        raise InputError(
            f"collapse_sums: centres have shape {start.shape}; give ({num_classes}, {dim}), a point for each class, "
            f"or ({dim},), one for all."
        )
    start = jnp.broadcast_to(jnp.where(jnp.isnan(start), 0, start), (num_classes, dim))

    one_hot = labels[..., None] == jnp.arange(num_classes)
    is_class = jnp.any(one_hot, axis=-1)
    centre = start[jnp.where(is_class, labels, 0)]
    deviation = jnp.where(is_class[..., None], features - centre, 0)
    exact = jax.lax.Precision.HIGHEST  # the default rounds to bfloat16 on a TPU and to TF32 on a GPU
    return {
        "counts": jnp.sum(one_hot, axis=tuple(range(labels.ndim)), dtype=jnp.int32),
        "sums": jnp.einsum("...k,...d->kd", one_hot.astype(wide), deviation, precision=exact),
        "scatter": jnp.einsum("...i,...j->ij", deviation, deviation, precision=exact),
        "centres": start,
        "parts": jnp.ones((), jnp.int32),
        "labelled": jnp.sum(labels != IGNORE, dtype=jnp.int32),
    }


def class_means(sums: Sums) -> np.ndarray:
    """float64 (K, d), the mean feature of each class from added `collapse_sums`; NaN rows where a class is absent."""
    counts = np.asarray(sums["counts"], np.int64)[:, None]
    offset = np.asarray(sums["sums"], np.float64) / np.maximum(counts, 1)
    means = np.asarray(sums["centres"], np.float64) / max(int(sums["parts"]), 1) + offset
    return np.where(counts > 0, means, np.nan)


@np.errstate(invalid="ignore")  # NaN goes in and comes out
def collapse_values(
    sums: Sums, classifier: np.ndarray | None = None, disagreement: Sums | None = None
) -> dict[str, float | None]:
    """NC1..NC4 of a data set from its added sums, all 0 under perfect neural collapse.

    K counts the classes that occur; others, and their rows of the classifier, are left out. With mu_c the class means,
    mu their average (not that of the samples: a collapsed feature set stays collapsed when classes are imbalanced; our
    decision, for balanced classes the same), and M the centred means mu_c - mu as rows:
      nc1: tr(Sigma_W Sigma_B^+) / K, with Sigma_W the average of (f - mu_c)(f - mu_c)^T over the samples (so that
        frequent classes weigh more) and Sigma_B = M^T M / K.
        Directions of M whose singular value is below max(K, d) eps32 of the largest are rounding and left out.
      nc2_equinorm: std_c / mean_c of ||M_c||.
      nc2_equiangularity: the standard deviation of the cosines of M_c and M_c' over all pairs c != c'.
      nc2_max_angle: the mean over these pairs of |cos + 1 / (K - 1)|.
      nc3: || W / ||W||_F - M / ||M||_F ||_F, W the classifier's rows.
      nc4: the share of samples for which the classifier's decision is not the nearest class mean.

    Args:
      sums: added `collapse_sums`.
      classifier: (num_classes, d), one row per class: the transpose of a Flax kernel. None: nc3 is None.
      disagreement: added `disagreement_sums`. None: nc4 is None.

    Returns: plain floats; None where a value is not defined (fewer than two classes, a mean without direction), NaN
    where a feature was not finite.

    Raises ValueError for labels outside [0, num_classes), and for a classifier of another shape.

    Source: Papyan, Han, Donoho 2020, arXiv 2008.08186, the definitions of NC1 to NC4.
    """
    counts = np.asarray(sums["counts"], np.int64)
    stray = int(sums["labelled"]) - int(counts.sum())
    if stray:
        raise InputError(
            f"collapse_values: {stray} of {int(sums['labelled'])} labels are neither {IGNORE} (ignore) nor in "
            f"[0, {counts.size}); correct the labels or num_classes."
        )
    shape = np.shape(sums["sums"])
    if classifier is not None and np.shape(classifier) != shape:
        raise InputError(
            f"collapse_values: classifier has shape {np.shape(classifier)}; give {shape}, one row per class (a Flax "
            "kernel is its transpose)."
        )
    present = counts > 0
    means = class_means(sums)[present]
    centred = means - np.mean(means, axis=0) if len(means) else means
    rows = None if classifier is None else np.asarray(classifier, np.float64)[present]
    decided = int(disagreement["count"]) if disagreement is not None else 0
    return {
        "nc1": _variability(_within_class_covariance(sums), centred),
        **_simplex_distances(centred),
        "nc3": None if rows is None else _duality(rows, centred),
        "nc4": int(disagreement["differ"]) / decided if disagreement is not None and decided else None,
    }


def _within_class_covariance(sums: Sums) -> np.ndarray:
    """Sigma_W (d, d): the scatter about the given points, less that of the class means about them."""
    counts = np.maximum(np.asarray(sums["counts"], np.float64), 1)
    offset = np.asarray(sums["sums"], np.float64)
    total = max(int(np.sum(sums["counts"])), 1)
    return (np.asarray(sums["scatter"], np.float64) - (offset / counts[:, None]).T @ offset) / total


def _variability(within: np.ndarray, centred: np.ndarray) -> float | None:
    if not np.all(np.isfinite(within)):
        return np.nan
    if not np.any(centred):
        return None
    _, singular, directions = np.linalg.svd(centred / np.sqrt(len(centred)), full_matrices=False)
    kept = singular > max(centred.shape) * np.finfo(np.float32).eps * singular[0]
    spread = np.einsum("ji,ik,jk->j", directions[kept], within, directions[kept])
    return float(np.sum(np.maximum(spread, 0) / singular[kept] ** 2)) / len(centred)


def _simplex_distances(centred: np.ndarray) -> dict[str, float | None]:
    names = ("nc2_equinorm", "nc2_equiangularity", "nc2_max_angle")
    norms = np.linalg.norm(centred, axis=1)
    if not np.any(norms):
        return dict.fromkeys(names)
    equinorm = float(np.std(norms) / np.mean(norms))
    if not np.all(norms):
        return dict(zip(names, (equinorm, None, None), strict=True))
    unit = centred / norms[:, None]
    cosines = (unit @ unit.T)[np.triu_indices(len(unit), k=1)]
    off = np.mean(np.abs(cosines + 1 / (len(unit) - 1)))
    return dict(zip(names, (equinorm, float(np.std(cosines)), float(off)), strict=True))


def _duality(rows: np.ndarray, centred: np.ndarray) -> float | None:
    lengths = np.linalg.norm(rows), np.linalg.norm(centred)
    return float(np.linalg.norm(rows / lengths[0] - centred / lengths[1])) if all(lengths) else None


def disagreement_sums(
    features: Float[Array, "*batch dim"],
    labels: Int[Array, "*batch"],
    predictions: Int[Array, "*batch"],
    means: Float[Array, "classes dim"],
) -> Sums:
    """{"differ", "count"}, int32: at how many of the labelled samples a decision is not the nearest class mean (NC4).

    Args:
      labels: say only which samples count, those that are not 255.
      predictions: the class that the classifier on these features decides for.
      means: of `class_means`; a row that is not finite is nobody's nearest. Ties go to the lowest class.

    Raises ValueError for shapes that do not fit.
    """
    features, labels = _aligned("disagreement_sums", features, labels)
    dim, wide = features.shape[-1], features.dtype
    if predictions.shape != labels.shape:
        raise InputError(f"disagreement_sums: predictions have shape {predictions.shape}, labels {labels.shape}.")
    if np.ndim(means) != 2 or np.shape(means)[1] != dim:
        raise InputError(f"disagreement_sums: means have shape {np.shape(means)}; give (classes, {dim}).")
    means = jnp.asarray(means, wide)
    present = jnp.all(jnp.isfinite(means), axis=-1)
    # argmin ||f - mu_c||^2 = argmax <f, mu_c> - ||mu_c||^2 / 2, about the middle of the means: no offset to cancel.
    middle = jnp.mean(means, axis=0, where=present[:, None])
    centred = jnp.where(present[:, None], means - middle, 0)
    score = jnp.matmul(features - middle, centred.T, precision=jax.lax.Precision.HIGHEST)
    score = score - jnp.sum(jnp.square(centred), axis=-1) / 2
    nearest = jnp.argmax(jnp.where(present, score, -jnp.inf), axis=-1)
    valid = labels != IGNORE
    return {
        "differ": jnp.sum(valid & (nearest != predictions), dtype=jnp.int32),
        "count": jnp.sum(valid, dtype=jnp.int32),
    }


def dot_regression_loss(
    features: Float[Array, "*batch dim"],
    labels: Int[Array, "*batch"],
    vertices: Float[Array, "dim classes"],
    *,
    eps: float = 1e-12,
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """(sum, int32 count) of ``(<m_y, f / ||f||> - 1)^2 / 2`` over labelled samples; the loss is sum / max(count, 1).

    The dot-regression loss with a fixed ETF classifier, here for features of unit length (E_H = E_W = 1): it pulls a
    feature to its class's vertex and, unlike cross-entropy, does not push it from the others. Minimum 0, at collapse.
    f = 0 costs 1/2 and has a zero gradient, as in `SimplexETF`; ``eps`` is added to ||f||^2. An ignored sample has a
    zero gradient whatever its feature holds; a label neither 255 nor in [0, K) makes the loss NaN. The vertices are
    fixed: no gradient reaches them.

    Args:
      vertices: unit columns (d, K), K the number of classes, 2 <= K <= d + 1: ``simplex_etf(K, d)``.

    Raises ValueError for shapes that do not fit.

    Source: Yang et al. 2022, arXiv 2203.09081: L_DR(h, W) = (<w_y, h> - sqrt(E_W E_H))^2 / (2 sqrt(E_W E_H)).
    """
    features, labels = _aligned("dot_regression_loss", features, labels)
    dim = features.shape[-1]
    if np.ndim(vertices) != 2 or np.shape(vertices)[0] != dim or not 2 <= np.shape(vertices)[1] <= dim + 1:
        raise InputError(
            f"dot_regression_loss: vertices have shape {np.shape(vertices)} and features {features.shape}; give "
            f"simplex_etf(classes, {dim}), of shape ({dim}, classes) with 2 <= classes <= {dim + 1}."
        )
    valid = labels != IGNORE
    is_class = (labels >= 0) & (labels < np.shape(vertices)[1])
    vertex = jax.lax.stop_gradient(jnp.asarray(vertices, features.dtype)).T[jnp.where(is_class, labels, 0)]
    features = jnp.where(valid[..., None], features, 0)
    cosine = jnp.sum(vertex * direction(features, eps), axis=-1) * dim**-0.5
    loss = jnp.square(cosine - 1) / 2
    loss = jnp.where(is_class, loss, jnp.nan)
    return jnp.sum(jnp.where(valid, loss, 0)), jnp.sum(valid, dtype=jnp.int32)


def _aligned(caller: str, features: Array, labels: Array) -> tuple[Array, Array]:
    """Both as JAX arrays, the features in at least float32."""
    features, labels = jnp.asarray(features), jnp.asarray(labels)
    if features.ndim < 1 or features.shape[:-1] != labels.shape:
        raise InputError(
            f"{caller}: features have shape {features.shape} and labels {labels.shape}; give features (..., dim) with "
            "a label for each, at one resolution."
        )
    return features.astype(jnp.promote_types(features.dtype, jnp.float32)), labels
