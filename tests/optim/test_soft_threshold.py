"""Thresholds that learn: the formula, its gradients, and what a decay makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

PARAMS = {
    "a": jax.random.normal(jax.random.key(0), (6, 5)),
    "b": jnp.ones(5),
    "c": jax.random.normal(jax.random.key(1), (5, 3)),
}


def by_hand(weights, s):
    """Weights shrunk by NumPy in float64."""
    w = np.asarray(weights, np.float64)
    return np.sign(w) * np.maximum(np.abs(w) - 1 / (1 + np.exp(-float(s))), 0)


def test_forward_pass_and_masks_are_the_formula():
    tx = jp.optim.soft_threshold(optax.sgd(0.1), initial=-0.5)
    state = tx.init(PARAMS)
    seen = jp.optim.sparse_params(state, PARAMS)
    for k in "ac":
        np.testing.assert_allclose(seen[k], by_hand(PARAMS[k], -0.5), rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(jp.optim.get_masks(state)[k], seen[k] != 0)
    np.testing.assert_array_equal(seen["b"], PARAMS["b"])


@pytest.mark.parametrize("how", ["through", "of what it returns"])
def test_one_step_descends_weights_and_thresholds(how):
    """As gradient descent on both does, the loss written out on them; either way of differentiating."""
    loss = lambda p: jnp.sum(jnp.sin(p["a"])) * jnp.sum(p["c"] ** 2) + jnp.sum(p["b"])
    tx = jp.optim.soft_threshold(optax.sgd(0.1), initial=-1.0, rate=0.5, decay=0.25)
    state = tx.init(PARAMS)
    seen = lambda p: jp.optim.sparse_params(state, p)
    if how == "through":
        grads = jax.grad(lambda p: loss(seen(p)))(PARAMS)
    else:
        grads = jax.grad(loss)(seen(PARAMS))

    def written_out(params, s):
        shrink = lambda w, s: jnp.sign(w) * jnp.maximum(jnp.abs(w) - jax.nn.sigmoid(s), 0)
        return loss(
            {"a": shrink(params["a"], s["a"]), "b": params["b"], "c": shrink(params["c"], s["c"])}
        )

    of_w, of_s = jax.grad(written_out, argnums=(0, 1))(PARAMS, {"a": -1.0, "c": -1.0})
    updates, state = jax.jit(tx.update)(grads, state, PARAMS)
    for k in "abc":
        np.testing.assert_allclose(updates[k], -0.1 * of_w[k], rtol=1e-5, atol=1e-6)
    for k in "ac":
        expected = -1.0 - 0.5 * (of_s[k] - 0.25)
        np.testing.assert_allclose(state.memory["thresholds"][k], [[expected]], rtol=1e-5)


def test_layers_of_a_stack_have_thresholds_of_their_own():
    params = {"w": jax.random.normal(jax.random.key(2), (3, 4, 4))}

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    uses = jp.uses(fn, params, jnp.ones((1, 4)))
    tx = jp.optim.soft_threshold(optax.sgd(0.1), initial=-2.0, uses=uses)
    state = tx.init(params)
    assert state.memory["thresholds"]["w"].shape == (3, 1, 1)
    grads = {"w": jnp.ones((3, 4, 4)).at[1].set(-1.0) * jnp.sign(params["w"])}
    _, state = tx.update(grads, state, params)
    first, second, third = state.memory["thresholds"]["w"].ravel()
    assert first > -2 > second
    assert third > -2


def test_sparsity_rises_where_the_loss_does_not_need_weights():
    """Twenty inputs of which four matter: the others' weights become zero, the four do not."""
    x = jax.random.normal(jax.random.key(3), (256, 20))
    true = jnp.zeros((20, 1)).at[:4].set(2.0)
    loss = lambda p: jnp.mean(jnp.square(x @ p["w"] - x @ true))
    tx = jp.optim.soft_threshold(optax.sgd(0.05), initial=-6.0, rate=0.5, decay=5e-2)
    params = {"w": 0.3 * jax.random.normal(jax.random.key(4), (20, 1))}

    def step(carry, _):
        params, state = carry
        grads = jax.grad(loss)(jp.optim.sparse_params(state, params))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = params, tx.init(params)
    (params, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, length=800))(carry)
    found = np.asarray(jp.optim.sparse_params(state, params)["w"]).ravel()
    assert (found[4:] == 0).all()
    np.testing.assert_allclose(found[:4], 2.0, atol=0.05)
    assert float(jp.optim.metrics(state)["masks/sparsity"]) == pytest.approx(0.8)


def test_bad_input():
    sgd = optax.sgd(0.1)
    for name, value in (("rate", 0.0), ("initial", np.inf), ("decay", -1.0)):
        with pytest.raises(ValueError, match=name):
            jp.optim.soft_threshold(sgd, **{name: value})
    with pytest.raises(ValueError, match="selects no leaf"):
        jp.optim.soft_threshold(sgd).init({"b": jnp.ones(3)})
    with pytest.raises(TypeError, match="prune before compressing"):
        jp.optim.soft_threshold(sgd).init(jp.quantize_tree({"w": jnp.ones((8, 8))}))
