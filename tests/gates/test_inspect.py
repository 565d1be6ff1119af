"""What gates did on a set of examples, and dynamic turned into static."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from jaxprune import gates as g
from tests.structure._zoo import build, normal


def test_rates_costs_and_classes():
    rng = np.random.default_rng(0)
    opened = {"a": rng.random((200, 6)) < 0.4, "b": rng.random((200, 3)) < 0.7}
    opened["a"][:, 0], opened["a"][:, 1] = True, False
    labels = rng.integers(0, 4, 200)
    values = {name: value * rng.random(value.shape) for name, value in opened.items()}
    seen = g.inspect(
        values, labels=labels, costs={"stem": 1.0, "a": 2.0, "b": 3.0}, inputs={"b": "a"}
    )
    np.testing.assert_allclose(seen.rates["a"], opened["a"].mean(0))
    np.testing.assert_allclose(seen.by_class["b"][2], opened["b"][labels == 2].mean(0))
    a, b = (opened[name].mean(1) for name in "ab")
    np.testing.assert_allclose(seen.costs, (1 + 2 * a + 3 * a * b) / 6, rtol=1e-5)
    assert seen.always_on()["a"].tolist() == [True] + [False] * 5
    assert seen.always_off()["a"].tolist() == [False, True] + [False] * 4
    assert np.all(np.diff(seen.costs[seen.by_cost]) >= 0)
    assert seen.correlation is None
    assert "200 examples" in seen.table.title


def test_correlation_is_spearmans():
    from scipy.stats import spearmanr

    rng = np.random.default_rng(1)
    opened, difficulty = rng.random((50, 7)) < 0.5, np.round(rng.random(50), 1)  # with ties
    seen = g.inspect({"a": opened}, difficulty=difficulty)
    wanted = spearmanr(opened.sum(1), difficulty).statistic
    assert seen.correlation == pytest.approx(wanted, abs=1e-9)


def test_over_batches_gathers():
    x = np.arange(10.0).reshape(5, 2)
    found = g.over_batches(lambda x, y: {"s": x.sum(-1) + y}, [(x[:3], 1.0), (x[3:], 1.0)])
    np.testing.assert_allclose(found["s"], x.sum(-1) + 1)


def test_unused_units_become_static():
    """Units that no example opens are masked and removed; the function stays what it was."""
    fn, params, _ = build("mlp")
    x = build("mlp")[2]
    gated = g.attach(fn, params, x, method="straight_through")
    own = gated.init(jax.random.key(0))
    name = gated.names[0]
    bias = np.where(np.arange(gated.sizes[0]) % 3 == 0, -50.0, 50.0)
    own[name]["expand"]["bias"] = jnp.asarray(bias, jnp.float32)
    for other in gated.names[1:]:
        own[other]["expand"]["bias"] = jnp.full_like(own[other]["expand"]["bias"], 50.0)
    out, gates = gated(params, own, x)
    seen = g.inspect(gates)
    assert seen.always_off()[name].tolist() == (bias < 0).tolist()
    keep = {layer: ~off for layer, off in seen.always_off().items()}
    masks = jp.structure.keep_units(gated.graph, keep)
    small, small_params = jp.compact(fn, params, masks, x)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(small(small_params, x)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    # rates as scores choose the same units
    share = (bias < 0).sum() / sum(gated.sizes)
    by_rate = jp.structure.unit_masks(
        gated.graph,
        unit_scores=seen.rates,
        sparsity=share,
        normalize="none",
        ignore=gated.names[1:],
    )
    counts = [int(jnp.sum(~jnp.asarray(m))) for m in jax.tree.leaves(by_rate)]
    assert sum(counts) > 0
    for a, b in zip(jax.tree.leaves(by_rate), jax.tree.leaves(masks), strict=True):
        assert bool(jnp.all(a | ~jnp.asarray(b)))  # only units that never open may go


def test_attached_gates_skip():
    key = jax.random.key(5)
    params = {"w1": normal(6, 16), "w2": normal(16, 12, seed=1), "w3": normal(12, 2, seed=2)}
    fn = lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["w1"]) @ p["w2"]) @ p["w3"]
    x = normal(1, 6)
    gated = g.attach(fn, params, x, k=0.25)
    own = gated.init(key)
    (whole, gates), (few, _) = jax.jit(gated)(params, own, x), jax.jit(gated.skip)(params, own, x)
    np.testing.assert_allclose(few, whole, rtol=1e-5, atol=1e-6)
    # 6*16 in full, a quarter of 16*12 and of 12*2
    np.testing.assert_allclose(gated.spent(gates), [(96 + 48 + 6) / 312], rtol=1e-5)
    assert gated.costs == {"w1[1]": 192.0, "w2[1]": 24.0}
    with pytest.raises(ValueError, match="batch of 3"):
        gated.skip(params, own, normal(3, 6))


def test_a_depthwise_convolution_is_gated_once():
    """Channels that a depthwise convolution hands on are closed where they are summed, not twice."""
    kernel = lambda *shape, seed=0: normal(*shape, seed=seed)
    params = {
        "a": kernel(1, 1, 3, 8),
        "d": kernel(3, 3, 1, 8, seed=1),
        "b": kernel(1, 1, 8, 4, seed=2),
    }

    def conv(x, w, groups=1):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )  # fmt: skip

    fn = lambda p, x: conv(jax.nn.relu(conv(jax.nn.relu(conv(x, p["a"])), p["d"], 8)), p["b"])
    x = normal(2, 5, 5, 3)
    gated = g.attach(fn, params, x, k=3)
    own = gated.init(jax.random.key(0))
    out, gates = gated(params, own, x)
    (name,) = gated.names
    before = jax.nn.relu(conv(jax.nn.relu(conv(x, params["a"])), params["d"], 8))
    wanted = conv(before * gates[name][:, None, None], params["b"])
    np.testing.assert_allclose(out, wanted, rtol=1e-4, atol=1e-5)


def test_buckets_equal_masks():
    inputs = jnp.array([1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    x = normal(1, 5, 5, 6) * inputs
    kernel, bias = normal(3, 3, 6, 8), normal(8)
    run = jax.jit(
        lambda x, gates, inputs: g.bucketed_conv(
            x, kernel, gates, bias=bias, inputs=inputs, strides=(2, 2), buckets=(2, 4, 1.0)
        )
    )
    whole = g.gathered_conv(x, kernel, bias=bias, strides=(2, 2))
    for opened in (0, 1, 3, 8):
        chosen = np.random.default_rng(opened).permutation(8) < opened
        gates = jnp.asarray(chosen, jnp.float32) * 1.5
        np.testing.assert_allclose(run(x, gates, inputs), whole * gates, rtol=1e-4, atol=1e-5)
    flat = g.bucketed_dense(x[:, 0, 0], kernel[0, 0], gates, bias=bias)
    np.testing.assert_allclose(
        flat, (x[:, 0, 0] @ kernel[0, 0] + bias) * gates, rtol=1e-4, atol=1e-5
    )


def test_the_plot_has_a_panel_for_all_that_is_known(tmp_path):
    rng = np.random.default_rng(0)
    gates = {"block/conv": rng.random((60, 8)) < 0.5}
    plain = jp.reports.plot_gates(tmp_path / "a.svg", g.inspect(gates)).read_text()
    full = g.inspect(gates, labels=rng.integers(0, 3, 60), difficulty=rng.random(60))
    images = rng.random((60, 4, 4, 1))
    every = jp.reports.plot_gates(
        tmp_path / "b.svg", full, images=images, classes="abc"
    ).read_text()
    assert "rate by class" in every
    assert "rank correlation" in every
    assert "images by cost" in every
    assert "rate by class" not in plain
    with pytest.raises(ValueError, match="one for each of 60"):
        jp.reports.plot_gates(tmp_path / "c.svg", full, images=images[:5])


GRAPH = jp.trace(
    lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"],
    {"a": jnp.ones((4, 8)), "b": jnp.ones((8, 2))},
    jnp.ones((1, 4)),
)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: g.inspect({}), "at least one layer"),
        (lambda: g.inspect({"a": np.zeros((0, 3))}), "at least one example"),
        (lambda: g.inspect({"a": np.ones((3, 2))}, labels=np.zeros(2, int)), "3 examples"),
        (lambda: g.inspect({"a": np.ones((3, 2))}, costs=np.ones(2)), "each of 3"),
        (lambda: g.inspect({"a": np.ones((3, 2))}, costs={"b": 1.0}), "none for 'a'"),
        (
            lambda: g.inspect({"a": np.ones((3, 2))}, costs={"a": 1.0}, inputs={"a": "z"}),
            "'a' reads 'z'",
        ),
        (lambda: g.over_batches(lambda x: x, []), "none were given"),
        (lambda: jp.structure.keep_units(GRAPH, {"c[1]": [True]}), r"a\[1\]"),
        (lambda: jp.structure.keep_units(GRAPH, {"a[1]": [True]}), "8 units"),
        (
            lambda: jp.structure.unit_masks(
                GRAPH, unit_scores={"a[1]": np.full(8, np.nan)}, sparsity=0.5
            ),
            "NaN",
        ),
        (lambda: g.bucketed_dense(jnp.ones((2, 4)), jnp.ones((4, 3)), jnp.ones(3)), "batch of 2"),
        (
            lambda: g.bucketed_dense(
                jnp.ones((1, 4)), jnp.ones((4, 3)), jnp.ones(3), buckets=(1, 2)
            ),
            "must hold all 3",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
