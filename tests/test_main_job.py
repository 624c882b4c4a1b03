"""The main job from end to end: the command trains, evaluates, draws and predicts, and the network learns."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import sgw_jax
from sgw_jax.__main__ import main
from sgw_jax.data_pipelines.scenes import Scenes


@pytest.mark.slow
def test_a_short_run_beats_the_constant_predictor_and_predicts(tmp_path) -> None:
    """A fifth of the default run; margins are left to the default run itself (docs/accuracy.md)."""
    run, cache = tmp_path / "run", f"--cache_dir={tmp_path / 'cache'}"
    short = ["steps=200", "data.lengths.train=512", "data.lengths.validation=32", "data.lengths.test=64"]
    short += ["checkpoint_every=100", "eval_every=200"]
    train = ["train", "--config=scenes", f"--workdir={run}", cache, *(f"--config.{item}" for item in short)]
    optimised = {**os.environ, "XLA_FLAGS": ""}  # hundreds of steps, on one device, as people have
    subprocess.run([sys.executable, "-m", "sgw_jax", *train], env=optimised, check=True)

    results = json.loads((run / "results.json").read_text(encoding="utf-8"))
    for task in results["tasks"]:
        name, metric = task["name"], task["metric"]
        if name == "human_parts":
            continue  # rises above "all background" only later
        network, constant = results["metrics"][name][metric], results["references"]["constant"][name][metric]
        assert (network > constant) == task["higher_is_better"], f"{name}: {network} against {constant}"
    assert results["diagnostics"]["slot_diversity"] > 0.5
    assert (run / "report.html").stat().st_size < 4_000_000
    assert (run / "examples.png").exists()

    assert main(["evaluate", f"--workdir={run}", cache, "--split=validation"]) == 0
    assert (run / "results_validation.json").exists()

    scene = Scenes("test", 1, size=(96, 64))[0]["image"]
    Image.fromarray(scene).save(tmp_path / "scene.png")
    output = tmp_path / "out"
    assert main(["predict", f"--workdir={run}", f"--output={output}", str(tmp_path / "scene.png"), cache]) == 0
    with np.load(output / "scene.npz", allow_pickle=False) as arrays:
        predicted = sgw_jax.load(run)(scene)
        for name, values in predicted.items():
            assert arrays[name].shape[:2] == (96, 64)
            np.testing.assert_array_equal(arrays[name], values.astype(arrays[name].dtype))
