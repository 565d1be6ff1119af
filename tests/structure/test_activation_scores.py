"""Scores of units from statistics: formula, invariances, brute force, kinds of units, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxprune as jp
import tests.structure._more_networks  # noqa: F401
from tests.structure._zoo import build, normal

scores_of = jp.structure.activation_scores


def two_layers(p, x):
    return jax.nn.relu(x @ p["a"] + p["bias"]) @ p["b"]


def tree(inner=12, outer=5):
    return {
        "a": normal(8, inner, seed=1) * np.geomspace(0.2, 2, inner)[None],
        "bias": 0.3 * normal(inner, seed=2),
        "b": normal(inner, outer, seed=3),
    }


def scored(fn, params, x, **how):
    return scores_of(jp.trace(fn, params, x), params, jp.calibrate(fn, params, [x]), **how)


def ranks(x):
    return np.argsort(np.argsort(x))


def rank_correlation(a, b):
    return np.corrcoef(ranks(a), ranks(b))[0, 1]


@pytest.mark.parametrize("centered", [False, True])
def test_the_formula(centered):
    params, x = tree(), normal(50, 8)
    h = np.asarray(jax.nn.relu(x @ params["a"] + params["bias"]), np.float64)
    energy = np.square(params["b"]) * (h.var(0) if centered else np.square(h).mean(0))[:, None]
    expected = (energy / energy.sum(0)).mean(1)
    found = scored(two_layers, params, x, centered=centered)
    np.testing.assert_allclose(found["a[1]"], expected, rtol=1e-3, atol=1e-6)
    assert found["a[1]"].sum() == pytest.approx(1)


def test_scales_that_cancel_change_nothing():
    params, x = tree(), normal(50, 8)
    c = np.geomspace(0.1, 10, 12)
    scaled = {"a": params["a"] * c, "bias": params["bias"] * c, "b": params["b"] / c[:, None]}
    outputs = {**params, "b": params["b"] * np.array([1, 5, 0.2, 3, 9.0])}
    expected = scored(two_layers, params, x)["a[1]"]
    for other in (scaled, outputs):
        np.testing.assert_allclose(scored(two_layers, other, x)["a[1]"], expected, rtol=1e-3)


def test_a_folded_batch_norm_changes_nothing():
    fn, params, x = build("residual")
    folded = jp.calibration.fold_batch_norm(fn, params, x)
    assert not np.allclose(*(jax.tree.leaves(t["params"]["Conv_0"])[-1] for t in (params, folded)))
    before, after = scored(fn, params, x), scored(fn, folded, x)
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_allclose(before[name], after[name], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["mlp", "flatten_cnn", "depthwise"])
def test_rank_agrees_with_removing_each_unit(name):
    fn, params, _ = build(name)
    x = normal(64, *build(name)[2].shape[1:], seed=4)
    graph = jp.trace(fn, params, x)
    found = scores_of(graph, params, jp.calibrate(fn, params, [x]))
    run = jax.jit(lambda p: fn(p, x))
    dense = run(params)
    found_ranks = []
    for group in graph.groups:
        if group.size < 8:
            continue
        change = []
        for u in range(group.size):
            masks = jp.structure.keep_units(graph, {group.name: np.arange(group.size) != u})
            masked = jax.tree.map(jnp.multiply, params, masks)
            change.append(float(jnp.square(run(masked) - dense).mean()))
        found_ranks.append(rank_correlation(found[group.name], change))
    assert min(found_ranks) > 0.6
    assert np.mean(found_ranks) > 0.75


KINDS = [
    "residual",
    "grouped",
    "qkv_in_one",
    "grouped_query_attention",
    "mixture_of_experts",
    "scanned_layers",
    "rms_norm_and_tied_embedding",
    "lstm",
]


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_unit_has_a_score(name):
    fn, params, x = build(name)
    graph = jp.trace(fn, params, x)
    found = scores_of(graph, params, jp.calibrate(fn, params, [x]))
    for group in graph.groups:
        if group.kind == "layers":
            continue
        values = found[group.name]
        assert values.shape == (group.size,)
        assert np.all((values >= 0) & (values <= 1 + 1e-6))
        assert len(np.unique(values)) > 1 or group.size == 1, group.name
    masks = jp.structure.unit_masks(graph, unit_scores=found, sparsity=0.3)
    compact_fn, small = jp.compact(fn, params, masks, x)
    expected = fn(jp.apply_masks(params, masks), x)
    for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(compact_fn(small, x)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-3)


def test_of_stacked_layers_the_largest_share_counts():
    layers = [tree(8, 8) for _ in range(3)]
    layers = [{k: v * (1 + 0.3 * i) for k, v in layer.items()} for i, layer in enumerate(layers)]
    layers[1]["b"] = layers[1]["b"][::-1]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    x = normal(20, 8)
    body = lambda x, p: (x + two_layers(p, x), None)
    one = scored(lambda p, x: jax.lax.scan(body, x, p)[0], stacked, x)

    def unrolled(p, x):
        for layer in p:
            x = x + two_layers(layer, x)
        return x

    each = scored(unrolled, layers, x)
    expected = np.max([each[f"{i}/a[1]"] for i in range(3)], axis=0)
    np.testing.assert_allclose(one["a[2]"], expected, rtol=1e-3, atol=1e-6)


def test_silent_and_masked_units_score_zero_and_go_first():
    params, x = tree(), normal(50, 8)
    params["bias"] = params["bias"].at[3].set(-100.0)
    params["b"] = params["b"].at[7].set(0)
    graph = jp.trace(two_layers, params, x)
    found = scores_of(graph, params, jp.calibrate(two_layers, params, [x]))
    assert np.flatnonzero(found["a[1]"] == 0).tolist() == [3, 7]
    masks = jp.structure.unit_masks(graph, unit_scores=found, sparsity=2 / 12)
    assert np.flatnonzero(~np.asarray(masks["bias"])).tolist() == [3, 7]


def test_a_constant_unit_goes_where_biases_take_its_mean():
    params, x = tree(), normal(50, 8)
    params["a"], params["bias"] = params["a"].at[:, 2].set(0), params["bias"].at[2].set(90.0)
    assert scored(two_layers, params, x)["a[1]"].argmax() == 2
    graph, stats = jp.trace(two_layers, params, x), jp.calibrate(two_layers, params, [x])
    found = scores_of(graph, params, stats, centered=True)
    assert found["a[1]"][2] < 1e-6


def test_linen_nnx_and_plain_functions_agree():
    params, x = tree(), normal(50, 8)
    expected = scored(two_layers, params, x)["a[1]"]

    class Linen(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(12)(x))
            return nn.Dense(5, use_bias=False)(x)

    first = {"kernel": params["a"], "bias": params["bias"]}
    variables = {"params": {"Dense_0": first, "Dense_1": {"kernel": params["b"]}}}
    found = scored(Linen().apply, variables, x)
    np.testing.assert_allclose(found["params/Dense_0/kernel[1]"], expected, rtol=1e-5)
    a = nnx.Linear(8, 12, rngs=nnx.Rngs(0))
    b = nnx.Linear(12, 5, use_bias=False, rngs=nnx.Rngs(0))
    (a_def, a_state), (b_def, b_state) = nnx.split(a), nnx.split(b)
    state = {"a": a_state, "b": b_state}
    state = jax.tree.unflatten(
        jax.tree.structure(state), [params["bias"], params["a"], params["b"]]
    )
    fn = lambda s, x: nnx.merge(b_def, s["b"])(nnx.relu(nnx.merge(a_def, s["a"])(x)))
    (values,) = scored(fn, state, x).values()
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_bad_input():
    params, x = tree(), normal(10, 8)
    graph, stats = jp.trace(two_layers, params, x), jp.calibrate(two_layers, params, [x])
    with pytest.raises(ValueError, match=r"stats: of another tree.*calibrate"):
        scores_of(graph, params, {"a": stats["a"]})
    with pytest.raises(ValueError, match="stats: leaf 'a' is a.*calibrate"):
        scores_of(graph, params, params)
    with pytest.raises(ValueError, match="params: of another tree"):
        scores_of(graph, {"a": params["a"]}, stats)
    with pytest.raises(ValueError, match=r"params: leaf 'a' has shape \(8, 6\)"):
        scores_of(graph, tree(6), stats)
    small = jp.calibrate(two_layers, tree(6), [x])
    with pytest.raises(ValueError, match="stats: leaf 'b'.*features"):
        scores_of(graph, params, small)
    nothing = jp.calibrate(two_layers, params, [x], where="bias")
    with pytest.raises(ValueError, match=r"nothing was recorded of 'a', 'b'.*'a\[1\]'.*where="):
        scores_of(graph, params, nothing)
    one = lambda p, x: x @ p["a"]
    params = {"a": params["a"]}
    with pytest.raises(ValueError, match="no product"):
        scores_of(jp.trace(one, params, x), params, jp.calibrate(one, params, [x]))
