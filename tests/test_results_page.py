"""docs/results.md says what the files of benchmarks/results hold, and nothing else; so does README.md."""

import seeds
import write_results


def test_the_page_is_filled_in_from_the_measurements():
    same = write_results.render() == write_results.PAGE.read_text(encoding="utf-8")
    assert same, "docs/results.md is out of date: python benchmarks/write_results.py"


def test_the_readme_shows_the_default_run():
    table = seeds.table(write_results.load("default_run_cpu"))
    scores = "\n".join(line for line in table.splitlines() if not line.startswith("| | "))
    assert scores in (write_results.ROOT / "README.md").read_text(encoding="utf-8"), f"README.md lacks\n{scores}"
