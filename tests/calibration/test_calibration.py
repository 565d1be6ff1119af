"""Statistics of what multiplies weights, and what is made of them, against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxprune as jp
import tests.structure._more_networks  # noqa: F401
from tests.structure._zoo import build, normal, randomized


def relative(a, b):
    return float(jnp.abs(a - b).max() / jnp.abs(a).max())


def test_dense_statistics_equal_numpy():
    params = {"w": normal(6, 4), "v": normal(3, 4, seed=1), "b": jnp.zeros(4)}
    fn = lambda p, x: jnp.tanh(x @ p["w"] + p["b"]) @ p["v"].T
    batches = [normal(5, 6, seed=2), (3 * normal(2, 6, seed=3),)]
    stats = jp.calibrate(fn, params, batches, second_moment=True, decay=0.5)
    rows = np.concatenate([batches[0], batches[1][0]])
    w = stats["w"]
    assert w.count == 7
    assert w.axes == (-2,)
    np.testing.assert_allclose(w.mean, rows.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(w.mean_square, (rows**2).mean(0), rtol=1e-5)
    np.testing.assert_allclose(w.absmax, np.abs(rows).max(0))
    np.testing.assert_allclose(w.second_moment, rows.T @ rows / 7, rtol=1e-4, atol=1e-5)
    assert (w.low, w.high) == (rows.min(), rows.max())
    moving = 0.5 * batches[0].max() + 0.5 * batches[1][0].max()
    np.testing.assert_allclose(w.moving_high, moving, rtol=1e-6)
    assert stats["v"].axes == (-1,)
    assert stats["v"].mean.shape == (4,)
    assert stats["b"].count == 0


def test_convolution_features_are_laid_out_as_the_kernel():
    kernel = normal(3, 2, 5, 4)
    x = normal(2, 6, 7, 5, seed=1)
    conv = lambda p, x: jax.lax.conv_general_dilated(
        x, p["k"], (2, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    stats = jp.calibrate(conv, {"k": kernel}, [x], second_moment=True)["k"]
    # y = features @ kernel: the mean output follows from the mean features
    expected = conv({"k": kernel}, x).reshape(-1, 4)
    np.testing.assert_allclose(stats.mean @ kernel.reshape(-1, 4), expected.mean(0), atol=1e-4)
    gram = kernel.reshape(-1, 4).T @ stats.second_moment @ kernel.reshape(-1, 4)
    np.testing.assert_allclose(gram, expected.T @ expected / len(expected), rtol=1e-3, atol=1e-3)


def test_scanned_layers_have_statistics_each_and_recurrences_share_them():
    def fn(p, x):
        y = jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), x, p["layers"])[0]
        return jax.lax.scan(lambda h, _: (jnp.tanh(h @ p["r"]), None), y, None, length=3)[0]

    params, x = {"layers": normal(4, 6, 6), "r": normal(6, 6, seed=1)}, normal(5, 6, seed=2)
    stats = jp.calibrate(fn, params, [x])
    assert stats["layers"].mean.shape == (4, 6)
    y = x
    for i in range(4):
        np.testing.assert_allclose(stats["layers"].mean[i], y.mean(0), atol=1e-5)
        y = jnp.tanh(y @ params["layers"][i])
    assert stats["r"].count == 15
    tree = jp.quantize_activations(jp.quantize_tree(params), stats)
    assert tree["layers"].input.scale.shape == (4,)
    run = jp.compressed(fn)
    assert relative(fn(params, x), jax.jit(run)(tree, x)) < 0.05
    assert {c.lowering for c in run.choices} == {"integer"}


@pytest.mark.parametrize("name", ["mlp", "residual", "flatten_cnn", "post_norm_encoder"])
def test_zoo_with_static_and_dynamic_activations(name):
    fn, params, x = build(name)
    stats = jp.calibrate(fn, params, [(x,)], histogram=True)
    expected = fn(params, x)
    for settings in (
        {},
        {"symmetric": False},
        {"range": "percentile"},
        {"range": "mse", "symmetric": False},
        {"range": "moving_average"},
        {"mode": "dynamic"},
        {"mode": "dynamic", "dtype": "float8_e4m3fn"},
    ):
        given = None if "mode" in settings else stats
        tree = jp.quantize_activations(jp.quantize_tree(params), given, **settings)
        assert relative(expected, jp.compressed(fn)(tree, x)) < 0.12, settings


def test_integer_product_with_a_zero_point_equals_rounded_activations():
    params, x = {"w": normal(32, 8)}, jnp.abs(normal(9, 32, seed=1)) + 0.5
    fn = lambda p, x: x @ p["w"]
    stats = jp.calibrate(fn, params, [x])
    small = jp.quantize_tree(params, symmetric=False)
    tree = jp.quantize_activations(small, stats, symmetric=False)
    run = jp.compressed(fn)
    rounded = tree["w"].input.rounded(x)
    np.testing.assert_allclose(
        run(tree, x), fn(jp.dequantize_tree(small), rounded), rtol=1e-4, atol=1e-4
    )
    assert [c.lowering for c in run.choices] == ["integer"]


def test_outliers_are_cut_by_percentile_and_least_error():
    x = np.asarray(normal(4096, 4)).copy()
    x[0, 0] = 100.0
    fn, params = lambda p, x: x @ p["w"], {"w": normal(4, 2)}
    stats = jp.calibrate(fn, params, [jnp.asarray(x)], histogram=True)
    tops = {}
    for method in ("absmax", "percentile", "mse"):
        tree = jp.quantize_activations(params, stats, 4, range=method, percentile=0.999)
        tops[method] = float(tree["w"].input.scale) * 7
    assert round(tops["absmax"], 3) == 100
    assert 2.5 < tops["percentile"] < 5
    assert 1.5 < tops["mse"] < 10


def test_bias_correction_restores_the_mean():
    params = {"w": normal(16, 6), "b": normal(6, seed=1)}
    fn = lambda p, x: jax.nn.relu(x) @ p["w"] + p["b"]
    x = normal(400, 16, seed=2) + 1
    stats = jp.calibrate(fn, params, [x])
    small = jp.quantize_tree(params, bits=2)
    fixed = jp.calibration.correct_biases(fn, params, small, stats, x)
    shift = lambda tree: np.abs((jp.compressed(fn)(tree, x) - fn(params, x)).mean(0)).max()
    assert shift(fixed) < 1e-3 < 0.05 < shift(small)


@pytest.mark.parametrize("bias", [False, True])
def test_batch_norm_is_folded_and_the_function_stays(bias):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            y = nn.Conv(6, (3, 3), use_bias=bias)(x)
            y = nn.relu(nn.BatchNorm(use_running_average=True)(y))
            y = nn.Conv(5, (1, 1), use_bias=bias)(y)
            return nn.BatchNorm(use_running_average=True)(y + 0.0 * y[..., :1])  # read twice: stays

    x = normal(2, 8, 8, 3)
    params = randomized(Net().init(jax.random.key(0), x))
    folded = jp.calibration.fold_batch_norm(Net().apply, params, x)
    np.testing.assert_allclose(Net().apply(folded, x), Net().apply(params, x), rtol=1e-4, atol=1e-4)
    first = folded["params"]["BatchNorm_0"]
    assert (first["scale"] == 1).all()
    assert (folded["batch_stats"]["BatchNorm_0"]["mean"] == 0).all()
    same = folded["params"]["BatchNorm_1"]["scale"], params["params"]["BatchNorm_1"]["scale"]
    np.testing.assert_array_equal(*same)


def test_saved_and_loaded(tmp_path):
    fn, params = lambda p, x: x @ p["w"], {"w": normal(8, 4)}
    x = normal(3, 8, seed=1)
    stats = jp.calibrate(fn, params, [x])
    for tree in (
        jp.quantize_activations(jp.quantize_tree(params, bits=4), stats, symmetric=False),
        jp.quantize_activations(params, mode="dynamic"),
    ):
        back = jp.export.load(jp.export.save(tmp_path / "m", tree, overwrite=True))
        np.testing.assert_array_equal(jp.compressed(fn)(tree, x), jp.compressed(fn)(back, x))


def test_bad_input():
    fn, params = lambda p, x: x @ p["w"], {"w": jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="batches: expected at least one"):
        jp.calibrate(fn, params, [])
    with pytest.raises(ValueError, match="batch 1.*'w'"):
        jp.calibrate(fn, params, [jnp.ones((1, 2)), jnp.full((1, 2), jnp.nan)])
    stats = jp.calibrate(fn, params, [jnp.ones((1, 2))])
    with pytest.raises(ValueError, match="histogram=True"):
        jp.quantize_activations(params, stats, range="mse")
    with pytest.raises(ValueError, match="another tree"):
        jp.quantize_activations({"v": params["w"]}, stats)
    with pytest.raises(ValueError, match="static scales need"):
        jp.quantize_activations(params, mode="static")
    with pytest.raises(ValueError, match="bits"):
        jp.quantize_activations(params, stats, 9)
