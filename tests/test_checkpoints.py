"""Checkpoints: what is saved is what was, what is kept, and clear errors for what does not fit or is damaged."""

import contextlib
import gc
import inspect
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgw_jax.run import checkpoints as checkpoints_module
from sgw_jax.run.checkpoints import CheckpointError, Checkpoints
from sgw_jax.sharding import make_mesh, state_sharding

SIZE = 2**16  # large enough that a save is still under way when the next step runs


def new_state(value=1.0):
    mesh = make_mesh({"data": 2, "fsdp": -1})
    tree = {
        "params": {"kernel": jnp.full((SIZE, 8), value), "bias": jnp.arange(3.0)},
        "constants": {},
        "step": jnp.zeros((), jnp.int32),
        "ema": None,
    }
    return jax.device_put(tree, state_sharding(tree, mesh))


def abstract(state):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), state)


def small(value=0.0):
    return {"params": {"kernel": jnp.full((4,), value)}}


@pytest.fixture
def checkpoints(tmp_path):
    manager = Checkpoints(tmp_path / "checkpoints", keep=2)
    yield manager
    manager.close()


def kept(checkpoints):
    checkpoints.wait()
    return sorted(int(path.name) for path in checkpoints.directory.iterdir() if path.is_dir())


def test_a_step_that_donates_the_state_does_not_change_what_is_saved(checkpoints):
    step = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf * 3 + 1, state), donate_argnums=0)
    state = new_state()
    for number in range(1, 4):
        expected = jax.tree.map(np.array, state)  # copies
        checkpoints.save(number, state, {})
        state = step(step(state))  # at once, while files are written
        restored = checkpoints.restore(abstract(state), number)
        jax.tree.map(np.testing.assert_array_equal, restored, expected)


def test_restoring_puts_leaves_where_they_belong(checkpoints):
    state = new_state()
    checkpoints.save(1, state, {})
    restored = checkpoints.restore(abstract(state), 1)
    assert jax.tree.map(lambda leaf: leaf.sharding, restored) == jax.tree.map(lambda leaf: leaf.sharding, state)
    other = {"data": 8, "fsdp": 1}
    moved = jax.tree.map(
        lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        state,
        state_sharding(state, make_mesh(other)),
    )
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(moved, 1), state)


def test_metadata_and_a_part_of_the_state_come_back(checkpoints):
    state = new_state()
    checkpoints.save(7, state, {"tasks": [{"name": "depth"}], "config": "{}"})
    assert checkpoints.metadata(7) == {"tasks": [{"name": "depth"}], "config": "{}"}
    part = checkpoints.restore_variables({"params": {"bias": abstract(state)["params"]["bias"]}, "constants": {}}, 7)
    np.testing.assert_array_equal(part["params"]["bias"], [0, 1, 2])
    assert checkpoints.shapes(7) == {"params/kernel": (SIZE, 8), "params/bias": (3,), "step": ()}


@pytest.mark.parametrize(
    ("scores", "best", "left"),
    [
        ({1: 0.1, 2: 0.9, 3: 0.2, 4: 0.3, 5: 0.4}, 2, [2, 4, 5]),
        ({1: 0.1, 2: 0.2, 3: None, 4: None, 5: None}, 2, [2, 4, 5]),  # saves without a score push no best out
        ({1: 0.5, 2: 0.5, 3: 0.5, 4: 0.1, 5: 0.1}, 3, [3, 4, 5]),  # of equals the latest
        ({1: -3.0, 2: -2.0, 3: -1.0}, 3, [2, 3]),
        ({1: None, 2: None, 3: None}, None, [2, 3]),
    ],
)
def test_the_last_and_the_best_are_kept_over_restarts(tmp_path, scores, best, left):
    for step, score in scores.items():  # every save in a manager of its own, as if the process had died each time
        checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
        checkpoints.save(step, small(step), {})
        if score is not None:
            checkpoints.record(step, score)
        checkpoints.close()
    for options in ({"keep": 2}, {"read_only": True}):
        checkpoints = Checkpoints(tmp_path / "checkpoints", **options)
        assert (checkpoints.best_step, checkpoints.latest_step) == (best, max(scores))
        assert kept(checkpoints) == left
        checkpoints.close()


def test_scores_of_earlier_releases_lie_in_the_checkpoints(checkpoints):
    for step in (1, 2):
        checkpoints.save(step, small(step), {})
        checkpoints.wait()
        (checkpoints.directory / str(step) / "metrics").mkdir()
        (checkpoints.directory / str(step) / "metrics" / "metrics").write_text(f'{{"score": {-step}}}')
    again = Checkpoints(checkpoints.directory, keep=1)
    assert (again.best_step, again.is_scored(2), again.is_scored(3)) == (1, True, False)
    again.save(3, small(3), {})
    again.close()
    assert kept(checkpoints) == [1, 3]


def test_a_score_dies_with_its_checkpoint(checkpoints):
    """A step whose checkpoint was deleted, and is saved once more, is to be evaluated once more."""
    for step in (1, 2):
        checkpoints.save(step, small(step), {})
        checkpoints.record(step, 0.5)
    checkpoints.close()
    shutil.rmtree(checkpoints.directory / "2")
    again = Checkpoints(checkpoints.directory)
    assert again.best_step == 1
    again.save(2, small(2), {})
    again.close()
    reader = Checkpoints(checkpoints.directory, read_only=True)
    assert (reader.is_scored(1), reader.is_scored(2)) == (True, False)
    reader.close()
    (checkpoints.directory / "scores.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"scores.json is damaged: .* Delete it"):
        Checkpoints(checkpoints.directory, read_only=True)


def test_an_unfinished_save_is_no_checkpoint_and_is_cleaned_up(tmp_path, checkpoints):
    checkpoints.save(3, small(), {})
    checkpoints.wait()
    leftover = checkpoints.directory / "6.orbax-checkpoint-tmp"
    shutil.copytree(checkpoints.directory / "3", leftover)
    reader = Checkpoints(checkpoints.directory, read_only=True)
    assert reader.latest_step == 3
    assert leftover.exists()  # a reader, beside a training run, must not clean up its saves
    reader.close()
    again = Checkpoints(checkpoints.directory)
    assert again.latest_step == 3
    again.save(6, small(), {})
    again.close()
    assert kept(checkpoints) == [3, 6]


def test_a_failure_after_a_save_still_completes_it(tmp_path):
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    state = new_state()
    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        try:
            checkpoints.save(1, state, {})
            raise KeyboardInterrupt
        finally:
            checkpoints.close()
    reader = Checkpoints(tmp_path / "checkpoints", read_only=True)
    jax.tree.map(np.testing.assert_array_equal, reader.restore(abstract(state), 1), state)
    reader.close()


def test_what_does_not_fit_is_listed(checkpoints):
    checkpoints.save(4, {"params": {"a": jnp.zeros(3), "b": jnp.zeros(2)}}, {})
    wanted = abstract({"params": {"a": jnp.zeros(5), "c": jnp.zeros(2)}})
    with pytest.raises(CheckpointError) as caught:
        checkpoints.restore(wanted, 4)
    message = str(caught.value)
    assert "step 4" in message
    assert str(checkpoints.directory) in message
    for line in (
        "params/a: (3,) in the checkpoint, (5,) expected",
        "params/b: (2,) in the checkpoint, absent expected",
        "params/c: absent in the checkpoint, (2,) expected",
    ):
        assert line in message


def test_a_missing_directory_or_step_is_named(tmp_path, checkpoints):
    with pytest.raises(CheckpointError, match=r"no checkpoints in .*nowhere"):
        Checkpoints(tmp_path / "nowhere", read_only=True)
    checkpoints.save(4, small(), {})
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 5; it has \[4\]"):
        checkpoints.metadata(5)


def what_reading_says(directory, state):
    """The error of reading step 6, or None: then it is what was saved."""
    try:
        reader = Checkpoints(directory, read_only=True)
        restored, metadata = reader.restore(abstract(state), 6), reader.metadata(6)
    except CheckpointError as error:
        return str(error)
    assert metadata == {"a": 1}
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    return None


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_flipped_bit_is_found_wherever_it_changes_a_number(tmp_path, checkpoints):
    values = np.random.default_rng(0).normal(size=(3, 2**14)).astype(np.float32)  # too much to lie with the structure
    state = {"params": {f"leaf{index}": jnp.asarray(row) for index, row in enumerate(values)}}
    checkpoints.save(3, state, {"a": 1})
    checkpoints.save(6, state, {"a": 1})
    checkpoints.wait()
    named = set()
    for file in [path for path in (checkpoints.directory / "6").rglob("*") if path.stat().st_size > 2**15]:
        whole = file.read_bytes()
        for place in range(5, len(whole), 2**14):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << place // 2**14 % 8
            file.write_bytes(damaged)
            message = what_reading_says(checkpoints.directory, state)  # else what was saved, to the bit
            if message:
                assert "step 6" in message
                named |= {name for name in state["params"] if f"not what was saved are params/{name}" in message}
        file.write_bytes(whole)
    close_dropped_reads()
    assert named == set(state["params"])
    assert what_reading_says(checkpoints.directory, state) is None


def test_a_part_of_the_state_is_verified_too(checkpoints, monkeypatch):
    state = new_state()
    checkpoints.save(1, state, {})
    bias = {"params": {"bias": abstract(state)["params"]["bias"]}}
    checkpoints.restore_variables(bias, 1)
    monkeypatch.setattr(checkpoints_module, "digests", lambda tree: {"params/bias": "0" * 16})
    with pytest.raises(CheckpointError, match="not what was saved are params/bias"):
        checkpoints.restore_variables(bias, 1)


def test_metadata_that_were_altered_are_named(checkpoints):
    checkpoints.save(1, small(), {"config": "steps 100"})
    checkpoints.wait()
    file = checkpoints.directory / "1" / "metadata" / "metadata"
    file.write_text(file.read_text().replace("steps 100", "steps 300"))
    with pytest.raises(CheckpointError, match="the metadata are not what was saved"):
        checkpoints.metadata(1)


def test_checkpoints_of_releases_without_digests_load(checkpoints, monkeypatch):
    state = new_state()
    monkeypatch.setattr(checkpoints_module, "_seal", lambda _: "")
    saved = ocp_json = checkpoints_module.ocp.args.JsonSave
    without = lambda found: saved({k: v for k, v in found.items() if k not in ("digests", "sha256")})  # noqa: E731
    monkeypatch.setattr(checkpoints_module.ocp.args, "JsonSave", without)
    checkpoints.save(1, state, {"a": 1})
    monkeypatch.setattr(checkpoints_module.ocp.args, "JsonSave", ocp_json)
    assert checkpoints.metadata(1) == {"a": 1}
    jax.tree.map(np.testing.assert_array_equal, checkpoints.restore(abstract(state), 1), state)


@pytest.mark.parametrize("name", ["run[1]", "run*", "what?"])
def test_a_path_that_orbax_takes_for_a_pattern_is_refused_at_the_start(tmp_path, name):
    with pytest.raises(CheckpointError, match="give a --workdir without"):
        Checkpoints(tmp_path / name / "checkpoints")


def test_another_dtype_is_listed(checkpoints):
    checkpoints.save(4, {"a": jnp.zeros(3)}, {})
    with pytest.raises(CheckpointError, match="a: float32 in the checkpoint, bfloat16 expected"):
        checkpoints.restore({"a": jax.ShapeDtypeStruct((3,), jnp.bfloat16)}, 4)


def close_dropped_reads():
    """Ends the reads that a failed restore of Orbax abandoned: left to the collector, they would complain in whatever
    test it runs in."""
    for thing in gc.get_objects():
        if inspect.iscoroutine(thing) and thing.__name__.startswith("_read_array"):
            with contextlib.suppress(Exception):  # Orbax wraps the exit in an error of its own
                thing.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # Orbax drops a coroutine when it fails
def test_a_damaged_file_is_an_error_that_says_what_to_do_or_does_no_harm(tmp_path, checkpoints):
    state = small(2.5)
    checkpoints.save(3, state, {"a": 1})
    checkpoints.save(6, state, {"a": 1})
    checkpoints.record(6, 0.5)
    checkpoints.wait()
    directory, backup, damaging = checkpoints.directory / "6", tmp_path / "backup", []
    shutil.copytree(directory, backup)
    files = [path.relative_to(directory) for path in directory.rglob("*") if path.is_file()]
    for file in files:
        for content in ((directory / file).read_bytes()[: (directory / file).stat().st_size // 2], None):
            if content is None:
                (directory / file).unlink()
            else:
                (directory / file).write_bytes(content)
            message = what_reading_says(checkpoints.directory, state)
            if message:
                damaging.append(file)
                assert str(checkpoints.directory) in message
                assert "listed" in message or ("step 6" in message and "--step=3 takes the one before" in message)
            shutil.rmtree(directory)
            shutil.copytree(backup, directory)
    close_dropped_reads()
    assert {file.parts[0] for file in damaging} >= {"state", "metadata"}
    shutil.rmtree(directory)
    again = Checkpoints(checkpoints.directory)
    assert again.latest_step == 3
    again.close()
