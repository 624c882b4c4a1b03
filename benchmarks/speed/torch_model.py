"""The ViT, the stems, KEM, the heads and the losses of this library in PyTorch, from the same parameters.

What a good PyTorch user would write: fused scaled-dot-product attention, channels-last convolutions, fused AdamW. It is
the other side of pytorch.py, which refuses to time the two before their losses and predictions agree.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

EPSILON = 1e-6


def linear(params: Mapping[str, Any]) -> nn.Linear:
    """From kernel (in, out) and bias."""
    kernel = np.asarray(params["kernel"])
    layer = nn.Linear(*kernel.shape, bias="bias" in params)
    layer.weight.data = torch.tensor(kernel.T.copy())
    if "bias" in params:
        layer.bias.data = torch.tensor(np.asarray(params["bias"]))
    return layer


class Conv(nn.Module):
    """A convolution of NHWC maps; ``stride`` None: 3x3 with padding, else windows side by side."""

    def __init__(self, params: Mapping[str, Any], stride: int | None = None) -> None:
        super().__init__()
        kernel = np.asarray(params["kernel"]).transpose(3, 2, 0, 1)
        padding = 0 if stride else kernel.shape[-1] // 2
        self.conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2], stride or 1, padding)
        self.conv.weight.data = torch.tensor(kernel.copy()).contiguous(memory_format=torch.channels_last)
        self.conv.bias.data = torch.tensor(np.asarray(params["bias"]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def norm(params: Mapping[str, Any]) -> nn.LayerNorm:
    """Over the channels."""
    layer = nn.LayerNorm(np.asarray(params["scale"]).shape[-1], eps=EPSILON)
    layer.weight.data = torch.tensor(np.asarray(params["scale"]))
    layer.bias.data = torch.tensor(np.asarray(params["bias"]))
    return layer


def resize(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Bilinear, half-pixel centres, NHWC."""
    if tuple(x.shape[1:3]) == tuple(size):
        return x
    return F.interpolate(x.permute(0, 3, 1, 2), tuple(size), mode="bilinear", align_corners=False).permute(0, 2, 3, 1)


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, params: Mapping[str, Any], heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = norm(params["norm1"]), norm(params["norm2"])
        self.qkv, self.output = (linear(params["attention"][key]) for key in ("query_key_value", "output"))
        self.hidden, self.out = (linear(params["mlp"][key]) for key in ("hidden", "output"))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        parts = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(*parts).transpose(1, 2).reshape(batch, tokens, width)
        x = x + self.output(mixed)
        return x + self.out(F.gelu(self.hidden(self.norm2(x))))


class Pyramid(nn.Module):
    """ViT of patches of 8 or 16 pixels, four taps made into maps of strides 4, 8, 16 and 32."""

    def __init__(self, params: Mapping[str, Any], heads: int) -> None:
        super().__init__()
        stacked = params["blocks"]
        depth = np.asarray(stacked["norm1"]["scale"]).shape[0]
        self.patch = np.asarray(params["patch_embed"]["projection"]["kernel"]).shape[0]
        self.embed = Conv(params["patch_embed"]["projection"], stride=self.patch)
        self.position = nn.Parameter(torch.tensor(np.asarray(params["position_embedding"])))
        self.blocks = nn.ModuleList(Block(_row(stacked, i), heads) for i in range(depth))
        self.norm = norm(params["norm"])
        self.levels = nn.ModuleDict()
        for stride in (4, 8, 16, 32):
            own = params[f"pyramid{stride}"]
            up = stride <= self.patch
            self.levels[str(stride)] = linear(own) if up else Conv(own, stride=stride // self.patch)
        self.norms = nn.ModuleDict({key: norm(params[f"pyramid_norm{key}"]) for key in self.levels})

    def forward(self, image: torch.Tensor) -> dict[int, torch.Tensor]:
        grid = self.embed(image) + self.position
        batch, height, width, channels = grid.shape
        x, taps, depth = grid.reshape(batch, -1, channels), [], len(self.blocks)
        for number, block in enumerate(self.blocks, 1):
            x = block(x)
            if number % (depth // 4) == 0:
                taps.append((self.norm(x) if number == depth else x).view(batch, height, width, channels))
        maps = {}
        for (key, level), tap in zip(self.levels.items(), taps, strict=True):
            found = level(tap)
            factor = self.patch // int(key)
            if factor > 1:
                cells = found.view(batch, height, width, factor, factor, channels)
                found = cells.transpose(2, 3).reshape(batch, height * factor, width * factor, channels)
            maps[int(key)] = self.norms[key](found)
        return maps


class Stem(nn.Module):
    """A task's encoder: levels projected, resized, summed; one convolution."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        super().__init__()
        self.levels = nn.ModuleDict({key[5:]: linear(own) for key, own in params.items() if key.startswith("level")})
        self.norm, self.conv = norm(params["norm"]), Conv(params["conv"])

    def forward(self, maps: Mapping[int, torch.Tensor]) -> torch.Tensor:
        size = maps[4].shape[1:3]
        fused = sum(resize(self.levels[str(stride)](level), size) for stride, level in maps.items())
        return fused + F.relu(self.conv(self.norm(fused)))


class KEM(nn.Module):
    """Slots retrieve from all tokens by top-k attention, are written back and broadcast (one head, pre-norm)."""

    def __init__(self, params: Mapping[str, Any], top_k: int) -> None:
        super().__init__()
        self.top_k = top_k
        self.slots = nn.Parameter(torch.tensor(np.asarray(params["slots"])))
        self.norm = norm(params["norm"])
        keys = ("query", "key", "value")
        self.retrieve = nn.ModuleDict({f"to_{key}": linear(params["retrieve"][key]) for key in keys})
        self.write = nn.ModuleDict({f"to_{key}": linear(params["write"][key]) for key in keys})

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(batch, tokens, channels)."""
        normed = self.norm(tokens)
        query = self.retrieve["to_query"](self.slots)
        key, value = self.retrieve["to_key"](normed), self.retrieve["to_value"](normed)
        scores, index = torch.topk(query @ key.transpose(1, 2) / query.shape[-1] ** 0.5, self.top_k, dim=-1)
        rows = torch.arange(len(tokens), device=tokens.device)[:, None, None]
        slots = (scores.softmax(-1)[..., None] * value[rows, index]).sum(2)
        query, key, value = (
            self.write["to_query"](normed),
            self.write["to_key"](slots),
            self.write["to_value"](slots),
        )
        return tokens + F.scaled_dot_product_attention(query, key, value)


class Head(nn.Module):
    """A task's decoder."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        super().__init__()
        self.norm, self.conv, self.output = norm(params["norm"]), Conv(params["conv"]), linear(params["output"])

    def forward(self, features: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
        return resize(self.output(F.relu(self.conv(self.norm(features)))), size)


class MultiTask(nn.Module):
    """The whole network from the parameters of `MultiTaskModel`."""

    def __init__(self, params: Mapping[str, Any], tasks: Sequence[str], heads: int, top_k: int) -> None:
        super().__init__()
        self.backbone = Pyramid(params["backbone"], heads)
        self.stems = nn.ModuleDict({name: Stem(params[f"stem_{name}"]) for name in tasks})
        self.interaction = KEM(params["interaction"], top_k)
        self.heads = nn.ModuleDict({name: Head(params[f"head_{name}"]) for name in tasks})

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = self.backbone(image)
        features = {name: stem(maps) for name, stem in self.stems.items()}
        batch, height, width, channels = next(iter(features.values())).shape
        tokens = self.interaction(torch.cat([x.reshape(batch, -1, channels) for x in features.values()], dim=1))
        parts = tokens.chunk(len(features), dim=1)
        return {
            name: head(part.reshape(batch, height, width, channels), image.shape[1:3])
            for (name, head), part in zip(self.heads.items(), parts, strict=True)
        }


def losses(predictions: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cross-entropy, L1 over metres, L1 between unit vectors: means over the labelled pixels."""
    found = {}
    for name, value in predictions.items():
        target = batch[name]
        if name == "semseg":
            found[name] = F.cross_entropy(value.permute(0, 3, 1, 2), target, ignore_index=255)
        elif name == "depth":
            valid = (target > 0) & torch.isfinite(target)
            found[name] = torch.where(valid, (value - target).abs(), 0).sum() / valid.sum()
        else:
            valid = (target != 0).any(-1)
            error = (F.normalize(value, dim=-1) - target).abs().sum(-1)
            found[name] = torch.where(valid, error, 0).sum() / valid.sum()
    return found


def _row(tree: Any, index: int) -> Any:
    """One layer of stacked parameters."""
    return {key: _row(value, index) for key, value in tree.items()} if isinstance(tree, Mapping) else tree[index]
