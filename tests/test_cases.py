"""Inputs that once went wrong, as people had them: each command ends as its README says. Where they are at hand."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from quick import QUICK

ROOT = Path(__file__).resolve().parent.parent
CASES = ROOT.parent / "shared" / "cases"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CASES.is_dir(), reason="the collection of inputs that went wrong lies beside no checkout"),
]

# Case -> exit code, a part of standard error, files that are there afterwards.
REFUSED = {
    "binary-labels-0-255": "the only values are 0 and 255",
    "class-beyond-num-classes": "train1.png, train split, task 'semseg': labels of the value 20, but there are 4",
    "label-suffix-case": "Rename it to train1.png",
}
TRAINED = {
    "larger-training-images": ("", "out/case01_run/report.html"),
    "nyud-640x480-archive": ("larger than config.data.size, 448 x 576", "out/case20_run/report.html"),
    "data-moved": ("where the data lies is said by --config.data.root=DIR", "out/case12_run/report_validation.html"),
    "workdir-tilde": ("", "home/case13_run/report.html"),
}


def run(case: Path) -> "subprocess.CompletedProcess[str]":
    """The case's own command, in its folder."""
    environment = {
        **os.environ,
        "HOME": str(case / "home"),
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache")),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": QUICK,  # one device, as people have; the tests' own are eight
    }
    (case / "home").mkdir()
    command = (case / "command.txt").read_text(encoding="utf-8")
    return subprocess.run(
        ["bash", "-c", command], cwd=case, env=environment, capture_output=True, text=True, timeout=500
    )


@pytest.fixture
def case(request, tmp_path) -> Path:
    return Path(shutil.copytree(CASES / request.param, tmp_path / request.param))


@pytest.mark.parametrize("case", REFUSED, indirect=True)
def test_what_cannot_be_right_stops_before_anything_is_written(case):
    ended = run(case)
    assert ended.returncode == 1
    assert REFUSED[case.name] in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (case / "out").exists()


@pytest.mark.parametrize("case", TRAINED, indirect=True)
def test_what_is_right_comes_to_a_report(case):
    said, report = TRAINED[case.name]
    ended = run(case)
    assert (case / report).is_file(), ended.stderr
    assert said in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("case", ["no-home"], indirect=True)
def test_help_needs_no_home(case):
    if shutil.which("setpriv") is None or os.geteuid() != 0:
        pytest.skip("only root may become a user without an entry")
    ended = run(case)
    assert "usage: sgw-jax predict" in ended.stdout
    assert ended.returncode == 0
