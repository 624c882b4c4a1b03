"""The house's structure: imports point down, the data island stays an island, every file says what it is."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("sgw_jax/**/*.py"), *ROOT.glob("data_pipelines/**/*.py"), *ROOT.glob("configs/*.py")])

# A module imports only from layers below its own; within a layer, files of one family may import each other.
# From the bottom up.
LAYERS = [
    "cost hlo chips layers etf selection sharding writers config_files host_memory host_threads stop_signal "
    "step_profile",
    "album charts",
    "projections neural_collapse layer_rates",
    "tasks optimizers multi_objective interactions backbones heads data_sets boundary",
    "model metrics objective",
    "train_step checkpoints evaluate probe report panels",
    "plan build diagnostics gallery finite edge_evaluation",
    "restore workdir starting_state",
    "fine_tuning",
    "train predict",
    "results image_files pod",
    "__main__",
]
FAMILIES = ("sgw_jax.tasks", "sgw_jax.layers", "sgw_jax.interactions", "sgw_jax.backbones", "sgw_jax.multi_objective")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def layer(module: str) -> tuple[int, str]:
    for height, names in enumerate(LAYERS):
        for name in (f"sgw_jax.{short}" for short in names.split()):
            if module == name or module.startswith(f"{name}."):
                return height, name
    raise AssertionError(f"{module} has no layer; give it one in LAYERS")


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


@pytest.mark.parametrize("path", [f for f in FILES if f.parts[-2] != "configs"], ids=module_name)
def test_imports_point_down(path: Path) -> None:
    module = module_name(path)
    ours = {name for name in imported(path) if name.split(".")[0] in ("sgw_jax", "data_pipelines", "configs")}
    if module.startswith("data_pipelines"):
        assert all(name.startswith("data_pipelines") for name in ours)
        assert not {
            name for name in imported(path) if name.split(".")[0] in ("jax", "flax", "optax", "tensorflow", "torch")
        }
        return
    if module == "sgw_jax":
        return  # the public names
    height, family = layer(module)
    for name in ours:
        if not name.startswith("sgw_jax"):
            assert name.startswith("data_pipelines")
            readers = ("sgw_jax.build", "sgw_jax.data_sets", "sgw_jax.__main__")
            shared = ("data_pipelines.transforms", "data_pipelines.errors")
            assert module in readers or name in shared, f"{module} imports {name}"
            continue
        below, other = layer(name)
        same_family = other == family and family in FAMILIES
        assert below < height or same_family, f"{module} (layer {height}) imports {name} (layer {below})"


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_every_file_says_what_it_is(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    docstring = ast.get_docstring(tree)
    assert docstring, f"{path} has no module docstring"
    assert tree.body[0].lineno == 1


def test_only_build_reads_configs() -> None:
    readers = {module_name(path) for path in FILES if any("ml_collections" in name for name in imported(path))}
    allowed = {
        "sgw_jax.build",
        "sgw_jax.config_files",
        "sgw_jax.restore",
        "sgw_jax.predict",
    }  # the last two carry it along
    assert {name for name in readers if not name.startswith("configs")} <= allowed


def test_public_names() -> None:
    import sgw_jax

    for name in (
        "KEM",
        "CrossTaskAttention",
        "SimplexETF",
        "simplex_etf",
        "MultiTaskModel",
        "Task",
        "TASKS",
        "delta_m",
        "load",
    ):
        assert hasattr(sgw_jax, name)
    assert all(hasattr(sgw_jax, name) for name in sgw_jax.__all__)
