"""Prediction for images of any size: arrays in, decoded maps out."""

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy as copied
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.export.folder import read_folder, save_folder
from sgw_jax.export.hub import locate, upload
from sgw_jax.export.stablehlo import StableHLO, load_stablehlo
from sgw_jax.model import MultiTaskModel
from sgw_jax.prediction.assembly import Assembly
from sgw_jax.prediction.blending import Blending
from sgw_jax.prediction.network import Network, Rows
from sgw_jax.prediction.options import Options
from sgw_jax.prediction.tiles import View
from sgw_jax.run.bfloat16 import check_bfloat16
from sgw_jax.run.saved_run import open_run, saved_model
from sgw_jax.tasks import TASKS
from sgw_jax.tasks.base import Task

CONFIDENCES = ("probability", "entropy", "spread")  # what a map of confidence is called, behind its task's name


class Predictor:
    """A trained network as a function of images of any size.

    An image is scaled to the largest copy that fits into the training size with its aspect (area averages where it
    shrinks, bilinear where it grows), normalised, and padded, centred, with 0, the mean colour. Of the raw predictions
    the padding is cut off; they are interpolated bilinearly (pixel centres aligned) at the pixels of the original and
    only then decoded. So labels are the argmax of interpolated logits and normals have unit length. Depth is returned
    as the network predicts it (our decision): resizing a picture changes neither the scene nor the angle of view, so
    distances stay, unlike under the zoom of training, which stands for a step closer.

    `Options` ask for more: the image as it is or at a size of one's own, in overlapping tiles of the training size
    (`tiles`) whose raw predictions are averaged before they are decoded (`Task.averageable`, `blending`); the average
    with the mirror image's; how sure the network is. Depth stays as predicted in all of them.

    `Task.decode` must treat each pixel by itself, as it does in all tasks of the package.

    Args:
      model: the network, of modules or read from a StableHLO file.
      variables: its collections.
      tasks: what it predicts.
      size: (height, width) that it was trained at, in pixels.
      config: of the run, where there is one.
      step: of the run, where there is one.
      origin: the directory it was loaded from, where there is one: a run's or a model's folder.
      batch_size: views (images, or tiles of them) that the network takes at once, always filled up to this number, so
        that it is compiled once. Divided by the number of this process' devices they are laid over all of them, each
        with a copy of the variables; any other number is for one. None: 1 on a CPU, where more gain nothing, else 8 for
        each device.

    Call:
      images: RGB, uint8 or float in [0, 1]: one (H, W, 3), a batch (N, H, W, 3) or a list of images of any sizes.
      options: resolution, flip, confidence; None: `Options()`.

    Returns:
      Decoded maps by task: labels uint8 (H, W), depth float32 (H, W) in metres, unit normals float32 (H, W, 3),
      probabilities float32 (H, W); with a leading axis for a batch, in lists for a list.

    Raises:
      ValueError: a batch size below 1; images of another shape, type or range, or none; a network in bfloat16 whose
        programs this CPU computes wrongly.

    >>> import flax.linen as nn
    >>> import jax
    >>> import jax.numpy as jnp
    >>> import numpy as np
    >>> from sgw_jax import KEM, TASKS, MultiTaskModel, Predictor
    >>> class Backbone(nn.Module):
    ...     def __call__(self, image, train=False):
    ...         return {4: image[:, ::4, ::4]}
    >>> tasks = [TASKS["depth"](), TASKS["normals"]()]
    >>> model = MultiTaskModel(tasks, Backbone(), KEM(num_slots=2), channels=4)
    >>> predictor = Predictor(model, jax.jit(model.init)(jax.random.key(0), jnp.ones((1, 8, 8, 3))), tasks, size=(8, 8))
    >>> maps = predictor(np.zeros((6, 10, 3), np.uint8))
    >>> {name: (value.shape, str(value.dtype)) for name, value in maps.items()}
    {'depth': ((6, 10), 'float32'), 'normals': ((6, 10, 3), 'float32')}
    """

    def __init__(
        self,
        model: MultiTaskModel | StableHLO,
        variables: Mapping[str, Any],
        tasks: Sequence[Task],
        size: tuple[int, int],
        *,
        config: ConfigDict | None = None,
        step: int | None = None,
        origin: Path | None = None,
        batch_size: int | None = None,
    ):
        if batch_size is None:
            batch_size = 1 if jax.default_backend() == "cpu" else 8 * len(jax.local_devices())
        if batch_size < 1:
            raise InputError(f"Predictor: batch_size is {batch_size}; it must be at least 1.")
        check_bfloat16(getattr(model, "dtype", None))
        self.tasks = tuple(tasks)
        self.config, self.step, self.origin = config, step, origin
        self.size, self.batch_size = (int(size[0]), int(size[1])), batch_size
        self.module, self.variables = model, variables
        self._network: Rows = Network(model, variables, batch_size)
        self._blending = Blending(self.tasks)
        self._stride = getattr(model, "coarsest_stride", 1)

    @classmethod
    def from_workdir(
        cls,
        workdir: Path | str,
        which: str | int = "best",
        kinds: dict[str, type[Task]] | None = None,
        batch_size: int | None = None,
    ) -> Self:
        """The predictor of a run, from its checkpoint alone.

        Args:
          workdir: the run's directory.
          which: "best" or "last" checkpoint, or the one of a step.
          kinds: task classes by name where the run used a user's own, {**TASKS, "Mine": Mine}.
          batch_size: as of `Predictor`.

        Returns:
          The predictor, with the run's configuration and step.

        Raises:
          CheckpointError: there is no complete checkpoint.
        """
        with open_run(workdir, which, kinds) as run:
            model = saved_model(run)
            variables = run.variables(model)
        size = tuple(run.config.data.size)
        about: dict[str, Any] = {"config": run.config, "step": run.step, "origin": Path(workdir)}
        return cls(model, variables, run.tasks, size, **about, batch_size=batch_size)

    @classmethod
    def from_pretrained(
        cls,
        name: Path | str,
        revision: str | None = None,
        kinds: dict[str, type[Task]] | None = None,
        batch_size: int | None = None,
    ) -> Self:
        """The predictor of a model's folder, see `sgw_jax.from_pretrained`."""
        found = read_folder(locate(name, revision), kinds)
        about: dict[str, Any] = {"config": found.config, "step": found.step, "origin": found.origin}
        return cls(found.module, found.variables, found.tasks, found.size, **about, batch_size=batch_size)

    def save_pretrained(self, output: Path | str, *, license: str | None = None, pictures: bool = True) -> Path:
        """Writes the network as a folder that `sgw_jax.from_pretrained` loads, as `sgw-jax export` does.

        Args:
          output: a directory that does not exist or is empty.
          license: for the card, as the hub spells it: apache-2.0, cc-by-nc-4.0, other.
          pictures: whether the run's examples.png goes along; it shows images of the data set, which may not be free.

        Returns:
          The folder.

        Raises:
          FileError: the directory holds something, or cannot be written.
          ValueError: a predictor put together by hand; a licence that is none.
        """
        return save_folder(self, output, license=license, pictures=pictures)

    def push_to_hub(
        self,
        name: str,
        *,
        license: str | None = None,
        pictures: bool = True,
        private: bool | None = None,
        message: str | None = None,
    ) -> str:
        """Publishes the folder of `save_pretrained` on the hub; needs the extra [hub], and a token (`hf auth login`).

        Args:
          name: of the model, "org/name"; made if there is none. Later calls add versions.
          license: as of `save_pretrained`.
          pictures: as of `save_pretrained`.
          private: whether a new repository is; None: as the account's default is.
          message: of the commit.

        Returns:
          The commit's address.

        Raises:
          HubError: the account may not, there is no connection, or the repository holds something else.
          MissingPackageError: huggingface_hub is not installed.
        """
        with tempfile.TemporaryDirectory(prefix="sgw_jax-") as place:
            folder = self.save_pretrained(Path(place) / name.rpartition("/")[2], license=license, pictures=pictures)
            return upload(folder, name, private=private, message=message)

    @classmethod
    def from_stablehlo(
        cls, path: Path | str, kinds: dict[str, type[Task]] | None = None, batch_size: int | None = None
    ) -> Self:
        """The predictor of a network that was exported as StableHLO: the same maps, without the network's code.

        Args:
          path: of the file, as `export_stablehlo` wrote it.
          kinds: task classes by name where the network has a user's own, {**TASKS, "Mine": Mine}.
          batch_size: as of `Predictor`.

        Returns:
          The predictor, with the run's step, if the file says it.

        Raises:
          ImportError: flatbuffers is not installed.
          OSError: the file cannot be read.
          ValueError: it is damaged or no such file, or has no program for this platform.
        """
        network = load_stablehlo(path, kinds or TASKS)
        options: dict[str, Any] = {"step": network.step, "batch_size": batch_size}
        return cls(network, network.parameters, network.tasks, network.size, **options)

    def with_network(self, network: Rows) -> Self:
        """This predictor, an image at a time and with another network: one that remembers, say (`CarriedSlots`).

        Args:
          network: whose `rows` give the raw predictions of normalised images (1, height, width, 3).

        Returns:
          A copy; `module` stays what it is.
        """
        twin = copied(self)
        twin._network, twin.batch_size = network, 1
        return twin

    def __call__(self, images: Any, options: Options | None = None) -> dict[str, Any]:
        """Decoded maps by task.

        Args:
          images: RGB, uint8 or float in [0, 1] (rounded to 8 bits, which is what the network was trained on): one
            (H, W, 3), whose maps are returned as they are; a batch (N, H, W, 3), whose maps get the leading axis N; or
            a list of images of any sizes, which gives a list per task.
          options: resolution, flips, confidence; None: `Options()`.

        Returns:
          Labels uint8 (H, W), depth float32 (H, W) in metres, unit normals float32 (H, W, 3), probabilities of edges
          and saliency float32 (H, W); with `Options.confidence` its maps float32 (H, W).

        Raises:
          ValueError: another shape, type or range; no image.
        """
        if isinstance(images, list | tuple):
            checked = [check_image(image, f"image {index}") for index, image in enumerate(images)]
            if not checked:
                raise InputError("predictor: the list of images is empty; give at least one image.")
            return self._gathered(checked, options)
        array = np.asarray(images)
        if array.ndim != 4:
            return next(self.stream([array], options))
        if not len(array):
            raise InputError(f"predictor: the batch has shape {array.shape}, no image; give at least one image.")
        maps = self._gathered([check_image(image, f"image {index}") for index, image in enumerate(array)], options)
        return {name: np.stack(values) for name, values in maps.items()}

    def stream(self, images: Iterable[Any], options: Options | None = None) -> Iterator[dict[str, np.ndarray]]:
        """The maps of one image after another, in order; only the images of `batch_size` views are held at a time.

        Args:
          images: as of a call, one after another.
          options: as of a call.

        Returns:
          Their maps by task.
        """
        chosen = Options() if options is None else options
        self._check_names(chosen)

        def views() -> Iterator[tuple[Assembly, View]]:
            for image in images:
                assembly = Assembly(check_image(image, "image"), self.size, self._stride, chosen, self._blending)
                for view in assembly.views():
                    yield assembly, view

        for group in _grouped(views(), self.batch_size):
            batch = np.zeros((self.batch_size, *self.size, 3), np.float32)
            for row, (assembly, view) in enumerate(group):
                batch[row] = assembly.tile(view)
            for (assembly, view), (raw, row) in zip(group, self._network.rows(batch), strict=False):
                maps = assembly.take(view, raw, row)
                if maps is not None:
                    yield maps
                    del maps  # before the next are made

    def _gathered(self, images: Sequence[np.ndarray], options: Options | None) -> dict[str, list[np.ndarray]]:
        maps = list(self.stream(images, options))
        return {name: [found[name] for found in maps] for name in maps[0]}

    def _check_names(self, options: Options) -> None:
        """Raises where a task has the name of another's map."""
        names = [task.name for task in self.tasks]
        taken = {f"{name}_{map_}": name for name in names for map_ in CONFIDENCES}
        for name in names if options.confidence else ():
            if name in taken:
                raise InputError(
                    f"confidence: the task {name!r} has the name of a map of {taken[name]!r}; predict without it."
                )


def check_image(image: Any, name: str) -> np.ndarray:
    """The image as uint8 (H, W, 3), or a ValueError that names it."""
    array = np.asarray(image)
    if array.ndim != 3 or array.shape[2] != 3 or not array.size:
        hint = {2: " Repeat a grey image three times along a last axis.", 3: " Drop an alpha channel: image[..., :3]."}
        expected = "RGB arrays are (height, width, 3), batches (number, height, width, 3)"
        raise InputError(f"predictor: {name} has shape {array.shape}; {expected}.{hint.get(array.ndim, '')}")
    if array.dtype == np.uint8:
        return np.ascontiguousarray(array)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise InputError(f"predictor: {name} is {array.dtype}; allowed are uint8 and floating point in [0, 1].")
    low, high = float(array.min()), float(array.max())
    if not (low >= 0 and high <= 1):  # NaN fails too
        raise InputError(
            f"predictor: {name} is {array.dtype} with values from {low:.4g} to {high:.4g}; floating-point images lie "
            "in [0, 1]. Divide by 255, or convert to uint8."
        )
    return np.rint(array.astype(np.float32) * 255).astype(np.uint8)


def _grouped(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    group: list[Any] = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
