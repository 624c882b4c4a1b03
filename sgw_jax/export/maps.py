"""What the maps hold that a program gives, for who reads them without this package."""

from typing import Any

from sgw_jax.tasks.base import Task


def about_map(task: Task, output: Any) -> dict[str, Any]:
    """A task for a reader: what its map holds; and, as "fields", for this package.

    Args:
      task: whose map it is.
      output: of the program, with its shape and dtype.
    """
    about: dict[str, Any] = {"name": task.name, "kind": task.kind, "holds": task.target["kind"]}
    about |= {"dtype": str(output.dtype), "channels": output.shape[3] if len(output.shape) == 4 else None}
    about |= {"unit": getattr(task, "unit", ""), "fields": task.to_dict()}
    if task.target["kind"] == "labels":
        about["classes"] = [name for name, _ in task.legend()]
        about["colours"] = [[int(level) for level in colour] for _, colour in task.legend()]
    return about
