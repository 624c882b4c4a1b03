"""The whole network: backbone -> stems -> interaction -> heads."""

from collections.abc import Sequence
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sgw_jax.heads import PredictionHead, TaskStem
from sgw_jax.layers.resize import resize
from sgw_jax.sharding import constrain_batch
from sgw_jax.tasks.base import Task

PRELIMINARY = "preliminary/"
FEATURES = "features/"


class MultiTaskModel(nn.Module):
    """One network for many dense tasks (arXiv 2410.03778, figure 2: encoder, task encoders, KEM, task decoders).

    Attributes:
      tasks: what to predict; a task gives its name and the width of its head.
      backbone: image -> {stride: map}.
      interaction: mapping task -> (batch, h, w, channels) -> the same mapping.
      channels: width of the task features.
      stride: of the task features, relative to the image.
      input_scale: the image is resized by it before the backbone, while predictions keep the image's size (Cityscapes:
        labels at 1024 x 2048, the network at half of that).
      upsample: how heads reach the image's size, see `PredictionHead`.
      preliminary: also predict from the stems, before the interaction, in training (deep supervision as in InvPT).
      dtype: of the computation; parameters and predictions are float32.

    Call: (image (batch, H, W, 3), train) -> {task: (batch, H, W, head width)} float32 raw outputs; with
    ``preliminary`` and ``train`` also {"preliminary/task": ...}, and in training {"features/task": (batch, h, w,
    channels)}, what enters the interaction, for each task whose loss uses it (`Task.uses_features`).

    Raises:
      ValueError: no task, or two of one name.
    """

    tasks: Sequence[Task]
    backbone: nn.Module
    interaction: nn.Module
    channels: int = 64
    stride: int = 4
    input_scale: float = 1.0
    upsample: Literal["bilinear", "subpixel"] = "bilinear"
    preliminary: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "batch height width 3"], train: bool = False) -> dict[str, Array]:
        names = [task.name for task in self.tasks]
        if not names or len(set(names)) < len(names):
            raise ValueError(f"MultiTaskModel: the tasks are {names}; give at least one, each name once.")
        size = (image.shape[1], image.shape[2])
        seen = resize(image, (round(size[0] * self.input_scale), round(size[1] * self.input_scale)))
        pyramid = self.backbone(constrain_batch(seen), train=train)
        features = {
            task.name: constrain_batch(
                TaskStem(self.channels, self.stride, dtype=self.dtype, name=f"stem_{task.name}")(pyramid)
            )
            for task in self.tasks
        }
        mixed = {name: constrain_batch(value) for name, value in self.interaction(features).items()}
        predictions = self._predict("head", mixed, size)
        if self.preliminary and train:
            early = self._predict("preliminary", features, size)
            predictions |= {PRELIMINARY + name: value for name, value in early.items()}
        if train:
            predictions |= {FEATURES + task.name: features[task.name] for task in self.tasks if task.uses_features}
        return predictions

    def _predict(self, prefix: str, features: dict[str, Array], size: tuple[int, int]) -> dict[str, Array]:
        return {
            task.name: PredictionHead(
                task.channels, size, self.upsample, dtype=self.dtype, name=f"{prefix}_{task.name}"
            )(features[task.name])
            for task in self.tasks
        }
