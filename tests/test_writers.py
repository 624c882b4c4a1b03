"""metrics.jsonl: what is on disk after crashes and resumptions; TensorBoard events; the progress report's speed."""

import contextlib
import io
import json
import math
import re
from unittest import mock

import pytest
from rich.console import Console
from tensorboardX.proto import event_pb2

from sgw_jax.data_pipelines import atomic
from sgw_jax.data_pipelines.atomic import write_atomically
from sgw_jax.run import progress as train_progress
from sgw_jax.run.logs import MetricsWriter, read_metrics
from sgw_jax.run.progress import TrainProgress
from sgw_jax.tasks import TASKS


def write_steps(workdir, steps, resume_step=0):
    writer = MetricsWriter(workdir, resume_step=resume_step)
    for step in steps:
        writer.write(step, "train", {"loss": 1.0 / step})
    writer.close()


def steps_in(workdir):
    return [line["step"] for line in read_metrics(workdir / "metrics.jsonl")]


def test_lines_come_back_as_written(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(1, "train", {"loss": 0.1})
    writer.write(1, "validation", {"depth/rmse": 1 / 3})
    writer.close()
    expected = [{"step": 1, "split": "train", "loss": 0.1}, {"step": 1, "split": "validation", "depth/rmse": 1 / 3}]
    assert read_metrics(tmp_path / "metrics.jsonl") == expected


def test_a_line_can_be_read_at_once(tmp_path):
    """By whoever follows a run; a checkpoint may be hours away."""
    writer = MetricsWriter(tmp_path)
    writer.write(1, "train", {"loss": 0.1})
    assert steps_in(tmp_path) == [1]
    writer.close()


def test_resuming_drops_later_lines_and_no_others(tmp_path):
    write_steps(tmp_path, range(1, 6))
    before = (tmp_path / "metrics.jsonl").read_text().splitlines()
    write_steps(tmp_path, range(4, 7), resume_step=3)
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "metrics.jsonl").read_text().splitlines()[:5] == before


@pytest.mark.parametrize("cut", ['{"step": 4, "spl', "{", '{"step": 4, "split": "train", "loss": 0.25}', "\xc3"])
def test_a_half_written_last_line_is_dropped(tmp_path, cut):
    write_steps(tmp_path, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(cut.encode("latin-1"))
    assert steps_in(tmp_path) == [1, 2, 3]
    write_steps(tmp_path, [4], resume_step=3)
    assert steps_in(tmp_path) == [1, 2, 3, 4]


def test_a_new_run_starts_an_empty_file(tmp_path):
    write_steps(tmp_path, range(1, 4))
    write_steps(tmp_path, [])
    assert steps_in(tmp_path) == []


def test_lines_are_strict_json_and_nan_comes_back(tmp_path):
    writer = MetricsWriter(tmp_path)
    writer.write(2, "validation", {"loss": 1.0, "human_parts/miou": math.nan})
    writer.close()
    text = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail)["human_parts/miou"] is None
    assert math.isnan(read_metrics(tmp_path / "metrics.jsonl")[0]["human_parts/miou"])
    write_steps(tmp_path, [], resume_step=2)  # rewriting the file keeps it so
    assert (tmp_path / "metrics.jsonl").read_text() == text


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "split": "train"}\nnonsense\n{"step": 3, "split": "train"}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2 is damaged: it is no JSON"):
        read_metrics(tmp_path / "metrics.jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"[1]", "is damaged: it holds a list"),
        (b"7", "is damaged: it holds a int"),
        (b"\xff\xfe", "is damaged: it is no JSON"),
        (b'{"split": "train"}', "has no step"),
        (b'{"step": "one", "split": "train"}', "step is 'one'"),
        (b'{"step": true, "split": "train"}', "step is True"),
        (b'{"step": 1, "split": "train", "loss": [1]}', r"loss is \[1\]"),
        (b"[" * 100_000, "is damaged: it is no JSON"),
    ],
)
def test_lines_that_no_run_wrote_are_named(tmp_path, line, message):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1, "split": "train"}\n' + line + b"\n")
    with pytest.raises(ValueError, match=rf"metrics\.jsonl, line 2 .*{message}.* Remove the line, or the file"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_an_atomic_write_that_dies_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_atomically(path, "old")

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "fsync", die)
        with pytest.raises(KeyboardInterrupt):
            write_atomically(path, "new")
    assert path.read_text() == "old"
    path.with_name("results.json.tmp").write_text("ne")  # what a killed process leaves
    write_atomically(path, b"newer")
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]  # the leftover .tmp was used up
    assert path.read_text() == "newer"


def test_processes_that_write_one_file_at_once_leave_one_of_them_whole(tmp_path):
    path = tmp_path / "results.json"
    with contextlib.ExitStack() as stack:  # each begins before another ends
        for content in map(str, range(3)):
            with mock.patch.object(atomic.os, "getpid", lambda content=content: content):
                stack.enter_context(atomic.replacing(path, contended=True)).write_text(content)
    assert path.read_text() == "0", "the last that ended"
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_tensorboard_events_hold_the_scalars(tmp_path):
    write_steps(tmp_path, [1, 2])
    write_steps(tmp_path, [2, 3], resume_step=1)
    runs = [scalars(file) for file in sorted((tmp_path / "tensorboard").iterdir())]
    found = {}
    for purge, values in runs:  # TensorBoard hides, of earlier files, what the purge step of a later one names
        found = {step: value for step, value in found.items() if purge is None or step < purge} | values
    assert found == pytest.approx({1: 1.0, 2: 0.5, 3: 1 / 3})
    assert runs[-1][0] == 2


def scalars(path):
    """(purge step or None, {step: value of train/loss}) of one event file: records of length, crc, bytes, crc."""
    data, position, values, purge = path.read_bytes(), 0, {}, None
    while position < len(data):
        length = int.from_bytes(data[position : position + 8], "little")
        event = event_pb2.Event.FromString(data[position + 12 : position + 12 + length])
        position += 16 + length
        if event.HasField("session_log"):
            purge = event.step
        for value in event.summary.value:
            assert value.tag == "train/loss"
            values[event.step] = value.simple_value
    return purge, values


def test_speed_counts_training_alone(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(train_progress.time, "monotonic", lambda: now[0])
    progress = TrainProgress(Console(file=io.StringIO()), total=100, start=0, batch_size=4)
    with progress:
        now[0] = 50.0  # compilation
        progress.update(1, {"loss/depth": 1.0})
        for step in (2, 3):
            now[0] += 0.5
            progress.update(step, {"loss/depth": 1.0})
        progress.pause()
        now[0] += 30.0  # an evaluation
        progress.update(4, {"loss/depth": 1.0})
        now[0] += 0.5
        progress.update(5, {"loss/depth": 1.0})
    assert progress.images_per_second == pytest.approx(8.0)  # 3 steps of 4 images in 1.5 s


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_bar_step_time_left_and_every_loss_are_seen_in_a_window_of_any_width(width, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")  # dumb terminals get no bar
    now = [0.0]
    monkeypatch.setattr(train_progress.time, "monotonic", lambda: now[0])
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    losses = {"loss": 12.345, **{f"loss/{name}": 0.12345 for name in (*TASKS, "[b]mine")}}
    with TrainProgress(console, total=40_000, start=0, batch_size=4) as progress:
        for step in range(1235):
            now[0] += 0.1
            progress.update(step, losses)
        progress._shown._bar.refresh()
    shown = re.sub(r"\x1b\[[0-9?]*[A-Za-z]", "\n", console.file.getvalue()).replace("\r", "\n")
    bar = [line for line in shown.splitlines() if "/40000" in line][-1]
    assert re.fullmatch(r"step [━╸╺ ]{4,} *1234/40000 \d:\d\d:\d\d left [\d:-]+ *", bar)
    assert max(map(len, shown.splitlines())) <= width
    after = shown[shown.rindex(bar) :]
    for text in ("40 images/s", "loss 12.3", *(f"{name} 0.123" for name in (*TASKS, "[b]mine"))):
        assert text in after


def test_a_compilation_is_told_before_and_after():
    console = Console(file=io.StringIO())
    with TrainProgress(console, total=2, start=0, batch_size=4) as progress:
        with progress.compiling("the training step"):
            before = console.file.getvalue()
        after = console.file.getvalue().removeprefix(before)
    assert before == "Compiling the training step (once; some minutes for large networks).\n"
    assert after == "Compiled the training step in 0 s.\n"


def test_without_a_terminal_progress_is_plain_lines():
    console = Console(file=io.StringIO(), width=40)
    with TrainProgress(console, total=2, start=0, batch_size=4) as progress:
        progress.update(2, {"loss": 1.5, "loss/depth": 0.25})
        progress.note("step 2: validation")
    lines = console.file.getvalue().splitlines()
    assert lines == ["step 2/2  loss 1.5  depth 0.25", "step 2: validation"]
