"""What is installed is what is here: every file that is no module is packaged; the scripts of the shell are sound."""

import ast
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sgw_jax"
SCRIPTS = sorted({*(p for d in ROOT.iterdir() if d.is_dir() for p in d.rglob("*.sh")), ROOT / ".ci" / "run"})


def installed() -> set[Path]:
    """The package's files, those of the linked folders by their name in the package."""
    found = (Path(folder) / name for folder, _, names in os.walk(PACKAGE, followlinks=True) for name in names)
    return {path.relative_to(ROOT) for path in found if "__pycache__" not in path.parts}


def test_every_file_that_is_no_module_is_package_data() -> None:
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (data,) = [node.value for node in ast.walk(tree) if isinstance(node, ast.keyword) and node.arg == "package_data"]
    listed = set()
    for package, patterns in ast.literal_eval(data).items():
        for pattern in patterns:
            found = {path.relative_to(ROOT) for path in ROOT.joinpath(*package.split(".")).glob(pattern)}
            assert found, f"package_data: {pattern} of {package} matches nothing"
            listed |= found
    assert {path for path in installed() if path.suffix != ".py"} == listed


def test_every_folder_of_modules_is_a_package() -> None:
    modules = {path for path in installed() if path.suffix == ".py"}
    assert {path.parent / "__init__.py" for path in modules} <= modules


@pytest.mark.slow
def test_the_wheel_holds_the_package(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", "70.1", reason="older ones make no wheels by themselves")
    copy = tmp_path / "copy"  # building leaves files behind
    copy.mkdir()
    for name in ("sgw_jax", "configs", "data_pipelines", "launch"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", f"--outdir={tmp_path}", str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = {Path(name) for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert names == installed()


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck_finds_nothing(path: Path) -> None:
    done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
