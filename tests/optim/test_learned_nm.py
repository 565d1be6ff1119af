"""Learned N:M: draws, gradients and logits written out; better choices than by magnitude."""

from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

KEY = jax.random.key(0)
PARAMS = {"w": jax.random.normal(jax.random.key(1), (8, 3)), "b": jnp.ones(3)}
TABLE = np.array([[i in kept for i in range(4)] for kept in combinations(range(4), 2)])


@pytest.mark.parametrize("axis", [0, 1])
def test_logits_begin_at_magnitudes_and_draws_are_patterns(axis):
    params = {"w": PARAMS["w"] if axis == 0 else PARAMS["w"].T}
    pattern = jp.masks.NM(2, 4, axis=axis)
    make = lambda heat, prior: jp.optim.learned_nm(
        optax.sgd(0.1), pattern, key=KEY, logits=optax.sgd(0.1), temperature=heat, prior=prior
    )
    state = make(1.0, 3.0).init(params)
    masks = jp.optim.get_masks(state)
    expected = jp.prune_tree(params, 0.5, pattern=pattern)[1]
    np.testing.assert_array_equal(masks["w"], expected["w"])
    assert state.memory["logits"]["w"].shape == ((2, 3, 6) if axis == 0 else (3, 2, 6))
    seen = jp.optim.sparse_params(make(1e-3, 0.0).init(params), params)["w"]  # cold: nearly hard
    soft = np.moveaxis(np.asarray(seen / params["w"]), axis, -1).reshape(-1, 4)
    assert (np.abs(soft[:, None] - TABLE).max(-1).min(-1) < 1e-3).mean() > 0.8
    np.testing.assert_allclose(soft.sum(-1), 2, rtol=1e-5)


def test_draws_follow_the_softmax_of_logits():
    params = {"w": jnp.ones((4, 4000))}
    tx = jp.optim.learned_nm(
        optax.sgd(0.1),
        jp.masks.NM(1, 4),
        key=KEY,
        logits=optax.sgd(0.1),
        temperature=1e-4,
        prior=0.0,
    )
    state = tx.init(params)
    state.memory["logits"]["w"] = state.memory["logits"]["w"] + jnp.log(jnp.array([1.0, 2, 3, 4]))
    often = np.asarray(jp.optim.sparse_params(state, params)["w"]).mean(1)
    np.testing.assert_allclose(often, [0.1, 0.2, 0.3, 0.4], atol=0.03)
    _, after = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
    again = jp.optim.sparse_params(after, params)["w"]
    assert np.mean(np.abs(again - jp.optim.sparse_params(state, params)["w"]) > 0.5) > 0.1


def test_gradients_reach_weights_and_logits():
    tx = jp.optim.learned_nm(
        optax.sgd(0.5), jp.masks.NM(2, 4), key=KEY, logits=optax.sgd(2.0), temperature=0.7
    )
    state = tx.init(PARAMS)
    logits = state.memory["logits"]["w"]
    seen = jp.optim.sparse_params(state, PARAMS)
    grads = jax.tree.map(jnp.sin, seen)
    own = jax.random.fold_in(jax.random.key(state.memory["seed"]), 1)  # the second leaf
    noise = jax.random.gumbel(own, logits.shape)

    def written_out(w, logits):
        soft = jax.nn.softmax((logits + noise) / 0.7) @ TABLE.astype(np.float32)  # (2, 3, 4)
        return w * soft.transpose(0, 2, 1).reshape(8, 3)

    np.testing.assert_allclose(written_out(PARAMS["w"], logits), seen["w"], rtol=1e-5)
    value = lambda w, x: jnp.sum(grads["w"] * written_out(w, x))
    of_w, of_logits = jax.grad(value, argnums=(0, 1))(PARAMS["w"], logits)
    updates, state = tx.update(grads, state, PARAMS)
    np.testing.assert_allclose(updates["w"], -0.5 * of_w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(updates["b"], -0.5 * grads["b"], rtol=1e-6)
    np.testing.assert_allclose(
        state.memory["logits"]["w"], logits - 2.0 * of_logits, rtol=1e-5, atol=1e-6
    )


def test_better_than_magnitude_with_frozen_weights():
    """Inputs of very different size: what is large among the weights matters little."""
    scale = jnp.tile(jnp.array([0.1, 1.0, 2.0, 0.2]), 4)
    x = scale * jax.random.normal(jax.random.key(2), (256, 16))
    params = {"w": jax.random.normal(jax.random.key(3), (16, 8)) / scale[:, None] ** 0.5}
    loss = lambda p: jnp.mean(jnp.square(x @ p["w"] - x @ params["w"]))
    tx = jp.optim.learned_nm(
        optax.set_to_zero(),
        jp.masks.NM(2, 4),
        key=KEY,
        logits=optax.adam(0.1),
        temperature=lambda step: 4.0 * 0.05 ** (jnp.minimum(step, 300) / 300),
    )

    def step(state, _):
        grads = jax.grad(loss)(jp.optim.sparse_params(state, params))
        return tx.update(grads, state, params)[1], None

    begun = tx.init(params)
    state, _ = jax.jit(lambda s: jax.lax.scan(step, s, None, length=300))(begun)
    of = lambda state: float(loss(jp.apply_masks(params, jp.optim.get_masks(state))))
    assert of(state) < 0.5 * of(begun)
    groups = np.asarray(jp.optim.get_masks(state)["w"]).reshape(4, 4, 8).sum(1)
    assert (groups == 2).all()


def test_bad_input():
    make = lambda pattern, **k: jp.optim.learned_nm(
        optax.sgd(0.1), pattern, key=KEY, logits=optax.sgd(0.1), **k
    )
    with pytest.raises(TypeError, match="NM"):
        make(jp.masks.Block((2, 2)))
    with pytest.raises(ValueError, match="12870 patterns"):
        make(jp.masks.NM(8, 16))
    with pytest.raises(ValueError, match=r"'w' of shape \(6, 3\)"):
        make(jp.masks.NM(2, 4)).init({"w": jnp.ones((6, 3))})
    for name in ("temperature", "prior"):
        with pytest.raises(ValueError, match=name):
            make(jp.masks.NM(2, 4), **{name: -1.0})
