"""Pretrained backbones: a hub folder (config.json + model.safetensors) or an AugReg .npz, every tensor accounted for."""

import dataclasses
import hashlib
import io
import json
import logging
import re
import zipfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath

from sgw_jax.backbones.swin import EPSILON as SWIN_EPSILON
from sgw_jax.backbones.swin import Swin
from sgw_jax.backbones.vit import ViT
from sgw_jax.layers.resize import cubic_matrix

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # mean and standard deviation of the channels, of 0..1
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))

# Layers that no checkpoint of a backbone has to have: what a model puts on top of it, at their initial values.
NEW_LAYERS = re.compile(r"^(pyramid|lateral|norm_stage)")

# Heads, pooling, masked-image tokens and index buffers, which a feature extractor has no use for.
UNUSED = re.compile(
    r"^(classifier\.|decoder\.|pooler\.|embeddings\.mask_token$|head/|pre_logits/)|\.relative_position_index$"
)


class PretrainedError(ValueError):
    """A file that is not what it should be, or not for this model."""


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """What a file holds: the module it is for, its parameters (nested, NumPy float32), the (mean, standard deviation)
    of the channels it was trained with, the tensors that are of no use here, and its SHA-256."""

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
        rest = f"; not used: {', '.join(self.unused)}" if self.unused else ""
        return f"{self.path}: {self.tensors} tensors, {count:,} parameters, sha256 {self.sha256[:16]}{rest}."


def load_pretrained(path: epath.PathLike) -> tuple[nn.Module, dict[str, Any]]:
    """The module that a file is for, and its variables.

    A folder in the hub's layout (``config.json`` with model_type swin, vit or dinov2, and ``model.safetensors``), local
    or in a bucket, or an AugReg ``.npz`` of Steiner et al. 2021. ``module.apply(variables, pixels)`` gives, for pixels
    normalised as the original was trained, what the original computes: for Swin {stride: map} of the four stages before
    merging, with output norms if the file has them; for ViT and DINOv2 {layer: map} of four layers, the last after the
    final norm, without the class token.

    Raises:
      PretrainedError: no such file, truncated, pickled, of another kind or option than those above; tensors that are
        missing, of another shape, or that nothing asks for, all of which are listed.
    """
    found = read_pretrained(path)
    logging.getLogger(__name__).info("Loaded %s", found.summary())
    return found.module, {"params": found.params}


def read_pretrained(path: epath.PathLike) -> Pretrained:
    """As `load_pretrained`, with what else there is to know of the file."""
    path = epath.Path(path)
    if path.suffix == ".npz":
        content = _read(path)
        return _assemble(str(path), content, _augreg(path, content), HALF)
    config = _json(path / "config.json")
    kind = config.get("model_type")
    if kind not in FAMILIES:
        raise PretrainedError(
            f"{path / 'config.json'}: model_type is {kind!r}; it must be one of {list(FAMILIES)}, of a Swin, ViT or "
            "DINOv2."
        )
    file = path / "model.safetensors"
    if not file.exists():
        pickled = [name for name in ("pytorch_model.bin", "tf_model.h5") if (path / name).exists()]
        hint = f" {pickled[0]} is not read: convert it (save_pretrained writes safetensors)." if pickled else ""
        raise PretrainedError(f"{file} does not exist.{hint}")
    content = _read(file)
    try:
        tensors = safetensors.numpy.load(content)
    except safetensors.SafetensorError as error:
        raise PretrainedError(f"{file} is truncated or no safetensors file ({error}); fetch it again.") from error
    module, default, convert = FAMILIES[kind](f"{path / 'config.json'}", config, set(map(_bare, tensors)))
    processor = path / "preprocessor_config.json"
    normalisation = default
    if processor.exists() and (options := _json(processor)).get("do_normalize", True):
        normalisation = tuple(options.get("image_mean", default[0])), tuple(options.get("image_std", default[1]))
    bare = {_bare(name): value for name, value in tensors.items()}
    return _assemble(str(path), content, (module, bare, convert), normalisation)


def fit(found: Pretrained, backbone: nn.Module, shapes: Mapping[str, Any], mean: Sequence[float], std: Sequence[float]):
    """The file's parameters as those of another module of the same architecture, flat: {"blocks/norm1/scale": array}.

    The position embedding is resized to the module's once, by `resize_bicubic`'s weights; the patch embedding absorbs
    the difference between the normalisation (``mean``, ``std``) of the pixels that the module gets and the original's,
    exactly: k' = k s / s_0 and b' = b + sum k (m - m_0) / s_0 [our decision]. Layers of `NEW_LAYERS` need not be in the
    file.

    Args:
      shapes: the module's parameters, nested, with anything that has a shape as leaves.

    Raises:
      PretrainedError: another architecture (each attribute that differs), a parameter that the file lacks.
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
        flat["position_embedding"] = _resized(flat["position_embedding"], wanted["position_embedding"].shape[1:3])
    flat |= _renormalised(flat, found.normalisation, (mean, std))
    missing = [name for name in wanted if name not in flat and not NEW_LAYERS.match(name)]
    wrong = [name for name in wanted if name in flat and flat[name].shape != tuple(wanted[name].shape)]
    if missing or wrong:
        raise PretrainedError(f"{found.path}: the backbone has {missing} that it lacks, {wrong} of another shape.")
    return {name: array for name, array in flat.items() if name in wanted}


# ---- the families: config.json -> (module, default normalisation, tensors -> parameters) ---------------------------


def _vit_family(where: str, config: Mapping[str, Any], names: set[str]) -> tuple[nn.Module, Any, Callable]:
    _refuse(where, config, {"num_channels": 3, "qkv_bias": True, "use_swiglu_ffn": False})
    dinov2 = config["model_type"] == "dinov2"
    width = _number(where, config, "hidden_size")
    patch, depth = _number(where, config, "patch_size"), _number(where, config, "num_hidden_layers")
    size = _number(where, config, "image_size")
    module = ViT(
        patch_size=patch,
        width=width,
        depth=depth,
        num_heads=_number(where, config, "num_attention_heads"),
        mlp_ratio=config.get("mlp_ratio", 4) if dinov2 else _number(where, config, "intermediate_size") / width,
        image_size=(size, size),
        class_token=True,
        layer_scale=1.0 if dinov2 else None,
        approximate_gelu=_approximate(where, config),
        epsilon=config.get("layer_norm_eps", 1e-6 if dinov2 else 1e-12),
        tapped=None if depth % 4 == 0 else tuple(range(1, depth + 1)),
        output="taps",
    )
    return module, IMAGENET if dinov2 else HALF, lambda take: _vit_params(take, module)


def _vit_params(take: "_Tensors", module: ViT) -> dict[str, Any]:
    width, hidden = module.width, int(module.width * module.mlp_ratio)
    dinov2 = module.layer_scale is not None
    norm1, norm2 = ("norm1", "norm2") if dinov2 else ("layernorm_before", "layernorm_after")
    first, second = ("mlp.fc1", "mlp.fc2") if dinov2 else ("intermediate.dense", "output.dense")

    def block(index: int) -> dict[str, Any]:
        at = f"encoder.layer.{index}."
        made = {
            "norm1": take.norm(at + norm1, width),
            "norm2": take.norm(at + norm2, width),
            "attention": {
                "query_key_value": take.joined(at + "attention.attention.", width),
                "output": take.dense(at + "attention.output.dense", width, width),
            },
            "mlp": {
                "hidden": take.dense(at + first, width, hidden),
                "output": take.dense(at + second, hidden, width),
            },
        }
        if dinov2:
            made |= {f"scale{i}": take(f"{at}layer_scale{i}.lambda1", (width,)) for i in (1, 2)}
        return made

    rows, columns = (size // module.patch_size for size in module.image_size)
    positions = take("embeddings.position_embeddings", (1, 1 + rows * columns, width))
    return {
        "patch_embed": {"projection": take.patches("embeddings.patch_embeddings.projection", module.patch_size, width)},
        "class_token": take("embeddings.cls_token", (1, 1, width)) + positions[:, :1],
        "position_embedding": positions[:, 1:].reshape(1, rows, columns, width),
        "blocks": _stacked([block(index) for index in range(module.depth)]),
        "norm": take.norm("layernorm", width),
    }


def _swin_family(where: str, config: Mapping[str, Any], names: set[str]) -> tuple[nn.Module, Any, Callable]:
    needed = {"num_channels": 3, "qkv_bias": True, "use_absolute_embeddings": False, "patch_size": 4}
    _refuse(where, config, {**needed, "layer_norm_eps": SWIN_EPSILON})
    if _approximate(where, config):
        raise PretrainedError(f"{where}: hidden_act is {config['hidden_act']!r}; a Swin must have 'gelu'.")
    module = Swin(
        width=_number(where, config, "embed_dim"),
        depths=tuple(config.get("depths", ())),
        num_heads=tuple(config.get("num_heads", ())),
        window_size=_number(where, config, "window_size"),
        mlp_ratio=config.get("mlp_ratio", 4.0),
        output_norms=any(name.startswith("hidden_states_norms.") for name in names),
    )
    try:
        module.check()
    except ValueError as error:
        raise PretrainedError(f"{where}: {error}") from error
    return module, IMAGENET, lambda take: _swin_params(take, module)


def _swin_params(take: "_Tensors", module: Swin) -> dict[str, Any]:
    offsets = (2 * module.window_size - 1) ** 2

    def block(stage: int, index: int) -> dict[str, Any]:
        at, width = f"encoder.layers.{stage}.blocks.{index}.", module.width << stage
        hidden = int(width * module.mlp_ratio)
        table = take(at + "attention.self.relative_position_bias_table", (offsets, module.num_heads[stage]))
        return {
            "norm1": take.norm(at + "layernorm_before", width),
            "norm2": take.norm(at + "layernorm_after", width),
            "attention": {
                "query_key_value": take.joined(at + "attention.self.", width),
                "output": take.dense(at + "attention.output.dense", width, width),
                "relative_position_bias_table": table,
            },
            "mlp": {
                "hidden": take.dense(at + "intermediate.dense", width, hidden),
                "output": take.dense(at + "output.dense", hidden, width),
            },
        }

    params = {
        "patch_embed": {"projection": take.patches("embeddings.patch_embeddings.projection", 4, module.width)},
        "patch_norm": take.norm("embeddings.norm", module.width),
    }
    for stage, depth in enumerate(module.depths):
        width = module.width << stage
        pairs = range(0, depth, 2)
        params[f"stage{stage + 1}"] = _stacked(
            [{"regular": block(stage, first), "shifted": block(stage, first + 1)} for first in pairs]
        )
        if stage + 1 < len(module.depths):
            at = f"encoder.layers.{stage}.downsample."
            kernel = take(at + "reduction.weight", (2 * width, 4 * width)).T
            params[f"merge{stage + 1}"] = {"norm": take.norm(at + "norm", 4 * width), "reduction": {"kernel": kernel}}
        if module.output_norms:
            params[f"norm_stage{stage + 1}"] = take.norm(f"hidden_states_norms.stage{stage + 1}", width)
    # The classifier's final norm, which is no part of the maps.
    take.ignore("layernorm.weight", "layernorm.bias")
    return params


FAMILIES: dict[str, Callable[..., tuple[nn.Module, Any, Callable]]] = {
    "swin": _swin_family,
    "vit": _vit_family,
    "dinov2": _vit_family,
}

# What two modules must have in common to share parameters; the rest is size of the image, dropping, dtype.
ARCHITECTURE: dict[type[nn.Module], tuple[str, ...]] = {
    ViT: (
        *("patch_size", "width", "depth", "num_heads", "mlp_ratio", "patch_embed", "class_token", "layer_scale"),
        *("approximate_gelu", "epsilon"),
    ),
    Swin: ("width", "depths", "num_heads", "window_size", "mlp_ratio"),
}


def _kind(name: str, value: Any) -> Any:
    """What of an attribute decides: of layer scale only whether there is one."""
    return value is not None if name == "layer_scale" else value


def _augreg(path: epath.Path, content: bytes) -> tuple[nn.Module, dict[str, np.ndarray], Callable]:
    """The ViT of an AugReg file: all that config.json would say is in its shapes. The GELU is the tanh approximation
    that these models were trained with."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            tensors = {name: file[name] for name in file.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        raise PretrainedError(f"{path} is truncated or no .npz of plain arrays ({error}); fetch it again.") from error
    at = "Transformer/encoderblock_"
    needed = ("embedding/kernel", "cls", "Transformer/posembed_input/pos_embedding")
    query = f"{at}0/MultiHeadDotProductAttention_1/query/kernel"
    if missing := [name for name in (*needed, query) if name not in tensors]:
        raise PretrainedError(
            f"{path} has no {missing}, which every AugReg ViT has (hybrids with a ResNet are not read). It holds "
            f"{len(tensors)} arrays, such as {sorted(tensors)[:5]}."
        )
    patch, _, _, width = tensors["embedding/kernel"].shape
    side = int(round((tensors[needed[2]].shape[1] - 1) ** 0.5))
    depth = len({name.split("/")[1] for name in tensors if name.startswith(at)})
    heads = tensors[query].shape[1]
    hidden = tensors[f"{at}0/MlpBlock_3/Dense_0/bias"].shape[0]
    module = ViT(
        patch_size=patch,
        width=width,
        depth=depth,
        num_heads=heads,
        mlp_ratio=hidden / width,
        image_size=(side * patch, side * patch),
        class_token=True,
        approximate_gelu=True,
        tapped=None if depth % 4 == 0 else tuple(range(1, depth + 1)),
        output="taps",
    )

    def convert(take: "_Tensors") -> dict[str, Any]:
        dim = width // heads

        def affine(name: str, *shape: int) -> dict[str, np.ndarray]:
            return {"kernel": take(f"{name}/kernel", shape), "bias": take(f"{name}/bias", shape[-1:])}

        def norm(name: str) -> dict[str, np.ndarray]:
            return {part: take(f"{name}/{part}", (width,)) for part in ("scale", "bias")}

        def block(index: int) -> dict[str, Any]:
            attention = f"{at}{index}/MultiHeadDotProductAttention_1"
            projections = [
                (
                    take(f"{attention}/{name}/kernel", (width, heads, dim)).reshape(width, width),
                    take(f"{attention}/{name}/bias", (heads, dim)).reshape(width),
                )
                for name in ("query", "key", "value")
            ]
            kernels, biases = zip(*projections, strict=True)
            output = affine(f"{attention}/out", heads, dim, width)
            return {
                "norm1": norm(f"{at}{index}/LayerNorm_0"),
                "norm2": norm(f"{at}{index}/LayerNorm_2"),
                "attention": {
                    "query_key_value": {"kernel": np.concatenate(kernels, 1), "bias": np.concatenate(biases)},
                    "output": {"kernel": output["kernel"].reshape(width, width), "bias": output["bias"]},
                },
                "mlp": {
                    "hidden": affine(f"{at}{index}/MlpBlock_3/Dense_0", width, hidden),
                    "output": affine(f"{at}{index}/MlpBlock_3/Dense_1", hidden, width),
                },
            }

        positions = take(needed[2], (1, 1 + side * side, width))
        return {
            "patch_embed": {"projection": affine("embedding", patch, patch, 3, width)},
            "class_token": take("cls", (1, 1, width)) + positions[:, :1],
            "position_embedding": positions[:, 1:].reshape(1, side, side, width),
            "blocks": _stacked([block(index) for index in range(depth)]),
            "norm": norm("Transformer/encoder_norm"),
        }

    return module, tensors, convert


# ---- reading -------------------------------------------------------------------------------------------------------


class _Tensors:
    """The tensors of a file by name; keeps account of what was asked for and what was wrong."""

    def __init__(self, tensors: Mapping[str, np.ndarray]):
        self._tensors = tensors
        self.taken: set[str] = set()
        self.ignored: set[str] = set()
        self.missing: list[str] = []
        self.wrong: list[str] = []

    def __call__(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """The tensor in float32; zeros where there is none of that name and shape, which is reported at the end."""
        found = self._tensors.get(name)
        if found is None:
            self.missing.append(name)
        else:
            self.taken.add(name)
            if found.shape == shape:
                return np.asarray(found, np.float32)
            self.wrong.append(f"{name} {found.shape} instead of {shape}")
        return np.zeros(shape, np.float32)

    def ignore(self, *names: str) -> None:
        self.ignored |= set(names) & set(self._tensors)

    def norm(self, name: str, width: int) -> dict[str, np.ndarray]:
        return {"scale": self(f"{name}.weight", (width,)), "bias": self(f"{name}.bias", (width,))}

    def dense(self, name: str, inputs: int, outputs: int) -> dict[str, np.ndarray]:
        """torch's Linear stores (out, in)."""
        return {"kernel": self(f"{name}.weight", (outputs, inputs)).T, "bias": self(f"{name}.bias", (outputs,))}

    def joined(self, prefix: str, width: int) -> dict[str, np.ndarray]:
        """Query, key and value side by side, as `SelfAttention` and `WindowAttention` have them."""
        parts = [self.dense(prefix + name, width, width) for name in ("query", "key", "value")]
        return {key: np.concatenate([part[key] for part in parts], -1) for key in ("kernel", "bias")}

    def patches(self, name: str, patch: int, width: int) -> dict[str, np.ndarray]:
        """torch's Conv2d stores (out, in, height, width)."""
        kernel = self(f"{name}.weight", (width, 3, patch, patch)).transpose(2, 3, 1, 0)
        return {"kernel": kernel, "bias": self(f"{name}.bias", (width,))}


def _assemble(path: str, content: bytes, source: tuple, normalisation: Any) -> Pretrained:
    module, tensors, convert = source
    take = _Tensors(tensors)
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
        sha256=hashlib.sha256(content).hexdigest(),
    )


def _read(path: epath.Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise PretrainedError(f"{path} cannot be read ({error.strerror or error}).") from error


def _json(path: epath.Path) -> dict[str, Any]:
    try:
        return json.loads(_read(path))
    except ValueError as error:
        if isinstance(error, PretrainedError):
            raise
        raise PretrainedError(f"{path} is no JSON ({error}).") from error


def _bare(name: str) -> str:
    """Without the prefix that a model with a head puts before its backbone's names."""
    return re.sub(r"^(swin|vit|dinov2)\.", "", name)


def _number(where: str, config: Mapping[str, Any], key: str) -> int:
    value = config.get(key)
    if isinstance(value, list) and len(set(value)) == 1:
        value = value[0]
    if not isinstance(value, int) or value < 1:
        raise PretrainedError(f"{where}: {key} is {value!r}; it must be a positive whole number.")
    return value


def _refuse(where: str, config: Mapping[str, Any], needed: Mapping[str, Any]) -> None:
    for key, value in needed.items():
        if config.get(key, value) != value:
            raise PretrainedError(f"{where}: {key} is {config[key]!r}; only {value!r} is supported.")


def _approximate(where: str, config: Mapping[str, Any]) -> bool:
    kinds = {"gelu": False, "gelu_new": True, "gelu_pytorch_tanh": True}
    name = config.get("hidden_act", "gelu")
    if name not in kinds:
        raise PretrainedError(f"{where}: hidden_act is {name!r}; it must be one of {list(kinds)}.")
    return kinds[name]


def _stacked(layers: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Trees of equal structure as one, layers along a new first axis."""
    first = layers[0]
    return {
        key: _stacked([layer[key] for layer in layers])
        if isinstance(first[key], dict)
        else np.stack([layer[key] for layer in layers])
        for key in first
    }


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}/") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _resized(table: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows, columns = (cubic_matrix(old, new) for old, new in zip(table.shape[1:3], size, strict=True))
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
