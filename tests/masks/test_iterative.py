"""Pruning in rounds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp


def chain(depth=6, width=16):
    keys = jax.random.split(jax.random.key(0), depth)
    return [0.3 * jax.random.normal(key, (width, width)) for key in keys]


def fn(params, x):
    for w in params:
        x = jax.nn.relu(x @ w)
    return x


def flow(params):
    return jp.scores.synflow(fn, params, jnp.ones((1, 16)))


def test_rounds_are_nested_and_exact():
    seen = []
    params = chain()

    def score(p):
        jax.debug.callback(lambda *x: seen.append([np.asarray(a) for a in x]), *p)
        return jp.scores.magnitude(p)

    masks = jp.masks.iterative(score, params, 0.9, rounds=5)
    jax.effects_barrier()
    assert len(seen) == 5
    kept = [sum(int((w != 0).sum()) for w in round) for round in seen]
    total = sum(w.size for w in params)
    assert kept == [round(total * 0.1 ** (k / 5)) for k in range(5)]
    assert sum(int(m.sum()) for m in masks) == round(0.1 * total)
    # magnitudes do not change, so rounds make no difference
    once = jp.masks.from_scores(jp.scores.magnitude(params), 0.9)
    jax.tree.map(np.testing.assert_array_equal, masks, once)


def test_synflow_in_rounds_keeps_a_path_where_one_round_cuts_layers_off():
    params = chain()
    params.insert(3, 0.3 * jax.random.normal(jax.random.key(9), (16, 64)))
    params.insert(4, 0.3 * jax.random.normal(jax.random.key(8), (64, 16)))
    once = jp.masks.from_scores(flow(params), 0.985)
    rounds = jp.masks.iterative(flow, params, 0.985, rounds=30)
    alive = lambda masks: float(
        fn(jax.tree.map(jnp.abs, jp.apply_masks(params, masks)), jnp.ones((1, 16))).sum()
    )
    assert alive(once) == 0
    assert alive(rounds) > 0
    assert jp.sparsity(rounds) == pytest.approx(0.985, abs=1e-3)


def test_patterns_budgets_where_and_jit():
    params = {"a": chain()[0], "b": chain()[1], "bias": jnp.ones(16)}
    score = jp.scores.magnitude
    masks = jp.masks.iterative(score, params, 0.5, rounds=3, pattern=jp.masks.NM(2, 4))
    assert (masks["a"].reshape(4, 4, 16).sum(1) == 2).all()
    budget = {"a": 0.75, "b": 0.0, "bias": 0.0}
    masks = jp.masks.iterative(score, params, budget, rounds=3)
    assert int(masks["a"].sum()) == 64
    assert masks["b"].all()
    masks = jax.jit(lambda p: jp.masks.iterative(score, p, 0.5, rounds=2, where="a"))(params)
    assert int(masks["a"].sum()) == 128
    assert masks["b"].shape == ()


def test_bad_input():
    params = {"a": chain()[0]}
    with pytest.raises(ValueError, match="rounds"):
        jp.masks.iterative(jp.scores.magnitude, params, 0.5, rounds=0)
    with pytest.raises(ValueError, match="not per cent"):
        jp.masks.iterative(jp.scores.magnitude, params, 50)
    with pytest.raises(ValueError, match="nearest"):
        jp.masks.iterative(jp.scores.magnitude, params, 0.5, where="b")
    with pytest.raises(ValueError, match="NaN in leaf 'a'"):
        jp.masks.iterative(lambda p: {"a": p["a"] * jnp.nan}, params, 0.5, rounds=2)
