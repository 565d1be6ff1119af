"""Proximal steps: exact, to exact zeros, and for units to networks that compact."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
from tests.optim._optimizers import OPTIMIZERS

KEYS = jax.random.split(jax.random.key(0), 4)
TRUE = jnp.zeros((20, 1)).at[:4].set(jnp.array([[2.0], [-1.5], [1.0], [3.0]]))
X = jax.random.normal(KEYS[0], (200, 20))
Y = X @ TRUE + 0.1 * jax.random.normal(KEYS[1], (200, 1))


def squares(params):
    return 0.5 * jnp.mean(jnp.square(X @ params["w"] - Y))


def fit(tx, params, loss, steps):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda c: jax.lax.scan(step, c, None, length=steps)[0])
    return run((params, tx.init(params)))


def of_nu(state):
    return jax.tree.map(lambda v: 1 / (jnp.sqrt(v) + 1e-8), optax.tree.get(state, "nu"))


@pytest.mark.parametrize("name", ["sgd", "rmsprop"])
def test_l1_finds_the_lasso(name):
    """The optimality conditions of the penalised problem, under a plain and an adaptive optimizer."""
    tx = {
        "sgd": lambda: jp.optim.proximal_l1(optax.sgd(0.1), 0.2, learning_rate=0.1),
        "rmsprop": lambda: jp.optim.proximal_l1(
            optax.rmsprop(1e-2, decay=0.99, eps=1e-8), 0.2, learning_rate=1e-2, scale=of_nu
        ),
    }[name]()
    params, _ = fit(tx, {"w": jnp.zeros((20, 1))}, squares, 3000)
    w, g = np.asarray(params["w"]), np.asarray(jax.grad(squares)(params)["w"])
    assert (w[4:] == 0).all()
    assert (w[:4] != 0).all()
    atol = 1e-4 if name == "sgd" else 2e-2
    np.testing.assert_allclose(g[:4], -0.2 * np.sign(w[:4]), atol=atol)
    assert (np.abs(g) <= 0.2 + atol).all()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "lamb", "contrib.schedule_free_sgd"])
def test_any_optimizer_and_dtype(optimizer):
    for dtype in (jnp.float32, jnp.bfloat16):
        tx = jp.optim.proximal_l1(OPTIMIZERS[optimizer](), 5.0, learning_rate=0.1)
        params = {"w": jnp.full((4, 4), 0.3, dtype), "b": jnp.ones(4, dtype)}
        trained, state = fit(tx, params, lambda p: jnp.sum(p["b"] * jnp.sum(p["w"])) * 1e-3, 3)
        assert not np.any(trained["w"])
        assert np.all(trained["b"])
        assert trained["w"].dtype == dtype
        assert state.count == 3


def network(p, x):
    h = jax.nn.relu(x @ p["in"] + p["bias"])
    return jax.nn.relu(h @ p["mid"]) @ p["out"]


NET = {
    "in": jax.random.normal(KEYS[2], (5, 12)) * 0.5,
    "bias": jnp.full(12, 0.1),
    "mid": jax.random.normal(KEYS[3], (12, 8)) * 0.5,
    "out": jnp.ones((8, 2)),
}
GRAPH = jp.trace(network, NET, jnp.ones((1, 5)))


def test_group_lasso_ends_in_a_compacted_network():
    x = jax.random.normal(jax.random.key(5), (64, 5))
    y = jnp.tanh(x[:, :2])
    loss = lambda p: jnp.mean(jnp.square(network(p, x) - y))
    tx = jp.optim.proximal_group_lasso(optax.adam(1e-2), 0.07, graph=GRAPH, learning_rate=1e-2)
    params, _ = fit(tx, NET, loss, 600)
    masks = jp.optim.zero_units(GRAPH, params)
    small_fn, small = jp.compact(network, params, masks, x)
    assert 0 < small["in"].shape[1] < 12
    assert small["bias"].shape == small["in"].shape[1:] == small["mid"].shape[:1]
    np.testing.assert_allclose(small_fn(small, x), network(params, x), rtol=1e-5, atol=1e-6)


def test_one_group_step_is_the_closed_form():
    w = np.asarray(NET["mid"])
    tx = jp.optim.proximal_group_lasso(optax.sgd(1.0), 0.3, graph=GRAPH, learning_rate=0.5)
    zeros = jax.tree.map(jnp.zeros_like, NET)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(NET), NET)
    after = optax.apply_updates(NET, updates)
    norm = np.linalg.norm(w, axis=0)
    expected = w * np.maximum(0, 1 - 0.3 * 0.5 * np.sqrt(12) / norm)
    np.testing.assert_allclose(after["mid"], expected, rtol=1e-5, atol=1e-6)
    both = np.concatenate([np.asarray(NET["in"]), np.asarray(NET["bias"])[None]])
    shrink = np.maximum(0, 1 - 0.3 * 0.5 * np.sqrt(6) / np.linalg.norm(both, axis=0))
    np.testing.assert_allclose(after["bias"], 0.1 * shrink, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(after["out"], NET["out"])


def test_bad_input():
    sgd = optax.sgd(0.1)
    with pytest.raises(ValueError, match="strength"):
        jp.optim.proximal_l1(sgd, -1.0, learning_rate=0.1)
    with pytest.raises(ValueError, match="selects no leaf"):
        jp.optim.proximal_l1(sgd, 1.0, learning_rate=0.1).init({"b": jnp.ones(3)})
    frozen = jp.trace(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 3))}, jnp.ones((1, 2)))
    with pytest.raises(ValueError, match=r"no unit of this function can go: w\[0\]"):
        jp.optim.proximal_group_lasso(sgd, 1.0, graph=frozen, learning_rate=0.1)
    with pytest.raises(ValueError, match="other parameters"):
        jp.optim.proximal_group_lasso(sgd, 1.0, graph=GRAPH, learning_rate=0.1).init(
            {"w": jnp.ones(2)}
        )
    with pytest.raises(ValueError, match="ignore"):
        jp.optim.zero_units(GRAPH, NET, ignore=["nothing"])
