"""The planted modules of benchmarks/claims/noise.py read what the closed forms say."""

import pytest

from benchmarks.claims import noise


@pytest.mark.parametrize("margin", [4.0])
@pytest.mark.parametrize(("name", "top_k"), [("dense", None), ("kem", 32), ("kem", 8), ("skem", 32), ("workspace", 32)])
def test_the_share_of_noise_is_the_closed_form(name, top_k, margin):
    """Without noise in the scores, through retrieval and write; KEM's choice of a slot adds what it takes of others."""
    found = noise.measure(name, 2, margin, top_k, noise.TOPICS, 0.0, 0.0)
    expected = noise.closed_form(2, margin, top_k)
    if name == "workspace":
        # The kept weights are those of the softmax over all: renormalised, the same.
        assert found["kept_mass"] < 1
    assert found["noise"] == pytest.approx(expected, abs=2e-3 if name in ("kem", "skem") else 1e-5)
    assert found.get("relevant_kept", 1) == 1
