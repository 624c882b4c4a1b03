"""The targets of a mixture's training batch by the source of its rows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from sgw_jax.data_pipelines.batch_names import SOURCE
from sgw_jax.tasks.base import Task


def shared_tasks(
    tasks: Sequence[Task], sources: Mapping[str, Sequence[str]]
) -> list[tuple[str, Task, Callable[[Mapping[str, Any]], Array]]]:
    """("TASK/SOURCE", task, batch -> its target with the rows of that source alone) of tasks that several sources have.

    The loss of a task that one source has is that source's.
    """

    def rows_of(place: int, task: Task) -> Callable[[Mapping[str, Any]], Array]:
        def only(batch: Mapping[str, Any]) -> Array:
            target = batch[task.name]
            rows = (batch[SOURCE] == place).reshape(-1, *(1,) * (target.ndim - 1))
            return jnp.where(rows, target, jnp.asarray(task.target["fill"], target.dtype))

        return only

    return [
        (f"{task.name}/{name}", task, rows_of(place, task))
        for task in tasks
        if sum(task.name in own for own in sources.values()) > 1
        for place, (name, own) in enumerate(sources.items())
        if task.name in own
    ]
