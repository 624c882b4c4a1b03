"""What every test runs under: the CPU, eight fake devices, quick compilation, and a cache of it between runs.

SGW_JAX_TEST_PLATFORM=cuda,cpu (or tpu,cpu) runs tests on an accelerator instead; CONTRIBUTING.md says which.
"""

import contextlib
import gc
import os
import tempfile
from pathlib import Path

from quick import flags

# Before jax is imported by any test: afterwards they are read no more.
os.environ["JAX_PLATFORMS"] = os.environ.get("SGW_JAX_TEST_PLATFORM", "cpu")
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # pytest's workers share an accelerator's memory
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {flags(os.environ['JAX_PLATFORMS'])}"

import jax
import jax.experimental
import pytest

from sgw_jax.host import enough_threads, sound_fusions

enough_threads()
sound_fusions()

# Tracing makes many objects and few cycles of them: looking for these so often was a tenth of the tests' time.
gc.set_threshold(100_000, 20, 50)

# Accelerators round float32 numbers in products to fewer digits than the tolerances are derived for.
if os.environ["JAX_PLATFORMS"] != "cpu":
    jax.config.update("jax_default_matmul_precision", "highest")

if not hasattr(jax, "enable_x64"):  # before jax 0.8
    jax.enable_x64 = jax.experimental.enable_x64

# One for each worker of pytest-xdist: JAX does not write entries atomically, and a half-written one cannot be read.
WORKER = os.environ.get("PYTEST_XDIST_WORKER", "")
CACHES = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "sgw_jax" / "xla_tests"


def _writable(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:  # a read-only home
        folder = Path(tempfile.gettempdir()) / "sgw_jax_xla_tests"
        folder.mkdir(parents=True, exist_ok=True)
    return folder


def pytest_configure(config: pytest.Config) -> None:
    """Before the workers start, each is given what the others have compiled: a file of tests goes to any of them."""
    workers = getattr(config.option, "numprocesses", None) or 0
    if WORKER or not workers:
        return
    folders = [_writable(CACHES / f"gw{worker}") for worker in range(workers)]
    for folder in folders:
        have = set(os.listdir(folder))
        for other in folders:
            for name in set(os.listdir(other)) - have:
                with contextlib.suppress(OSError):  # another run's worker was first, or a file system without links
                    os.link(other / name, folder / name)


# Half of the tests' time is compilation. A program that is found here need not be compiled again; the cache's key holds
# the program, the compiler's version and its options, so that a stale entry is never used. Small programs are kept too:
# there are ten of them to a large one.
jax.config.update("jax_compilation_cache_dir", str(_writable(CACHES / WORKER)))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ["JAX_PLATFORMS"] != "cpu" and jax.device_count() < 8:
        for item in items:
            if item.get_closest_marker("eight_devices"):
                item.add_marker(pytest.mark.skip(reason="eight devices"))
