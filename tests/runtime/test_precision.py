"""Results are within 5e-4 of their root mean square, whatever the data; NaN and infinity stay."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp

K, N = 256, 48
BOUND = 5e-4


def pruned(params):
    return jp.sparsify_tree(jp.prune_tree(params, 0.5, pattern=jp.masks.NM(2, 4))[0])


KINDS = {
    "int8": lambda p: jp.quantize_tree(p),
    "int4 asymmetric": lambda p: jp.quantize_tree(p, bits=4, symmetric=False),
    "rows": lambda p: jp.quantize_tree(p, channel_axis=-2),
    "groups": lambda p: jp.quantize_tree(p, group_size=128),
    "nf4": lambda p: jp.quantize_tree(p, dtype="nf4"),
    "nf4 groups": lambda p: jp.quantize_tree(p, dtype="nf4", group_size=64),
    "float8": lambda p: jp.quantize_tree(p, dtype="float8_e4m3fn"),
    "clusters": lambda p: jp.cluster_tree(p, bits=4, preserve_zeros=False),
    "many clusters": lambda p: jp.cluster_tree(p, bits=7, preserve_zeros=False),
    "integer codebook": lambda p: jp.quantize_tree(
        jp.cluster_tree(p, bits=4, preserve_zeros=False)
    ),
    "2:4": pruned,
}
R = np.random.default_rng(0)


def outliers(x, count=5, size=1e4):
    x = x.copy()
    x.flat[R.integers(0, x.size, count)] *= size
    return x


def normal(*shape):
    return R.normal(size=shape)


def cauchy(*shape):
    return np.clip(R.standard_cauchy(shape), -1e4, 1e4)


def feature(rows):
    x = normal(rows, K)
    x[:, 3] = 1e4
    return x


def small_row(w):
    w = w.copy()
    w[3] = 0
    return w


DATA = {
    "normal": lambda rows: (normal(rows, K), normal(K, N)),
    "half of it zero": lambda rows: (np.maximum(normal(rows, K), 0), normal(K, N)),
    "an outlier feature": lambda rows: (feature(rows), normal(K, N)),
    "an outlier feature, weights small": lambda rows: (feature(rows), small_row(normal(K, N))),
    "heavy inputs": lambda rows: (cauchy(rows, K), normal(K, N)),
    "heavy weights": lambda rows: (normal(rows, K), cauchy(K, N)),
    "both heavy": lambda rows: (cauchy(rows, K), cauchy(K, N)),
    "outliers in weights": lambda rows: (normal(rows, K), outliers(normal(K, N))),
    "one column of weights": lambda rows: (
        normal(rows, K),
        normal(K, N) * (1 + 1e4 * (np.arange(N) == 5)),
    ),
    "rows of all sizes": lambda rows: (
        normal(rows, K) * 10.0 ** R.integers(-4, 4, (rows, 1)),
        normal(K, N),
    ),
}


@cache
def function(activations=None):
    return jax.jit(jp.compressed(lambda p, x: x @ p["w"], activations=activations))


def results(kind, data, rows):
    x, w = (jnp.asarray(y, jnp.float32) for y in DATA[data](rows))
    tree = KINDS[kind]({"w": w})
    wanted = np.asarray(x, np.float64) @ np.asarray(tree["w"].materialize(), np.float64)
    return wanted, function()(tree, x)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_holds(kind, rows):
    for data in DATA:
        wanted, found = results(kind, data, rows)
        off = np.abs(wanted - found).max() / np.sqrt(np.mean(wanted**2))
        assert off <= BOUND, (data, off)


@pytest.mark.parametrize("rows", [2, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_finite_stays(kind, rows):
    tree = KINDS[kind]({"w": jnp.asarray(normal(K, N), jnp.float32)})
    x = jnp.asarray(normal(rows, K), jnp.float32)
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        odd = x.at[1, 7].set(value)
        wanted = odd @ tree["w"].materialize()
        np.testing.assert_allclose(function()(tree, odd), wanted, rtol=1e-3, atol=2e-2)
        coarse = np.asarray(function("int8")(tree, odd))
        np.testing.assert_array_equal(np.isnan(coarse[1]), np.isnan(wanted[1]))
        assert np.isfinite(np.delete(coarse, 1, 0)).all()


def test_convolutions_keep_what_is_not_finite():
    conv = lambda p, x: jax.lax.conv_general_dilated(
        x, p["k"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    tree = jp.quantize_tree({"k": jnp.asarray(normal(3, 3, 16, 64), jnp.float32)})
    x = jnp.asarray(normal(2, 12, 12, 16), jnp.float32).at[0, 3, 3, 3].set(jnp.nan)
    run = jp.compressed(conv, activations="int8")
    found = run(tree, x)
    assert [choice.lowering for choice in run.choices] != ["converted"]
    assert np.isnan(found[0, 3, 3]).all()
    assert np.isfinite(found[1]).all()


def test_maps_keep_the_branch():
    """Mapped over rows, a product is still one of integers where all rows allow it."""
    tree = jp.quantize_tree({"w": jnp.asarray(normal(K, N), jnp.float32)})
    run = jp.compressed(lambda p, x: x @ p["w"])
    text = str(jax.make_jaxpr(jax.vmap(run, (None, 0)))(tree, jnp.ones((6, 8, K))))
    assert "cond[" in text
    x = jnp.asarray(normal(6, 8, K), jnp.float32)
    np.testing.assert_allclose(
        jax.vmap(run, (None, 0))(tree, x), x @ tree["w"].materialize(), rtol=1e-2, atol=1e-2
    )


def test_float64_is_as_precise_as_it_says():
    with jax.enable_x64(True):
        w, x = jnp.asarray(normal(K, N)), jnp.asarray(normal(4, K))
        tree = jp.quantize_tree({"w": w})
        run = jp.compressed(lambda p, x: x @ p["w"])
        wanted = np.asarray(x) @ np.asarray(tree["w"].materialize())
        np.testing.assert_allclose(run(tree, x), wanted, rtol=1e-12, atol=1e-12)
        assert "float64" in run.choices[0].why


@pytest.mark.parametrize("name", ["int8", "int4", "nf4", "groups", "asymmetric", "out, in"])
def test_large_activations_that_meet_zeros_do_not_drown_the_others(name):
    """Half of the features are a thousand times larger, and no weight reads them."""
    kinds = {
        "int8": {"bits": 8},
        "int4": {"bits": 4},
        "nf4": {"dtype": "nf4"},
        "groups": {"bits": 8, "group_size": 64},
        "asymmetric": {"bits": 8, "symmetric": False},
        "out, in": {"bits": 8, "channel_axis": -2},
    }
    rng = np.random.default_rng(3)
    w = rng.normal(size=(128, 48)).astype(np.float32)
    w[:64] = 0
    tree = jp.quantize_tree({"w": jnp.asarray(w)}, **kinds[name])
    for rows in (1, 40):
        x = rng.normal(size=(rows, 128)).astype(np.float32)
        x[:, :64] *= 1e3
        wanted = x.astype(np.float64) @ np.asarray(tree["w"].materialize(), np.float64)
        got = jp.compressed(lambda p, x: x @ p["w"])(tree, jnp.asarray(x))
        assert np.abs(got - wanted).max() <= 5e-4 * np.sqrt(np.mean(wanted**2))
