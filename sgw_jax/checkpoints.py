"""Checkpoints: asynchronous Orbax saves of {state, metadata}; the last few and the best are kept."""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from sgw_jax.sharding import path_name

SCORE = "score"  # the metric that ranks checkpoints; higher is better


class CheckpointError(RuntimeError):
    """A checkpoint that is not there, or does not fit."""


class Checkpoints:
    """The checkpoints of one working directory.

    A checkpoint is complete or absent: Orbax writes into a temporary directory and renames it, so a process killed in
    the middle leaves the one before. ``metadata`` is JSON beside the arrays, enough to rebuild the model for prediction.

    Args:
      directory: of the checkpoints; made if missing.
      keep: how many of the last to keep; the best by SCORE is kept besides.
      read_only: never writes or cleans anything.
    """

    def __init__(self, directory: Path | str, *, keep: int = 2, read_only: bool = False):
        directory = Path(directory).absolute()
        if read_only and not directory.is_dir():
            raise CheckpointError(f"There are no checkpoints in {directory}: the directory does not exist.")
        best = preservation_policy.BestN(
            get_metric_fn=lambda metrics: metrics[SCORE], n=1, keep_checkpoints_without_metrics=False
        )
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(
                [preservation_policy.LatestN(n=keep), best]
            ),
            create=not read_only,
            read_only=read_only,
            cleanup_tmp_directories=not read_only,
        )
        self.directory = directory
        # Handlers by name, so that a manager that has saved nothing yet can read what is there.
        handlers = {"state": ocp.PyTreeCheckpointHandler(), "metadata": ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(directory, options=options, item_handlers=handlers)

    @property
    def latest_step(self) -> int | None:
        """The step of the last complete checkpoint."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The step of the checkpoint with the highest score; None if none was ever scored."""
        scored = {
            step: metrics[SCORE]
            for step in self._manager.all_steps()
            if (metrics := self._manager.metrics(step)) is not None and SCORE in metrics
        }
        return max(scored, key=lambda step: (scored[step], -step)) if scored else None

    def save(self, step: int, state: Any, metadata: dict[str, Any], score: float | None = None) -> None:
        """Starts an asynchronous save; the arrays are copied before it returns, so the step may donate them."""
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), metadata=ocp.args.JsonSave(metadata))
        metrics = None if score is None else {SCORE: float(score)}
        self._manager.save(step, args=items, metrics=metrics, force=True)

    def restore(self, abstract: Any, step: int) -> Any:
        """The state at ``step`` in the structure, dtypes and shardings of ``abstract`` (ShapeDtypeStructs).

        Raises:
          CheckpointError: where structure or shapes differ; the message lists what.
        """
        self._check_fits(abstract, step)
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args)
        return self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]

    def restore_variables(self, abstract: dict[str, Any], step: int) -> dict[str, Any]:
        """A part of the saved state by its top-level names, for example {"params": ..., "constants": ...}."""
        self._check_fits(abstract, step, partial=True)
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args, partial_restore=True)
        return self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]

    def metadata(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays."""
        return self._manager.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))["metadata"]

    def shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """Path -> shape of every array that the checkpoint holds."""
        tree = self._manager.item_metadata(step)["state"].tree
        return {path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}

    def _check_fits(self, abstract: Any, step: int, partial: bool = False) -> None:
        found = self.shapes(step)
        wanted = {path_name(path): tuple(leaf.shape) for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
        problems = [f"{name}: not in the checkpoint, expected {shape}" for name, shape in wanted.items() if name not in found]
        problems += [
            f"{name}: {found[name]} in the checkpoint, {shape} expected"
            for name, shape in wanted.items()
            if name in found and found[name] != shape
        ]
        if not partial:
            problems += [f"{name}: {shape} in the checkpoint, not expected" for name, shape in found.items() if name not in wanted]
        if problems:
            shown = "\n  ".join(problems[:20]) + (f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else "")
            raise CheckpointError(f"The checkpoint of step {step} in {self.directory} does not fit this model:\n  {shown}")

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
