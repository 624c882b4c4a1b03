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
# A newcomer's virtual environment may lie in the checkout; the scripts in it are others'.
FOLDERS = [path for path in ROOT.iterdir() if path.is_dir() and not (path / "pyvenv.cfg").exists()]
SCRIPTS = sorted({*(script for folder in FOLDERS for script in folder.rglob("*.sh")), ROOT / ".ci" / "run"})


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


def copied(folder: Path) -> Path:
    """What a distribution is made of: building leaves files behind."""
    pytest.importorskip("setuptools", "70.1", reason="older ones make no wheels by themselves")
    copy = folder / "copy"
    copy.mkdir()
    for name in ("sgw_jax", "configs", "data_pipelines", "launch"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, copy)
    return copy


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def built(copy: Path, outdir: Path, *options: str) -> Path:
    """The wheel that `python -m build` makes; without options of an sdist that it makes first."""
    done = run(sys.executable, "-m", "build", "--no-isolation", f"--outdir={outdir}", *options, copy, cwd=outdir.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = outdir.glob("*.whl")
    return wheel


def contents(wheel: Path) -> dict[Path, bytes]:
    """The files of the package, without what is said about it."""
    with zipfile.ZipFile(wheel) as archive:
        return {Path(name): archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    return built(copied(folder), folder / "dist", "--wheel")


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh virtual environment with the wheel installed, and what it depends on from the one that tests."""
    folder = tmp_path_factory.mktemp("environment")
    done = run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    assert done.returncode == 0, done.stderr
    pip = (sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "--disable-pip-version-check")
    done = run(*pip, "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    assert done.returncode == 0, done.stderr
    paths = [path for path in sys.path if Path(path).name == "site-packages"]
    (site(folder) / "dependencies.pth").write_text("\n".join(paths))
    return folder


def site(environment: Path) -> Path:
    (found,) = environment.glob("lib/python*/site-packages")
    return found


@pytest.mark.slow
def test_the_wheel_holds_the_package(wheel: Path) -> None:
    assert contents(wheel).keys() == installed()


@pytest.mark.slow
def test_the_sdist_makes_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    assert contents(built(copied(tmp_path), tmp_path / "dist")) == contents(wheel)
    assert len(list((tmp_path / "dist").glob("*.tar.gz"))) == 1


@pytest.mark.slow
def test_one_name_is_installed(environment: Path, tmp_path: Path) -> None:
    names = {path.name for path in site(environment).iterdir() if path.suffix != ".dist-info"}
    assert names == {"sgw_jax", "dependencies.pth"}
    for name in ("configs", "data_pipelines", "launch"):
        done = run(environment / "bin" / "python", "-c", f"import {name}", cwd=tmp_path)
        assert "ModuleNotFoundError" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("package", [True, False])
def test_it_works_beside_folders_of_the_same_names(package: bool, environment: Path, tmp_path: Path) -> None:
    """Where somebody starts it there may be a configs/ and a data_pipelines/ of their own."""
    names = {"configs": ("scenes", "base"), "data_pipelines": ("loader", "errors", "prepare"), "launch": ("tpu_vm",)}
    for folder, modules in names.items():
        (tmp_path / folder).mkdir()
        for module in modules:
            (tmp_path / folder / f"{module}.py").write_text("raise SystemExit('the wrong file')\n")
        if package:
            (tmp_path / folder / "__init__.py").write_text("")
    (tmp_path / "configs" / "default.py").write_text("NAME = 'mine'\n")
    python, command = environment / "bin" / "python", environment / "bin" / "sgw-jax"
    code = f"""
import sgw_jax
assert sgw_jax.__file__.startswith({str(environment)!r})
assert sgw_jax.read_config("scenes").data.source == "scenes"
from configs import default
assert default.NAME == "mine"
import sgw_jax.configs.base, sgw_jax.data_pipelines.loader, sgw_jax.launch.tpu_vm
"""
    for line, shown in (
        ((python, "-W", "error", "-c", code), ""),
        ((python, "-m", "sgw_jax", "--help"), "train | evaluate"),
        ((command, "--help"), "train | evaluate"),
        ((command, "launch", "tpu-vm", "--help"), "--accelerator-type"),
        ((command, "prepare", "--help"), "--source"),
        ((command, "plan", "--config=scenes:tasks=depth"), "parameters"),
    ):
        done = run(*line, cwd=tmp_path)
        assert done.returncode == 0, (line, done.stderr)
        assert shown in done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck_finds_nothing(path: Path) -> None:
    done = subprocess.run(["shellcheck", str(path)], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", 0)
