"""Scalarisers: values and gradients of the papers' formulas in float64, masks, states that learn."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgw_jax.experiment.choice import taken
from sgw_jax.multi_objective import SCALARIZERS
from sgw_jax.multi_objective.scalarize import dwa, famo, rlw, stch, uncertainty, uw_so, weighted_sum

EPS32 = float(np.finfo(np.float32).eps)
LOSSES = np.array([0.5, 2.0, 4.0], np.float32)


def make(name, tasks=3, **options):
    return SCALARIZERS[name](tasks, **taken(SCALARIZERS[name], {"steps_per_epoch": 2}), **options)


@functools.cache
def compiled(scalarizer):
    """One compilation for all steps: losses, state and mask are arguments."""
    return jax.jit(jax.value_and_grad(scalarizer.apply, has_aux=True))


def value_and_gradient(scalarizer, losses, state=None, mask=None):
    state = scalarizer.init() if state is None else state
    (value, state), gradient = compiled(scalarizer)(jnp.asarray(losses, jnp.float32), state, mask)
    return float(value), np.asarray(gradient), state


def softmax(scores):
    found = np.exp(scores - np.max(scores))
    return found / found.sum()


L = LOSSES.astype(np.float64)
FIRST = {  # value and gradient of the first step
    "equal": (L.sum(), np.ones(3)),
    "uncertainty": (L.sum() / 2, np.full(3, 0.5)),
    "uw_so": (softmax(1 / L) @ L, softmax(1 / L)),
    "log_loss": (np.log(L).sum(), 1 / L),
    "gls": (np.prod(L) ** (1 / 3), np.prod(L) ** (1 / 3) / 3 / L),
    "dwa": (L.sum(), np.ones(3)),
    "stch": (np.log(np.exp(L / 3).sum()), softmax(L / 3) / 3),
    "famo": (1 / np.sum(1 / 3 / L) * np.sum(np.log(L)) / 3, 1 / np.sum(1 / 3 / L) / 3 / L),
}


@pytest.mark.parametrize("name", FIRST)
def test_first_step(name):
    value, gradient, _ = value_and_gradient(make(name), LOSSES)
    np.testing.assert_allclose(value, FIRST[name][0], rtol=32 * EPS32)
    np.testing.assert_allclose(gradient, FIRST[name][1], rtol=32 * EPS32)


@pytest.mark.parametrize("name", SCALARIZERS)
def test_absent_tasks_and_extremes(name):
    """A masked task counts as if it did not exist; losses of 0, 1e-30 and 1e6 give finite values and gradients."""
    mask = np.array([True, False, True])
    if name != "rlw":  # whose draws belong to places
        value, gradient, _ = value_and_gradient(make(name), [0.5, np.nan, 4.0], mask=mask)
        expected, kept, _ = value_and_gradient(make(name, 2), [0.5, 4.0])
        np.testing.assert_allclose(value, expected, rtol=64 * EPS32)
        np.testing.assert_allclose(gradient[mask], kept, rtol=64 * EPS32)
        assert gradient[1] == 0
    value, gradient, _ = value_and_gradient(make(name), LOSSES, mask=np.zeros(3, bool))
    assert value == 0
    assert not gradient.any()
    scalarizer = make(name, **({"temperature": 0.01} if name == "uw_so" else {}))  # 1 / L / temperature is infinite
    for losses in ([0.0, 1e-30, 1e6], [0.0, 0.0, 1.0], [1e-3, 1e-3, 1e-3]):
        state = None
        for _ in range(5):
            value, gradient, state = value_and_gradient(scalarizer, losses, state)
            assert np.isfinite(value)
            assert np.all(np.isfinite(gradient))
            assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", SCALARIZERS)
def test_the_state_keeps_its_structure(name):
    """Under scan, as a checkpoint and a compiled step need it."""
    scalarizer = make(name)

    def step(state, losses):
        value, state = scalarizer.apply(losses, state)
        return state, value

    _, values = jax.jit(lambda: jax.lax.scan(step, scalarizer.init(), jnp.tile(LOSSES, (6, 1))))()
    assert np.all(np.isfinite(values))


def test_uncertainty_learns_the_logarithm_of_the_losses():
    scalarizer = uncertainty(3, learning_rate=0.1)
    state = scalarizer.init()
    step = jax.jit(lambda s: scalarizer.apply(jnp.asarray(LOSSES), s)[1])
    for _ in range(500):
        state = step(state)
    np.testing.assert_allclose(state, np.log(L), atol=1e-4)
    _, gradient, _ = value_and_gradient(scalarizer, LOSSES, state)
    np.testing.assert_allclose(gradient * L, 0.5, rtol=1e-3)


def test_dwa_weighs_by_the_last_two_epochs():
    scalarizer = dwa(2, steps_per_epoch=2, temperature=1.0)
    state = scalarizer.init()
    for losses in ([4.0, 2.0], [2.0, 2.0], [1.0, 3.0], [2.0, 1.0]):  # epochs of means (3, 2) and (1.5, 2)
        _, gradient, state = value_and_gradient(scalarizer, np.float32(losses), state)
        np.testing.assert_allclose(gradient, 1.0)
    _, gradient, _ = value_and_gradient(scalarizer, np.float32([1, 1]), state)
    np.testing.assert_allclose(gradient, 2 * softmax(np.array([0.5, 1.0])), rtol=16 * EPS32)


def test_dwa_keeps_the_mean_of_a_task_that_was_absent_for_an_epoch():
    scalarizer = dwa(2, steps_per_epoch=1, temperature=1.0)
    state = scalarizer.init()
    for losses, there in (([4.0, 2.0], [1, 1]), ([2.0, 1.0], [1, 1]), ([1.0, np.nan], [1, 0])):
        _, _, state = value_and_gradient(scalarizer, losses, state, np.array(there, bool))
    _, gradient, _ = value_and_gradient(scalarizer, [1, 1], state, np.ones(2, bool))
    np.testing.assert_allclose(gradient, 2 * softmax(np.array([0.5, 1.0])), rtol=16 * EPS32)


def test_rlw_draws_anew_and_alike():
    scalarizer = rlw(3, seed=5)
    _, first, state = value_and_gradient(scalarizer, LOSSES)
    _, again, _ = value_and_gradient(scalarizer, LOSSES)
    _, second, _ = value_and_gradient(scalarizer, LOSSES, state)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, second)
    np.testing.assert_allclose([first.sum(), second.sum()], 1, rtol=8 * EPS32)


def test_stch_tends_to_the_largest_loss():
    value, gradient, _ = value_and_gradient(stch(3, mu=1e-3, preference=[1, 1, 1], ideal=[0, 0, 3.5]), LOSSES)
    assert value == pytest.approx(2.0, abs=1e-3)
    np.testing.assert_allclose(gradient, [0, 1, 0], atol=1e-6)


def test_famo_favours_the_task_that_lags():
    scalarizer = famo(2)
    state, weights = None, []
    for step in range(30):  # the first task halves every ten steps, the second stands still
        _, gradient, state = value_and_gradient(scalarizer, np.float32([2.0 ** -(step / 10), 1.0]), state)
        weights.append(gradient * [2.0 ** -(step / 10), 1.0])
    assert weights[-1][1] / weights[-1].sum() > weights[0][1] / weights[0].sum() + 0.1


def test_uw_so_at_a_high_temperature_is_equal():
    _, gradient, _ = value_and_gradient(uw_so(3, temperature=1e4), LOSSES)
    np.testing.assert_allclose(gradient, 1 / 3, rtol=1e-3)


def test_errors():
    for call, message in (
        (lambda: dwa(2, steps_per_epoch=0), "steps_per_epoch is 0"),
        (lambda: stch(2, mu=0), "mu is 0"),
        (lambda: stch(2, preference=[1]), "need 2 numbers; got 1 and 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert weighted_sum([1.0]).linear
