"""Training on the grid: gradients by formula, and conversion that changes nothing."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
import tests.structure._more_networks  # noqa: F401
from tests.structure._zoo import build, normal

fn = lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"]


def problem():
    params = {"a": normal(8, 16), "b": normal(16, 3, seed=1)}
    x = normal(64, 8, seed=2)
    return params, x, fn({k: 0.7 * v + 0.1 for k, v in params.items()}, x)


def test_lsq_gradients_equal_the_paper():
    x = jnp.array([0.3, -0.9, 5.0, -7.0, 0.26])
    how = jp.quantize.InputScale(jnp.float32(0.5), None, 3, "lsq")
    value, (gx, ghow) = jax.value_and_grad(
        lambda x, how: jnp.sum(how.rounded(x) * jnp.arange(1.0, 6.0)), (0, 1)
    )(x, how)
    q, weights = 3, np.arange(1.0, 6.0)
    v = np.asarray(x) / 0.5
    rounded = np.clip(np.round(v), -q, q)
    np.testing.assert_allclose(value, np.sum(rounded * 0.5 * weights), rtol=1e-6)
    inside = np.abs(v) <= q
    np.testing.assert_allclose(gx, np.where(inside, weights, 0))
    slope = np.where(inside, rounded - v, rounded)
    expected = np.sum(slope * weights) / np.sqrt(5 * q)
    np.testing.assert_allclose(ghow.scale, expected, rtol=1e-5)
    # PACT: only what is clipped moves the range
    pact = jp.quantize.InputScale(jnp.float32(0.5), None, 3, "pact")
    ghow = jax.grad(lambda how: jnp.sum(how.rounded(x) * weights))(pact)
    np.testing.assert_allclose(
        ghow.scale, np.sum(np.where(inside, 0, rounded) * weights), rtol=1e-5
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 4},
        {"bits": 2, "group_size": 4},
        {"bits": 4, "symmetric": False},
        {"bits": 8, "method": "absmax"},
        {"dtype": "nf4", "method": "absmax"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "training", [None, "lsq", *(pytest.param(t, marks=pytest.mark.slow) for t in ("pact", "fixed"))]
)
def test_training_improves_and_converting_changes_nothing(settings, training):
    params, x, target = problem()
    _, masks = jp.prune_tree(params, 0.3)
    tree = jp.qat.prepare(params, masks=masks, **settings)
    if training:
        stats = jp.calibrate(fn, params, [x])
        tree = jp.quantize_activations(tree, stats, training=training, symmetric=training != "pact")
    run = jp.compressed(fn)
    loss = lambda t: jnp.mean((run(t, x) - target) ** 2)
    start = loss(tree)
    trainable = jax.tree.map(lambda v: jnp.issubdtype(v.dtype, jnp.floating), tree)
    tx = optax.multi_transform({True: optax.adam(3e-3), False: optax.set_to_zero()}, trainable)
    grad = jax.grad(loss, allow_int=True)

    @jax.jit
    def step(tree, state):
        grads = jax.tree.map(
            lambda g, v: g if g.dtype == v.dtype else jnp.zeros_like(v), grad(tree), tree
        )
        updates, state = tx.update(grads, state, tree)
        return jax.tree.map(
            lambda v, u: v + u if jnp.issubdtype(v.dtype, jnp.floating) else v, tree, updates
        ), state

    state = tx.init(tree)
    for _ in range(60):
        tree, state = step(tree, state)
    assert loss(tree) < 0.9 * start
    small = jp.qat.convert(tree)
    kinds = {type(x).__name__ for x in jax.tree.leaves(small, is_leaf=jp._types.is_compressed)}
    assert kinds == ({"ActivationQuantized"} if training else {"QuantizedArray"})
    off = np.abs(run(small, x) - run(tree, x)) > 2e-3 * np.abs(run(tree, x)).max()
    assert off.mean() < 0.05  # where an activation lies between two levels, rounding may tip over
    for name, mask in masks.items():
        dense = small[name].materialize()
        assert not np.asarray(dense)[~np.asarray(mask)].any()


SLOW = ["residual", "scanned_layers"]


@pytest.mark.parametrize(
    "name", [*(pytest.param(name, marks=pytest.mark.slow) for name in SLOW), "nnx_cnn"]
)
def test_networks(name):
    net, params, x = build(name)
    stats = jp.calibrate(net, params, [(x,)])
    tree = jp.quantize_activations(jp.qat.prepare(params, bits=4), stats, training="lsq")
    run = jp.compressed(net)
    grads = jax.jit(jax.grad(lambda t: jnp.sum(run(t, x) ** 2), allow_int=True))(tree)
    floats = [g for g in jax.tree.leaves(grads) if g.dtype == jnp.float32]
    assert all(bool(jnp.isfinite(g).all()) for g in floats)
    assert sum(bool((g != 0).any()) for g in floats) > 4
    small = jp.qat.convert(tree)
    np.testing.assert_allclose(run(small, x), run(tree, x), rtol=5e-3, atol=5e-3)


def test_random_rounding_is_right_in_the_mean():
    x = jnp.array([0.0, 0.1, -0.37, 1.0])
    draw = lambda key: jp.fake_quantize(x, bits=4, scale=0.25, key=key)
    many = jax.vmap(draw)(jax.random.split(jax.random.key(0), 4000))
    assert set(np.unique(many[:, 1]).tolist()) == {0.0, 0.25}
    np.testing.assert_allclose(many.mean(0), x, atol=0.01)
    with pytest.raises(ValueError, match="equal steps"):
        jp.fake_quantize(x, dtype="nf4", key=jax.random.key(0))
    params = {"w": normal(8, 8), "v": normal(8, 8)}
    rounded = jp.fake_quantize_tree(params, bits=4, key=jax.random.key(1))
    assert (rounded["w"] != rounded["v"]).any()  # a key of its own for each leaf


def test_ranges_follow_training():
    params, x, _ = problem()
    stats = jp.calibrate(fn, params, [x])
    for symmetric in (True, False):
        tree = jp.quantize_activations(params, stats, symmetric=symmetric)
        moved = jax.jit(lambda t, x: jp.qat.observe(fn, t, x, decay=0.0))(tree, 2 * x)
        expected = jp.quantize_activations(
            params, jp.calibrate(fn, params, [2 * x]), symmetric=symmetric
        )
        for name in params:
            np.testing.assert_allclose(
                moved[name].input.scale, expected[name].input.scale, rtol=1e-5
            )
    with pytest.raises(ValueError, match="quantize_activations"):
        jp.qat.observe(fn, params, x)


def test_bad_input():
    params, _, _ = problem()
    with pytest.raises(ValueError, match="no step to learn"):
        jp.qat.prepare(params, dtype="nf4")
    with pytest.raises(ValueError, match="group_size.*'a'"):
        jp.qat.prepare(params, group_size=7, otherwise="error")
    with pytest.raises(ValueError, match="masks"):
        jp.qat.prepare(params, masks={"a": jnp.array(True)})
    with pytest.raises(ValueError, match="method"):
        jp.qat.prepare(params, method="pact")


def trained(tree, x, y, tx, steps=60):
    run = jp.compressed(fn)
    loss = lambda t: jnp.mean((run(t, x) - y) ** 2)

    @jax.jit
    def step(tree, state):
        updates, state = tx.update(jax.grad(loss)(tree), state, tree)
        return optax.apply_updates(tree, updates), state

    state, before = tx.init(tree), loss(tree)
    for _ in range(steps):
        tree, state = step(tree, state)
    assert loss(tree) < before
    return tree, state


OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-2),
    "adamw": lambda: optax.adamw(1e-2, weight_decay=0.1),
    "lion": lambda: optax.lion(1e-3),
    "averages": lambda: optax.chain(optax.adam(1e-2), optax.ema(0.9)),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_stock_optimizers_train_all_that_a_leaf_holds(optimizer, symmetric):
    params, x, y = problem()
    params = {"a": params["a"] + 0.7, "b": params["b"].at[0, 0].set(0.0)}
    _, masks = jp.prune_tree(params, 0.5)
    masks["b"] = masks["b"].at[0, 0].set(True)  # a weight that is kept, and 0
    tree = jp.qat.prepare(params, bits=4, symmetric=symmetric, masks=masks)
    assert all(jnp.issubdtype(v.dtype, jnp.floating) for v in jax.tree.leaves(tree))
    tree, _ = trained(tree, x, y, OPTIMIZERS[optimizer]())
    small, run = jp.qat.convert(tree), jp.compressed(fn)
    wanted = run(tree, x)
    np.testing.assert_allclose(run(small, x), wanted, atol=1e-3 * float(jnp.abs(wanted).max()))
    for name, mask in masks.items():
        assert not np.asarray(tree[name].value)[~np.asarray(mask)].any()
        assert not np.asarray(small[name].materialize())[~np.asarray(mask)].any()
    assert tree["b"].value[0, 0] != 0
    if not symmetric:
        np.testing.assert_array_equal(small["a"].zero_point, tree["a"].zero_point)


def test_learned_steps_stay_positive_at_any_rate():
    params, x, y = problem()
    scales = 10.0 ** -jnp.arange(16.0)[None] * jnp.ones((8, 1))
    params = {"a": params["a"] * scales, "b": params["b"]}
    for settings in ({"bits": 8}, {"bits": 4, "symmetric": False}):
        tree = jp.qat.prepare(params, **settings)
        for rate in (1e-2, 0.3):
            moved, _ = trained(tree, x, y + 10, optax.adam(rate), steps=40)
            for leaf in moved.values():
                assert bool((leaf.scale > 0).all())
                assert bool(jnp.isfinite(leaf.materialize()).all())
                alive = jnp.abs(leaf.materialize()).max(0) > 0
                assert bool(alive.all())


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("training", ["lsq", "pact"])
def test_learned_zero_points_of_inputs_follow_gradients(optimizer, training):
    """Scale and zero point of activations train with the rest; what training gives is what converts."""
    params, x, y = problem()
    tree = jp.qat.prepare(params, bits=4)
    stats = jp.calibrate(fn, params, [x + 2.0])  # another range than training sees
    tree = jp.quantize_activations(tree, stats, training=training, symmetric=False, bits=4)
    tree, _ = trained(tree, x, y, OPTIMIZERS[optimizer]())
    small, run = jp.qat.convert(tree), jp.compressed(fn)
    for leaf in small.values():
        assert float(leaf.input.zero_point) == round(float(leaf.input.zero_point))
        assert leaf.input.range[0] <= leaf.input.zero_point <= leaf.input.range[1]
    wanted = run(tree, x)
    off = np.abs(run(small, x) - wanted) > 2e-3 * np.abs(wanted).max()
    assert off.mean() < 0.05  # where an activation lies between two levels, rounding may tip over


def test_gradients_of_zero_points_are_those_of_lsq_plus():
    x = jnp.array([0.3, -9.0, 5.0, 9.0, 0.26])
    weights = jnp.arange(1.0, 6.0)
    for training in ("lsq", "pact"):
        how = jp.quantize.InputScale(jnp.float32(0.5), jnp.float32(1.2), 3, training)
        grads = jax.grad(lambda how: jnp.sum(how.rounded(x) * weights))(how)
        clipped = (np.asarray(x) / 0.5 + 1 < -4) | (np.asarray(x) / 0.5 + 1 > 3)
        np.testing.assert_allclose(grads.zero_point, -0.5 * np.sum(weights[clipped]), rtol=1e-5)


def test_fixed_input_scales_beside_weights_that_train_are_told():
    params, x, _ = problem()
    stats = jp.calibrate(fn, params, [x])
    with pytest.warns(UserWarning, match=r"input scale of leaf 'a', … is fixed.*training='lsq'"):
        jp.quantize_activations(jp.qat.prepare(params), stats)
    with pytest.warns(UserWarning, match="fixed"):
        jp.qat.prepare(jp.quantize_activations(params, stats))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jp.qat.prepare(jp.quantize_activations(params, stats, training="pact"))
        jp.qat.prepare(jp.quantize_activations(params, mode="dynamic"))
