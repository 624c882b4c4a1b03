"""What is looked at, and what a run's sources say and render, before a run."""

import jax
import numpy as np
from rich.console import Console

from sgw_jax.data_pipelines.errors import InputError, UserError
from sgw_jax.experiment.experiment import Data
from sgw_jax.experiment.inspection import Look, inspect
from sgw_jax.run.workdir import wait_for_all
from sgw_jax.sharding import from_all_processes


def look(subject: Look, console: Console, *, again: bool = False) -> Look | None:
    """The look at the data, taken by the first process alone; None where there is nothing to look at.

    Its errors are raised on the other processes here, on the first one by the caller, who shows more before.

    Args:
      again: look even if nothing changed since a look before.
    """
    found, failed = None, None
    if jax.process_index() == 0:
        try:
            found = inspect(subject, console, again=again)
        except UserError as error:  # the others wait
            failed = error
    if jax.process_count() > 1:
        wrong = failed is not None or bool(found is not None and found.found.errors)
        if from_all_processes(np.asarray(wrong, np.uint32)).any() and jax.process_index() != 0:
            raise InputError("The first process found the data wrong; its message says what.")
    if failed is not None:
        raise failed
    return found


def say_what_is_shrunk(data: Data, console: Console) -> None:
    """A line for each split with images that evaluation must shrink although pixels keep their scale."""
    for sentence in data.shrunk().values():
        console.print(sentence, soft_wrap=True)


def prepare(data: Data, console: Console) -> None:
    """Lets sources say what they found and render what they need: first on the first process, so that a shared disk
    gets it once."""
    each = data.each_source().values()
    for sentence in {source.describe() for source in each if hasattr(source, "describe")}:
        console.print(sentence, soft_wrap=True, markup=False)

    def render() -> None:
        for source in each:
            if hasattr(source, "prepare"):
                source.prepare()

    if jax.process_index() == 0:
        render()
    wait_for_all("data prepared")
    if jax.process_index() != 0:
        render()
