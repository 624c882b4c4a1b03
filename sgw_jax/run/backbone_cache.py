"""The taps of a frozen backbone, computed once and read by the runs that have the same backbone and images.

What they depend on beside an image is the cache's key: the backbone's options and pretrained parameters, the size and
fit of images, the number type and the platform. What a run learns, its tasks, seed and batch size are no part of it.
"""

import contextlib
import dataclasses
import hashlib
import inspect
import json
import shutil
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from sgw_jax.backbones.taps import TAPS
from sgw_jax.data_pipelines.atomic import alone
from sgw_jax.data_pipelines.errors import InputError, files_named
from sgw_jax.data_pipelines.progress import Progress
from sgw_jax.data_pipelines.tap_cache import HEADER, VIEWS, Arrays, Shard, TapCache, check_cache, open_cache
from sgw_jax.data_pipelines.transforms import Example
from sgw_jax.differentiate import flat
from sgw_jax.experiment.experiment import Experiment, flatten
from sgw_jax.layers.parameter_names import BACKBONE, in_backbone, is_added
from sgw_jax.run.digests import digests
from sgw_jax.run.workdir import disk_full_named, wait_for_all
from sgw_jax.sharding import from_all_processes, global_batch, replicated

SPLITS = ("train", "validation")  # what a run reads while it trains
IMAGE = "image"
WEIGHTS = "the backbone's parameters"
PROBES = 8  # images of a split that are compared before the first step; each is compared again when it is read

# Options of a backbone that change no number of a frozen one, but for the rounding of sums.
FREE_OPTIONS = ("drop_path", "remat", "attention_chunk", "window_chunk")


def check_backbone_cache(experiment: Experiment, params: Any) -> None:
    """Raises what can be known before there are parameters: ``params`` may be shapes alone.

    Raises:
      InputError: `config.backbone_cache` with a backbone of which something pretrained learns, or with an augmentation
        that changes images otherwise than by the flip; a directory with a cache of another configuration.
    """
    if not experiment.backbone_cache:
        return
    problems = [*_of_backbone(experiment, params), *_of_augmentation(experiment)]
    if problems:
        raise InputError(
            f"config.backbone_cache is {experiment.backbone_cache}, but what the backbone makes of an image is not the "
            "same in every step:\n  " + "\n  ".join(problems) + "\nChange that, or set config.backbone_cache=''."
        )
    for split in _splits(experiment):
        with files_named(f"config.backbone_cache={experiment.backbone_cache}"):
            check_cache(Path(experiment.backbone_cache) / split, _key(experiment))


def _of_backbone(experiment: Experiment, params: Any) -> Iterator[str]:
    backbone = experiment.model.backbone
    if TAPS not in inspect.signature(type(backbone).__call__).parameters:
        yield f"config.backbone: {type(backbone).__name__} takes no taps (backbones/taps.py); it cannot be divided."
    if experiment.model.lora is not None:
        yield "config.lora.rank: low-rank updates of the backbone learn; set it to None."
        return
    part = params if experiment.trained is None else jax.eval_shape(experiment.trained, params)
    if learning := list(_pretrained(part)):
        yield (
            f"config.optimizer.backbone_scale: {len(learning)} arrays of the pretrained network learn, such as "
            f"{learning[0]}; set it to 0."
        )


def _of_augmentation(experiment: Experiment) -> Iterator[str]:
    augmentation = experiment.data.augmentation
    if tuple(augmentation.scale) != (1, 1):
        yield f"config.augment.scale is {augmentation.scale}; it must be (1, 1), no zoom."
    if augmentation.scale_crop:
        yield f"config.augment.scale_crop is {augmentation.scale_crop}; it must be (), no crop."
    if augmentation.colour is not None:
        yield "config.augment.colour is True; it must be False."


def with_backbone_cache(experiment: Experiment, params: Any, console: Console) -> Experiment:
    """The experiment whose data bring the taps of `config.backbone_cache`, all of them computed by now.

    Every process must call it. What is there already is taken; of several trainings that share the directory one
    computes while the others wait.

    Args:
      params: of the model, on its mesh.
      console: is told what is to come, and shows how far it is.

    Raises:
      InputError: see `check_backbone_cache`; a cache of other parameters or images; a file of it that is damaged; too
        little room on the disk.
    """
    if not experiment.backbone_cache:
        return experiment
    check_backbone_cache(experiment, params)
    _check_crops(experiment)
    root = Path(experiment.backbone_cache)
    key, compute = {**_key(experiment), WEIGHTS: _digest(params)}, _computation(experiment, params)
    arrays = _arrays(experiment, compute)

    def opened() -> dict[str, TapCache]:
        lengths = {split: len(experiment.data.sources[split]) for split in _splits(experiment)}
        return {split: open_cache(root / split, key, arrays, length) for split, length in lengths.items()}

    with disk_full_named(root), files_named(f"config.backbone_cache={root}"), contextlib.ExitStack() as stack:
        if not _complete(experiment, opened):
            if jax.process_index() == 0:
                root.mkdir(parents=True, exist_ok=True)
                wait = f"Waiting for another process that computes {root}."
                stack.enter_context(alone(root / ".lock", lambda: console.print(wait, soft_wrap=True, markup=False)))
                opened()
            wait_for_all("backbone cache begun")
        caches = opened()
        missing = {split: cache.missing(_views(experiment, split)) for split, cache in caches.items()}
        _say(experiment, caches, missing, console)
        _fill(experiment, compute, caches, missing, console)
        wait_for_all("backbone cache complete")
        for split, cache in caches.items():
            _probe(experiment, split, cache)
    return dataclasses.replace(experiment, data=dataclasses.replace(experiment.data, taps=caches))


def _complete(experiment: Experiment, opened: Callable[[], Mapping[str, TapCache]]) -> bool:
    """Whether nothing has to be written, as process 0 sees it: such a cache may be on a disk that is read alone."""
    root, found = Path(experiment.backbone_cache), False
    if jax.process_index() == 0 and all((root / split / HEADER).exists() for split in _splits(experiment)):
        found = not any(cache.missing(_views(experiment, split)) for split, cache in opened().items())
    if jax.process_count() == 1:
        return found
    return bool(from_all_processes(np.asarray(found, np.uint32))[0])


def _say(
    experiment: Experiment,
    caches: Mapping[str, TapCache],
    missing: Mapping[str, Sequence[Shard]],
    console: Console,
) -> None:
    """How large the cache is and what of it is still to be computed; refuses it where the disk has not the room."""
    root = Path(experiment.backbone_cache)
    parts = [
        f"{cache.length} {split} images ({', '.join(_views(experiment, split))})" for split, cache in caches.items()
    ]
    row = next(iter(caches.values())).row_bytes
    rows = sum(cache.length * len(_views(experiment, split)) for split, cache in caches.items())
    left = sum(len(shard.items) for shards in missing.values() for shard in shards)
    said = f"Frozen backbone: {' and '.join(parts)} in {root}, {_bytes(rows * row)}"
    if not left:
        console.print(f"{said}, all there.", soft_wrap=True, markup=False)
        return
    free = shutil.disk_usage(root).free
    line = f"{said}, {_bytes(left * row)} of it to be computed now; {_bytes(free)} are free there."
    if left * row > free:
        raise InputError(f"{line} Give a directory on a larger disk, a smaller config.data.size, or backbone_cache=''.")
    console.print(line, soft_wrap=True, markup=False)


def _bytes(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e8 else f"{count / 1e6:.2f} MB"


def _fill(
    experiment: Experiment,
    compute: Callable[[Any], dict[str, Any]],
    caches: Mapping[str, TapCache],
    missing: Mapping[str, Sequence[Shard]],
    console: Console,
) -> None:
    """Computes and writes the files that are missing, one after another."""
    total = sum(len(shard.items) for shards in missing.values() for shard in shards)
    if not total:
        return
    with jax.set_mesh(experiment.mesh), Progress("frozen backbone, images", total, console) as progress:
        for split, shards in missing.items():
            with contextlib.closing(_rows(experiment, compute, split, shards, progress)) as rows:
                for shard in shards:
                    if jax.process_index() == 0:
                        caches[split].write(shard, rows)
                    else:
                        for _ in shard.items:
                            next(rows)


def _rows(
    experiment: Experiment, compute: Callable[[Any], dict[str, Any]], split: str, shards: Sequence[Shard], bar: Progress
) -> Generator[tuple[np.ndarray, Example]]:
    """Image and taps of all items of these files, in their order."""
    wanted = [(item, shard.view == VIEWS[1]) for shard in shards for item in shard.items]
    count = _batch_rows(experiment)
    with experiment.data.images(split, wanted, count) as batches:
        for start, batch in zip(range(0, len(wanted), count), batches, strict=True):
            found = compute(global_batch(batch, experiment.mesh)["image"])
            arrays = {name: np.asarray(value.addressable_data(0)) for name, value in found.items()}
            images = arrays.pop(IMAGE)
            for row in range(min(count, len(wanted) - start)):
                yield images[row], {name: values[row] for name, values in arrays.items()}
                bar.advance()


def _computation(experiment: Experiment, params: Any) -> Callable[[Any], dict[str, Any]]:
    """Images -> their taps by name and the images themselves, on every device: what a step computes, alone.

    Rows are as many as a step computes at once, so that products have the same shapes and sums the same order.
    """
    backbone = params[BACKBONE]

    def taps(backbone: Any, image: Any) -> dict[str, Any]:
        variables = {"params": {BACKBONE: backbone}}
        _, found = experiment.model.apply(variables, image, method="encode", mutable=["intermediates"])
        (taps,) = found["intermediates"][BACKBONE][TAPS]
        return {IMAGE: image, **{name: _as_stored(value) for name, value in taps.items()}}

    compiled = jax.jit(taps, out_shardings=replicated(experiment.mesh))
    return lambda image: compiled(backbone, image)


def _as_stored(value: Any) -> Any:
    return jax.lax.bitcast_convert_type(value, jnp.uint16) if value.dtype == jnp.bfloat16 else value


def _arrays(experiment: Experiment, compute: Callable[[Any], dict[str, Any]]) -> Arrays:
    image = jax.ShapeDtypeStruct((_batch_rows(experiment), *experiment.size, 3), jnp.float32)
    with jax.set_mesh(experiment.mesh):
        shapes = jax.eval_shape(compute, image)
    return {
        name: (np.dtype(shape.dtype).newbyteorder("<").str, tuple(shape.shape[1:]))
        for name, shape in sorted(shapes.items())
        if name != IMAGE
    }


def _batch_rows(experiment: Experiment) -> int:
    return experiment.settings.batch_size // experiment.settings.accumulate


def _probe(experiment: Experiment, split: str, cache: TapCache) -> None:
    """Raises an InputError where images of the split, some from its whole length, are not those of the cache."""
    for item in np.unique(np.linspace(0, cache.length - 1, PROBES).astype(int)).tolist():
        cache.read(item, experiment.data.image(split, item))


def _check_crops(experiment: Experiment) -> None:
    """Raises an InputError where an image is larger than what is trained on: it is cropped at random."""
    size = experiment.size
    if experiment.data.augmentation.fit != "pad":
        return
    larger = sum(own[0] > size[0] or own[1] > size[1] for own in experiment.data.sizes("train"))
    if larger:
        raise InputError(
            f"config.backbone_cache: {larger} images of train are larger than config.data.size, {size[0]} x {size[1]}, "
            "and are cropped at random. Set config.data.fit='resize', a larger config.data.size, or backbone_cache=''."
        )


def _splits(experiment: Experiment) -> list[str]:
    return [split for split in SPLITS if split in experiment.data.sources]


def _views(experiment: Experiment, split: str) -> tuple[str, ...]:
    return VIEWS if split == "train" and experiment.data.augmentation.flip else VIEWS[:1]


def _key(experiment: Experiment) -> dict[str, Any]:
    """What the taps depend on beside image and parameters."""
    config = experiment.config
    options = flatten(config.backbones.get(config.backbone, {}), f"config.backbones.{config.backbone}.")
    return {
        "platform": jax.default_backend(),
        "config.dtype": config.dtype,
        "config.data.size": list(experiment.size),
        "config.data.fit": experiment.data.augmentation.fit,
        "config.input_scale": config.input_scale,
        "config.backbone": config.backbone,
        **{name: value for name, value in options.items() if name.rpartition(".")[2] not in FREE_OPTIONS},
    }


def _pretrained(params: Any) -> dict[str, Any]:
    """The arrays of the pretrained network by their paths in the backbone."""
    inside = {in_backbone(path): leaf for path, leaf in flat(params).items()}
    return {path: leaf for path, leaf in inside.items() if path is not None and not is_added(path)}


def _digest(params: Any) -> str:
    found = json.dumps(digests(_pretrained(params)), sort_keys=True)
    return hashlib.sha256(found.encode()).hexdigest()[:32]
