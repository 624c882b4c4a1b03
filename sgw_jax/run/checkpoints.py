"""Checkpoints: asynchronous Orbax saves of {state, metadata}; the last few and the best are kept."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from sgw_jax.data_pipelines.errors import UserError
from sgw_jax.sharding import path_name

SCORE = "score"  # the metric that ranks checkpoints; higher is better


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is not there, cannot be read, or does not fit."""


class Checkpoints:
    """The checkpoints of one working directory.

    A checkpoint is complete or absent: Orbax writes into a temporary directory and renames it, so a process killed in
    the middle leaves the one before. ``metadata`` is JSON beside the arrays, enough to rebuild the model for
    prediction. With several processes every one of them makes the same calls. As a context manager it closes itself.

    Args:
      directory: of the checkpoints; made if missing.
      keep: how many of the last to keep; the best by SCORE is kept besides.
      read_only: never writes or cleans anything.

    Raises:
      CheckpointError: nothing to read, or a directory that cannot be listed.
    """

    def __init__(self, directory: Path | str, *, keep: int = 2, read_only: bool = False):
        directory = Path(directory).absolute()
        if read_only and not directory.is_dir():
            raise CheckpointError(f"There are no checkpoints in {directory}: the directory does not exist.")
        best = preservation_policy.BestN(get_metric_fn=_score, n=1, keep_checkpoints_without_metrics=False)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy([preservation_policy.LatestN(n=keep), best]),
            best_fn=_score,  # the policy alone would rank in memory and write no score down for the next start
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
            save_interval_steps=0 if read_only else 1,
        )
        self.directory = directory
        # Handlers by name, so that a manager that has saved nothing yet can read what is there.
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "metadata": ocp.JsonCheckpointHandler()}
        try:
            self._manager = ocp.CheckpointManager(directory, options=options, item_handlers=handlers)
        except Exception as error:  # whatever Orbax meets in a damaged directory
            raise CheckpointError(f"The checkpoints in {directory} cannot be listed: {_first_line(error)}") from error

    @property
    def latest_step(self) -> int | None:
        """The step of the last complete checkpoint."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The step of the checkpoint with the highest score, of equals the latest; None if none was ever scored."""
        scored = [(_score(found), step) for step in self._steps if (found := self._manager.metrics(step)) is not None]
        return max(scored)[1] if scored else None

    @property
    def _steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, metadata: dict[str, Any], score: float | None = None) -> None:
        """Starts an asynchronous save, after the one before is complete.

        What is saved are the arrays as they are now: a step that donates them cannot change it (test_checkpoints.py).
        """
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), metadata=ocp.args.JsonSave(metadata))
        metrics = None if score is None else {SCORE: float(score)}
        self._manager.save(step, args=items, metrics=metrics, force=True)

    def restore(self, abstract: Any, step: int) -> Any:
        """The state at ``step`` in the structure, dtypes and shardings of ``abstract`` (ShapeDtypeStructs).

        Raises:
          CheckpointError: structure or shapes differ (the message lists where), or files are damaged.
        """
        return self._restore_state(abstract, step, partial=False)

    def restore_variables(self, abstract: dict[str, Any], step: int) -> dict[str, Any]:
        """A part of the saved state by its top-level names, for example {"params": ..., "constants": ...}."""
        return self._restore_state(abstract, step, partial=True)

    def metadata(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays."""
        with self._reading(step):
            return self._manager.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))["metadata"]

    def shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """Path -> shape of every array that the checkpoint holds."""
        with self._reading(step):
            tree = self._manager.item_metadata(step)["state"].tree
            return {path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    def _restore_state(self, abstract: Any, step: int, partial: bool) -> Any:
        self._check_fits(abstract, step, partial)
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args, partial_restore=partial)
        with self._reading(step):
            return self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turns whatever Orbax and its formats raise over missing, cut or altered files into one clear error."""
        self.wait()  # for a save of the step that may still be under way
        try:
            yield
        except Exception as error:
            if step not in self._steps:
                raise CheckpointError(
                    f"{self.directory} has no checkpoint of step {step}; it has {self._steps}."
                ) from error
            before = [other for other in self._steps if other < step]
            fallback = f"step {before[-1]}" if before else "the beginning"
            raise CheckpointError(
                f"The checkpoint of step {step} in {self.directory} is damaged ({_first_line(error)}). "
                f"Delete {self.directory / str(step)} to go on from {fallback}."
            ) from error

    def _check_fits(self, abstract: Any, step: int, partial: bool) -> None:
        found = self.shapes(step)
        wanted = {path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
        absent, names = "absent", [*wanted, *(() if partial else found.keys() - wanted.keys())]
        problems = [
            f"{name}: {found.get(name, absent)} in the checkpoint, {wanted.get(name, absent)} expected"
            for name in names
            if found.get(name) != wanted.get(name)
        ]
        if problems:
            more = [f"... and {len(problems) - 20} more"] if len(problems) > 20 else []
            shown = "\n  ".join(problems[:20] + more)
            raise CheckpointError(
                f"The checkpoint of step {step} in {self.directory} does not fit this model:\n  {shown}"
            )

    def wait(self) -> None:
        """Blocks until what was saved is on disk."""
        self._manager.wait_until_finished()

    def reached_preemption(self, step: int) -> bool:
        """Whether the cluster is about to stop the processes; agreed between them (needs jax.distributed)."""
        return self._manager.reached_preemption(step)

    def close(self) -> None:
        """Waits, then frees the manager's threads."""
        self._manager.wait_until_finished()
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _score(metrics: Any) -> float:
    return metrics[SCORE]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"
