"""The rules of jaxpruner, written out in NumPy, beside ours over a few hundred steps."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

SHAPES = {"a": (20, 31), "b": (31, 7), "bias": (7,)}
RNG = np.random.default_rng(0)
PARAMS = {k: jnp.asarray(RNG.normal(size=s), jnp.float32) for k, s in SHAPES.items()}
STEPS = 200


def top_k(scores, sparsity):
    """As many as `max(1, round(n (1 - s)))`, ties to the lower index."""
    flat = scores.ravel()
    count = max(1, int(np.round(np.float32(flat.size) * (np.float32(1) - np.float32(sparsity)))))
    mask = np.zeros(flat.size, bool)
    mask[np.argsort(-flat, kind="stable")[:count]] = True
    return mask.reshape(scores.shape)


def ramp(step, target, begin, end):
    p = np.float32(np.clip(step + 1 - begin, 0, end - begin)) / np.float32(end - begin)
    return np.float32(target) * (np.float32(1) - (np.float32(1) - p) ** 3)


def is_due(step, begin, end, every):
    return step % every == 0 and begin <= step <= end


def gradients(seed):
    keys = jax.random.split(jax.random.fold_in(jax.random.key(1), seed), len(SHAPES))
    return {k: jax.random.normal(key, s) for key, (k, s) in zip(keys, SHAPES.items(), strict=True)}


def ours(tx):
    """Masks after each step, and parameters and gradients that went in."""

    def step(carry, i):
        params, state = carry
        grads = gradients(i)
        updates, state = tx.update(grads, state, params)
        after = optax.apply_updates(params, updates)
        return (after, state), (jp.optim.get_masks(state), params, grads, after)

    _, seen = jax.jit(lambda c: jax.lax.scan(step, c, jnp.arange(STEPS)))((PARAMS, tx.init(PARAMS)))
    return jax.tree.map(np.asarray, seen)


@pytest.mark.parametrize("scope", ["leaf", "global"])
def test_magnitude_pruning(scope):
    begin, end, every = 13, 160, 10
    schedule = jp.schedules.polynomial(0.9, begin=begin, end=end, every=every)
    normed = lambda p: {
        k: jnp.inf * jnp.ones(()) if w.ndim < 2 else jnp.abs(w) / (jnp.linalg.norm(w) + 1e-8)
        for k, w in p.items()
    }
    options = {"min_keep": 1} if scope == "leaf" else {"scores": normed}
    tx = jp.optim.gradual(optax.sgd(1e-2), schedule, scope=scope, **options)
    masks, params, _, _ = ours(tx)
    held = {k: np.ones(s, bool) for k, s in SHAPES.items()}
    for i in range(STEPS):
        if is_due(i, begin, end, every):
            s = ramp(i, 0.9, begin, end)
            if scope == "leaf":
                held = {k: top_k(np.abs(params[k][i]), s) for k in "ab"}
            else:
                with jax.ensure_compile_time_eval():
                    scores = normed({k: jnp.asarray(params[k][i]) for k in SHAPES})
                both = top_k(np.concatenate([np.ravel(scores[k]) for k in "ab"]), s)
                held = {"a": both[: 20 * 31].reshape(20, 31), "b": both[20 * 31 :].reshape(31, 7)}
        for k in "ab":
            np.testing.assert_array_equal(masks[k][i], held[k], err_msg=f"step {i}, {k}")
        assert masks["bias"][i].all()


def test_rigl():
    """Drop by magnitude, grow by gradient, what was just dropped included; no gradient then."""
    end, every = 150, 7
    drop = jp.schedules.cosine(0.0, initial=0.3, end=end)
    tx = jp.optim.rigl(
        optax.sgd(1e-2), 0.8, key=jax.random.key(0), every=every, begin=14, end=end, drop=drop
    )
    masks, params, grads, after = ours(tx)
    held = {k: np.asarray(jp.optim.get_masks(tx.init(PARAMS))[k]) for k in "ab"}
    for k in "ab":
        assert held[k].sum() == max(1, round(held[k].size * 0.2))
    for i in range(STEPS):
        if is_due(i, 14, end, every):
            for k in "ab":
                held[k] = regrown(held[k], params[k][i], grads[k][i], np.float32(drop(i)))
                stays = held[k] & (params[k][i] != 0)
                np.testing.assert_array_equal(after[k][i][stays], params[k][i][stays])
        for k in "ab":
            np.testing.assert_array_equal(masks[k][i], held[k], err_msg=f"step {i}, {k}")
            assert not after[k][i][~held[k]].any()


def regrown(mask, weights, grads, drop):
    density = np.float32(mask.sum()) / np.float32(mask.size)
    scores = np.where(mask, np.abs(weights), -1)
    kept = top_k(scores, np.float32(1) - density * (np.float32(1) - drop))
    scores = np.where(kept, np.inf, np.abs(grads))
    return top_k(scores, np.float32(1) - density)


def test_set_grows_at_random():
    """The same counts as RigL, and every free place as likely as any other."""
    params = {"w": jnp.arange(1.0, 41.0).reshape(5, 8)}

    def once(seed):
        tx = jp.optim.set_(optax.sgd(0.0), 0.5, key=seed, drop=0.5, every=1, begin=1)
        state = tx.init(params)
        first = jp.optim.get_masks(state)["w"]
        for _ in range(2):
            _, state = tx.update(params, state, params)
        return first, jp.optim.get_masks(state)["w"]

    first, masks = jax.jit(jax.vmap(once))(jax.random.split(jax.random.key(0), 600))
    first, masks = np.asarray(first).reshape(600, -1), np.asarray(masks).reshape(600, -1)
    assert (first.sum(1) == 20).all()
    assert (masks.sum(1) == 20).all()
    np.testing.assert_allclose(first.mean(0), 0.5, atol=0.1)
    order = np.where(first, np.arange(40), -1)
    kept = np.argsort(-order, axis=1)[:, :10]  # the ten largest of the first twenty
    assert np.take_along_axis(masks, kept, 1).all()
    free = np.ones_like(first)
    np.put_along_axis(free, kept, False, 1)
    np.testing.assert_allclose(masks[free].mean(), 10 / 30)
    rate = (masks & free).sum(0) / free.sum(0)
    np.testing.assert_allclose(rate, 1 / 3, atol=0.1)


def test_straight_through():
    """Masks of the forward pass are those of the dense weights at that step."""
    begin, end = 5, 100
    tx = jp.optim.straight_through(
        optax.sgd(1e-2), jp.schedules.polynomial(0.8, begin=begin, end=end)
    )
    masks, _, grads, after = ours(tx)
    for i in range(STEPS - 1):
        s = ramp(min(i + 1, end), 0.8, begin, end) if i + 1 >= begin else 0.0
        for k in "ab":
            expected = top_k(np.abs(after[k][i]), s) if s else np.ones(SHAPES[k], bool)
            np.testing.assert_array_equal(masks[k][i], expected, err_msg=f"step {i + 1}, {k}")
    np.testing.assert_allclose(after["a"][0], PARAMS["a"] - 1e-2 * grads["a"][0], rtol=1e-6)


def test_n_of_m_is_dense_until_it_begins():
    pattern = jp.masks.NM(2, 4, axis=-1)
    params = {"w": jnp.asarray(RNG.normal(size=(6, 8)), jnp.float32)}
    for make in (
        lambda s: jp.optim.gradual(optax.sgd(0.0), s, pattern=pattern),
        lambda s: jp.optim.straight_through(optax.sgd(0.0), s, pattern=pattern),
    ):
        tx = make(jp.schedules.one_shot(0.5, at=3))
        state = tx.init(params)
        for i in range(5):
            _, state = tx.update(params, state, params)
            groups = np.asarray(jp.optim.get_masks(state)["w"]).reshape(-1, 4).sum(1)
            assert set(groups) == {4} if i < 2 else set(groups) == {2} or i == 2
        size = np.abs(np.asarray(params["w"])).reshape(-1, 4)
        best = np.argsort(-size, axis=1)[:, :2]
        mask = np.asarray(jp.optim.get_masks(state)["w"]).reshape(-1, 4)
        assert np.take_along_axis(mask, best, 1).all()
