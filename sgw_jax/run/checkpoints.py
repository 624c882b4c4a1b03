"""Checkpoints: asynchronous Orbax saves of {state, metadata}; the last few and the best are kept."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp

from sgw_jax.data_pipelines.atomic import write_atomically
from sgw_jax.data_pipelines.errors import UserError
from sgw_jax.data_pipelines.json_files import read_object
from sgw_jax.run.digests import digests
from sgw_jax.run.late_echoes import silence_echoes
from sgw_jax.sharding import path_name

SCORES = "scores.json"  # step -> score, which ranks checkpoints: higher is better; beside them, for it comes later
SCORE = "score"  # in a checkpoint itself: of runs of before there was such a file
DIGESTS, SEAL = "digests", "sha256"  # beside the metadata: of every array, and of all that
PATTERN = re.compile(r"[*?[]")  # Orbax's glob reads these in a path as a pattern


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that is not there, cannot be read, or does not fit."""


class LastAndBest:
    """Orbax's policy: the last few steps are kept, and the one with the highest score, of equals the latest."""

    def __init__(self, keep: int, scores: Mapping[int, float]):
        self.keep, self.scores = keep, scores  # a view: scores are found while the policy is in use

    def best(self, steps: Sequence[int]) -> int | None:
        """The step of the highest score; None if none has one."""
        scored = [(self.scores[step], step) for step in steps if step in self.scores]
        return max(scored)[1] if scored else None

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Of each checkpoint, whether it stays."""
        del context
        steps = [checkpoint.step for checkpoint in checkpoints]
        kept = {*sorted(steps)[-self.keep :], self.best(steps)}
        return [step in kept for step in steps]


class Checkpoints:
    """The checkpoints of one working directory.

    A checkpoint is complete or absent: Orbax writes into a temporary directory and renames it, so a process killed in
    the middle leaves the one before. ``metadata`` is JSON beside the arrays, enough to rebuild the model for
    prediction; with it goes a digest of every array, which what is read must have again (earlier releases wrote none).
    With several processes every one of them makes the same calls. As a context manager it closes itself.

    Args:
      directory: of the checkpoints; made if missing.
      keep: how many of the last to keep; the best by its score is kept besides.
      read_only: never writes or cleans anything.

    Raises:
      CheckpointError: nothing to read, a directory that cannot be listed, or a path that Orbax cannot write to.
    """

    def __init__(self, directory: Path | str, *, keep: int = 2, read_only: bool = False):
        directory = Path(directory).absolute()
        if read_only and not directory.is_dir():
            raise CheckpointError(f"There are no checkpoints in {directory}: the directory does not exist.")
        check_path(directory)
        self._scores: dict[int, float] = {}
        self._policy = LastAndBest(keep, self._scores)
        self._read_only = read_only
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self._policy,
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
            raise CheckpointError(
                f"The checkpoints in {directory} cannot be listed: {_first_line(error)}. One of them is damaged; "
                "`train --step=N` goes on from that of step N and sets aside what comes after."
            ) from error
        self._scores |= self._saved_scores()

    def _saved_scores(self) -> dict[int, float]:
        scores = {}
        for step in self._steps:
            with self._reading(step):
                if (found := self._manager.metrics(step)) is not None:
                    scores[step] = _score(found)
        path = self.directory / SCORES
        if path.exists():
            why = "Delete it: the last checkpoint then counts as the best until there is another score."
            saved = read_object(path, why, CheckpointError)
            try:
                scores |= {int(step): float(score) for step, score in saved.items()}
            except (TypeError, ValueError) as error:
                raise CheckpointError(f"{path} is damaged ({_first_line(error)}). {why}") from error
        return scores

    @property
    def latest_step(self) -> int | None:
        """The step of the last complete checkpoint."""
        return self._manager.latest_step()

    @property
    def best_step(self) -> int | None:
        """The step of the checkpoint with the highest score, of equals the latest; None if none was ever scored."""
        return self._policy.best(self._steps)

    def is_scored(self, step: int) -> bool:
        """Whether a score was recorded for the step."""
        return step in self._scores

    @property
    def _steps(self) -> list[int]:
        return sorted(self._manager.all_steps())

    def record(self, step: int, score: float) -> None:
        """Notes the score of a step that was saved; what it makes needless goes with the next save, or at the end."""
        self._scores[step] = float(score)
        self._write_scores()

    def _write_scores(self) -> None:
        if jax.process_index() == 0:
            there = {step: self._scores[step] for step in self._steps if step in self._scores}
            write_atomically(self.directory / SCORES, json.dumps(there))

    def save(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
        """Starts an asynchronous save, after the one before is complete.

        What is saved are the arrays as they are now: a step that donates them cannot change it (test_checkpoints.py).
        """
        if self._scores.pop(step, None) is not None:  # of a checkpoint that was there before, and was deleted
            self._write_scores()
        described = {**metadata, DIGESTS: digests(state)}
        described[SEAL] = _seal(described)
        items = ocp.args.Composite(state=ocp.args.PyTreeSave(state), metadata=ocp.args.JsonSave(described))
        self._manager.save(step, args=items, force=True)

    def restore(self, abstract: Any, step: int) -> Any:
        """The state at ``step`` in the structure, dtypes and shardings of ``abstract`` (ShapeDtypeStructs).

        Raises:
          CheckpointError: structure, shapes or dtypes differ (the message lists where), or files are damaged.
        """
        return self._restore_state(abstract, step, partial=False)

    def restore_variables(self, abstract: dict[str, Any], step: int) -> dict[str, Any]:
        """A part of the saved state by its top-level names, for example {"params": ..., "constants": ...}."""
        return self._restore_state(abstract, step, partial=True)

    def metadata(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays."""
        return {name: value for name, value in self._described(step).items() if name not in (DIGESTS, SEAL)}

    def shapes(self, step: int) -> dict[str, tuple[int, ...]]:
        """Path -> shape of every array that the checkpoint holds."""
        return {name: shape for name, (shape, _) in self._arrays(step).items()}

    def _arrays(self, step: int) -> dict[str, tuple[tuple[int, ...], str]]:
        with self._reading(step):
            return _forms(self._manager.item_metadata(step)["state"].tree)

    def _described(self, step: int) -> dict[str, Any]:
        with self._reading(step):
            found = self._manager.restore(step, args=ocp.args.Composite(metadata=ocp.args.JsonRestore()))["metadata"]
            if not isinstance(found, dict) or (SEAL in found and found[SEAL] != _seal(found)):
                raise ValueError("the metadata are not what was saved")
            return found

    def _restore_state(self, abstract: Any, step: int, partial: bool) -> Any:
        self._check_fits(abstract, step, partial)
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(item=abstract, restore_args=restore_args, partial_restore=partial)
        saved = self._described(step).get(DIGESTS, {})
        with self._reading(step):
            state = self._manager.restore(step, args=ocp.args.Composite(state=args))["state"]
            altered = [name for name, found in digests(state).items() if saved.get(name, found) != found]
            if altered:
                more = f" and {len(altered) - 3} more" if len(altered) > 3 else ""
                raise ValueError(f"not what was saved are {', '.join(altered[:3])}{more}")
        return state

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[None]:
        """Turns whatever Orbax and its formats raise over missing, cut or altered files into one clear error."""
        self.wait()  # for a save of the step that may still be under way
        try:
            yield
        except Exception as error:
            silence_echoes()
            if step not in self._steps:
                raise CheckpointError(
                    f"{self.directory} has no checkpoint of step {step}; it has {self._steps}."
                ) from error
            before = [other for other in self._steps if other < step]
            remedy = (
                f"--step={before[-1]} takes the one before it; `train` then goes on from there and sets aside what "
                "comes after."
                if before
                else f"Delete {self.directory / str(step)} to begin anew."
            )
            raise CheckpointError(
                f"The checkpoint of step {step} in {self.directory} is damaged ({_first_line(error)}). {remedy}"
            ) from error

    def _check_fits(self, abstract: Any, step: int, partial: bool) -> None:
        found, wanted, absent = self._arrays(step), _forms(abstract), ("absent", "")
        problems = []
        for name in [*wanted, *(() if partial else found.keys() - wanted.keys())]:
            (there, kind), (here, needed) = found.get(name, absent), wanted.get(name, absent)
            if there != here:
                problems.append(f"{name}: {there} in the checkpoint, {here} expected")
            elif kind != needed:
                problems.append(f"{name}: {kind} in the checkpoint, {needed} expected")
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

    def close(self, delete: bool = True) -> None:
        """Waits, deletes what a score since the last save made needless, then frees the manager's threads.

        Args:
          delete: whether to; every process must, and after a failure of one alone the others never come.
        """
        self._manager.wait_until_finished()
        if delete and not self._read_only:
            steps = self._steps
            best = self._policy.best(steps)
            for step in steps[: -self._policy.keep]:
                if step != best:
                    self._manager.delete(step)
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self.close(delete=kind is None)


def check_path(directory: Path) -> None:
    """Raises where checkpoints cannot be kept because of the path's name: better before training than after.

    Raises:
      CheckpointError: with what to do.
    """
    if PATTERN.search(str(directory.absolute())):
        raise CheckpointError(
            f"{directory.absolute()}: checkpoints cannot be kept in a path with * ? or [ in it, which Orbax takes for "
            "a pattern; give a --workdir without, or rename the directory."
        )


def _forms(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Path -> shape and dtype."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {path_name(path): (tuple(leaf.shape), str(np.dtype(leaf.dtype))) for path, leaf in leaves}


def _seal(described: dict[str, Any]) -> str:
    rest = {name: value for name, value in described.items() if name != SEAL}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _score(metrics: Any) -> float:
    return metrics[SCORE]


def _first_line(error: Exception) -> str:
    text = str(error).partition("\n")[0].partition(". See full")[0]  # TensorStore adds a dump of its settings
    return f"{type(error).__name__}: {text[:300]}"
