"""What a run's sources say and render before a run."""

import jax
from rich.console import Console

from sgw_jax.experiment.experiment import Data
from sgw_jax.run.workdir import wait_for_all


def say_what_is_shrunk(data: Data, console: Console) -> None:
    """A line for each split with images that evaluation must shrink although pixels keep their scale."""
    for sentence in data.shrunk().values():
        console.print(sentence, soft_wrap=True)


def prepare(data: Data, console: Console) -> None:
    """Lets sources say what they found and render what they need: first on the first process, so that a shared disk
    gets it once."""
    for sentence in {source.describe() for source in data.sources.values() if hasattr(source, "describe")}:
        console.print(sentence, soft_wrap=True)

    def render() -> None:
        for source in data.sources.values():
            if hasattr(source, "prepare"):
                source.prepare()

    if jax.process_index() == 0:
        render()
    wait_for_all("data prepared")
    if jax.process_index() != 0:
        render()
