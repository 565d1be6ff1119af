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


SLOW = ["residual", "flatten_cnn", "post_norm_encoder"]


@pytest.mark.parametrize(
    "name", ["mlp", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
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
        cut = {"percentile": 0.999} if method == "percentile" else {}
        tree = jp.quantize_activations(params, stats, 4, range=method, **cut)
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


def badly_scaled(key=0):
    """Two dense layers and a depthwise convolution whose channels differ a hundredfold."""
    channels = 10.0 ** jnp.linspace(-1, 1, 8)
    params = {
        "a": normal(3, 3, 4, 8, seed=key) * channels,
        "a_bias": normal(8, seed=key + 1) * channels,
        "depthwise": normal(3, 3, 1, 8, seed=key + 2) / channels[::-1],
        "b": normal(3, 3, 8, 5, seed=key + 3) * (channels[::-1] / channels)[:, None],
    }

    def fn(p, x):
        conv = lambda x, k, groups: jax.lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )  # fmt: skip
        x = jax.nn.relu(conv(x, p["a"], 1) + p["a_bias"])
        return conv(jax.nn.leaky_relu(conv(x, p["depthwise"], 8)), p["b"], 1)

    return fn, params, normal(2, 6, 6, 4, seed=key + 4)


def test_equalized_channels_have_one_range_and_the_function_stays():
    fn, params, x = badly_scaled()
    even = jp.calibration.equalize(fn, params, x)
    assert relative(fn(even, x), fn(params, x)) < 1e-5
    ranges = jnp.abs(even["a"]).max((0, 1, 2)), jnp.abs(even["b"]).max((0, 1, 3))
    np.testing.assert_allclose(*ranges, rtol=2e-3)
    np.testing.assert_allclose(ranges[0], jnp.abs(even["depthwise"]).max((0, 1, 2)), rtol=2e-3)
    error = lambda p: relative(
        jp.compressed(fn)(jp.quantize_tree(p, granularity="tensor", where="a|b|depthwise"), x),
        fn(p, x),
    )
    assert error(even) < 0.2 * error(params)


@pytest.mark.parametrize("name", ["grouped_query_attention", "glu_and_split", "nnx_cnn"])
def test_equalization_of_any_network_keeps_its_function(name):
    fn, params, x = build(name)
    even = jp.calibration.equalize(fn, params, x)
    same = jax.tree.map(lambda a, b: relative(a, b) < 1e-5, fn(params, x), fn(even, x))
    assert all(jax.tree.leaves(same))
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), params, even)
    assert any(jax.tree.leaves(changed)) == (name != "nnx_cnn")


def test_nothing_to_equalize_through_a_sigmoid():
    fn = lambda p, x: jax.nn.sigmoid(x @ p["a"]) @ p["b"]
    params = {"a": normal(3, 4), "b": normal(4, 2)}
    assert jp.calibration.equalize(fn, params, normal(5, 3)) is params


def test_first_and_last_in_the_order_of_the_program():
    def fn(p, x):
        x = x @ p["z"].T
        x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]
        return x @ p["a"] + p["bias"]

    params = {"z": normal(4, 3), "layers": normal(2, 4, 4), "a": normal(4, 2), "bias": normal(2)}
    rules = jp.calibration.first_and_last(fn, params, normal(1, 3), spec=None)
    assert rules == [("z", None), ("a", None)]
    tree = jp.quantize_tree(params, bits=4, rules=rules)
    assert isinstance(tree["layers"], jp.QuantizedArray)
    assert tree["z"] is params["z"]


def test_wanda_weighs_by_input_features():
    fn = lambda p, x: jax.lax.scan(lambda x, w: (x @ w.T, None), x, p["w"])[0]
    params, x = {"w": normal(2, 3, 3)}, normal(9, 3, seed=4)
    scores = jp.scores.wanda(params, jp.calibrate(fn, params, [x]))["w"]
    second = x @ params["w"][0].T
    for layer, rows in enumerate((x, second)):
        norm = jnp.sqrt(jnp.mean(rows**2, 0))
        np.testing.assert_allclose(scores[layer], jnp.abs(params["w"][layer]) * norm, rtol=1e-4)
    with pytest.raises(ValueError, match="another tree"):
        jp.scores.wanda({"v": params["w"]}, jp.calibrate(fn, params, [x]))


GROUPED = {
    "depthwise": (8, 8, 1, 1),
    "depthwise, two each": (8, 8, 2, 1),
    "two groups": (2, 8, 1, 4),
}


@pytest.mark.parametrize("name", GROUPED)
def test_grouped_convolutions_have_statistics_of_each_group(name):
    groups, channels, each, inner = GROUPED[name]
    params = {"w": normal(3, 3, inner, channels * each), "b": jnp.zeros(channels * each)}
    shift = 3.0 * jnp.arange(channels)  # every channel has a mean of its own

    def fn(p, x):
        y = jax.lax.conv_general_dilated(
            x + shift, p["w"], (1, 1), "VALID", feature_group_count=groups,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )  # fmt: skip
        return y + p["b"]

    x = normal(4, 6, 6, channels, seed=1)
    stats = jp.calibrate(fn, params, [x])
    assert stats["w"].mean.shape == (groups, 9 * inner)
    np.testing.assert_allclose(
        stats["w"].mean.mean(1)[-1], (x + shift)[..., -inner:].mean(), atol=0.5
    )
    small = jp.quantize_tree(params, bits=2, where="w")
    fixed = jp.calibration.correct_biases(fn, params, small, stats, x)
    off = lambda tree: np.abs(
        (fn(jp.dequantize_tree(tree), x) - fn(params, x)).mean((0, 1, 2))
    ).max()
    assert off(fixed) < 1e-3 < 0.1 < off(small)
    scores = jp.scores.wanda(params, stats)["w"]
    assert scores.shape == params["w"].shape
    per_channel = jnp.mean(scores / jnp.abs(params["w"]), (0, 1, 2))
    assert per_channel[-1] > 2 * per_channel[0]  # the last group reads larger inputs


def test_rows_that_do_not_count():
    params = {"e": normal(20, 8).at[0].set(50.0), "w": normal(8, 6), "v": normal(6, 3)}

    def fn(p, tokens, keep):
        h = jax.nn.relu(p["e"][tokens] @ p["w"])
        pooled = (h * keep[..., None]).sum(1) / keep.sum(1, keepdims=True)
        return pooled @ p["v"]

    keep = jnp.arange(10)[None] < jnp.array([[3], [5], [10], [2]])
    tokens = jnp.where(keep, jnp.asarray(np.random.default_rng(0).integers(1, 20, (4, 10))), 0)
    whole = jp.calibrate(fn, params, [(tokens, keep)], histogram=True, second_moment=True)
    for weights in ("keep", lambda tokens, keep: keep, lambda tokens, keep: 2.0 * keep):
        some = jp.calibrate(
            fn, params, [(tokens, keep)], weights=weights, histogram=True, second_moment=True
        )
        rows = params["e"][tokens[keep]]
        factor = float(some["w"].count) / 20
        assert factor in (1.0, 2.0)
        np.testing.assert_allclose(some["w"].mean, rows.mean(0), rtol=1e-5)
        np.testing.assert_allclose(some["w"].absmax, jnp.abs(rows).max(0), rtol=1e-6)
        np.testing.assert_allclose(
            some["w"].second_moment, rows.T @ rows / 20, rtol=1e-4, atol=1e-5
        )
        assert float(some["w"].histogram.sum()) == 160 * factor
        assert float(some["v"].count) == 4 * factor  # pooled: every example has rows that count
    assert float(whole["w"].count) == 40
    with pytest.raises(ValueError, match=r"no argument 'maks'.*'keep'"):
        jp.calibrate(fn, params, [(tokens, keep)], weights="maks")
    masked = lambda p, tokens, mask: fn(p, tokens, mask)
    with pytest.warns(UserWarning, match=r"'mask' is 0.*weights=None counts all"):
        auto = jp.calibrate(masked, params, [(tokens, keep)])
    assert float(auto["w"].count) == 20
    # rows that do not count may hold anything
    bad = jnp.where(keep, tokens, 19)
    odd = {**params, "e": params["e"].at[19].set(jnp.nan)}
    good = jnp.where(keep, jnp.minimum(tokens, 18), 19)
    found = jp.calibrate(lambda p, t, keep: p["e"][t] @ p["w"], odd, [(good, keep)], weights="keep")
    assert bool(jnp.isfinite(found["w"].mean).all())
    with pytest.raises(ValueError, match="NaN"):
        jp.calibrate(lambda p, t, keep: p["e"][t] @ p["w"], odd, [(bad, keep)])


def test_unused_slots_of_experts_do_not_count():
    params = {"w": normal(3, 8, 4)}
    x = normal(3, 5, 8).at[0, 2:].set(0).at[2].set(0)
    stats = jp.calibrate(lambda p, x: jnp.einsum("ecd,edf->ecf", x, p["w"]), params, [x])["w"]
    assert stats.count.tolist() == [2, 5, 0]
    np.testing.assert_allclose(stats.mean[0], x[0, :2].mean(0), rtol=1e-5)
    np.testing.assert_allclose(stats.mean[2], 0)
