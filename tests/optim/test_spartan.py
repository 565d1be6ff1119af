"""The soft top-k mask and its gradient, beside float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import brentq

import jaxprune as jp

PARAMS = {
    "a": jax.random.normal(jax.random.key(0), (5, 4)),
    "b": jnp.ones(4),
    "c": 3 * jax.random.normal(jax.random.key(1), (4, 3)),
}


def soft(w, density, slope):
    """The soft mask of a flat vector, its shift by a root finder."""
    z = slope * np.abs(w)
    mask = lambda shift: 1 / (1 + np.exp(-(z + shift)))
    return mask(brentq(lambda x: mask(x).sum() - density * w.size, -100, 100, xtol=1e-13))


def flat(tree, part):
    return np.concatenate([np.asarray(tree[k], np.float64).ravel() for k in part])


@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_forward_pass_and_gradient(scope):
    tx = jp.optim.spartan(optax.sgd(1.0), 0.6, sharpness=4.0, scope=scope)
    state = tx.init(PARAMS)
    seen = jp.optim.sparse_params(state, PARAMS)
    masks = jp.optim.get_masks(state)
    grads = jax.tree.map(lambda x: jnp.cos(3 * x), PARAMS)
    updates, _ = jax.jit(tx.update)(grads, state, PARAMS)
    parts = [("a", "c")] if scope == "global" else [("a",), ("c",)]
    for part in parts:
        join = lambda tree, part=part: flat(tree, part)
        w, slope = join(PARAMS), 4.0 / np.abs(join(PARAMS)).mean()
        softened = lambda w, slope=slope: w * soft(w, 0.4, slope)
        kept = join(masks).astype(bool)
        assert kept.sum() == round(0.4 * w.size)
        np.testing.assert_allclose(join(seen), np.where(kept, softened(w), 0), rtol=1e-4, atol=1e-6)
        jacobian = [
            (softened(w + 1e-5 * e) - softened(w - 1e-5 * e)) / 2e-5 for e in np.eye(w.size)
        ]
        expected = -np.asarray(jacobian) @ join(grads)
        np.testing.assert_allclose(join(updates), expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(updates["b"], -grads["b"])


def test_sharpness_and_sparsity_follow_their_schedules():
    tx = jp.optim.spartan(
        optax.sgd(0.0),
        jp.schedules.linear(0.5, end=4),
        sharpness=lambda step: 1.0 + 100.0 * (step >= 4),
        every=2,
    )
    state, sparsity = tx.init(PARAMS), []
    np.testing.assert_allclose(jp.optim.sparse_params(state, PARAMS)["a"], PARAMS["a"], rtol=1e-4)
    for _ in range(5):
        _, state = tx.update(PARAMS, state, PARAMS)
        sparsity.append(jp.sparsity(jp.optim.get_masks(state)))
    assert sparsity == [0.0, 0.25, 0.25, 0.5, 0.5]
    seen = jp.optim.sparse_params(state, PARAMS)
    hard = jp.prune_tree(PARAMS, 0.5, scope="leaf")[0]
    np.testing.assert_allclose(seen["a"], hard["a"], atol=0.05)  # as sharp as a hard mask


def test_a_wrong_choice_is_mended():
    """The weights that matter begin outside the mask, and are in it in the end."""
    x = jax.random.normal(jax.random.key(3), (128, 10))
    true = jnp.zeros((10, 1)).at[:3].set(2.0)
    params = {"w": jnp.full((10, 1), 0.6).at[:3].set(0.3)}
    tx = jp.optim.spartan(optax.sgd(0.05), 0.7, sharpness=lambda step: 1.0 + step / 40)
    loss = lambda p: jnp.mean(jnp.square(x @ (p["w"] - true)))

    def step(carry, _):
        params, state = carry
        grads = jax.grad(loss)(jp.optim.sparse_params(state, params))
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    carry = params, tx.init(params)
    assert not np.any(jp.optim.get_masks(carry[1])["w"][:3])
    (params, state), _ = jax.jit(lambda c: jax.lax.scan(step, c, None, length=600))(carry)
    assert np.all(jp.optim.get_masks(state)["w"][:3])
    assert loss(jp.optim.sparse_params(state, params)) < 1e-2


def test_bad_input():
    sgd = optax.sgd(0.1)
    with pytest.raises(ValueError, match="sharpness"):
        jp.optim.spartan(sgd, 0.5, sharpness=-1.0)
    budget = {"a": 0.5, "b": 0.0, "c": 0.5}
    with pytest.raises(ValueError, match='scope="leaf"'):
        jp.optim.spartan(sgd, lambda _: budget, scope="global").init(PARAMS)
    with pytest.raises(TypeError, match="schedule"):
        jp.optim.spartan(sgd, "0.5")
