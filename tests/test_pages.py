"""What the pages name is there: paths, links, commands, extras and public names."""

import ast
import builtins
import importlib
import re
from pathlib import Path

import pytest

from sgw_jax.__main__ import COMMANDS
from sgw_jax.launch.__main__ import LAUNCHERS

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PATH = re.compile(r"(?<![\w./:-])(?:\.\./|[\w-]+/)+[\w-]+(?:\.[\w-]+)*\.(?:py|sh|md|json|jinja|ipynb|png|yml)\b")
PLACEHOLDER = re.compile(r"\b(yours|runs|_yours|WORKDIR|DIR)\b")


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def page_name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_path_is_there(page: Path) -> None:
    paths = {path for path in PATH.findall(text(page)) if not PLACEHOLDER.search(path)}
    links = {link for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text(page)) if "://" not in link}
    lost = [path for path in paths if not ((ROOT / path).exists() or (page.parent / path).exists())]
    lost += [link for link in links if not (page.parent / link).exists()]
    assert not lost


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_command_is_one(page: Path) -> None:
    commands = set(re.findall(r"(?:sgw-jax|python -m sgw_jax) ([a-z]+)", text(page)))
    assert commands <= COMMANDS.keys()
    launchers = set(re.findall(r"(?:sgw-jax|python) launch ([a-z][a-z-]*)", text(page)))
    assert launchers <= LAUNCHERS.keys()
    assert not re.findall(r"python -m (?!sgw_jax\b)[\w.]*(?:sgw_jax|data_pipelines|configs|launch)[\w.]*", text(page))
    tree = ast.parse(text(ROOT / "setup.py"))
    (extras,) = [n.value for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == "EXTRAS"]
    named = {name for names in re.findall(r'"(?:\.|sgw_jax)\[([\w,]+)\]"', text(page)) for name in names.split(",")}
    assert named <= {ast.literal_eval(key) for key in extras.keys}


# The pages with snippets, and the test that runs them.
RUN = {
    "README.md": "tests/test_predict.py",
    "docs/backbones.md": "tests/test_pretrained.py",
    "docs/deploy.md": "tests/test_export_folder.py",
    "docs/extending.md": "tests/test_inside_models.py",
    "docs/objectives.md": "tests/test_aggregators.py",
    "docs/scaling.md": "tests/test_placement.py",
    "docs/your-data.md": "tests/test_mixture.py",
}


def test_every_page_with_snippets_has_a_test_that_runs_them() -> None:
    assert {page_name(page) for page in PAGES if "```python" in text(page)} == RUN.keys()
    for page, test in RUN.items():
        assert Path(page).name in text(ROOT / test)


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_snippet_defines_the_names_it_uses(page: Path) -> None:
    """A section's snippets, top to bottom; where a page begins with one before its sections, they may go on from it."""
    start, *sections = (
        re.findall(r"^```python\n(.*?)^```", part, re.M | re.S) for part in re.split(r"(?m)^## ", text(page))
    )
    for snippets in sections:
        tree = ast.parse("\n".join([*start, *snippets]))
        nodes = list(ast.walk(tree))
        bound = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
        bound |= {node.arg for node in nodes if isinstance(node, ast.arg)}
        bound |= {node.name for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        bound |= {(node.asname or node.name).partition(".")[0] for node in nodes if isinstance(node, ast.alias)}
        used = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        assert used <= bound | set(dir(builtins))


@pytest.mark.parametrize("page", PAGES, ids=page_name)
def test_every_import_is_of_public_names(page: Path) -> None:
    for module, names in re.findall(r"^from sgw_jax([.\w]*) import ([\w, ]+)", text(page), re.MULTILINE):
        assert {name.split()[0] for name in names.split(",")} <= set(
            importlib.import_module(f"sgw_jax{module}").__all__
        )
