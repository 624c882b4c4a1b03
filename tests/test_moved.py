"""Old import paths lead to the modules themselves, with a warning; a user's own folders come first."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sgw_jax.moved import MOVED

ROOT = Path(__file__).parent.parent


def run(code: str, cwd: Path, *options: str) -> subprocess.CompletedProcess:
    """Python in a directory, with the package as if installed: nothing of the checkout but it is on the path."""
    site = cwd / "site" if cwd != ROOT else None
    if site is not None:
        site.mkdir()
        (site / "sgw_jax").symlink_to(ROOT / "sgw_jax")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {} if site is None else {"PYTHONPATH": str(site)}
    command = [sys.executable, *options, "-c", code]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_every_old_module_is_the_new_one(tmp_path: Path) -> None:
    """In a process of its own: an old name becomes an attribute of the package."""
    code = f"""
import importlib, warnings
for old, new in {MOVED!r}.items():
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        module = importlib.import_module(old)
    assert module is importlib.import_module(new), old
    assert any(w.category is DeprecationWarning and old in str(w.message) and new in str(w.message) for w in found), old
"""
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("place", ["checkout", "elsewhere"])
def test_the_data_island_and_configs_by_their_old_names(place: str, tmp_path: Path) -> None:
    code = """
import warnings
with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter("always")
    import sgw_jax
    from configs import base
    from data_pipelines.loader import Batches
    import data_pipelines.rooms.cache
assert {str(w.message).split()[0].split(".")[0] for w in found} == {"configs", "data_pipelines"}, found
import sgw_jax.configs.base, sgw_jax.data_pipelines.loader
assert base is sgw_jax.configs.base
assert Batches is sgw_jax.data_pipelines.loader.Batches
"""
    done = run(code, ROOT if place == "checkout" else tmp_path)
    assert done.returncode == 0, done.stderr


def test_an_old_command_still_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "data_pipelines.prepare", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "--source" in done.stdout


def test_a_name_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("sgw_jax.no_such_module")


@pytest.mark.parametrize("package", [True, False])
def test_a_user_folder_comes_first(package: bool, tmp_path: Path) -> None:
    """Whoever has a folder configs/ of their own keeps it, and the shipped configurations are found all the same."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "default.py").write_text("NAME = 'mine'\n")
    (folder / "scenes.py").write_text("raise SystemExit('the wrong file')\n")
    if package:
        (folder / "__init__.py").write_text("")
    code = """
import sgw_jax
from configs import default
assert default.NAME == "mine"
config = sgw_jax.read_config("scenes")
assert config.data.source == "scenes"
"""
    done = run(code, tmp_path, "-W", "error")
    assert done.returncode == 0, done.stderr
