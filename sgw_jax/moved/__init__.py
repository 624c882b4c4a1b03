"""The import paths of the release before: they work in this release, with a DeprecationWarning, and not in the next."""

import importlib
import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

# Where each module of the package's root lies now.
MOVED = {
    f"sgw_jax.{old}": f"sgw_jax.{new}"
    for old, new in {
        "album": "pictures.album",
        "boundary": "evaluation.boundary",
        "build": "experiment.build",
        "charts": "pictures.charts",
        "checkpoints": "run.checkpoints",
        "chips": "plan.chips",
        "config_files": "experiment.config_files",
        "cost": "plan.cost",
        "data_sets": "experiment.data_sets",
        "diagnostics": "evaluation.diagnostics",
        "edge_evaluation": "evaluation.edge_scores",
        "evaluate": "evaluation.evaluate",
        "fine_tuning": "run.warm_start",
        "finite": "run.finite",
        "gallery": "pictures.gallery",
        "hlo": "plan.hlo",
        "host_memory": "host",
        "host_threads": "host",
        "image_files": "prediction.image_files",
        "interactions.tokens": "functional.tokens",
        "layer_rates": "backbones.layer_rates",
        "metrics": "evaluation.metrics",
        "neural_collapse": "etf.neural_collapse",
        "objective": "differentiate",
        "panels": "pictures.panels",
        "pod": "plan.pod",
        "predict": "prediction.predictor",
        "probe": "evaluation.probe",
        "projections": "etf.projections",
        "restore": "run.saved_run",
        "results": "report.results",
        "selection": "evaluation.selection",
        "starting_state": "run.state",
        "step_profile": "run.step_profile",
        "stop_signal": "run.stop_signal",
        "workdir": "run.workdir",
        "writers": "run.logs",
    }.items()
}

# Once packages of their own, which every project may have in its own folder: see `redirect`.
ROOTS = ("configs", "data_pipelines")


def new_name(name: str) -> str | None:
    """The module's name in this release; None if it did not move."""
    return MOVED.get(name) or (f"sgw_jax.{name}" if name.partition(".")[0] in ROOTS else None)


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds a module of an old name and gives the module itself, so that there is never a second copy of it.

    inside: finds what lies in a root that is known to be ours, before Python looks there by the old name; the other
    one finds all else, after Python, so that a user's own folder comes first.
    """

    def __init__(self, inside: bool):
        self._inside = inside

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        root, inside, _ = name.partition(".")
        if self._inside != bool(root in ROOTS and inside):
            return None
        if self._inside and sys.modules.get(root) is not sys.modules.get(f"sgw_jax.{root}"):
            return None
        new = new_name(name)
        if new is None or importlib.util.find_spec(new) is None:
            return None
        return importlib.util.spec_from_loader(name, self, is_package=False)

    def exec_module(self, module: ModuleType) -> None:
        new = new_name(module.__name__)
        assert new is not None
        warn(module.__name__, new)
        sys.modules[module.__name__] = importlib.import_module(new)

    def get_code(self, fullname: str) -> CodeType | None:  # for python -m
        new = new_name(fullname)
        spec = None if new is None else importlib.util.find_spec(new)
        if spec is None or not isinstance(spec.loader, importlib.abc.InspectLoader):
            return None
        return spec.loader.get_code(spec.name)

    def get_source(self, fullname: str) -> str | None:
        return None


INSIDE, ELSE = _Moved(inside=True), _Moved(inside=False)


def warn(old: str, new: str) -> None:
    """Says where a module lies now."""
    message = f"{old} is now {new}; the old name will be gone in the next release."
    warnings.warn(message, DeprecationWarning, stacklevel=2)


def install() -> None:
    """Makes the old names importable."""
    if ELSE not in sys.meta_path:
        sys.meta_path.insert(0, INSIDE)
        sys.meta_path.append(ELSE)


def redirect(root: str) -> None:
    """In a checkout, whose folder `root` Python has just found by its old name: the module is sgw_jax.root itself."""
    warn(root, f"sgw_jax.{root}")
    sys.modules[root] = importlib.import_module(f"sgw_jax.{root}")
