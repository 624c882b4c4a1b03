"""What each task has for itself: the stem before the interaction and the prediction head after it."""

from collections.abc import Mapping
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.layers.resize import depth_to_space, resize, resize_to_stride

UPSAMPLES = ("bilinear", "subpixel")


class TaskStem(nn.Module):
    """One task's encoder: fuses the pyramid to one map of stride ``stride``.

    Every level is projected to ``channels`` by a 1x1 convolution, resized by the ratio of the strides, summed,
    normalised, and passed through one 3x3 convolution with a residual. LayerNorm over channels: no running state (see
    backbones/vit.py).
    """

    channels: int
    stride: int = 4
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, pyramid: Mapping[int, Array]) -> Float[Array, "batch height width channels"]:
        if self.stride not in pyramid:
            raise InputError(f"TaskStem: stride {self.stride} is not in the pyramid, which has {sorted(pyramid)}.")
        _, height, width, _ = pyramid[self.stride].shape
        # Projecting before resizing keeps the large maps narrow.
        levels = []
        for stride, level in pyramid.items():
            narrow = nn.Dense(self.channels, dtype=self.dtype, name=f"level{stride}")(level)
            levels.append(resize_to_stride(narrow, stride, self.stride, (height, width)))
        fused = sum(levels[1:], start=levels[0])
        normed = nn.LayerNorm(dtype=self.dtype, name="norm")(fused)
        return fused + nn.relu(nn.Conv(self.channels, (3, 3), dtype=self.dtype, name="conv")(normed))


class PredictionHead(nn.Module):
    """One task's decoder: norm, 3x3 convolution, ReLU, 1x1 convolution, then to the image's size.

    ``upsample="bilinear"`` interpolates the output (the field's customary head); ``"subpixel"`` predicts the pixels of
    each cell from its channels, which keeps thin structures at small image sizes. Predictions leave in float32
    (float64 in a float64 program).

    Raises:
      ValueError: an unknown ``upsample``; "subpixel" for a size that is not a whole multiple of the features' size.
    """

    channels: int
    size: tuple[int, int]
    upsample: Literal["bilinear", "subpixel"] = "bilinear"
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, features: Float[Array, "batch h w c"]) -> Float[Array, "batch height width channels"]:
        if self.upsample not in UPSAMPLES:
            raise InputError(f"PredictionHead: upsample is {self.upsample!r}; it must be one of {UPSAMPLES}.")
        wide = jnp.promote_types(self.dtype, jnp.float32)
        x = nn.LayerNorm(dtype=self.dtype, name="norm")(features)
        x = nn.relu(nn.Conv(features.shape[-1], (3, 3), dtype=self.dtype, name="conv")(x))
        # The last layer starts small, so that the first losses are those of a constant predictor.
        init = nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")
        if self.upsample == "bilinear":
            output = nn.Dense(self.channels, dtype=self.dtype, kernel_init=init, name="output")(x)
            return resize(output.astype(wide), self.size)
        height, width = features.shape[1:3]
        factor = self.size[0] // height
        if self.size != (factor * height, factor * width):
            raise InputError(
                f"PredictionHead: 'subpixel' cannot reach {self.size} from {(height, width)} by one whole factor; "
                "use 'bilinear'."
            )
        packed = nn.Dense(self.channels * factor**2, dtype=self.dtype, kernel_init=init, name="output")(x)
        return depth_to_space(packed.astype(wide), factor)
