"""Swin Transformer: attention within shifted windows, four stages whose maps are the feature pyramid."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sgw_jax.backbones.taps import Taps, known_taps
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.layers.drop_path import DropPath
from sgw_jax.layers.mlp import MLP
from sgw_jax.layers.patch_embed import PatchEmbed
from sgw_jax.layers.remat import rematerialised
from sgw_jax.layers.resize import pad_to_multiple
from sgw_jax.layers.stack import check_frozen, drop_rates, frozen_of, scan_blocks
from sgw_jax.layers.window_attention import WindowAttention
from sgw_jax.sharding import constrain_activations

EPSILON = 1e-5  # of every layer norm, as in the paper's code


class SwinBlock(nn.Module):
    """Pre-norm block: windowed attention and MLP, each on a residual branch with drop path.

    Call: (map, drop path rate of this layer) -> map.
    """

    num_heads: int
    window_size: int = 7
    shifted: bool = False
    always_partition: bool = True
    mlp_ratio: float = 4.0
    window_chunk: int | None = None
    train: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, grid: Float[Array, "batch height width channels"], rate: Array) -> Array:
        drop_path = DropPath(name="drop_path")
        attention = WindowAttention(
            self.num_heads,
            window_size=self.window_size,
            shifted=self.shifted,
            always_partition=self.always_partition,
            chunk=self.window_chunk,
            dtype=self.dtype,
            name="attention",
        )
        branch = attention(nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype, name="norm1")(grid))
        grid = constrain_activations(grid + drop_path(branch, rate, self.train))
        normed = nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype, name="norm2")(grid)
        branch = MLP(int(grid.shape[-1] * self.mlp_ratio), dtype=self.dtype, name="mlp")(normed)
        return constrain_activations(grid + drop_path(branch, rate, self.train))


class BlockPair(nn.Module):
    """A block with plain windows, then one with shifted windows: what a stage repeats.

    Call: (map, the two drop path rates) -> (map, None): carry and output of a scan.
    """

    num_heads: int
    window_size: int = 7
    always_partition: bool = True
    mlp_ratio: float = 4.0
    window_chunk: int | None = None
    remat: str = "none"
    train: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, grid: Float[Array, "batch height width channels"], rates: Float[Array, "2"]):
        block = rematerialised(SwinBlock, self.remat)
        for index, name in enumerate(("regular", "shifted")):
            options = {
                "window_size": self.window_size,
                "shifted": name == "shifted",
                "always_partition": self.always_partition,
                "mlp_ratio": self.mlp_ratio,
                "window_chunk": self.window_chunk,
                "train": self.train,
                "dtype": self.dtype,
            }
            grid = block(self.num_heads, **options, name=name)(grid, rates[index])
        return grid, None


class PatchMerging(nn.Module):
    """Half the size, twice the width: 2 x 2 tokens side by side, layer norm, a linear map without bias.

    The four tokens are taken in the paper's order: column by column, (0, 0), (1, 0), (0, 1), (1, 1). Odd sizes are
    padded with zeros at the bottom and on the right.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, grid: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w doubled"]:
        grid = pad_to_multiple(grid, 2)
        batch, height, width, channels = grid.shape
        cells = grid.reshape(batch, height // 2, 2, width // 2, 2, channels).transpose(0, 1, 3, 4, 2, 5)
        cells = cells.reshape(batch, height // 2, width // 2, 4 * channels)
        normed = nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype, name="norm")(cells)
        return nn.Dense(2 * channels, use_bias=False, dtype=self.dtype, name="reduction")(normed)


class Swin(nn.Module):
    """Swin Transformer (Liu et al. 2021); the pyramid is the maps of its four stages, before merging.

    Any image size: the image is padded to patches of 4 x 4 pixels, every map to whole windows, odd maps before merging
    (zeros, at the bottom and on the right). Equal to Hugging Face's `SwinBackbone`, up to drop path, which is here on
    both branches of a block as in the paper's code. Pairs of blocks are one scanned stack per stage: compile time does
    not grow with depth, FSDP gathers one pair at a time. Layer norm only, see backbones/vit.py.

    Attributes:
      width: channels of the first stage, doubled from stage to stage.
      depths: blocks per stage, even: they come in pairs of a plain and a shifted one.
      num_heads, window_size, mlp_ratio: as in the paper; num_heads per stage.
      always_partition: False shrinks the window to maps no larger than it, see `WindowAttention`. It matters where the
        image's shorter side is at most 32 window_size = 224 pixels.
      drop_path: rate of the last block, in [0, 1), linear from 0 at the first block of the first stage.
      window_chunk: windows x heads of an image at a time, see `WindowAttention`; None is all.
      output_norms: a layer norm per map (`norm_stage1` to `norm_stage4`).
      remat: what a block keeps for the backward pass, see layers/remat.py.
      frozen_layers: the lowest blocks, in whole pairs, through which no gradient goes and in which no path is dropped,
        see layers/stack.py.

    Call: (image (batch, H, W, 3), train, taps) -> {stride: (batch, h, w, width stride / 4)} with strides 4, 8, 16 and
    32, h = ceil(H / stride), w = ceil(W / stride). ``taps``: see `known_taps`.

    Raises:
      ValueError: an attribute out of the range given above.
    """

    width: int = 96
    depths: tuple[int, ...] = (2, 2, 6, 2)
    num_heads: tuple[int, ...] = (3, 6, 12, 24)
    window_size: int = 7
    mlp_ratio: float = 4.0
    always_partition: bool = True
    drop_path: float = 0.0
    output_norms: bool = True
    window_chunk: int | None = None
    remat: str = "none"
    dtype: jnp.dtype = jnp.float32
    frozen_layers: int = 0

    strides = (4, 8, 16, 32)
    fixed_size = "the masks of Swin's shifted windows are made for one size"

    @property
    def num_layers(self) -> int:
        """Of which ``frozen_layers`` counts: blocks, not pairs of them."""
        return sum(self.depths)

    @nn.compact
    def __call__(
        self, image: Float[Array, "batch height width 3"], train: bool = False, taps: Taps | None = None
    ) -> dict[int, Array]:
        self.check()
        taps = known_taps(self, taps, lambda: self._taps(image, train))
        maps = {}
        for stage, stride in enumerate(self.strides):
            grid = taps[f"stride{stride}"]
            normed = self._norm(f"norm_stage{stage + 1}")(grid) if self.output_norms else grid
            maps[stride] = constrain_activations(normed)
        return maps

    @nn.nowrap  # a part of the call: operations keep their paths
    def _taps(self, image: Array, train: bool) -> dict[str, Array]:
        """The stages' maps."""
        patch = self.strides[0]
        image = pad_to_multiple(image.astype(self.dtype), patch)
        grid, _ = PatchEmbed(patch, self.width, dtype=self.dtype, name="patch_embed")(image)
        grid = constrain_activations(self._norm("patch_norm")(grid))

        # Known when traced: at rate 0 no random number is drawn.
        dropping = train and self.drop_path > 0 and self.frozen_layers < self.num_layers
        rates = drop_rates(self.drop_path, self.num_layers, self.frozen_layers)
        taps = {}
        for stage, stride in enumerate(self.strides):
            if stage:
                grid = constrain_activations(PatchMerging(dtype=self.dtype, name=f"merge{stage}")(grid))
            first, depth = sum(self.depths[:stage]), self.depths[stage]
            pairs = BlockPair(
                self.num_heads[stage],
                window_size=self.window_size,
                always_partition=self.always_partition,
                mlp_ratio=self.mlp_ratio,
                window_chunk=self.window_chunk,
                remat=self.remat,
                train=dropping,
                dtype=self.dtype,
                name=f"stage{stage + 1}",
            )
            own, frozen = rates[first : first + depth].reshape(-1, 2), frozen_of(self.frozen_layers, first, depth)
            grid, _ = scan_blocks(pairs, grid, own, length=depth // 2, frozen=frozen // 2)
            taps[f"stride{stride}"] = grid
        return taps

    def _norm(self, name: str) -> nn.LayerNorm:
        return nn.LayerNorm(epsilon=EPSILON, dtype=self.dtype, name=name)

    def check(self) -> None:
        """Raises a ValueError for attributes out of range."""
        stages = len(self.strides)
        if len(self.depths) != stages or any(depth < 2 or depth % 2 for depth in self.depths):
            raise InputError(
                f"Swin: depths {self.depths} must be {stages} even numbers from 2 on: blocks come in pairs."
            )
        if len(self.num_heads) != stages or any(heads < 1 for heads in self.num_heads):
            raise InputError(f"Swin: num_heads {self.num_heads} must be {stages} positive numbers, one per stage.")
        for stage, heads in enumerate(self.num_heads):
            if (self.width << stage) % heads:
                raise InputError(
                    f"Swin: the width of stage {stage + 1}, {self.width << stage}, does not divide into its "
                    f"{heads} heads; num_heads is {self.num_heads}."
                )
        check_frozen("Swin", self.frozen_layers, self.num_layers, unit=2)
        if self.window_size < 1:
            raise InputError(f"Swin: window_size {self.window_size} must be at least 1.")
        if self.window_chunk is not None and self.window_chunk < 1:
            raise InputError(f"Swin: window_chunk {self.window_chunk} must be at least 1, or None for all.")
        if not 0 <= self.drop_path < 1:
            raise InputError(f"Swin: drop_path {self.drop_path} must be in [0, 1).")


@dataclasses.dataclass(frozen=True)
class Size:
    """Width, depths and heads of a named size."""

    width: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]


SIZES: dict[str, Size] = {
    "tiny": Size(96, (2, 2, 6, 2), (3, 6, 12, 24)),
    "small": Size(96, (2, 2, 18, 2), (3, 6, 12, 24)),
    "base": Size(128, (2, 2, 18, 2), (4, 8, 16, 32)),
    "large": Size(192, (2, 2, 18, 2), (6, 12, 24, 48)),
}


def swin(size: str = "tiny", image_size: tuple[int, int] | None = None, **overrides) -> Swin:
    """A Swin of a named size ("tiny", "small", "base", "large"); any attribute of `Swin` can be overridden.

    ``image_size`` is what every backbone is told; no parameter of Swin depends on it, so it is not used.
    """
    del image_size
    if size not in SIZES:
        raise InputError(f"swin: size {size!r}; it must be one of {list(SIZES)}.")
    return Swin(**{**dataclasses.asdict(SIZES[size]), **overrides})
