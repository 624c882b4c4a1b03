"""docs/results.md says what the files of benchmarks/results hold, and nothing else."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def pages():
    sys.path.insert(0, str(ROOT / "benchmarks"))  # as Python does for a script
    try:
        import write_results
    finally:
        sys.path.remove(str(ROOT / "benchmarks"))
    return write_results


def test_the_page_is_filled_in_from_the_measurements(pages):
    same = pages.render() == pages.PAGE.read_text(encoding="utf-8")
    assert same, "docs/results.md is out of date: python benchmarks/write_results.py"
