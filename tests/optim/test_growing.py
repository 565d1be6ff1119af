"""A penalty that grows: its course in NumPy, units that compact, and what curvature tells apart."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

PARAMS = {"w": jax.random.normal(jax.random.key(0), (6, 5)), "b": jnp.ones(5)}


def walk(tx, params, loss, steps):
    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), (params, jp.optim.get_masks(state), state.memory["chosen"])

    carry = params, tx.init(params)
    (_, state), seen = jax.jit(lambda c: jax.lax.scan(step, c, None, length=steps))(carry)
    return jax.tree.map(np.asarray, seen), state


@pytest.mark.parametrize("pick", [0.0, 0.3])
def test_the_course_of_the_penalty(pick):
    """Weights, masks and the choice of each step, in NumPy."""
    slope = np.asarray(jax.random.normal(jax.random.key(1), (6, 5)), np.float32)
    tx = jp.optim.growing(
        optax.sgd(0.2), 0.6, growth=0.1, every=2, ceiling=0.5, pick=pick, settle=3
    )
    (params, masks, chosen), _ = walk(tx, PARAMS, lambda p: jnp.sum(p["w"] * slope * 0.1), 20)
    w, pruned = np.asarray(PARAMS["w"]), 2 * 5 + 3
    keep = np.zeros((6, 5), bool) if pick else None
    for i in range(20):
        if keep is None or (pick and i == 2 * 3):
            keep = np.zeros(30, bool)
            keep[np.argsort(-np.abs(w).ravel(), kind="stable")[:12]] = True
            keep = keep.reshape(6, 5)
        penalty = min(0.1 * (i // 2), 0.5)
        w = w - 0.2 * (0.1 * slope + np.where(keep, 0, penalty * w))
        w = np.where(keep, w, 0) if i >= pruned else w
        np.testing.assert_allclose(params["w"][i], w, rtol=1e-5, atol=1e-6, err_msg=f"step {i}")
        np.testing.assert_array_equal(chosen["w"][i], keep)
        np.testing.assert_array_equal(masks["w"][i], keep if i >= pruned else np.ones_like(keep))


def network(p, x):
    return jax.nn.relu(x @ p["in"] + p["bias"]) @ p["out"]


@pytest.mark.parametrize("optimizer", [optax.sgd(0.05), optax.adam(5e-2)], ids=["sgd", "adam"])
def test_units_are_pressed_whole_and_compact(optimizer):
    keys = jax.random.split(jax.random.key(2), 3)
    net = {
        "in": jax.random.normal(keys[0], (5, 12)),
        "bias": jnp.full(12, 0.1),
        "out": jax.random.normal(keys[1], (12, 2)),
    }
    x = jax.random.normal(keys[2], (64, 5))
    loss = lambda p: jnp.mean(jnp.square(network(p, x) - jnp.tanh(x[:, :2])))
    units = jp.structure.Units(jp.trace(network, net, x), reduce="l2")
    tx = jp.optim.growing(optimizer, 0.5, growth=0.05, every=2, pattern=units)
    (params, masks, chosen), state = walk(tx, net, loss, 45)
    goes = ~np.broadcast_to(chosen["in"][0], (5, 12))[0]
    assert goes.sum() == 6
    size = lambda i: (
        np.linalg.norm(params["in"][i][:, goes]) + np.linalg.norm(params["out"][i][goes])
    )
    assert size(39) < 0.5 * size(0)  # pressed before they go at step 40
    assert size(40) == 0
    last = jax.tree.map(lambda p: jnp.asarray(p[-1]), params)
    fn, small = jp.compact(network, last, jp.optim.get_masks(state), x)
    assert small["in"].shape == (5, 6)
    np.testing.assert_allclose(fn(small, x), network(last, x), rtol=1e-4, atol=1e-5)


def test_curvature_tells_weights_apart():
    """GReg-2: of equal weights those go whose loss is flat; by size at the start none would differ."""
    params = {"w": jnp.ones((2, 8))}
    curve = jnp.array([[4.0], [0.1]]) * jnp.ones((2, 8))
    loss = lambda p: 0.5 * jnp.sum(curve * jnp.square(p["w"] - 1))
    tx = jp.optim.growing(optax.sgd(0.1), 0.5, growth=0.05, every=1, pick=0.5)
    _, state = walk(tx, params, loss, 25)
    np.testing.assert_array_equal(jp.optim.get_masks(state)["w"], [[True] * 8, [False] * 8])


def test_bad_input():
    sgd = optax.sgd(0.1)
    for name, value in (
        ("growth", 0.0),
        ("ceiling", -1.0),
        ("every", 0),
        ("settle", -1),
        ("pick", 1.0),
    ):
        with pytest.raises(ValueError, match=name):
            jp.optim.growing(sgd, 0.5, **{name: value})
    for transform in (jp.optim.growing, jp.optim.straight_through):
        with pytest.raises(ValueError, match="before there are gradients"):
            transform(sgd, 0.5, scores=jp.scores.taylor)
    frozen = jp.trace(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 3))}, jnp.ones((1, 2)))
    with pytest.raises(ValueError, match=r"w\[0\]"):
        jp.optim.growing(sgd, 0.5, pattern=jp.structure.Units(frozen)).init({"w": jnp.ones((2, 3))})
