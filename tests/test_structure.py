"""The house's structure: imports point down, the data island stays an island, every file says what it is."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sgw_jax

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "sgw_jax"
# The user's top level, under one name once installed: links in the package.
LINKED = ("configs", "data_pipelines", "launch")
OWN = sorted(p for p in PACKAGE.rglob("*.py") if p.relative_to(PACKAGE).parts[0] not in LINKED)
FILES = [*OWN, *sorted(path for name in LINKED for path in (ROOT / name).rglob("*.py"))]

# The spine's files and the folders, from the bottom up. A module imports only from floors below its own; within a
# folder, files may import each other.
FLOORS = [
    "moved host sharding",
    "layers etf multi_objective",
    "functional",
    "tasks interactions nnx backbones heads",
    "model optimizers pictures",
    "differentiate",
    "train_step experiment",
    "evaluation",
    "run",
    "plan report",
    "export",
    "train prediction",
    "demo",
    "commands",
    "__main__",
]
SPINE = {"__init__", "__main__", "differentiate", "heads", "host", "model", "optimizers", "sharding", "train"} | {
    "train_step"
}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts if parts[0] == "sgw_jax" else ("sgw_jax", *parts)).removesuffix(".__init__")


def room(module: str) -> str:
    """The folder, or the file of the spine, that a module of the package is or lies in."""
    return module.split(".")[1]


def floor(module: str) -> int:
    for height, names in enumerate(FLOORS):
        if room(module) in names.split():
            return height
    raise AssertionError(f"{module} has no floor; give its folder one in FLOORS")


def imported(path: Path) -> set[str]:
    """Every module that a file imports, in functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names = {name for name in whole if (ROOT / (name.replace(".", "/") + ".py")).exists()}
            found |= names or {node.module}
    return found


def ours(path: Path) -> set[str]:
    return {name for name in imported(path) if name.split(".")[0] in ("sgw_jax", *LINKED)} - {"sgw_jax"}


def test_the_root_is_the_spine_alone() -> None:
    assert {path.stem for path in PACKAGE.glob("*.py")} == SPINE
    assert len(SPINE) <= 10


@pytest.mark.parametrize("path", [p for p in OWN if p.parent != PACKAGE or p.stem != "__init__"], ids=module_name)
def test_imports_point_down(path: Path) -> None:
    module = module_name(path)
    for name in ours(path):
        if room(name) in LINKED:
            continue
        below = floor(name) < floor(module) or room(name) == room(module)
        assert below, f"{module} (floor {floor(module)}) imports {name} (floor {floor(name)})"


# What the package takes of the data island beside its sources: what training normalises by, what both sides need.
SHARED = (
    "transforms",
    "atomic",
    "batch_names",
    "consoles",
    "errors",
    "json_files",
    "paths",
    "progress",
    "readers",
    "tap_cache",
)


@pytest.mark.parametrize("path", OWN, ids=module_name)
def test_data_enters_by_the_experiment(path: Path) -> None:
    taken = {name for name in ours(path) if name.startswith("sgw_jax.data_pipelines")}
    if room(module_name(path) + ".") in ("experiment", "__main__", "moved"):
        return
    allowed = {f"sgw_jax.data_pipelines.{name}" for name in SHARED}
    assert taken <= allowed, f"{module_name(path)} imports {taken - allowed}"


@pytest.mark.parametrize("path", sorted((ROOT / "data_pipelines").rglob("*.py")), ids=module_name)
def test_the_data_island_imports_itself_alone(path: Path) -> None:
    mine = ours(path) - ({"sgw_jax.moved"} if path.name == "__init__.py" else set())
    assert all(name.startswith("sgw_jax.data_pipelines") for name in mine)
    assert not {name for name in imported(path) if name.split(".")[0] in ("jax", "flax", "optax", "tensorflow")}


def test_sources_never_import_jax() -> None:
    """Rendering workers and the like start in a moment. (The loader's grain imports jax where it is there.)"""
    code = "import sys, sgw_jax.data_pipelines.folder, sgw_jax.data_pipelines.scenes; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize("path", sorted((ROOT / "launch").rglob("*.py")), ids=module_name)
def test_launchers_need_no_jax(path: Path) -> None:
    assert all(name.startswith("sgw_jax.launch") for name in ours(path))


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_file_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstring = ast.get_docstring(tree)
    assert docstring, f"{path} has no module docstring"
    assert tree.body[0].lineno == 1


def test_only_the_experiment_reads_configurations() -> None:
    readers = {module_name(path) for path in OWN if any("ml_collections" in name for name in imported(path))}
    carriers = {"sgw_jax.run.saved_run", "sgw_jax.prediction.predictor"} | {
        "sgw_jax.export.trained",
        "sgw_jax.export.folder",
    }
    assert {name for name in readers if room(name) != "experiment"} <= carriers


def test_the_links_lead_to_the_top_level() -> None:
    for name in LINKED:
        assert (PACKAGE / name).is_symlink()
        assert (PACKAGE / name).resolve() == ROOT / name


def test_public_names() -> None:
    """All of them load, and type checkers see each from the module that it is loaded from."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    for name in sgw_jax.__all__:
        assert getattr(sgw_jax, name) is not None
    homes = {name: f"sgw_jax.{home}" for name, home in sgw_jax._HOMES.items()}
    homes |= {name: f"sgw_jax.{home.rpartition('.')[0]}" for name, home in sgw_jax._MODULES.items()}
    assert seen == homes
    assert set(sgw_jax.__all__) == {*homes, "load", "from_pretrained"}
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = sgw_jax.no_such_name
