"""Outliers moved from activations into weights."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxprune as jp


def rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale


def decoder(p, tokens):
    """Two pre-norm blocks: attention and a gated feed-forward."""
    x = p["embed"][tokens]
    for block in (p["one"], p["two"]):
        h = rms_norm(x, block["n1"])
        q, k, v = (jnp.einsum("btd,dhk->bhtk", h, block[n]) for n in ("q", "k", "v"))
        a = jax.nn.softmax(q @ jnp.swapaxes(k, -1, -2) / 2, -1) @ v
        x = x + jnp.einsum("bhtk,hkd->btd", a, block["o"])
        h = rms_norm(x, block["n2"])
        x = x + (jax.nn.silu(h @ block["gate"]) * (h @ block["up"])) @ block["down"]
    return rms_norm(x, p["n"]) @ p["embed"].T


def made(outlier=30.0):
    keys = iter(jax.random.split(jax.random.key(0), 32))
    normal = lambda *s: jax.random.normal(next(keys), s) / s[0] ** 0.5
    block = lambda: {
        "n1": jnp.ones(16).at[3].set(outlier),
        "n2": jnp.ones(16).at[5].set(outlier),
        "q": normal(16, 2, 4),
        "k": normal(16, 2, 4),
        "v": normal(16, 2, 4),
        "o": normal(2, 4, 16),
        "gate": normal(16, 24),
        "up": normal(16, 24),
        "down": normal(24, 16),
    }
    return {"embed": normal(32, 16), "one": block(), "two": block(), "n": jnp.ones(16)}


TOKENS = jax.random.randint(jax.random.key(9), (4, 12), 0, 32)


def test_outliers_move_into_the_weights_that_read_them():
    params = made()
    stats = jp.calibrate(decoder, params, [TOKENS])
    smooth = jp.smooth_quant(decoder, params, stats, TOKENS)
    wanted = decoder(params, TOKENS)
    np.testing.assert_allclose(
        decoder(smooth, TOKENS), wanted, atol=1e-5 * float(jnp.abs(wanted).max())
    )
    assert smooth["one"]["n1"][3] < 0.5 * params["one"]["n1"][3]
    after = jp.calibrate(decoder, smooth, [TOKENS])
    peak = lambda s: float(s.absmax.max() / jnp.median(s.absmax))
    for name in ("q", "k", "v", "gate", "up"):
        assert peak(after["one"][name]) < 0.5 * peak(stats["one"][name])
    run = jp.compressed(decoder, activations="int8")
    errors = [
        float(jnp.linalg.norm(run(jp.quantize_tree(p, 8, uses=stats), TOKENS) - wanted))
        for p in (params, smooth)
    ]
    assert errors[1] < 0.7 * errors[0]


def test_alpha_shares_the_range_as_the_paper_says():
    fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]
    k = jax.random.split(jax.random.key(0), 3)
    params = {
        "a": jax.random.normal(k[0], (6, 8)) * jnp.geomspace(0.1, 10, 8),
        "b": jax.random.normal(k[1], (8, 3)),
    }
    x = jax.random.normal(k[2], (32, 6))
    stats = jp.calibrate(fn, params, [x])
    for alpha in (0.0, 0.3, 1.0):
        with pytest.warns(UserWarning, match=r"stay as they are.*'a'"):
            smooth = jp.smooth_quant(fn, params, stats, x, alpha=alpha)
        s = stats["b"].absmax ** alpha / jnp.abs(params["b"]).max(1) ** (1 - alpha)
        np.testing.assert_allclose(smooth["b"], params["b"] * s[:, None], rtol=1e-4)
        np.testing.assert_allclose(smooth["a"], params["a"] / s, rtol=1e-4)


def test_linen_and_layer_norm():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.LayerNorm()(nn.Dense(16)(x))
            return nn.Dense(4)(nn.gelu(nn.Dense(24)(h)))

    x = jax.random.normal(jax.random.key(1), (16, 8))
    variables = Net().init(jax.random.key(0), x)
    scale = variables["params"]["LayerNorm_0"]["scale"].at[2].set(40.0)
    variables["params"]["LayerNorm_0"]["scale"] = scale
    stats = jp.calibrate(Net().apply, variables, [x])
    with pytest.warns(UserWarning, match="Dense_0"):
        smooth = jp.smooth_quant(Net().apply, variables, stats, x)
    np.testing.assert_allclose(
        Net().apply(smooth, x), Net().apply(variables, x), rtol=1e-4, atol=1e-4
    )
    assert smooth["params"]["LayerNorm_0"]["scale"][2] < 20
    assert jax.tree.structure(smooth) == jax.tree.structure(variables)


def test_what_cannot_be_smoothed_is_told():
    fn = lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]
    params, x = {"a": jnp.eye(4), "b": jnp.eye(4)}, jnp.ones((2, 4))
    stats = jp.calibrate(fn, params, [x])
    with pytest.warns(UserWarning, match=r"nothing is smoothed.*'a', 'b'"):
        same = jp.smooth_quant(fn, params, stats, x)
    assert all(same[k] is params[k] for k in params)


def test_bad_input():
    params, x = {"a": jnp.eye(4)}, jnp.ones((2, 4))
    fn = lambda p, x: x @ p["a"]
    stats = jp.calibrate(fn, params, [x])
    with warnings.catch_warnings(), pytest.raises(ValueError, match="alpha: expected a number in"):
        jp.smooth_quant(fn, params, stats, x, alpha=1.5)
    with pytest.raises(ValueError, match="stats: of another tree"):
        jp.smooth_quant(fn, {"b": jnp.eye(4)}, stats, x)
