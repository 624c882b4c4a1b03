"""Published data sets from the archive's files to the report, and the same from prepared files."""

import json

import numpy as np
import pytest
import test_cityscapes
import test_mtan
import test_nyud
import test_pascal_context

from sgw_jax.__main__ import main
from sgw_jax.data_pipelines.prepare import SOURCES
from sgw_jax.data_pipelines.prepare import main as prepare
from sgw_jax.data_pipelines.prepared import VERSION, Prepared

# A shipped configuration at toy size; the archives' images of 8 x 16 to 16 x 24 pixels are padded to 32 x 32.
TOY = [
    "data.size=32,32",
    "input_scale=1.0",
    "backbone=vit",
    "backbones.vit.width=8",
    "backbones.vit.depth=4",
    "backbones.vit.num_heads=2",
    "channels=8",
    "preliminary=False",
    "interactions.kem.num_slots=2",
    "steps=2",
    "batch_size=8",
    "checkpoint_every=2",
    "eval_every=2",
]
# Configuration -> (name for `prepare`, what writes a tiny archive).
ARCHIVES = {
    "nyud:protocol=published": ("nyud", lambda root: test_nyud.write_archive(root, "invpt")),
    "pascal_context": ("pascal_context", test_pascal_context.write_archive),
    "cityscapes": ("cityscapes", test_cityscapes.write_archive),
    "mtan": ("mtan_nyuv2", lambda root: test_mtan.write(root, 13, normals=True)),
    "mtan:data=cityscapes": ("mtan_cityscapes", lambda root: test_mtan.write(root, 7, normals=False)),
}


# What is trained from the archive, what from prepared files, and what is read alone: its configuration and its reader
# differ from the others' by what test_configs.py and its own file of tests ask of them.
TRAINED = {"nyud:protocol=published": "archive", "pascal_context": "prepared", "cityscapes": "", "mtan": ""}


@pytest.mark.slow
@pytest.mark.parametrize("config", TRAINED)
def test_from_the_archive_and_from_prepared_files(config, tmp_path, capsys):
    name, write = ARCHIVES[config]
    archive, run = tmp_path / "archive", tmp_path / "run"
    archive.mkdir()
    write(archive)

    assert prepare([name, f"--source={archive}", f"--out={tmp_path}"]) == 1
    assert "the published one" in capsys.readouterr().err.replace("\n", " ")
    assert prepare([name, f"--source={archive}", f"--out={tmp_path}", "--any_size"]) == 0
    directory = tmp_path / name / VERSION
    for split in ("train", "validation"):
        read, source = Prepared(directory, split), SOURCES[name](archive, split)
        assert read.fingerprint() == source.fingerprint()
        for index in range(len(source)):
            found, expected = read[index], source[index]
            assert set(found) == set(expected)
            for key, values in expected.items():
                np.testing.assert_array_equal(found[key], values)

    if not TRAINED[config]:
        return
    options = [f"--config.{key}" for key in TOY]
    if TRAINED[config] == "archive":
        options.append(f"--config.data.root={archive}")
    else:
        options += [f"--config.data.root={directory}", "--config.data.format=prepared"]
    assert main(["train", f"--config={config}", f"--workdir={run}", f"--cache_dir={tmp_path}", *options]) == 0
    said = capsys.readouterr().err.replace("\n", " ")
    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    assert results["split"] == "test"
    assert set(results["metrics"]) == set(results["config"]["tasks"])
    assert 0 < results["metrics"]["edges"]["ods"] <= 100
    if name == "nyud":
        assert "archive 'invpt' (NYUDv2.tar.gz of ATRC and InvPT)" in said
        assert results["protocol"] == "published"
        assert main(["evaluate", f"--workdir={run}", "--split=train", f"--cache_dir={tmp_path}"]) == 0
