"""What importers read: every public name says what it takes, returns and raises, and its example runs."""

import ast
import dataclasses
import doctest
import inspect
import re
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import flax.linen as nn
import pytest

import sgw_jax
import sgw_jax.functional
import sgw_jax.multi_objective
import sgw_jax.nnx

ROOT = Path(__file__).parent.parent
FAMILIES = {"AGGREGATORS", "METHODS", "SCALARIZERS", "BACKBONES", "INTERACTIONS", "TASKS"}  # dicts, said in a comment
SECTIONS = ("Args", "Attributes", "Call", "Returns", "Collections", "Raises", "Source")
ENTRY = re.compile(r"^  (\w+(?:, \w+)*):( |$)", re.MULTILINE)


def public() -> Iterator[tuple[str, Any]]:
    """(name, what it stands for): of the modules, of the modules among their names, and the scalarisers."""
    for module in (sgw_jax, sgw_jax.nnx, sgw_jax.functional, sgw_jax.multi_objective):
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, ModuleType):
                for inner in getattr(value, "__all__", own_functions(value)):
                    yield f"{value.__name__}.{inner}", getattr(value, inner)
            elif name not in FAMILIES:
                yield f"{module.__name__}.{name}", value


def own_functions(module: ModuleType) -> list[str]:
    """The public functions that a module defines."""
    found = inspect.getmembers(module, inspect.isfunction)
    return [name for name, value in found if value.__module__ == module.__name__ and not name.startswith("_")]


PUBLIC = dict(public())


def sections(documented: Any) -> dict[str, str]:
    """What stands under each heading of a docstring."""
    parts = re.split(rf"^({'|'.join(SECTIONS)}):", inspect.getdoc(documented) or "", flags=re.MULTILINE)
    bodies = (re.split(r"\n\n(?! )", body)[0] for body in parts[2::2])
    return dict(zip(parts[1::2], bodies, strict=True))


def named(section: str) -> set[str]:
    """The parameters that a section has an entry for."""
    return {name for entry in ENTRY.finditer(section) for name in entry[1].split(", ")}


def parameters(value: Any) -> set[str]:
    """The parameters of a function, of making an object, or the fields of a linen module."""
    if isinstance(value, type) and issubclass(value, nn.Module):
        return {field.name for field in dataclasses.fields(value)} - {"parent", "name"}
    if value is sgw_jax.multi_objective.WeightedAggregator:  # made by `from_weighting`, which adds two
        return {"init", "update", "weighting", "weigh"}
    function = value.__init__ if isinstance(value, type) and "__init__" in vars(value) else value
    return {name for name in inspect.signature(function).parameters if name != "self"}


def called(value: Any) -> Callable[..., Any] | None:
    """What calling an object of a class does."""
    return vars(value).get("__call__") if isinstance(value, type) else None


def refuses(value: Any) -> bool:
    """Whether it raises, itself or by a function that it calls by name."""
    if isinstance(value, type) and dataclasses.is_dataclass(value) and not issubclass(value, nn.Module):
        value = getattr(value, "__post_init__", value)
    source = inspect.unwrap(value) if inspect.isfunction(value) else value
    if not raises(source):
        calls = (node.func for node in nodes(source) if isinstance(node, ast.Call))
        names = {function.id for function in calls if isinstance(function, ast.Name)}
        found = (vars(sys.modules[source.__module__]).get(name) for name in names)
        return any(inspect.isfunction(function) and raises(inspect.unwrap(function)) for function in found)
    return True


def raises(value: Any) -> bool:
    return value.__module__.startswith("sgw_jax") and any(isinstance(node, ast.Raise) for node in nodes(value))


def nodes(value: Any) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(textwrap.dedent(inspect.getsource(value))))


def test_every_scalariser_and_aggregator_is_among_the_public_names() -> None:
    found = list(PUBLIC.values())
    assert all(value in found for value in (*sgw_jax.AGGREGATORS.values(), *sgw_jax.SCALARIZERS.values()))


@pytest.mark.parametrize("name", PUBLIC)
def test_a_docstring_has_its_sections(name: str) -> None:
    value = PUBLIC[name]
    found = sections(value)
    assert (inspect.getdoc(value) or "").partition("\n")[0], "no first line"
    wanted = parameters(value)
    if wanted:
        assert found.keys() & {"Args", "Attributes"}
    entries = named(found.get("Args", "")) | named(found.get("Attributes", ""))
    assert entries == wanted
    call = called(value)
    if call is not None:
        assert named(found["Call"]) == inspect.signature(call).parameters.keys() - {"self", "named"}
        assert "Returns" in found
    if inspect.isfunction(value) and inspect.signature(value).return_annotation is not None:
        assert "Returns" in found
    if refuses(value):
        assert "Raises" in found
    assert all(text.strip() for text in found.values())


@pytest.mark.parametrize("name", PUBLIC)
def test_an_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    test = doctest.DocTestParser().get_doctest(inspect.getdoc(PUBLIC[name]) or "", {}, name, None, None)
    assert test.examples, f"{name} has no example"
    report: list[str] = []
    failed, _ = doctest.DocTestRunner().run(test, out=report.append)
    assert not failed, "".join(report)


SNIPPET = """
import jax
import jax.numpy as jnp
from jax import Array

import sgw_jax

features: dict[str, Array] = {"depth": jnp.ones((1, 4, 8))}
module = sgw_jax.KEM(4)
variables = module.init(jax.random.key(0), features)
applied = module.apply(variables, features)
mixed = module(features)
depth: Array = mixed["depth"]
with_slots, slots = module(features, return_slots=True)
reveal_type(mixed)
reveal_type(with_slots)
reveal_type(slots)
reveal_type(module([depth, depth]))
reveal_type(sgw_jax.CrossTaskAttention()(features))
reveal_type(sgw_jax.load("runs/scenes"))
"""


@pytest.mark.slow
def test_type_checkers_see_what_comes_out(tmp_path: Path) -> None:
    snippet = tmp_path / "snippet.py"
    snippet.write_text(SNIPPET)
    command = [sys.executable, "-m", "mypy", "--config-file=pyproject.toml", str(snippet)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    array = "jax._src.basearray.Array"
    mapping = f"dict[str, {array}]"
    predictor = "sgw_jax.prediction.predictor.Predictor"
    found = re.findall(r'Revealed type is "(.*)"', done.stdout)
    assert [text.replace("builtins.", "") for text in found] == [
        *(mapping, mapping, array, f"list[{array}]", mapping, predictor),
    ]
