"""Data that changed since a run began: the files are named, and the run goes on with them when that is asked for."""

import json
from pathlib import Path

import pytest
from test_data_check import GOOD, options, write
from test_folder import save, write_split

from sgw_jax.experiment.build import build
from sgw_jax.experiment.config_files import read_config
from sgw_jax.experiment.experiment import Experiment
from sgw_jax.run.data_changes import CHANGES, FILES
from sgw_jax.run.workdir import WorkdirError, check_workdir, claim_workdir


def experiment(root: Path, *keys: str) -> Experiment:
    name, *overrides = options(root, ["semseg"], "batch_size=8", *keys)
    return build(read_config(name.removeprefix("--config="), overrides), root / "cache")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "data", semseg=GOOD["semseg"])


def claim(workdir: Path, now: Experiment) -> None:
    """Makes the directory that of a run, which it is from its first checkpoint on."""
    claim_workdir(workdir, now)
    (workdir / "checkpoints" / "1").mkdir(parents=True)


def refused(workdir: Path, now: Experiment) -> str:
    with pytest.raises(WorkdirError) as error:
        check_workdir(workdir, now)
    return str(error.value)


def test_a_mended_file_is_named_and_gone_on_with_when_asked(root, tmp_path):
    workdir, image = tmp_path / "run", root / "images/train1.png"
    whole = image.read_bytes()
    image.write_bytes(whole[:-40])
    claim(workdir, experiment(root))
    before = (workdir / "run.json").read_bytes()
    image.write_bytes(whole)
    mended = experiment(root)
    line = f"train: images/train1.png is {len(whole):,} bytes, was {len(whole) - 40:,}"
    said = refused(workdir, mended)
    assert line in said
    assert "--accept_changed_data" in said
    assert "digest" not in said
    assert (workdir / "run.json").read_bytes() == before
    assert claim_workdir(workdir, mended, accept_changed_data=True) == [line]
    (record,) = json.loads((workdir / CHANGES).read_text(encoding="utf-8"))
    assert record["changed"] == [line]
    assert claim_workdir(workdir, mended) == []  # from now on these are its data


def test_files_that_came_and_went_are_named(root, tmp_path):
    workdir = tmp_path / "run"
    claim(workdir, experiment(root))
    write_split(root, "train", "train0", "test0")
    (root / "splits/validation.txt").unlink()
    said = refused(workdir, experiment(root))
    for line in ("train: images/train1.png is gone", "train: semseg/test0.png is new", "validation: the split is gone"):
        assert line in said
    write_split(root, "train", "train1", "train0")
    write_split(root, "validation", "validation0")
    assert "train: the same files in another order" in refused(workdir, experiment(root))


def test_another_configuration_is_not_accepted_with_the_data(root, tmp_path):
    workdir = tmp_path / "run"
    claim(workdir, experiment(root))
    save(root / "semseg/train0.png", GOOD["semseg"][1][:, ::-1])
    (root / "semseg/train1.png").unlink()
    with pytest.raises(WorkdirError, match="seed: 0 there, 1 now"):
        claim_workdir(workdir, experiment(root, "seed=1"), accept_changed_data=True)


def test_a_run_that_kept_no_list_says_which_split_changed(root, tmp_path):
    workdir = tmp_path / "run"
    claim(workdir, experiment(root))
    (workdir / FILES).unlink()
    (root / "semseg/train1.png").unlink()
    assert "data.train.digest: " in refused(workdir, experiment(root))


def test_keys_that_were_none_when_a_run_began_had_their_defaults(root, tmp_path):
    workdir, now = tmp_path / "run", experiment(root)
    claim(workdir, now)
    record = json.loads((workdir / "run.json").read_text(encoding="utf-8"))
    old = {key: value for key, value in record.items() if not key.startswith(("lora.", "backbones.convnext."))}
    assert len(old) < len(record)
    (workdir / "run.json").write_text(json.dumps(old), encoding="utf-8")
    assert check_workdir(workdir, now) == []
    assert "lora.rank: None there, 4 now" in refused(workdir, experiment(root, "lora.rank=4"))
    (workdir / "run.json").write_text(
        json.dumps({k: v for k, v in record.items() if k != "data.fit"}), encoding="utf-8"
    )
    assert "data.fit: 'pad' there, 'resize' now" in refused(workdir, now)
