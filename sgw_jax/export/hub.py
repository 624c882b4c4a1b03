"""Models of the Hugging Face hub by name: fetched into its cache, and published; huggingface_hub does the work."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import sgw_jax
from sgw_jax.backbones.files import INDEX, ONE_FILE
from sgw_jax.data_pipelines.errors import FileError, InputError, MissingFileError, UserError, extra_named
from sgw_jax.export.description import CONFIG, LIBRARY, Description, check_ours

NAME = re.compile(r"[A-Za-z0-9_.-]+/[A-Za-z0-9_.-]+")  # what else a name must be, the hub says
TENSORS = (ONE_FILE, "model-*-of-*.safetensors", INDEX)
FILES = (CONFIG, *TENSORS, "README.md", "*.png")  # of a repository; others are none of ours
OTHERS = (".gitattributes", "README.md")  # what a new repository holds
LOG_IN = "For a private one log in: `hf auth login`, or the variable HF_TOKEN."


class HubError(UserError, RuntimeError):
    """What the hub does not give or take."""


def is_hub_name(name: str) -> bool:
    """Whether it may be a model's name on the hub, "org/name", as far as its form says."""
    return NAME.fullmatch(name) is not None and ".." not in name


def locate(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a model: a directory as it is, or, of a model of the hub, where its cache holds it.

    What lies here goes before what the hub has. A name whose first part is a directory here is a path that is not
    there, so that a mistyped path never becomes somebody's model.

    Args:
      revision: of the hub's model: a branch, a tag or a commit. None: its main branch.

    Raises:
      MissingFileError: it is neither a directory nor the name of a model.
      InputError: a revision of a directory.
      HubError, MissingPackageError: as of `download`.
    """
    path = Path(name)
    if path.exists():
        if revision is not None:
            raise InputError(f"revision is {revision!r}, but {name} is a directory here; revisions are the hub's.")
        return path
    if not is_hub_name(str(name)):
        raise MissingFileError(
            f"{name} does not exist; give a model's folder, or the name of a model of the hub, org/name."
        )
    if (first := Path(str(name).partition("/")[0])).is_dir():
        raise MissingFileError(
            f"{name} does not exist, but {first} is a directory here. Give a folder that exists; for the hub's model "
            "of that name start from another directory."
        )
    return download(str(name), revision)


def download(name: str, revision: str | None = None) -> Path:
    """The folder of the hub's cache that holds the model; asks for nothing that is there.

    config.json comes first, so that of another library's model nothing else is fetched. Where the hub cannot be
    reached, or HF_HUB_OFFLINE is set, the cache alone is looked at.

    Raises:
      HubError: no such model or revision, none that this account may see, no connection.
      PretrainedError: another library's model.
      MissingPackageError: huggingface_hub is not installed.
    """
    hub = _hub(f"The model {name}")
    options: dict[str, Any] = {"library_name": LIBRARY, "library_version": sgw_jax.__version__}
    with _asking(hub, name, revision):
        first = Path(hub.snapshot_download(name, revision=revision, allow_patterns=[CONFIG], **options))
        if not (first / CONFIG).exists():
            raise HubError(f"{name} of the hub has no {CONFIG}: it is no model of this library.")
        Description.read(first / CONFIG)
        # A commit, so that both are of one, even if somebody publishes in between.
        return Path(hub.snapshot_download(name, revision=first.name, allow_patterns=list(FILES), **options))


def upload(folder: Path, name: str, *, private: bool | None = None, message: str | None = None) -> str:
    """Publishes a model's folder as one version of a repository, which is made if there is none.

    Tensors of an earlier version that this one lacks are deleted in it; the repository keeps its history.

    Args:
      private: whether a new repository is; None: as the account's default is.
      message: of the commit.

    Returns:
      The commit's address.

    Raises:
      HubError: the account may not, there is no connection, or the repository holds something else.
      MissingPackageError: huggingface_hub is not installed.
    """
    hub = _hub("push_to_hub")
    if not is_hub_name(name):
        raise InputError(f"{name!r} is no name of a model on the hub; give org/name.")
    api = hub.HfApi(library_name=LIBRARY, library_version=sgw_jax.__version__)
    with _asking(hub, name, None):
        api.create_repo(name, private=private, exist_ok=True)
        _check_repository(hub, api, name)
        commit = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message=message or f"Upload by sgw_jax {sgw_jax.__version__}",
            delete_patterns=list(TENSORS),
        )
    return str(commit.commit_url)


def _check_repository(hub: ModuleType, api: Any, name: str) -> None:
    """Raises where it holds what is no earlier version of a model of this library."""
    there = set(api.list_repo_files(name)) - set(OTHERS)
    if not there:
        return
    if CONFIG in there:
        try:
            check_ours(json.loads(Path(hub.hf_hub_download(name, CONFIG)).read_bytes()), f"{name}/{CONFIG}")
        except (ValueError, AttributeError) as error:
            why = str(error) if isinstance(error, UserError) else f"its {CONFIG} is no JSON object"
        else:
            return
    else:
        why = f"it holds {', '.join(sorted(there)[:3])}, but no {CONFIG}"
    raise HubError(f"{name} of the hub is no model of this library ({why}): nothing was uploaded. Give another name.")


def _hub(what: str) -> ModuleType:
    with extra_named(what, "hub"):
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors

    return huggingface_hub


@contextlib.contextmanager
def _asking(hub: ModuleType, name: str, revision: str | None) -> Iterator[None]:
    """Turns what huggingface_hub raises into one sentence that says what to do."""
    errors, endpoint = hub.errors, hub.constants.ENDPOINT
    try:
        yield
    except UserError:
        raise
    except errors.GatedRepoError as error:
        raise HubError(
            f"{name}: its owners grant access one by one. Ask for it at {endpoint}/{name}. {LOG_IN}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise HubError(
            f"{name} is neither a directory here nor a model of {endpoint} that you may see; check the name. {LOG_IN}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise HubError(
            f"{name} of the hub has no revision {revision!r}; give a branch, a tag or a commit of it."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        offline = "HF_HUB_OFFLINE is set" if hub.constants.HF_HUB_OFFLINE else f"{endpoint} does not answer"
        raise HubError(
            f"{name}{'' if revision is None else f' at {revision}'} is not, or not whole, in the hub's cache "
            f"({hub.constants.HF_HUB_CACHE}), and {offline}. Fetch it once with a connection."
        ) from error
    except errors.HFValidationError as error:
        raise HubError(f"{name!r} is no name of a model on the hub: {_first_line(error)}") from error
    except errors.HfHubHTTPError as error:
        raise HubError(f"{name}: {endpoint} refuses: {_first_line(error)} {LOG_IN}") from error
    except RuntimeError as error:  # so a file's upload fails, whatever the reason
        why = _first_line(error.__cause__ or error)
        raise HubError(
            f"{name}: {_first_line(error)} ({why}). Nothing was published; the same call again goes on."
        ) from error
    except OSError as error:  # a full disk, a cache that cannot be written
        raise FileError(f"{name} of the hub: {error.strerror or _first_line(error)} ({error.filename}).") from error
    except errors.HfHubHTTPError.__bases__[0] as error:  # the HTTP client's own, which changed with the versions
        raise HubError(f"{name}: {endpoint} cannot be reached: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
