"""ConvNeXt as DINOv3 distils it: depthwise convolutions, four stages whose maps are the feature pyramid."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sgw_jax.backbones.taps import Taps, known_taps
from sgw_jax.backbones.vit import OUTPUTS
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.layers.drop_path import DropPath
from sgw_jax.layers.mlp import MLP
from sgw_jax.layers.patch_embed import PatchEmbed
from sgw_jax.layers.remat import rematerialised
from sgw_jax.layers.resize import pad_to_multiple
from sgw_jax.layers.stack import check_frozen, drop_rates, frozen_of, scan_blocks
from sgw_jax.sharding import constrain_activations

EPSILON = 1e-6  # of every layer norm, as in the paper's code
WINDOW = 7  # of the depthwise convolutions


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, layer norm, MLP and layer scale, on a residual branch with drop path.

    Call: (map, drop path rate of this layer) -> (map, None): carry and output of a scan.
    """

    train: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, grid: Float[Array, "batch height width channels"], rate: Array) -> tuple[Array, None]:
        channels = grid.shape[-1]
        window = (WINDOW, WINDOW)
        mixed = nn.Conv(channels, window, feature_group_count=channels, dtype=self.dtype, name="depthwise")(grid)
        normed = nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype, name="norm")(mixed)
        branch = MLP(4 * channels, dtype=self.dtype, name="mlp")(normed)
        branch *= self.param("scale", nn.initializers.constant(1e-6), (channels,)).astype(self.dtype)
        return constrain_activations(grid + DropPath(name="drop_path")(branch, rate, self.train)), None


class Downsample(nn.Module):
    """Layer norm, then a convolution of 2 x 2 pixels to half the size and twice the width.

    An odd map loses its last row or column, as in the original, or is padded with zeros behind the norm (``pad``).
    """

    pad: bool
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, grid: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w doubled"]:
        normed = nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype, name="norm")(grid)
        whole = pad_to_multiple(normed, 2) if self.pad else normed
        merge = nn.Conv(2 * grid.shape[-1], (2, 2), 2, padding="VALID", dtype=self.dtype, name="projection")
        return merge(whole)


class ConvNeXt(nn.Module):
    """ConvNeXt (Liu et al. 2022); the pyramid is the maps of its four stages.

    Blocks are one scanned stack per stage, see backbones/vit.py. Layer norm only, hence nothing to synchronise.

    Attributes:
      width: channels of the first stage, doubled from stage to stage.
      depths: blocks per stage.
      output: "pyramid", any image size: the image is padded to whole patches of 4 pixels, a map to an even size before
        it is halved (zeros, at the bottom and on the right), and every map is normalised, the last by the pretrained
        norm (`norm`), the others by norms that are added (`norm_stage1` to `norm_stage3`). "taps": the stages' maps as
        the original has them, which leaves out what does not fill a patch.
      final_norm: with "taps", whether the last map passes through `norm`.
      drop_path: rate of the last block, in [0, 1), linear from 0 at the first block of the first stage.
      remat: what a block keeps for the backward pass, see layers/remat.py.
      frozen_layers: the lowest blocks, counted from stage to stage, through which no gradient goes and in which no path
        is dropped, see layers/stack.py.

    Call: (image (batch, H, W, 3), train, taps) -> {stride: (batch, h, w, width stride / 4)} with strides 4, 8, 16 and
    32, h = ceil(H / stride), w = ceil(W / stride); with "taps" floor in place of ceil. ``taps``: see `known_taps`.

    Raises:
      ValueError: an attribute out of the range given above; taps of an image smaller than 32 pixels.
    """

    width: int = 96
    depths: tuple[int, ...] = (3, 3, 9, 3)
    output: Literal["pyramid", "taps"] = "pyramid"
    final_norm: bool = True
    drop_path: float = 0.0
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32
    frozen_layers: int = 0

    strides = (4, 8, 16, 32)

    @property
    def num_layers(self) -> int:
        """Of which ``frozen_layers`` counts: the blocks of all stages."""
        return sum(self.depths)

    @nn.compact
    def __call__(
        self, image: Float[Array, "batch height width 3"], train: bool = False, taps: Taps | None = None
    ) -> dict[int, Array]:
        self._check((image.shape[1], image.shape[2]))
        taps = known_taps(self, taps, lambda: self._taps(image, train))
        return {stride: self._normed(stage, taps[f"stride{stride}"]) for stage, stride in enumerate(self.strides)}

    @nn.nowrap  # a part of the call: operations keep their paths
    def _taps(self, image: Array, train: bool) -> dict[str, Array]:
        """The stages' maps, the last by the pretrained norm if that is asked for."""
        pad, patch = self.output == "pyramid", self.strides[0]
        image = image.astype(self.dtype)
        image = pad_to_multiple(image, patch) if pad else image
        grid, _ = PatchEmbed(patch, self.width, dtype=self.dtype, name="patch_embed")(image)
        grid = constrain_activations(self._norm("patch_norm")(grid))

        # Known when traced: at rate 0 no random number is drawn.
        dropping = train and self.drop_path > 0 and self.frozen_layers < self.num_layers
        rates = drop_rates(self.drop_path, self.num_layers, self.frozen_layers)
        taps = {}
        for stage, stride in enumerate(self.strides):
            if stage:
                grid = constrain_activations(Downsample(pad, dtype=self.dtype, name=f"downsample{stage}")(grid))
            first, depth = sum(self.depths[:stage]), self.depths[stage]
            block = rematerialised(ConvNeXtBlock, self.remat)(dropping, dtype=self.dtype, name=f"stage{stage + 1}")
            frozen = frozen_of(self.frozen_layers, first, depth)
            grid, _ = scan_blocks(block, grid, rates[first : first + depth], length=depth, frozen=frozen)
            taps[f"stride{stride}"] = grid
        return taps | {f"stride{stride}": self._norm("norm")(grid)} if self._normed_last() else taps

    def _normed_last(self) -> bool:
        return self.output == "pyramid" or self.final_norm

    def _normed(self, stage: int, grid: Array) -> Array:
        """A map as it leaves: all but the last are normalised here, in a pyramid."""
        if self.output == "taps":
            return grid
        last = stage + 1 == len(self.strides)
        return constrain_activations(grid if last else self._norm(f"norm_stage{stage + 1}")(grid))

    def _norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype, name=name)

    def _check(self, size: tuple[int, int]) -> None:
        if len(self.depths) != len(self.strides) or any(depth < 1 for depth in self.depths):
            raise InputError(f"ConvNeXt: depths {self.depths} must be {len(self.strides)} positive numbers.")
        check_frozen("ConvNeXt", self.frozen_layers, self.num_layers)
        if self.width < 1:
            raise InputError(f"ConvNeXt: width {self.width} must be at least 1.")
        if self.output not in OUTPUTS:
            raise InputError(f"ConvNeXt: output is {self.output!r}; it must be one of {OUTPUTS}.")
        if not 0 <= self.drop_path < 1:
            raise InputError(f"ConvNeXt: drop_path {self.drop_path} must be in [0, 1).")
        if self.output == "taps" and min(size) < self.strides[-1]:
            raise InputError(f"ConvNeXt: the image is {size[0]} x {size[1]}; its last map's cells are 32 x 32.")


@dataclasses.dataclass(frozen=True)
class Size:
    """Width and depths of a named size."""

    width: int
    depths: tuple[int, ...]


SIZES: dict[str, Size] = {
    "atto": Size(40, (2, 2, 6, 2)),  # of ConvNeXt V2 (Woo et al. 2023)
    "tiny": Size(96, (3, 3, 9, 3)),
    "small": Size(96, (3, 3, 27, 3)),
    "base": Size(128, (3, 3, 27, 3)),
    "large": Size(192, (3, 3, 27, 3)),
}


def convnext(size: str = "tiny", image_size: tuple[int, int] | None = None, **overrides) -> ConvNeXt:
    """A ConvNeXt of a named size, a key of `SIZES`; any attribute of `ConvNeXt` can be overridden.

    ``image_size`` is what every backbone is told; no parameter of ConvNeXt depends on it, so it is not used.
    """
    del image_size
    if size not in SIZES:
        raise InputError(f"convnext: size {size!r}; it must be one of {list(SIZES)}.")
    return ConvNeXt(**{**dataclasses.asdict(SIZES[size]), **overrides})
