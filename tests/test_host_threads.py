"""Threads enough for the collective operations of fake devices."""

import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from sgw_jax.host import COLLECTIVES_AT_ONCE, THREADS, enough_threads

FLAG = "--xla_force_host_platform_device_count"


@pytest.mark.parametrize(
    ("flags", "chosen", "expected"),
    [
        (f"{FLAG}=4", None, str(COLLECTIVES_AT_ONCE * 4)),
        (f"{FLAG}=8 --xla_cpu_use_onednn=false {FLAG}=2", None, str(COLLECTIVES_AT_ONCE * 2)),  # XLA takes the last
        (f"{FLAG}=1", None, None),
        ("", None, None),
        (f"{FLAG}=4", "3", "3"),  # the user's own choice
    ],
)
def test_threads_follow_the_devices(monkeypatch, flags, chosen, expected):
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.delenv(THREADS, raising=False)
    if chosen is not None:
        monkeypatch.setenv(THREADS, chosen)
    enough_threads()
    assert os.environ.get(THREADS) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted in /proc")
def test_xla_has_the_threads_that_were_asked_for():
    """The variable's name is XLA's, and it counts only before the first array is made: tests/conftest.py sets it."""
    jnp.zeros(()).block_until_ready()
    names = [(path / "comm").read_text() for path in Path("/proc/self/task").iterdir()]
    assert sum("XLA" in name for name in names) >= COLLECTIVES_AT_ONCE * jax.device_count()
