"""AugReg's ViT files (.npz): the model that their shapes describe, and its parameters."""

import io
import zipfile
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

from sgw_jax.backbones.tensors import PretrainedError, Tensors, stacked
from sgw_jax.backbones.vit import ViT


def read_augreg(path: str, content: bytes) -> tuple[ViT, dict[str, np.ndarray], Callable]:
    """The ViT of an AugReg file: all that config.json would say is in its shapes. The GELU is the tanh approximation
    that these models were trained with."""
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            tensors = {name: file[name] for name in file.files}
    # TypeError: a lone array (.npy); RuntimeError: a zip with a password.
    except (ValueError, OSError, EOFError, TypeError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        raise PretrainedError(f"{path} is truncated or no .npz of plain arrays ({error}); fetch it again.") from error
    at = "Transformer/encoderblock_"
    table, query = "Transformer/posembed_input/pos_embedding", f"{at}0/MultiHeadDotProductAttention_1/query/kernel"
    # What says the sizes: number of axes by name.
    needed = {"embedding/kernel": 4, "cls": 3, table: 3, query: 3, f"{at}0/MlpBlock_3/Dense_0/bias": 1}
    if missing := [name for name in needed if name not in tensors]:
        raise PretrainedError(
            f"{path} has no {missing}, which every AugReg ViT has (hybrids with a ResNet are not read). It holds "
            f"{len(tensors)} arrays, such as {sorted(tensors)[:5]}."
        )
    if other := [name for name, array in tensors.items() if getattr(array, "dtype", np.dtype("O")).kind not in "fiu"]:
        raise PretrainedError(f"{path}: {', '.join(sorted(other)[:20])} must be arrays of numbers.")
    shapes = {name: tensors[name].shape for name in needed}
    if any(len(shapes[name]) != axes or 0 in shapes[name] for name, axes in needed.items()):
        raise PretrainedError(f"{path}: the shapes {shapes} are no ViT's, whose axes are {tuple(needed.values())}.")
    patch, _, _, width = shapes["embedding/kernel"]
    side = round((shapes[table][1] - 1) ** 0.5)
    depth = len({name.split("/")[1] for name in tensors if name.startswith(at)})
    heads = shapes[query][1]
    hidden = shapes[f"{at}0/MlpBlock_3/Dense_0/bias"][0]
    if width % heads:
        raise PretrainedError(f"{path}: {query} has {heads} heads, into which the width {width} does not divide.")
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

    def convert(take: "Tensors") -> dict[str, Any]:
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

        positions = take(table, (1, 1 + side * side, width))
        return {
            "patch_embed": {"projection": affine("embedding", patch, patch, 3, width)},
            "class_token": take("cls", (1, 1, width)) + positions[:, :1],
            "position_embedding": positions[:, 1:].reshape(1, side, side, width),
            "blocks": stacked([block(index) for index in range(depth)]),
            "norm": norm("Transformer/encoder_norm"),
        }

    return module, tensors, convert
