"""A published data set from the archive's files to the report, and the same from prepared files."""

import json

import pytest
from test_nyud import write_archive

from data_pipelines.prepare import main as prepare
from data_pipelines.prepared import VERSION
from sgw_jax.__main__ import main

# The shipped configuration at toy size; 16 x 24 images are padded to 32 x 32.
TOY = [
    "data.size=32,32",
    "backbones.vit.width=8",
    "backbones.vit.depth=4",
    "backbones.vit.num_heads=2",
    "channels=8",
    "steps=2",
    "batch_size=8",
    "checkpoint_every=2",
    "eval_every=2",
]


def train(root, run, cache, *keys):
    toy = [f"--config.{key}" for key in (*TOY, f"data.root={root}", *keys)]
    return main(["train", "--config=nyud:protocol=published", f"--workdir={run}", cache, *toy])


@pytest.mark.slow
def test_nyud_from_the_archive_and_from_prepared_files(tmp_path, capsys):
    archive, run, cache = tmp_path / "archive", tmp_path / "run", f"--cache_dir={tmp_path / 'cache'}"
    archive.mkdir()
    write_archive(archive, "invpt")
    assert train(archive, run, cache) == 0
    assert "archive 'invpt' (NYUDv2.tar.gz of ATRC and InvPT)" in capsys.readouterr().out.replace("\n", " ")
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert (results["split"], results["protocol"]) == ("test", "published")
    assert 0 < results["metrics"]["edges"]["ods"] <= 100

    assert prepare(["nyud", f"--source={archive}", f"--out={tmp_path}"]) == 1
    assert "split 'train' has 2 images, the published one 795" in capsys.readouterr().err.replace("\n", " ")
    assert prepare(["nyud", f"--source={archive}", f"--out={tmp_path}", "--any_size"]) == 0
    again = tmp_path / "again"
    assert train(tmp_path / "nyud" / VERSION, again, cache, "data.format=prepared") == 0
    prepared = json.loads((again / "results.json").read_text(encoding="utf-8"))
    assert prepared["metrics"] == results["metrics"]  # the same batches, hence the same numbers
