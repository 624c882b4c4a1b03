"""Commands close what they open: every set of checkpoints, and every loader with its threads."""

import jax
import pytest

from sgw_jax.__main__ import main
from sgw_jax.data_pipelines.loader import Batches
from sgw_jax.run.checkpoints import CheckpointError, Checkpoints
from sgw_jax.run.saved_run import open_run

TINY = [
    "data.size=32,32",
    "data.lengths.train=8",
    "data.lengths.validation=8",
    "data.lengths.test=8",
    "backbones.vit.width=8",
    "backbones.vit.depth=4",
    "backbones.vit.num_heads=2",
    "interactions.kem.num_slots=2",
    "interactions.kem.top_k=4",
    "channels=8",
    "boundary.max_dist=0.05",
    "schedule.warmup_steps=0",
    "optimizer.name=sgd",
    "steps=1",
    "checkpoint_every=1",
    "eval_every=1",
]


@pytest.fixture
def opened(monkeypatch):
    """Everything that is opened from here on, with whether it was closed; held, so that no collection closes it."""
    found = {}

    def watch(kind):
        begin, end = kind.__init__, kind.close

        def init(self, *arguments, **options):
            found[self] = False
            try:
                begin(self, *arguments, **options)
            except Exception:
                del found[self]  # never opened
                raise

        def close(self, *arguments, **options):
            found[self] = True
            end(self, *arguments, **options)

        monkeypatch.setattr(kind, "__init__", init)
        monkeypatch.setattr(kind, "close", close)

    watch(Checkpoints)
    watch(Batches)
    cache_dir = jax.config.jax_compilation_cache_dir
    yield found
    jax.config.update("jax_compilation_cache_dir", cache_dir)


@pytest.mark.slow
def test_training_from_another_run_and_evaluating_leave_nothing_open(tmp_path, opened):
    cache = f"--cache_dir={tmp_path / 'cache'}"
    tiny = (f"--config.{item}" for item in ("interaction=none", *TINY))
    train = ["train", "--config=scenes:tasks=semseg+depth", cache, *tiny]
    assert main([*train, f"--workdir={tmp_path / 'first'}"]) == 0
    assert main([*train, f"--workdir={tmp_path / 'second'}", f"--init_from={tmp_path / 'first'}"]) == 0
    assert main(["evaluate", f"--workdir={tmp_path / 'second'}", cache]) == 0
    # Training, what it starts from (checked, then read), its results; evaluation's configuration and results.
    assert sum(isinstance(one, Checkpoints) for one in opened) == 2 + (2 + 2) + 2
    assert any(isinstance(one, Batches) for one in opened)
    assert [one for one, closed in opened.items() if not closed] == []


def test_a_run_that_cannot_be_opened_is_closed(tmp_path, opened):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        open_run(tmp_path)
    assert list(opened.values()) == [True]
