"""Scores of units: reductions against NumPy, and what the defaults choose."""

import inspect
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


def chain(*widths):
    """Dense layers of these widths; any input of the first."""
    pairs = list(pairwise(widths))
    params = [
        np.abs(np.random.default_rng(i).standard_normal(shape)) for i, shape in enumerate(pairs)
    ]
    params = [jnp.asarray(w, jnp.float32) for w in params]

    def fn(p, x):
        for w in p[:-1]:
            x = jax.nn.relu(x @ w)
        return x @ p[-1]

    return fn, params, jnp.ones((1, widths[0]))


def kept(graph, masks):
    gone = graph.removal(masks).units
    return [int((~gone[group.units]).sum()) for group in graph.groups]


@pytest.mark.parametrize(
    ("size", "sparsity"), [(64, 0.5), (6, 0.5), (64, 0.3), (100, 0.25), (3, 1 / 3), (128, 0.9)]
)
def test_a_sparsity_is_exact(size, sparsity):
    fn, params, x = chain(4, size, 2)
    graph = jp.trace(fn, params, x)
    masks = jp.structure.unit_masks(graph, jp.scores.magnitude(params), sparsity=sparsity)
    assert kept(graph, masks) == [size - round(sparsity * size)]


@pytest.mark.parametrize("target", ["flops", "params"])
def test_other_targets_keep_widths_that_are_fast(target):
    fn, params, x = chain(64, 128, 256, 128, 64)
    graph = jp.trace(fn, params, x)
    scores = jp.scores.magnitude(params)
    masks = jp.structure.unit_masks(graph, scores, **{target: 0.5})
    assert all(width % 32 == 0 for width in kept(graph, masks))
    exact = jp.structure.unit_masks(graph, scores, **{target: 0.5}, round_to=1)
    assert any(width % 32 for width in kept(graph, exact))
    for found in (masks, exact):
        assert 0.37 <= graph.cost(found).flops / graph.cost().flops <= 0.51


def test_narrow_groups_are_not_emptied_by_rounding():
    fn, params, x = chain(4, 5, 6, 3)
    graph = jp.trace(fn, params, x)
    masks = jp.structure.unit_masks(graph, jp.scores.magnitude(params), flops=0.5)
    assert min(kept(graph, masks)) >= 1
    assert 0.25 < graph.cost(masks).flops / graph.cost().flops <= 0.5


def test_a_unit_of_many_columns_needs_no_multiple():
    """Heads of 32 columns fill whole vectors, any number of them."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"q": (64, 6, 32), "k": (64, 6, 32), "v": (64, 6, 32), "o": (6, 32, 64)}
    params = {n: jax.random.normal(k, s) for k, (n, s) in zip(keys, shapes.items(), strict=True)}

    def attention(p, x):
        q, k, v = (jnp.einsum("bld,dhe->blhe", x, p[name]) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("blhe,bmhe->bhlm", q, k), -1)
        return jnp.einsum("bhlm,bmhe,heo->blo", weights, v, p["o"])

    graph = jp.trace(attention, params, jnp.ones((1, 4, 64)))
    heads = next(group for group in graph.groups if group.size == 6)
    ignore = [group.name for group in graph.groups if group.name != heads.name]
    masks = jp.structure.unit_masks(graph, jp.scores.magnitude(params), flops=0.84, ignore=ignore)
    assert int((~graph.removal(masks).units[heads.units]).sum()) == 5


class TestLatency:
    @pytest.fixture
    def traced(self):
        fn, params, _ = chain(256, 1024, 256)
        return fn, params, jp.trace(fn, params, jnp.ones((256, 256)))

    def test_a_measured_target(self, traced):
        fn, params, graph = traced
        scores = jp.scores.magnitude(params)
        masks = jp.structure.unit_masks(graph, scores, latency=0.7)
        (width,) = kept(graph, masks)
        assert 0 < width < 1024
        assert width % 32 == 0

    def test_what_is_found_by_a_clock_that_is_known(self, traced, monkeypatch):
        """The least removal that meets it, whatever the noise of this machine."""
        from jaxprune.structure import _latency

        _, params, graph = traced
        units = graph.groups[0].units
        monkeypatch.setattr(_latency._Timer, "__init__", lambda self, graph: None)
        monkeypatch.setattr(
            _latency._Timer, "__call__", lambda self, gone: 0.1 + 0.9 * (1 - gone[units].mean())
        )
        scores = jp.scores.magnitude(params)
        masks = jp.structure.unit_masks(graph, scores, latency=0.55)
        assert kept(graph, masks) == [512]
        with pytest.raises(ValueError, match=r"latency: 0.05 is out of reach on .*0\.1\d of the"):
            jp.structure.unit_masks(graph, scores, latency=0.05)

    def test_bad_input(self, traced):
        _, params, graph = traced
        scores = jp.scores.magnitude(params)
        with pytest.raises(ValueError, match="expected one of sparsity=.*latency="):
            jp.structure.unit_masks(graph, scores, latency=0.5, flops=0.5)
        with pytest.raises(ValueError, match="latency"):
            jp.structure.unit_masks(graph, scores, latency=1.5)
        with pytest.raises(ValueError, match="latency: nothing to remove"):
            jp.structure.unit_masks(graph, scores, latency=0.5, ignore=[graph.groups[0].name])
        with pytest.raises((ValueError, TypeError), match="round_to"):
            jp.structure.unit_masks(graph, scores, flops=0.5, round_to="fast")


def test_scores_that_are_no_numbers_are_refused():
    params = tree()
    scores = jp.scores.magnitude(params) | {"b": jnp.full((6, 2), jnp.nan)}
    graph = jp.trace(two_layers, params, jnp.ones((1, 20)))
    with pytest.raises(ValueError, match="'b' holds NaN"):
        jp.structure.unit_masks(graph, scores, sparsity=0.5)
