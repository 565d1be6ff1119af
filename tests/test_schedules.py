import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

RAMPS = {
    "cubic": lambda t: 1 - (1 - t) ** 3,
    "linear": lambda t: t,
    "cosine": lambda t: (1 - np.cos(np.pi * t)) / 2,
}


@pytest.mark.parametrize("name", RAMPS)
@pytest.mark.parametrize("every", [1, 7])
def test_ramp(name, every):
    schedule = getattr(jp.schedules, name)(0.9, begin=10, end=60, every=every, initial=0.1)
    steps = np.arange(0, 100)
    got = jax.jit(jax.vmap(schedule))(jnp.asarray(steps))
    stair = 10 + (steps - 10) // every * every
    ramp = 0.1 + 0.8 * RAMPS[name](np.clip((stair - 10) / 50, 0, 1))
    np.testing.assert_allclose(got, np.where(steps >= 60, 0.9, ramp), rtol=1e-5, atol=1e-6)
    assert np.all(np.diff(got) >= 0)
    assert len(set(np.asarray(got).tolist())) <= 50 // every + 3


def test_one_shot():
    schedule = jp.schedules.one_shot(0.5, at=3)
    assert [float(schedule(i)) for i in range(5)] == [0, 0, 0, 0.5, 0.5]


@pytest.mark.parametrize("name", RAMPS)
def test_bad_arguments(name):
    make = getattr(jp.schedules, name)
    with pytest.raises(ValueError, match="final"):
        make(80, end=10)
    with pytest.raises(ValueError, match="end"):
        make(0.8, begin=10, end=10)
    with pytest.raises(ValueError, match="every"):
        make(0.8, end=10, every=0)
    with pytest.raises(TypeError, match="begin"):
        make(0.8, begin=0.5, end=10)
