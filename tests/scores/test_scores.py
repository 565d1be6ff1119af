"""One contract for every score, and each formula against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp


def halves(params):
    return jax.tree.map(lambda x: jnp.full_like(x, 0.5), params)


SCORES = {
    "magnitude": lambda p, **kw: jp.scores.magnitude(p, **kw),
    "random": lambda p, **kw: jp.scores.random(p, jax.random.key(1), **kw),
    "lamp": lambda p, **kw: jp.scores.lamp(p, **kw),
    "taylor": lambda p, **kw: jp.scores.taylor(p, halves(p), **kw),
    "movement": lambda p, **kw: jp.scores.movement(p, halves(p), **kw),
    "fisher": lambda p, **kw: jp.scores.fisher(p, halves(p), **kw),
}


@pytest.mark.parametrize("name", SCORES)
def test_contract(name, params, container):
    tree = container(params)
    scores = SCORES[name](tree)
    assert jax.tree.structure(scores) == jax.tree.structure(tree)
    for p, s in zip(jax.tree.leaves(tree), jax.tree.leaves(scores), strict=True):
        assert jnp.issubdtype(s.dtype, jnp.floating)
        assert s.shape == (p.shape if p.ndim >= 2 else ())
        assert s.ndim or s == jnp.inf
    again = jax.jit(SCORES[name])(tree)
    for a, b in zip(jax.tree.leaves(scores), jax.tree.leaves(again), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize("name", SCORES)
def test_where(name, params):
    scores = SCORES[name](params, where="dense/bias")
    assert scores["dense"]["bias"].shape == (10,)
    assert scores["dense"]["kernel"].shape == ()
    with pytest.raises(ValueError, match="nearest"):
        SCORES[name](params, where="dens/bias")


@pytest.mark.parametrize("name", SCORES)
def test_bfloat16(name, params):
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    masks = jp.masks.from_scores(SCORES[name](low), 0.5)
    assert jp.sparsity(masks) == pytest.approx(0.5, abs=0.01)


def test_formulas(params):
    grads = jax.tree.map(lambda x: jnp.cos(3 * x), params)
    w, g = (np.asarray(t["dense"]["kernel"]) for t in (params, grads))
    pick = lambda scores: np.asarray(scores["dense"]["kernel"])
    np.testing.assert_array_equal(pick(jp.scores.magnitude(params)), np.abs(w))
    np.testing.assert_allclose(pick(jp.scores.taylor(params, grads)), np.abs(w * g), rtol=1e-6)
    np.testing.assert_allclose(pick(jp.scores.movement(params, grads)), -w * g, rtol=1e-6)
    squares = jax.tree.map(jnp.square, grads)
    np.testing.assert_allclose(
        pick(jp.scores.fisher(params, squares)), w * w * g * g / 2, rtol=1e-5, atol=1e-8
    )
    # LAMP, spelled out
    flat = np.sort(np.square(w.ravel()))
    expected = {v: v / flat[i:].sum() for i, v in enumerate(flat)}
    got = pick(jp.scores.lamp(params)).ravel()
    np.testing.assert_allclose(got, [expected[v] for v in np.square(w.ravel())], rtol=1e-4)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e30])
def test_lamp_at_the_edges(scale):
    w = scale * jnp.array([[1.0, 2.0], [2.0, 4.0]])
    scores = jp.scores.lamp({"w": w})["w"]
    assert jnp.all(jnp.isfinite(scores))
    assert scale == 0 or scores[1, 1] == 1
    assert jp.scores.lamp({"w": jnp.zeros((0, 3))})["w"].shape == (0, 3)


def test_lamp_keeps_the_order_of_magnitude(params):
    w = jax.random.normal(jax.random.key(0), (300, 200))
    got = jp.scores.lamp({"w": w})["w"].ravel()
    assert jnp.all(jnp.diff(got[jnp.argsort(jnp.abs(w).ravel())]) >= 0)


def test_random_leaves_differ():
    scores = jp.scores.random({"a": jnp.ones((4, 4)), "b": jnp.ones((4, 4))}, jax.random.key(0))
    assert not jnp.array_equal(scores["a"], scores["b"])


def test_gradients_must_match(params):
    with pytest.raises(ValueError, match="missing 'conv/bias'"):
        jp.scores.taylor(params, {"dense": params["dense"]})
    wrong = {**params, "embed": jnp.ones((5, 7))}
    with pytest.raises(ValueError, match=r"'embed'.*\(5, 7\)"):
        jp.scores.movement(params, wrong)


def test_a_score_of_ones_own(params):
    def mine(tree):
        return jax.tree.map(lambda w: jnp.square(w) if w.ndim > 1 else jnp.inf, tree)

    pruned, masks = jp.prune_tree(params, 0.5, scores=mine)
    same, _ = jp.prune_tree(params, 0.5)
    assert jp.sparsity(masks) == pytest.approx(0.5, abs=0.01)
    jax.tree.map(np.testing.assert_array_equal, pruned, same)
