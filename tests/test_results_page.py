"""docs/results.md says what the files of benchmarks/results hold, all of it and nothing else; so does README.md."""

import json
import re
from pathlib import Path

import pytest

from benchmarks import measure, write_results
from benchmarks.claims import seeds
from sgw_jax.data_pipelines.errors import InputError, MissingFileError

PAGES = [write_results.PAGE, write_results.ROOT / "README.md"]


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
    path.write_text(json.dumps([measured, {"diagnostics": diagnostics}]), encoding="utf-8")
    with pytest.raises(InputError, match=rf"{path}: diagnostics.*is missing or empty"):
        seeds.gates(measure.load(path))
    path.write_text(json.dumps([measured, {"diagnostics": {"task_gates": {"depth": 0.5}}}]), encoding="utf-8")
    check_table(seeds.gates(measure.load(path)).splitlines())
    assert seeds.gates(measure.load(path)).splitlines() == ["| depth |", "|---|", "| 0.38 [0.25, 0.50] |"]


def test_what_is_missing_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=str(tmp_path / "run.json")):
        measure.load(tmp_path / "run.json")
    (tmp_path / "run.json").write_text('{"rows": [{"a": 1}]}', encoding="utf-8")
    found = measure.load(tmp_path / "run.json")
    with pytest.raises(InputError, match=r"run\.json: there is no 'b', only a"):
        found["rows"][0]["b"]
    with pytest.raises(InputError, match=r"run\.json: no row has a = 2"):
        measure.select(found["rows"], a=2)


def test_the_page_is_filled_in_from_the_measurements():
    same = write_results.render() == write_results.PAGE.read_text(encoding="utf-8")
    assert same, "docs/results.md is out of date: python benchmarks/write_results.py"


def test_the_readme_shows_the_default_run():
    table = seeds.table(write_results.load("default_run_cpu"))
    scores = "\n".join(line for line in table.splitlines() if not line.startswith("| – "))
    assert scores in (write_results.ROOT / "README.md").read_text(encoding="utf-8"), f"README.md lacks\n{scores}"
