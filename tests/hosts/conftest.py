"""What the tests of other libraries share: a batch, a loss, and what every one of them asks of a training."""

import jax
import numpy as np
import pytest

TASKS = ("bright", "red")


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent.name == "hosts":
            item.add_marker(pytest.mark.hosts)
            item.add_marker(pytest.mark.filterwarnings("default"))  # other people's deprecations


@pytest.fixture
def batch():
    """Images (8, 16, 16, 3) and, for each patch of 4 x 4, two targets that depend on it."""
    image = np.random.default_rng(0).normal(size=(8, 16, 16, 3)).astype(np.float32)
    patches = image.reshape(8, 4, 4, 4, 4, 3).mean((2, 4))
    return {"image": image, "bright": patches.sum(-1, keepdims=True), "red": patches[..., :1]}


@pytest.fixture
def loss_of():
    """(predictions, batch) -> mean squared error, summed over the tasks."""
    return lambda predictions, batch: sum(((predictions[name] - batch[name]) ** 2).mean() for name in TASKS)


@pytest.fixture
def check_training(batch):
    """Four steps of ``step(state, batch) -> (state, loss)``: the loss falls, the structure stays, all of sKEM's
    parameters learn, no frame is among them, and the program is compiled once.

    kem: state -> sKEM's parameters. compiled: () -> how many programs there are. Returns the last state.
    """

    def run(step, state, kem, compiled):
        start, losses = jax.tree.map(np.array, state), []
        for _ in range(4):
            state, loss = step(state, batch)
            losses.append(float(loss))
        assert np.isfinite(losses).all()
        assert losses[-1] < losses[0]
        assert jax.tree.structure(state) == jax.tree.structure(start)
        assert len(jax.tree.leaves(kem(state))) == 7  # slots and six kernels
        moved = jax.tree.map(lambda a, b: bool(np.any(np.asarray(a) != b)), kem(state), kem(start))
        assert all(jax.tree.leaves(moved)), moved
        assert compiled() == 1
        return state

    return run
