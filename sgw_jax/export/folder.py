"""A model's folder: tensors, config.json and a card; written whole, read with every tensor accounted for."""

import dataclasses
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from etils import epath
from ml_collections import ConfigDict
from rich.console import Console

from sgw_jax.backbones.files import read_shapes, read_tensors, tensor_files
from sgw_jax.backbones.tensors import PretrainedError
from sgw_jax.data_pipelines.atomic import new_directory
from sgw_jax.data_pipelines.errors import FileError, InputError, UserError, files_named
from sgw_jax.differentiate import flat
from sgw_jax.experiment.network import build_model
from sgw_jax.export.card import CARD, Measured, check_license, measured_in, model_card
from sgw_jax.export.description import CONFIG, FETCH, Description, check_preprocessing
from sgw_jax.export.shards import SHARD, write_tensors
from sgw_jax.export.trained import Trained
from sgw_jax.layers.parameter_names import CONSTANTS, PARAMS
from sgw_jax.model import MultiTaskModel
from sgw_jax.run.saved_run import abstract_variables
from sgw_jax.tasks import TASKS, task_from_dict
from sgw_jax.tasks.base import Task

LISTED = 10  # names in a message


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """What a folder holds; a `Trained`."""

    module: MultiTaskModel
    variables: Mapping[str, Any]
    tasks: tuple[Task, ...]
    size: tuple[int, int]
    config: ConfigDict
    step: int
    origin: Path


def save_folder(
    trained: Trained,
    output: Path | str,
    *,
    license: str | None = None,
    pictures: bool = True,
    shard_bytes: int = SHARD,
    console: Console | None = None,
) -> Path:
    """Writes the network's folder; it appears whole or not at all.

    model.safetensors (parameters as they are evaluated, averages where the run has them, and constants), config.json
    and README.md, the card. What a run measured of this very checkpoint is in the card, with the report's pictures. The
    card of a network that came from a folder goes with it as it is.

    Args:
      output: a directory that does not exist or is empty.
      license: for the card, as the hub spells it: apache-2.0, cc-by-nc-4.0, other.
      pictures: whether the report's examples.png goes along; it shows images of the data set, which may not be free.
      shard_bytes: the most that a file of tensors holds.
      console: says what of the card is missing, and what it shows.

    Returns:
      The folder.

    Raises:
      FileError: the directory holds something, or cannot be written.
      InputError: a network without a configuration; a licence that is no identifier, or for a card that there is
        already.
    """
    output = Path(output).absolute()
    check_license(license)
    check_free(output)
    found = Measured() if trained.origin is None else measured_in(trained.origin, trained.step)
    if found.card is not None and license is not None:
        raise InputError(
            f"license is {license!r}, but the card of {trained.origin} is kept as it is; edit {CARD} of the new folder."
        )
    with files_named(str(output)), new_directory(output) as partial:
        sha256 = write_tensors(partial, named_variables(trained.variables), shard_bytes)
        described = Description.of(trained, sha256)
        shown = [path for path in found.pictures if pictures]
        for path in shown:
            shutil.copyfile(path, partial / path.name)
        card = found.card or model_card(trained, output.name, found.results, [path.name for path in shown], license)
        (partial / CARD).write_text(card, encoding="utf-8")
        (partial / CONFIG).write_text(described.to_json(), encoding="utf-8")
    if console is not None:
        for sentence in _notes(trained, found, shown, license):
            console.print(sentence, soft_wrap=True)
    return output


def _notes(trained: Trained, found: Measured, shown: Sequence[Path], license: str | None) -> Iterator[str]:
    """What whoever publishes the folder should know."""
    if found.card is not None:
        return
    if found.results is None:
        yield (
            f"The card has no scores: {trained.origin} holds no results.json of step {trained.step}. `sgw-jax "
            "evaluate` of that checkpoint writes one; then export again."
        )
    for path in shown:
        yield f"{path.name} shows images of the data set; --no_pictures leaves it out where they are not free."
    if license is None:
        yield "The card states no licence; --license=apache-2.0 (or another of the hub's identifiers) does."


def check_free(output: Path) -> None:
    """Raises unless a folder can be written there without touching what others put there.

    Raises:
      FileError: names the path and what it is.
    """
    if output.is_dir():
        if there := sorted(path.name for path in output.iterdir()):
            raise FileError(
                f"{output} holds {', '.join(there[:3])}{' ...' if there[3:] else ''}; a model's folder is written to a "
                "new or empty directory. Give another, or remove this one."
            )
    elif output.exists() or output.is_symlink():
        raise FileError(f"{output} is no directory; give another path.")


def named_variables(variables: Mapping[str, Any]) -> dict[str, Any]:
    """The arrays by the names that they have in the file: params/backbone/..., constants/...."""
    return flat({name: variables.get(name, {}) for name in (PARAMS, CONSTANTS)})


def read_folder(folder: Path, kinds: Mapping[str, type[Task]] | None = None) -> SavedModel:
    """The network of a folder, on the default device.

    Args:
      kinds: task classes by name where the model has a user's own, {**TASKS, "Mine": Mine}.

    Raises:
      PretrainedError: a file that is missing, truncated, altered, another library's or of a later release; a network
        that cannot be built; tensors that are missing, of another shape or type, or that nothing asks for.
    """
    about = read_description(folder)
    tasks, config, module, size = _network(folder, about, kinds or TASKS)
    abstract = abstract_variables(module, size)
    wanted = flat(abstract)
    _account(folder, {name: leaf.shape for name, leaf in wanted.items()}, weights_shapes(folder))
    tensors = read_weights(folder, about)
    _account(folder, {name: np.dtype(leaf.dtype) for name, leaf in wanted.items()}, _types(tensors), "type")
    placed = [jax.device_put(tensors[name], leaf.sharding) for name, leaf in wanted.items()]
    variables = jax.tree.unflatten(jax.tree.structure(abstract), placed)
    return SavedModel(module, variables, tasks, size, config, about.step, folder)


def read_description(folder: Path) -> Description:
    """The folder's config.json.

    Raises:
      PretrainedError: see `Description.read`; for a run's directory it says what reads it.
    """
    if not (folder / CONFIG).exists() and (folder / "checkpoints").is_dir():
        raise PretrainedError(
            f"{folder} is a run's directory, no model's folder: sgw_jax.load reads it, and `sgw-jax export` makes a "
            "folder of it."
        )
    return Description.read(folder / CONFIG)


def weights_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors, of which the files' first bytes tell.

    Raises:
      PretrainedError: a file that is missing or damaged.
    """
    return read_shapes(tensor_files(epath.Path(folder)))


def read_weights(folder: Path, about: Description) -> dict[str, np.ndarray]:
    """All tensors by name.

    Raises:
      PretrainedError: a file that is missing or damaged, or is not the one that config.json was written beside.
    """
    files = tensor_files(epath.Path(folder))
    tensors, sha256 = read_tensors(files)
    if sha256 != about.sha256:
        raise PretrainedError(
            f"{files[0]}{' and the others' if files[1:] else ''}: the SHA-256 is {sha256[:16]}..., but "
            f"{folder / CONFIG} says {about.sha256[:16]}...: a file was altered, or is another model's. {FETCH}"
        )
    return tensors


def _network(
    folder: Path, about: Description, kinds: Mapping[str, type[Task]]
) -> tuple[tuple[Task, ...], ConfigDict, MultiTaskModel, tuple[int, int]]:
    path = folder / CONFIG
    try:
        tasks = tuple(task_from_dict(task, kinds) for task in about.tasks)
        config = ConfigDict(about.config)
        height, width = config.data.size
        module = build_model(config, tasks)
    except UserError as error:
        raise PretrainedError(f"{path} describes a network that cannot be built here: {error}") from error
    except Exception as error:  # whatever is missed in a file that another program wrote
        raise PretrainedError(
            f"{path} does not describe a network of this package ({type(error).__name__}: {error}). {FETCH}"
        ) from error
    check_preprocessing(about.preprocessing, (height, width), path)
    return tasks, config, module, (height, width)


def _types(tensors: Mapping[str, np.ndarray]) -> dict[str, np.dtype]:
    return {name: tensor.dtype for name, tensor in tensors.items()}


def _account(folder: Path, wanted: Mapping[str, Any], found: Mapping[str, Any], what: str = "shape") -> None:
    """Every tensor that the network has is in the file, and every one of the file is the network's."""
    wrong = [name for name in wanted if name in found and found[name] != wanted[name]]
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        f"of another {what}": [f"{name} ({found[name]}, not {wanted[name]})" for name in wrong],
        "that the network has no use for": sorted(found.keys() - wanted.keys()),
    }
    listed = [
        f"{len(names)} {why}: {', '.join(names[:LISTED])}{' ...' if names[LISTED:] else ''}"
        for why, names in problems.items()
        if names
    ]
    if listed:
        raise PretrainedError(
            f"The tensors in {folder} are not those of the network that its {CONFIG} describes: {'; '.join(listed)}. "
            f"Are both files of one model, with the same tasks? {FETCH}"
        )
