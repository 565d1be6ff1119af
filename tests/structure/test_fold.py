"""What removed units contributed moves into the biases behind them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jaxprune as jp
from tests.structure._zoo import IMAGE, build, linen, normal, randomized
from tests.structure.test_compact import assert_close


def constant_units(graph, params, name, units):
    """Parameters in which nothing reaches some units of a layer, and masks of these units."""
    (group,) = (g for g in graph.groups if g.name == name)
    gone = np.zeros(len(graph.solution.reason), bool)
    gone[group.units[units]] = True
    return jp.structure._scoring.masks_without(graph, gone)


def test_constants_of_an_mlp_move_exactly():
    def fn(p, x):
        return jax.nn.sigmoid(x @ p["a"] + p["c"]) @ p["b"] + p["d"]

    shapes = {"a": (5, 8), "c": (8,), "b": (8, 3), "d": (3,)}
    params = randomized({k: jnp.ones(s) for k, s in shapes.items()})
    x = normal(16, 5)
    graph = jp.trace(fn, params, x)
    masks = constant_units(graph, params, "a[1]", [1, 4, 6])
    cut = {**params, "a": params["a"].at[:, jnp.array([1, 4, 6])].set(0)}
    compact_fn, small = jp.compact(fn, params, masks, x, fold="constants", verify=True)
    assert small["a"].shape == (5, 5)
    assert_close(fn(cut, x), compact_fn(small, x), 1e-5)
    moved = jax.nn.sigmoid(params["c"]) @ (params["b"] * ~masks["b"])
    np.testing.assert_allclose(small["d"], params["d"] + moved, rtol=1e-5)
    plain_fn, plain = jp.compact(fn, params, masks, x)
    assert_close(fn(jp.apply_masks(params, masks), x), plain_fn(plain, x), 1e-5)
    assert np.abs(fn(cut, x) - plain_fn(plain, x)).max() > 0.1


def test_batch_norm_shifts_move_into_the_next_mean():
    def body(x):
        norm = lambda: nn.BatchNorm(use_running_average=True)
        x = nn.relu(norm()(nn.Conv(8, (3, 3), use_bias=False)(x)))
        x = nn.relu(norm()(nn.Conv(6, (1, 1), use_bias=False)(x)))
        return nn.Dense(3)(x.mean((1, 2)))

    module = linen(body)
    params = randomized(module.init(jax.random.key(0), IMAGE))
    graph = jp.trace(module.apply, params, IMAGE)
    masks = constant_units(graph, params, "params/Conv_0/kernel[3]", [0, 3, 5])
    kernel = params["params"]["Conv_0"]["kernel"].at[..., jnp.array([0, 3, 5])].set(0)
    conv = {"Conv_0": {"kernel": kernel}}
    cut = {**params, "params": {**params["params"], **conv}}
    compact_fn, small = jp.compact(
        module.apply, params, masks, IMAGE, fold="constants", verify=True
    )
    assert small["params"]["Conv_0"]["kernel"].shape == (3, 3, 3, 5)
    assert_close(module.apply(cut, IMAGE), compact_fn(small, IMAGE), 1e-5)
    before = params["batch_stats"]["BatchNorm_1"]["mean"]
    assert np.abs(before - small["batch_stats"]["BatchNorm_1"]["mean"]).max() > 1e-3


@pytest.mark.parametrize(
    "name", ["mlp", "sigmoid_mlp", "transformer", "relu6_and_leaky", "squeeze_excite"]
)
def test_means_come_closer_to_the_dense_network(name):
    fn, params, x = build(name)
    graph = jp.trace(fn, params, x)
    masks = jp.structure.unit_masks(graph, jp.scores.magnitude(params), sparsity=0.2)
    errors = {}
    for fold in (None, "mean"):
        compact_fn, small = jp.compact(fn, params, masks, x, fold=fold)
        errors[fold] = float(jnp.mean(jnp.square(compact_fn(small, x) - fn(params, x))))
    assert errors["mean"] < errors[None]


def test_sums_without_a_bias_are_named():
    fn = lambda p, x: jax.nn.sigmoid(x @ p["a"]) @ p["b"]
    params = randomized({"a": jnp.ones((5, 8)), "b": jnp.ones((8, 3))})
    x = normal(4, 5)
    graph = jp.trace(fn, params, x)
    masks = jp.structure.unit_masks(graph, jp.scores.magnitude(params), sparsity=0.5)
    with pytest.warns(UserWarning, match="'b' at .*test_fold.py.*no bias follows"):
        jp.compact(fn, params, masks, x, fold="constants")


def test_bad_input():
    fn, params, x = build("mlp")
    masks = jax.tree.map(lambda _: jnp.array(True), params)
    with pytest.raises(ValueError, match="fold"):
        jp.compact(fn, params, masks, x, fold="all")
