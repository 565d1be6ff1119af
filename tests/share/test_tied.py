"""Ties of leaves and of layers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from tests.structure._zoo import normal

resolve = jp.share.resolve_ties


def relative(a, b):
    return float(jnp.linalg.norm((a - b).ravel()) / jnp.linalg.norm(b.ravel()))


def family():
    a = normal(12, 8)
    order = jax.random.permutation(jax.random.key(1), 8)
    return {
        "a": a,
        "near": a + 0.01 * normal(12, 8, seed=1),
        "moved": a[:, order],
        "opposite": -2.0 * a,
        "other": normal(12, 8, seed=2),
        "shape": normal(8, 12, seed=3),
        "bias": jnp.ones(8),
    }


def test_similarities():
    params = family()
    found = {(s.first, s.second): s.value for s in jp.share.similarities(params)}
    assert found["a", "near"] > 0.999
    np.testing.assert_allclose(found["a", "opposite"], -1, atol=1e-5)
    assert all("shape" not in pair for pair in found)
    aligned = {
        (s.first, s.second): s.value for s in jp.share.similarities(params, measure="aligned")
    }
    np.testing.assert_allclose(aligned["a", "moved"], 1, atol=1e-5)
    fn = lambda p, x: [x @ p[n] for n in ("a", "moved", "other")]
    stats = jp.calibrate(fn, params, [normal(64, 12)], second_moment=True)
    cka = jp.share.similarities(params, measure="cka", stats=stats, where="a|moved|other")
    assert (cka[0].first, cka[0].second) == ("a", "moved")
    np.testing.assert_allclose(cka[0].value, 1, atol=1e-4)
    assert cka[1].value < 0.9
    assert jp.share.similarity_table(cka).row_count == 3


def test_linear_cka_equals_its_definition():
    x = normal(50, 6)
    params = {"a": normal(6, 4, seed=1), "b": normal(6, 4, seed=2)}
    stats = jp.calibrate(lambda p, x: (x @ p["a"], x @ p["b"]), params, [x], second_moment=True)
    (found,) = jp.share.similarities(params, measure="cka", stats=stats)
    ya, yb = x @ params["a"], x @ params["b"]
    norm = lambda m: jnp.sum(m**2)
    wanted = norm(ya.T @ yb) / jnp.sqrt(norm(ya.T @ ya) * norm(yb.T @ yb))
    np.testing.assert_allclose(found.value, wanted, rtol=1e-4)


def test_thresholds_budgets_and_the_expansion():
    params = family()
    tied = jp.tie_tree(params, threshold=0.99)
    assert jp.share.ties(tied) == {"near": "a"}
    full = resolve(tied)
    assert full["near"] is full["a"]
    np.testing.assert_allclose(full["a"], (params["a"] + params["near"]) / 2, rtol=1e-5)
    assert jp.nbytes(tied) == jp.nbytes(params) - params["a"].nbytes
    tied = jp.tie_tree(params, threshold=0.99, measure="aligned")
    assert set(jp.share.ties(tied)) == {"near", "moved"}
    assert relative(resolve(tied)["moved"], params["moved"]) < 0.01
    tied = jp.tie_tree(params, threshold=0.99, scale=True)
    assert set(jp.share.ties(tied)) == {"near", "opposite"}
    assert relative(resolve(tied)["opposite"], params["opposite"]) < 0.02
    tied = jp.tie_tree(params, budget=0.7)
    held = sum(x.size for x in jax.tree.leaves(tied) if x.ndim == 2)
    assert held <= 0.7 * 6 * 96


def test_what_is_missing_is_added_in_low_rank():
    params = {"a": normal(12, 8), "b": normal(12, 8, seed=1)}
    errors = [
        relative(resolve(jp.tie_tree(params, ties=[("a", "b")], rank=r))["b"], params["b"])
        for r in (1, 4, 8)
    ]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-5


def test_gradients_sum_and_training_keeps_the_tie():
    params = {"a": normal(6, 6), "b": normal(6, 6)}
    tied = jp.tie_tree(params, threshold=0.5)
    fn = lambda p, x: jnp.sum(jnp.tanh(x @ p["a"]) @ p["b"])
    x = normal(3, 6, seed=2)
    plain = jax.grad(fn)(resolve(tied), x)
    loss = lambda t: jp.compressed(fn)(t, x)
    grads = jax.jit(jax.grad(loss))(tied)
    np.testing.assert_allclose(grads["a"], plain["a"] + plain["b"], rtol=1e-4, atol=1e-5)
    tx = optax.sgd(0.1)
    updates, _ = tx.update(grads, tx.init(tied), tied)
    full = resolve(optax.apply_updates(tied, updates))
    np.testing.assert_array_equal(full["a"], full["b"])


@pytest.mark.parametrize("scale", [False, True])
def test_layers_of_a_stack(scale):
    base = normal(2, 10, 10)
    factors = jnp.array([1.0, 1.0, 1.2, 1.2]) if scale else jnp.ones(4)
    params = {"layers": base[jnp.array([0, 1, 0, 1])] * factors[:, None, None]}

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"])[0]

    tied = jp.tie_tree(params, threshold=0.99, layers="layers", scale=scale)
    leaf = tied["layers"]
    assert leaf.owner == (0, 1, 0, 1)
    x = normal(3, 10, seed=5)
    np.testing.assert_allclose(jp.compressed(fn)(tied, x), fn(params, x), rtol=1e-4, atol=1e-5)
    assert jp.nbytes(tied) < 0.55 * jp.nbytes(params)
    small = jp.quantize_tree(tied, bits=8)
    rounded = fn(jp.materialize_tree(small), x)
    np.testing.assert_allclose(jp.compressed(fn)(small, x), rounded, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(leaf[2], params["layers"][2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({}, "exactly one"),
        ({"ties": [("a", "shape")]}, r"unequal shapes.*'a' \(12, 8\).*'shape' \(8, 12\)"),
        ({"ties": [("a", "nearr")]}, "near"),
        ({"ties": [("a", "near"), ("a", "other")]}, "two groups"),
        ({"ties": ["a"]}, "at least two"),
        ({"budget": 0.01}, "cannot be met"),
        ({"threshold": 0.5, "measure": "l2"}, "expected one of"),
        ({"threshold": 0.5, "measure": "cka"}, "second_moment"),
        ({"ties": [("a", "near")], "rank": 9}, "more than the full rank"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        jp.tie_tree(family(), **change)
