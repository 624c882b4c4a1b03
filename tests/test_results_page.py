"""docs/results.md says what the files of benchmarks/results hold, and nothing else."""

import write_results


def test_the_page_is_filled_in_from_the_measurements():
    same = write_results.render() == write_results.PAGE.read_text(encoding="utf-8")
    assert same, "docs/results.md is out of date: python benchmarks/write_results.py"
