"""The whole network: backbone -> stems -> interaction -> heads."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from sgw_jax.backbones.taps import Taps
from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.heads import PredictionHead, TaskStem
from sgw_jax.layers import parameter_names as names
from sgw_jax.layers.lora import LoRA, adapting
from sgw_jax.layers.resize import resize, resize_to_stride
from sgw_jax.sharding import constrain_activations
from sgw_jax.tasks.base import Task

# What precedes a task's name in the outputs of training.
PRELIMINARY, FEATURES = "preliminary/", "features/"


class MultiTaskModel(nn.Module):
    """One network for many dense tasks (arXiv 2410.03778, figure 2: encoder, task encoders, KEM, task decoders).

    Attributes:
      tasks: what to predict; a task gives its name and the width of its head.
      backbone: image -> {stride: map}.
      interaction: mapping task -> (batch, h, w, channels) -> the same mapping.
      channels: width of the task features.
      stride: of the task features, relative to the image.
      scales: coarser strides at which the tasks interact too, from the coarsest to ``stride``, each with stems and an
        interaction of its own (parameters stem16_NAME, interaction16); what leaves a scale is resized and added to the
        features of the next.
      persist: the slots that leave a scale start the next one, so that one workspace sees all scales (KEM, sKEM,
        SharedWorkspace).
      input_scale: the image is resized by it before the backbone, while predictions keep the image's size (Cityscapes:
        labels at 1024 x 2048, the network at half of that).
      upsample: how heads reach the image's size, see `PredictionHead`.
      preliminary: also predict from the stems, before the interaction, in training (deep supervision as in InvPT).
      dtype: of the computation; parameters and predictions are float32.
      lora: low-rank updates of the backbone's matrices, see layers/lora.py; None is none.

    Call:
      image: (batch, H, W, 3), normalised, of any size. Features have ceil(H / stride) rows and ceil(W / stride)
        columns, each cell over the pixels that the stride says; predictions beyond the image are cropped.
      train: whether it is training, which drops paths and adds outputs.
      taps: of the backbone, if they are known (backbones/taps.py): the image then says its size alone.
      slots: {stride: (batch, L, width)}, what the interaction of a scale starts from in place of its own slots, so that
        a workspace lasts over the frames of a video; with ``persist`` the coarsest scale's alone.
      return_slots: also return the slots that are left, in the form of ``slots``; with ``persist`` those that leave the
        last scale, for the coarsest.

    Returns:
      {task: (batch, H, W, head width)} float32 raw outputs; with ``preliminary`` and ``train`` also
      {"preliminary/task": ...}, and in training {"features/task": (batch, h, w, channels)}, what enters the
      interaction, for each task whose loss uses it (`Task.uses_features`). With ``return_slots`` a pair with the slots.

    Raises:
      ValueError: no task, or two of one name; a scale that is not coarser than ``stride``; ``persist``, ``slots`` or
        ``return_slots`` with an interaction that has no slots; slots of a stride that starts from none.

    >>> import flax.linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> from sgw_jax import KEM, TASKS, MultiTaskModel
    >>> class Backbone(nn.Module):
    ...     def __call__(self, image, train=False):
    ...         return {4: image[:, ::4, ::4]}
    >>> tasks = [TASKS["depth"](), TASKS["normals"]()]
    >>> model = MultiTaskModel(tasks, Backbone(), KEM(num_slots=2), channels=4)
    >>> image = jnp.ones((1, 8, 8, 3))
    >>> outputs, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), image)
    >>> {name: value.shape for name, value in outputs.items()}
    {'depth': (1, 8, 8, 1), 'normals': (1, 8, 8, 3)}
    """

    tasks: Sequence[Task]
    backbone: nn.Module
    interaction: nn.Module
    channels: int = 64
    stride: int = 4
    scales: tuple[int, ...] = ()
    persist: bool = False
    input_scale: float = 1.0
    upsample: Literal["bilinear", "subpixel"] = "bilinear"
    preliminary: bool = False
    dtype: jnp.dtype = jnp.float32
    lora: LoRA | None = None

    @property
    def coarsest_stride(self) -> int:
        """In pixels of the image: an image moved by it moves every grid of features by whole cells."""
        cells = math.lcm(*getattr(self.backbone, "strides", ()), self.stride, *self.scales)
        return math.ceil(cells / self.input_scale)

    @property
    def fixed_size(self) -> str:
        """Why a program for images of any size (jax.export) cannot be made; "" where it can, as far as is known."""
        if self.input_scale != 1:
            return f"images are resized by input_scale = {self.input_scale}, and sizes rounded"
        return getattr(self.backbone, "fixed_size", "") or getattr(self.interaction, "fixed_size", "")

    @property
    def starts(self) -> tuple[int, ...]:
        """The strides whose interactions start from slots of their own, or from given ones."""
        if not getattr(self.interaction, "has_slots", False):
            return ()
        strides = self._strides()
        return strides[:1] if self.persist else strides

    def initial_slots(self, params: Mapping[str, Any], batch: int = 1) -> dict[int, Array]:
        """The slots that the network starts from where none are given: {stride: (batch, L, width)}.

        Args:
          params: the network's parameters.
          batch: images.

        Returns:
          Slots by stride, in the form that a call takes; {} of an interaction without slots.
        """
        return {stride: self.interaction.initial_slots(params[self._mixes(stride)], batch) for stride in self.starts}

    def __call__(
        self,
        image: Float[Array, "batch height width 3"],
        train: bool = False,
        taps: Taps | None = None,
        *,
        slots: Mapping[int, Float[Array, "batch slots width"]] | None = None,
        return_slots: bool = False,
    ) -> Any:
        pyramid, size = self.encode(image, train, taps), (image.shape[1], image.shape[2])
        return self.decode(pyramid, size, train, slots=slots, return_slots=return_slots)

    def encode(
        self, image: Float[Array, "batch height width 3"], train: bool = False, taps: Taps | None = None
    ) -> dict[int, Array]:
        """The backbone's pyramid {stride: (batch, h, w, width)}: all that tasks have in common."""
        image = constrain_activations(resize(image, self._seen((image.shape[1], image.shape[2]))))
        known = {} if taps is None else {"taps": taps}  # somebody's own backbone may have none
        with adapting(self.lora):
            return self.backbone(image, train=train, **known)

    @nn.compact
    def decode(
        self,
        pyramid: dict[int, Array],
        size: tuple[int, int],
        train: bool = False,
        *,
        slots: Mapping[int, Float[Array, "batch slots width"]] | None = None,
        return_slots: bool = False,
    ) -> Any:
        """Predictions of an image of ``size`` (height, width) from its pyramid; with `encode`, the call."""
        self._check(slots, return_slots)
        given, left = slots or {}, dict[int, Array]()
        mixed: dict[str, Array] = {}
        before, start = self.stride, None
        for stride in self._strides():
            features = self._stems(pyramid, stride, mixed, before)
            before = stride
            interaction = self._interaction(stride)
            if self.persist or return_slots or given:
                start = start if self.persist and start is not None else given.get(stride)
                mixed, after = interaction(features, start, True)
                left[self.starts[0] if self.persist else stride] = start = after
            else:
                mixed = interaction(features)
            mixed = {name: constrain_activations(value) for name, value in mixed.items()}
        predictions = self._predict(names.HEAD, mixed, size)
        if self.preliminary and train:
            early = self._predict(names.PRELIMINARY, features, size)
            predictions |= {PRELIMINARY + name: value for name, value in early.items()}
        if train:
            predictions |= {FEATURES + task.name: features[task.name] for task in self.tasks if task.uses_features}
        return (predictions, left) if return_slots else predictions

    def _strides(self) -> tuple[int, ...]:
        """Of the scales at which tasks interact, from the coarsest on."""
        return (*sorted(self.scales, reverse=True), self.stride)

    def _stems(
        self, pyramid: dict[int, Array], stride: int, coarser: dict[str, Array], before: int
    ) -> dict[str, Array]:
        """Every task's features at a stride, with what left the scale before, of stride ``before``."""
        features = {}
        for task in self.tasks:
            name = names.of_task(names.STEM, task.name, self._coarser(stride))
            stem = TaskStem(self.channels, stride, dtype=self.dtype, name=name)
            own = stem(pyramid)
            if coarser:
                own += resize_to_stride(coarser[task.name], before, stride, (own.shape[1], own.shape[2]))
            features[task.name] = constrain_activations(own)
        return features

    def _interaction(self, stride: int) -> nn.Module:
        return self.interaction if stride == self.stride else self.interaction.copy(name=self._mixes(stride))

    def _mixes(self, stride: int) -> str:
        """The name of a scale's interaction among the parameters."""
        return names.INTERACTION if stride == self.stride else names.of_scale(names.INTERACTION, stride)

    def _coarser(self, stride: int) -> int | None:
        return None if stride == self.stride else stride

    def _predict(self, part: str, features: dict[str, Array], size: tuple[int, int]) -> dict[str, Array]:
        predictions = {}
        for task in self.tasks:
            name, own = names.of_task(part, task.name), features[task.name]
            head = PredictionHead(task.channels, self._covered(own, size), self.upsample, dtype=self.dtype, name=name)
            predictions[task.name] = constrain_activations(head(own)[:, : size[0], : size[1]])
        return predictions

    def _seen(self, size: tuple[int, int]) -> tuple[int, int]:
        """The size in which the backbone sees an image of ``size``."""
        if self.input_scale == 1:  # also of lengths that are symbols (jax.export), which nothing rounds
            return size
        return round(size[0] * self.input_scale), round(size[1] * self.input_scale)

    def _covered(self, features: Array, size: tuple[int, int]) -> tuple[int, int]:
        """What the cells of the features cover of an image of ``size``: more, where it is no multiple of the stride."""
        if self.input_scale == 1:
            height, width = (
                max(length, cells * self.stride) for length, cells in zip(size, features.shape[1:3], strict=True)
            )
            return height, width
        height, width = (
            max(length, round(length * cells * self.stride / seen))
            for length, cells, seen in zip(size, features.shape[1:3], self._seen(size), strict=True)
        )
        return height, width

    def _check(self, slots: Mapping[int, Any] | None, return_slots: bool) -> None:
        given = [task.name for task in self.tasks]
        if not given or len(set(given)) < len(given):
            raise InputError(f"MultiTaskModel: the tasks are {given}; give at least one, each name once.")
        if len(set(self.scales)) < len(self.scales) or any(scale <= self.stride for scale in self.scales):
            raise InputError(
                f"MultiTaskModel: scales {self.scales} must be different strides, coarser than stride {self.stride}."
            )
        wanted = {"persist": self.persist, "slots": slots is not None, "return_slots": return_slots}
        if any(wanted.values()) and not self.starts:
            raise InputError(
                f"MultiTaskModel: {' and '.join(name for name, set_ in wanted.items() if set_)} needs an interaction "
                f"with slots; {type(self.interaction).__name__} has none."
            )
        if unknown := sorted(set(slots or {}) - set(self.starts)):
            raise InputError(
                f"MultiTaskModel: slots of the strides {unknown}; those that start from slots are {list(self.starts)}."
            )
