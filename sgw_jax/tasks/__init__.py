"""The tasks the package knows by name, and the way back from a task's plain data to the task."""

import difflib
from collections.abc import Mapping
from typing import Any

from sgw_jax.data_pipelines.errors import InputError
from sgw_jax.tasks.base import Task
from sgw_jax.tasks.depth import Depth
from sgw_jax.tasks.edges import Edges
from sgw_jax.tasks.human_parts import HumanParts
from sgw_jax.tasks.normals import Normals
from sgw_jax.tasks.saliency import Saliency
from sgw_jax.tasks.semseg import SemSeg

__all__ = ["TASKS", "Depth", "Edges", "HumanParts", "Normals", "Saliency", "SemSeg", "Task", "task_from_dict"]

TASKS: dict[str, type[Task]] = {
    "semseg": SemSeg,
    "depth": Depth,
    "normals": Normals,
    "edges": Edges,
    "saliency": Saliency,
    "human_parts": HumanParts,
}


def task_from_dict(description: Mapping[str, Any], kinds: Mapping[str, type[Task]] = TASKS) -> Task:
    """The task that `Task.to_dict` described; pass `kinds={**TASKS, "Albedo": Albedo}` for a class of your own.

    Raises ValueError for an unknown kind and for fields that the task does not have.
    """
    fields = dict(description)
    kind = fields.pop("kind", None)
    if kind not in kinds:
        nearest = difflib.get_close_matches(str(kind), kinds, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise InputError(f"Unknown kind of task {kind!r}; known are {sorted(kinds)}.{hint}")
    try:
        return kinds[kind](**fields)
    except TypeError as error:
        raise InputError(f"The description of a {kind!r} task does not fit its fields: {error}") from error
