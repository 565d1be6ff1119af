"""`verify=True` compares what a call leaves, over two calls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from tests.structure._zoo import normal

KEEP = jnp.arange(8) % 2 == 0
PARAMS = {
    "up": normal(5, 8, seed=1),
    "down": normal(8, 3, seed=2),
    "mean": jnp.zeros(8),
    "steps": jnp.zeros((), jnp.int32),
}
MASKS = {
    "up": KEEP[None],
    "down": KEEP[:, None],
    "mean": KEEP,
    "steps": jnp.array(True),
}
X = normal(4, 5)


def step(p, x, total):
    """Moves a mean, a counter and a state."""
    h = jnp.tanh(x @ p["up"])
    mean = 0.9 * p["mean"] + 0.1 * h.mean(0)
    total = total + h - mean
    out = (total @ p["down"]) * (1.0 + p["steps"])
    return out, {**p, "mean": mean, "steps": p["steps"] + 1}, total


HOW = {"updates": lambda out: out[1], "states": {"total": lambda out: out[2]}, "verify": True}


def test_two_calls_agree():
    small_fn, small = jp.compact(step, PARAMS, MASKS, X, jnp.zeros((4, 8)), **HOW)
    assert small["mean"].shape == (4,)
    assert set(small_fn.differences) >= {"0", "1/mean", "2"}
    assert max(small_fn.differences.values()) < 1e-5


def test_what_differs_in_the_second_call_only_is_refused(monkeypatch):
    """A compact function that forgets what the first call left."""
    calls, right = [], jp.structure.CompactFunction.__call__

    def wrong(self, params, *args, **kwargs):
        calls.append(params)
        out = right(self, params, *args, **kwargs)
        off = params["steps"] > 0  # nothing is wrong before a call was made
        return (jnp.where(off, out[0] + 1.0, out[0]), *out[1:])

    monkeypatch.setattr(jp.structure.CompactFunction, "__call__", wrong)
    with pytest.raises(ValueError, match=r"verify: output '0'.* in a second call"):
        jp.compact(step, PARAMS, MASKS, X, jnp.zeros((4, 8)), **HOW)
    assert calls


def test_one_call_where_nothing_is_left_behind(monkeypatch):
    fn = lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]
    params = {k: PARAMS[k] for k in ("up", "down")}
    count, right = [], jax.jit

    def counted(f, *args, **kwargs):
        count.append(getattr(f, "__name__", ""))
        return right(f, *args, **kwargs)

    monkeypatch.setattr("jaxprune.structure._verify.jax.jit", counted)
    small_fn, _ = jp.compact(fn, params, {k: MASKS[k] for k in params}, X, verify=True)
    assert count.count("call") == 2  # both functions, once
    np.testing.assert_allclose(small_fn.differences["output"], 0, atol=1e-5)
