"""The comparison's arithmetic: pairing by seed, signs, spread, and a page that holds the numbers."""

import compare
import comparison
import jax
import jax.numpy as jnp
import numpy as np

from sgw_jax.build import build
from sgw_jax.config_files import read_config
from sgw_jax.tasks import Depth, SemSeg

TASKS = (SemSeg(), Depth())


def run(miou, rmse, diagnostics=None):
    metrics = {"semseg": {"miou": miou}, "depth": {"rmse": rmse}}
    return {"metrics": metrics, "parameters": 1234, "images_per_second": 50.0, "diagnostics": diagnostics}


def diagnostics():
    changed = {"metrics": {"semseg": {"miou": 20.0}, "depth": {"rmse": 1.2}}}
    numbers = dict.fromkeys(("slot_diversity", "retrieve_entropy", "write_entropy", "readout_cosine"), 0.5)
    return {**numbers, "update_ratio": None, "ablations": {"zeroed": changed, "swapped": changed}}


FOUND = {
    "none": [run(20.0, 1.0), run(10.0, 2.0)],
    "kem": [run(22.0, 0.9, diagnostics()), run(10.0, 2.0, diagnostics())],
    "single_semseg": [run(20.0, 9.0), run(20.0, 9.0)],
    "single_depth": [run(1.0, 1.0), run(1.0, 1.0)],
}


def test_gains_are_paired_by_seed():
    summary = comparison.summarise(FOUND, TASKS)
    none, kem = summary["methods"]
    np.testing.assert_allclose(none["over_none"]["values"], [0, 0])
    np.testing.assert_allclose(kem["over_none"]["values"], [10, 0])  # +10 % mIoU and -10 % error; then nothing
    np.testing.assert_allclose(kem["over_none"]["std"], np.std([10, 0], ddof=1))
    np.testing.assert_allclose(none["delta_m"]["values"], [0, -75])  # half the mIoU, twice the error
    assert summary["single"]["depth"]["mean"] == 1.0
    assert none["diagnostics"] is None
    expected = 100 * ((20 / 22 - 1) - (1.2 / 0.9 - 1)) / 2
    np.testing.assert_allclose(kem["diagnostics"]["delta_m with the read-out zeroed"]["values"][0], expected)
    assert "update_ratio" not in kem["diagnostics"]


def test_widened_has_as_many_parameters_as_kem():
    """To half a hidden unit, of 2 c + 1 parameters."""

    def count(interaction, width=None):
        config = read_config(f"scenes:interaction={interaction}")
        config.interactions.none.mlp_width = width
        config.mesh.data, config.batch_size = -1, 8
        experiment = build(config, "unused")
        image = jnp.zeros((1, *experiment.size, 3))
        params = jax.eval_shape(experiment.model.init, jax.random.key(0), image)["params"]
        return experiment, sum(leaf.size for leaf in jax.tree.leaves(params))

    kem, wanted = count("kem")
    _, found = count("none", compare.equal_mlp_width(kem))
    assert abs(found - wanted) <= (2 * kem.config.channels + 1) / 2


def test_one_seed_has_no_spread():
    summary = comparison.summarise({name: runs[:1] for name, runs in FOUND.items()}, TASKS)
    assert summary["methods"][1]["over_none"]["std"] is None


def test_the_page_and_the_table_hold_the_numbers():
    facts = {
        "config": "scenes",
        "overrides": [],
        "steps": 5,
        "trunk_steps": 6,
        "seeds": 2,
        "environment": {"device": "cpu"},
    }
    summary = comparison.summarise(FOUND, TASKS) | facts
    page, table = comparison.page(summary), comparison.markdown(summary)
    for text in (page, table):
        assert "kem" in text
        assert "1,234" in text
        assert "5 ± 7.1" in text  # delta_m over none: 10 and 0
    assert "<script" not in page
