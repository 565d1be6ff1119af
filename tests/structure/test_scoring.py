"""Scores of units: reductions against NumPy, and what the defaults choose."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np

import jaxprune as jp


def two_layers(p, x):
    return jax.nn.relu(x @ p["a"] + p["bias"]) @ p["b"]


def tree(inner=6):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"a": (20, inner), "bias": (inner,), "b": (inner, 2)}
    return {
        name: jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def removed(masks):
    return np.flatnonzero(~np.asarray(masks["bias"]).reshape(-1)).tolist()


def test_each_kernel_has_one_voice():
    params = tree()
    graph = jp.trace(two_layers, params, jnp.ones((1, 20)))
    scores = jax.tree.map(jnp.abs, params)
    a, b = (np.abs(np.asarray(params[name])) for name in "ab")
    expected = (
        a.mean(0) + b.mean(1)
    ) / 2  # the bias has none, the long kernel no more than the short
    for count in range(1, 6):
        masks = jp.structure.unit_masks(graph, scores, sparsity=count / 6, reduce="kernels")
        assert removed(masks) == sorted(np.argsort(expected)[:count].tolist())


def test_masked_entries_have_no_voice():
    params = tree()
    graph = jp.trace(two_layers, params, jnp.ones((1, 20)))
    scores = {**jax.tree.map(jnp.abs, params), "b": jnp.full((6, 2), -jnp.inf)}
    masks = jp.structure.unit_masks(graph, scores, sparsity=0.5, reduce="kernels")
    expected = np.argsort(np.abs(np.asarray(params["a"])).mean(0))[:3]
    assert removed(masks) == sorted(expected.tolist())


def test_the_pattern_agrees_under_jit():
    params = tree()
    graph = jp.trace(two_layers, params, jnp.ones((1, 20)))
    scores = jax.tree.map(jnp.abs, params)
    pattern = jp.structure.Units(graph, reduce="kernels")
    jitted = jax.jit(lambda s: jp.masks.from_scores(s, 0.5, pattern=pattern))(scores)
    whole = jp.structure.unit_masks(graph, scores, sparsity=0.5, reduce="kernels")
    assert removed(jitted) == removed(whole)


def test_a_narrow_group_of_large_weights_stays():
    """Divided by their group's mean, its units would go first."""
    narrow, wide = jnp.array([[1.0, 9.0]]), jnp.linspace(0.1, 0.2, 32).reshape(2, 16)
    params = {"a": narrow, "b": wide, "c": jnp.full((16, 2), 0.1)}
    fn = lambda p, x: jax.nn.relu(jax.nn.relu(x @ p["a"]) @ p["b"]) @ p["c"]
    graph = jp.trace(fn, params, jnp.ones((1, 1)))
    scores = {**params, "b": jnp.tile(wide[:1], (2, 1))}
    widths = lambda **how: jp.structure.widths(
        graph, jp.structure.unit_masks(graph, scores, sparsity=2 / 18, reduce="kernels", **how)
    )
    assert widths()["a"] == (1, 2)
    assert widths(normalize="mean")["a"] == (1, 1)


def test_unit_masks_and_the_pattern_share_their_defaults():
    of = lambda fn, name: inspect.signature(fn).parameters[name].default
    for name in ("reduce", "normalize", "min_units"):
        assert of(jp.structure.unit_masks, name) == of(jp.structure.Units, name)
