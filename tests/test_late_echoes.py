"""Of a checkpoint's many reads and writes the first that fails is told; what others say afterwards is not."""

import gc
import sys
from types import SimpleNamespace

import pytest

from sgw_jax.run.late_echoes import CALLED_LATE, is_echo, silence_echoes


async def read():
    """A read as Orbax words it: whatever ends it becomes an error that says where it read."""
    try:
        await waiting()
    except BaseException as error:
        raise Exception("Encountered error while reading array index") from error


class waiting:
    def __await__(self):
        yield


@pytest.fixture
def told(monkeypatch):
    heard = []

    def hear(found):
        heard.append(found.exc_value)

    monkeypatch.setattr(sys, "unraisablehook", hear)
    silence_echoes()
    silence_echoes()  # once is enough, twice harms nothing
    return heard


def test_a_read_that_is_dropped_unfinished_says_nothing(told):
    coroutine = read()
    coroutine.send(None)
    del coroutine
    gc.collect()
    assert not told


@pytest.mark.parametrize("text", CALLED_LATE)
def test_a_call_that_comes_too_late_says_nothing(told, text):
    sys.unraisablehook(SimpleNamespace(exc_value=RuntimeError(text)))
    assert not told


@pytest.mark.parametrize(
    "error", [RuntimeError("else"), OSError("Event loop is closed"), KeyboardInterrupt(), None], ids=repr
)
def test_anything_else_is_told(told, error):
    sys.unraisablehook(SimpleNamespace(exc_value=error))
    assert told == [error]
    assert not is_echo(error)
