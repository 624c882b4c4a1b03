"""The pages of results say what the files of benchmarks/results hold, all of it and nothing else; so does README.md."""

import re
from pathlib import Path

import pytest

from benchmarks import measure, write_results
from benchmarks.claims import seeds
from sgw_jax.data_pipelines.errors import InputError, MissingFileError

PAGES = [*write_results.PAGES.values(), write_results.ROOT / "README.md"]


def cells(line: str) -> list[str]:
    assert line.endswith("|"), line
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def tables(text: str) -> list[list[str]]:
    """The lines of every Markdown table."""
    found, before = [], ""
    for line in re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE).splitlines():
        if line.startswith("|"):
            if not before.startswith("|"):
                found.append([])
            found[-1].append(line)
        before = line
    return found


def check_table(lines: list[str]) -> None:
    """A header, a separator and rows, all as wide, and no cell without an answer: "–" says that there is none.

    A header may leave a column without a name, which goes on with what the one before it has.
    """
    assert len(lines) > 2, lines
    header, separator, *rows = map(cells, lines)
    assert any(header), lines
    assert all(re.fullmatch(":?-+:?", cell) for cell in separator), lines
    for row in (separator, *rows):
        assert len(row) == len(header), row
        assert all(row), row


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_no_table_misses_a_number(page: Path) -> None:
    found = tables(page.read_text(encoding="utf-8"))
    assert found
    for table in found:
        check_table(table)


def test_empty_tables_and_cells_are_seen() -> None:
    for bad in (
        "|  |\n\n|  |",
        "| a | b |\n|---|---|",
        "| a | b |\n|---|---|\n| 1 |  |",
        "| a | b |\n|---|---|\n| 1 |",
    ):
        with pytest.raises(AssertionError):
            [check_table(table) for table in tables(bad)]
    check_table(*tables("| | b |\n|---|---|\n| 1 | – |"))


@pytest.mark.parametrize("diagnostics", [None, {}, {"task_gates": None}, {"task_gates": {}}])
def test_gates_that_were_not_measured_are_an_error(diagnostics: dict | None, tmp_path: Path) -> None:
    """It names the file and the key."""
    path = tmp_path / "run.json"
    measured = {"diagnostics": {"task_gates": {"depth": -0.25}}}
    results = measure.Results("default", path)
    results.write([measured, {"diagnostics": diagnostics}])
    with pytest.raises(InputError, match=rf"{path}: diagnostics.*is missing or empty; `python .*seeds\.py"):
        seeds.gates(results.load())
    results.write([measured, {"diagnostics": {"task_gates": {"depth": 0.5}}}])
    check_table(seeds.gates(results.load()).splitlines())
    assert seeds.gates(results.load()).splitlines() == ["| depth |", "|---|", "| 0.38 [0.25, 0.50] |"]


def test_what_is_missing_names_its_file(tmp_path: Path) -> None:
    results = measure.Results("noise_trained_cpu", tmp_path / "run.json")
    with pytest.raises(MissingFileError, match=r"run\.json is not there; `python .*noise_trained\.py` measures it"):
        results.load()
    (tmp_path / "run.json").write_text('{"rows": [{"a": 1}]}', encoding="utf-8")
    found = results.load()
    with pytest.raises(InputError, match=r"run\.json: there is no 'b', only a"):
        found["rows"][0]["b"]
    with pytest.raises(InputError, match=r"run\.json: no row has a = 2"):
        measure.select(found["rows"], a=2)


def test_results_are_gone_on_with(tmp_path: Path) -> None:
    """Rows replace those of their key, sections stay beside each other, and both know where they were measured."""
    results = measure.Results("noise", tmp_path / "new" / "noise.json", steps=3)
    assert results.rows() == []
    results.add([{"a": 1, "b": 1}, {"a": 2, "b": 1}], "a")
    assert results.add([{"a": 1, "b": 5}], "a") == [{"a": 2, "b": 1}, {"a": 1, "b": 5}] == results.rows()
    results.update(more=[7])
    assert results.load() == {"rows": results.rows(), "more": [7], "environment": measure.environment(steps=3)}
    labels = measure.Results("attention", tmp_path / "attention.json")
    labels.label("one", {"a": 1})
    assert (
        labels.label("two", {"a": 2})
        == labels.load()
        == {name: {"a": a, "environment": measure.environment()} for name, a in (("one", 1), ("two", 2))}
    )


@pytest.mark.parametrize("path", sorted(measure.FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_every_file_of_results_names_what_made_it(path: Path) -> None:
    results = measure.Results(path.stem)
    assert results.load()
    script = results.remedy.removeprefix("`python ").split()[0].rstrip("`")
    assert script == "-m" or (write_results.ROOT / script).exists()


@pytest.mark.parametrize("name", write_results.PAGES)
def test_a_page_is_filled_in_from_the_measurements(name: str) -> None:
    path = write_results.PAGES[name]
    same = write_results.render(name) == path.read_text(encoding="utf-8")
    assert same, f"docs/{path.name} is out of date: python benchmarks/write_results.py"


def test_the_readme_shows_the_default_run():
    table = seeds.table(write_results.load("default_run_cpu"))
    scores = "\n".join(line for line in table.splitlines() if not line.startswith("| – "))
    assert scores in (write_results.ROOT / "README.md").read_text(encoding="utf-8"), f"README.md lacks\n{scores}"
