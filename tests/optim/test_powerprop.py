"""Training weights as powers: the same as training their roots, written out."""

from itertools import pairwise

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxprune as jp
from tests.optim._optimizers import OPTIMIZERS

PARAMS = {"w": 0.5 * jax.random.normal(jax.random.key(0), (6, 5)), "b": jnp.zeros(5)}
X = jax.random.normal(jax.random.key(1), (32, 6))
Y = jnp.tanh(X[:, :5] * 2)


def loss(params):
    return jnp.mean(jnp.square(X @ params["w"] + params["b"] - Y))


def weights(theta, alpha):
    return {"w": theta["w"] * jnp.abs(theta["w"]) ** (alpha - 1), "b": theta["b"]}


def run(tx, params, loss, steps=8, **extra):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params, **extra)
        return (optax.apply_updates(params, updates), state), None

    carry = params, tx.init(params)
    return jax.jit(lambda c: jax.lax.scan(step, c, None, length=steps)[0])(carry)


@pytest.mark.parametrize("alpha", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("name", ["sgd", "adamw", "lamb"])
def test_the_same_as_training_roots(name, alpha):
    inner = OPTIMIZERS[name]()
    trained, _ = run(jp.optim.powerprop(inner, alpha), PARAMS, loss)
    w = PARAMS["w"]
    theta = {"w": jnp.sign(w) * jnp.abs(w) ** (1 / alpha), "b": PARAMS["b"]}
    by_roots, _ = run(inner, theta, lambda t: loss(weights(t, alpha)))
    expected = weights(by_roots, alpha)
    for k in "wb":
        np.testing.assert_allclose(trained[k], expected[k], rtol=2e-3, atol=2e-5)


def test_a_line_search_sees_roots():
    """`value_fn` and `grad` are those of what the optimizer moves, so that it finds a good step."""
    tx = jp.optim.powerprop(optax.lbfgs(), 2.0)
    params, state = PARAMS, tx.init(PARAMS)

    @jax.jit
    def step(params, state):
        value, grad = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grad, state, params, value=value, grad=grad, value_fn=loss)
        return optax.apply_updates(params, updates), state

    values = [float(loss(params))]
    for _ in range(12):
        params, state = step(params, state)
        values.append(float(loss(params)))
    assert all(b <= a + 1e-6 for a, b in pairwise(values))
    assert values[-1] < 0.5 * values[0]


def test_zeros_stay_and_what_does_not_move_does_not_drift():
    params = {"w": PARAMS["w"].at[0].set(0.0), "b": jnp.zeros(5)}
    trained, _ = run(jp.optim.powerprop(optax.sgd(0.5), 3.0), params, loss, steps=3)
    assert not np.any(trained["w"][0])
    assert np.all(trained["w"][1:] != params["w"][1:])
    same, _ = run(
        jp.optim.powerprop(optax.sgd(0.5), 3.0), params, lambda p: 0.0 * loss(p), steps=50
    )
    np.testing.assert_array_equal(same["w"], params["w"])
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    half, _ = run(jp.optim.powerprop(optax.sgd(0.5), 3.0), low, loss, steps=3)
    assert half["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(half["w"].astype(jnp.float32), trained["w"], atol=0.05)


def test_solutions_are_sparse():
    """Thirty equations for sixty unknowns, of which four matter: pruned to four it still solves them."""
    x = jax.random.normal(jax.random.key(5), (30, 60))
    true = jnp.zeros((60, 1)).at[:4].set(1.5)
    fit = lambda p: jnp.mean(jnp.square(x @ (p["w"] - true)))
    start = {"w": jnp.full((60, 1), 0.01)}
    left = []
    for alpha in (1.0, 2.0):
        trained, _ = run(jp.optim.powerprop(optax.sgd(0.02), alpha), start, fit, steps=1500)
        assert fit(trained) < 1e-3
        left.append(float(fit(jp.prune_tree(trained, 1 - 4 / 60)[0])))
    assert left[0] > 1.0
    assert left[1] < 0.05


def test_linen_and_nnx():
    module = nn.Dense(4)
    params = module.init(jax.random.key(0), X)["params"]
    trained, _ = run(
        jp.optim.powerprop(optax.adam(1e-2), 2.0),
        params,
        lambda p: jnp.mean(jnp.square(module.apply({"params": p}, X))),
    )
    assert (trained["kernel"] != params["kernel"]).all()
    model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    before = model.kernel[...]
    optimizer = nnx.Optimizer(model, jp.optim.powerprop(optax.adam(1e-2), 2.0), wrt=nnx.Param)
    optimizer.update(model, nnx.grad(lambda m: jnp.mean(jnp.square(m(X))))(model))
    assert (model.kernel[...] != before).all()


def test_bad_input():
    with pytest.raises(ValueError, match="alpha"):
        jp.optim.powerprop(optax.sgd(0.1), 0.5)
    tx = jp.optim.powerprop(optax.sgd(0.1), 2.0)
    with pytest.raises(ValueError, match="selects no leaf"):
        tx.init({"b": jnp.ones(3)})
    with pytest.raises(ValueError, match="tx.update"):
        tx.update(PARAMS, tx.init(PARAMS))
    with pytest.raises(TypeError, match="prune before compressing"):
        tx.init(jp.quantize_tree({"w": jnp.ones((8, 8))}))
