"""Pretrained backbones from a hub folder or an AugReg .npz, every tensor of which is accounted for."""

import dataclasses
import hashlib
import logging
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
from etils import epath

from sgw_jax.backbones.augreg import read_augreg
from sgw_jax.backbones.convnext import ConvNeXt
from sgw_jax.backbones.files import read_bytes, read_json, read_shapes, read_tensors, tensor_files
from sgw_jax.backbones.hub import FAMILIES, HALF
from sgw_jax.backbones.hub_sizes import check_sizes
from sgw_jax.backbones.preprocessor import normalisation
from sgw_jax.backbones.swin import Swin
from sgw_jax.backbones.tensors import PretrainedError, Tensors
from sgw_jax.backbones.vit import ViT
from sgw_jax.layers.parameter_names import is_added
from sgw_jax.layers.resize import cubic_matrix

# Heads, pooling, masked-image tokens and index buffers, which a feature extractor has no use for.
UNUSED = re.compile(
    r"^(classifier\.|decoder\.|pooler\.|embeddings\.mask_token$|rope_embeddings\.inv_freq$|head/|pre_logits/)"
    r"|\.relative_position_index$"
)


# What two modules must have in common to share parameters; the rest is size of the image, dropping, dtype.
ARCHITECTURE: dict[type[nn.Module], tuple[str, ...]] = {
    ViT: (
        *("patch_size", "width", "depth", "num_heads", "mlp_ratio", "patch_embed", "class_token", "layer_scale"),
        *("approximate_gelu", "epsilon", "registers", "rope_theta", "gated", "qkv_bias"),
    ),
    Swin: ("width", "depths", "num_heads", "window_size", "mlp_ratio"),
    ConvNeXt: ("width", "depths"),
}


def _kind(name: str, value: Any) -> Any:
    """What of an attribute decides: of layer scale only whether there is one."""
    return value is not None if name == "layer_scale" else value


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """What a file holds: the module it is for, its parameters (nested, NumPy float32), the (mean, standard deviation)
    of the channels it was trained with, the tensors that are of no use here, and its SHA-256 (of
    shards, one behind the other)."""

    path: str
    module: nn.Module
    params: dict[str, Any]
    normalisation: tuple[Sequence[float], Sequence[float]]
    tensors: int
    unused: tuple[str, ...]
    sha256: str

    def summary(self) -> str:
        """One line for the log."""
        count = sum(array.size for array in _flat(self.params).values())
        kinds = Counter(re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in self.unused)
        listed = ", ".join(name if number == 1 else f"{name} ({number})" for name, number in kinds.items())
        rest = f"; not used: {listed}" if listed else ""
        return f"{self.path}: {self.tensors} tensors, {count:,} parameters, sha256 {self.sha256[:16]}{rest}."


def load_pretrained(path: epath.PathLike) -> tuple[nn.Module, dict[str, Any]]:
    """The module that a file is for, and its variables.

    A folder in the hub's layout, local or in a bucket: ``config.json``, whose model_type is one of `FAMILIES`, and
    ``model.safetensors`` or the shards of ``model.safetensors.index.json``; or an AugReg ``.npz`` of Steiner et al.
    2021. ``module.apply(variables, pixels)`` gives, for pixels normalised as the original was trained, what the
    original computes: for Swin {stride: map} of the four stages before merging, with output norms if the file has them;
    for ConvNeXt the same before downsampling, the last after the final norm; for ViT, DINOv2 and DINOv3 {layer: map} of
    four layers, the last after the final norm, without the class token and registers.

    Args:
      path: the folder, or the ``.npz``; local or in a bucket.

    Returns:
      (module, {"params": ...}), NumPy float32.

    Raises:
      PretrainedError: no such file, truncated, pickled, of another kind or option than those above; tensors that are
        missing, of another shape, or that nothing asks for, all of which are listed.

    >>> from sgw_jax import load_pretrained
    >>> module, variables = load_pretrained("dinov2-large")  # doctest: +SKIP
    >>> maps = module.apply(variables, pixels)  # doctest: +SKIP
    """
    found = read_pretrained(path)
    logging.getLogger(__name__).info("Loaded %s", found.summary())
    return found.module, {"params": found.params}


def read_pretrained(path: epath.PathLike) -> Pretrained:
    """As `load_pretrained`, with what else there is to know of the file."""
    path = epath.Path(path)
    if path.suffix == ".npz":
        content = read_bytes(path)
        checksum = hashlib.sha256(content).hexdigest()
        return _assemble(str(path), checksum, read_augreg(str(path), content), HALF)
    if path.suffix == ".safetensors":
        raise PretrainedError(f"{path} is one file; give the folder that holds it and its config.json.")
    config = read_json(path / "config.json")
    kind = config.get("model_type")
    if kind not in list(FAMILIES):  # in a file it may be anything, and not hashable
        raise PretrainedError(f"{path / 'config.json'}: model_type is {kind!r}; it must be one of {list(FAMILIES)}.")
    files = tensor_files(path)
    shapes = _bare_names(path, read_shapes(files))
    module, default, convert = FAMILIES[kind](f"{path / 'config.json'}", config, set(shapes))
    check_sizes(f"{path / 'config.json'}", module, shapes)  # before anything of that size is read or made
    preprocessor = path / "preprocessor_config.json"
    options = read_json(preprocessor) if preprocessor.exists() else None
    normalised = default if options is None else normalisation(str(preprocessor), options, default)
    tensors, checksum = read_tensors(files)
    return _assemble(str(path), checksum, (module, _bare_names(path, tensors), convert), normalised)


def fit(found: Pretrained, backbone: nn.Module, shapes: Mapping[str, Any], mean: Sequence[float], std: Sequence[float]):
    """The file's parameters as those of another module of the same architecture, flat: {"blocks/norm1/scale": array}.

    The position embedding is resized to the module's once, by `resize_bicubic`'s weights; the patch embedding absorbs
    the difference between the normalisation (``mean``, ``std``) of the pixels that the module gets and the original's,
    exactly: k' = k s / s_0 and b' = b + sum k (m - m_0) / s_0 [our decision]. What a model adds to a backbone
    (layer_rates.py) need not be in the file.

    Args:
      shapes: the module's parameters, nested, with anything that has a shape as leaves.

    Raises:
      PretrainedError: another architecture (each attribute that differs), a parameter that only one of the two has.
    """
    ours = type(backbone)
    if ours is not type(found.module):
        raise PretrainedError(
            f"{found.path} holds a {type(found.module).__name__}, but the backbone is a {ours.__name__}."
        )
    different = {
        name: (getattr(found.module, name), getattr(backbone, name))
        for name in ARCHITECTURE[ours]
        if _kind(name, getattr(found.module, name)) != _kind(name, getattr(backbone, name))
    }
    if different:
        listed = "; ".join(f"{name} is {there!r} there, {here!r} here" for name, (there, here) in different.items())
        raise PretrainedError(
            f"{found.path} is of another {ours.__name__}: {listed}. Give the backbone the file's values (in a "
            "configuration the keys of the same names under config.backbones), or another file."
        )
    wanted, flat = _flat(shapes), _flat(found.params)
    if "position_embedding" in flat:
        size = wanted["position_embedding"].shape[1:3]
        flat["position_embedding"] = _resized(flat["position_embedding"], size, found.module.antialias)
    flat |= _renormalised(flat, found.normalisation, (mean, std))
    missing = [name for name in wanted if name not in flat and not is_added(name)]
    wrong = [name for name in wanted if name in flat and flat[name].shape != tuple(wanted[name].shape)]
    left = [name for name in flat if name not in wanted]
    if missing or wrong or left:
        raise PretrainedError(
            f"{found.path}: the backbone has {missing} that it lacks, {wrong} of another shape; {left} are in it alone."
        )
    return flat


def _assemble(path: str, checksum: str, source: tuple, normalisation: Any) -> Pretrained:
    module, tensors, convert = source
    take = Tensors(tensors)
    params = convert(take)
    left = set(tensors) - take.taken - take.ignored
    unused = {name for name in left if UNUSED.search(name)}
    problems = [
        f"{len(names)} {what}: {', '.join(sorted(names)[:20])}{' ...' if len(names) > 20 else ''}"
        for what, names in (
            ("missing", take.missing),
            ("of another shape", take.wrong),
            ("unexpected", left - unused),
        )
        if names
    ]
    if problems:
        raise PretrainedError(
            f"{path} does not hold the {type(module).__name__} that it describes. Tensors {'; '.join(problems)}."
        )
    bad = [name for name in sorted(take.taken) if not np.all(np.isfinite(np.asarray(tensors[name], np.float32)))]
    if bad:
        raise PretrainedError(f"{path}: NaN or infinity in {', '.join(bad[:20])}; fetch the file again.")
    return Pretrained(
        path=path,
        module=module,
        params=params,
        normalisation=normalisation,
        tensors=len(take.taken),
        unused=tuple(sorted(unused | take.ignored)),
        sha256=checksum,
    )


def _bare_names(path: epath.Path, found: Mapping[str, Any]) -> dict[str, Any]:
    """By names without the prefix that a model with a head puts before its backbone's."""
    bare = {name: re.sub(r"^(swin|vit|dinov2|dinov2_with_registers|model)\.", "", name) for name in found}
    if len(set(bare.values())) < len(bare):
        twice = [name for name in found if bare[name] != name and bare[name] in found]
        raise PretrainedError(f"{path} has {len(twice)} tensors with and without a prefix, such as {twice[:3]}.")
    return {bare[name]: value for name, value in found.items()}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _resized(table: np.ndarray, size: tuple[int, int], antialias: bool) -> np.ndarray:
    rows, columns = (cubic_matrix(old, new, antialias) for old, new in zip(table.shape[1:3], size, strict=True))
    if table.shape[1:3] == tuple(size):
        return table
    return np.einsum("ih,jw,bhwc->bijc", rows, columns, table.astype(np.float64)).astype(np.float32)


def _renormalised(flat: Mapping[str, np.ndarray], theirs: Any, ours: Any) -> dict[str, np.ndarray]:
    name = "patch_embed/projection"
    kernel, bias = (np.asarray(flat[f"{name}/{part}"], np.float64) for part in ("kernel", "bias"))
    (mean0, std0), (mean, std) = np.asarray(theirs, np.float64), np.asarray(ours, np.float64)
    shift = np.einsum("hwco,c->o", kernel, (mean - mean0) / std0)
    scaled = kernel * (std / std0)[:, None]
    return {f"{name}/kernel": scaled.astype(np.float32), f"{name}/bias": (bias + shift).astype(np.float32)}
