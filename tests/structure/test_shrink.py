"""What goes with removed units: states that go on, functions traced anew, words about what stays."""

import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

KEYS = jax.random.split(jax.random.key(0), 6)
PARAMS = {
    "up": {"kernel": jax.random.normal(KEYS[0], (6, 8)), "bias": jax.random.normal(KEYS[1], (8,))},
    "down": jax.random.normal(KEYS[2], (8, 3)),
}
X, Y = jax.random.normal(KEYS[3], (16, 6)), jax.random.normal(KEYS[4], (16, 3))
KEEP = jnp.arange(8) % 2 == 0
MASKS = {"up": {"kernel": KEEP[None], "bias": KEEP}, "down": KEEP[:, None]}


def network(p, x):
    return jax.nn.relu(x @ p["up"]["kernel"] + p["up"]["bias"]) @ p["down"]


def features(p, x):
    h = jax.nn.relu(x @ p["up"]["kernel"] + p["up"]["bias"])
    return h @ p["down"], h


def accumulated(p, x):  # a sum that hands masked features on: they stay
    h = jax.nn.relu(x @ p["up"]["kernel"] + p["up"]["bias"])
    return jnp.cumsum(h, -1) @ p["down"]


def train_steps(fn, params, state, tx, count):
    loss = lambda p: jnp.mean((fn(p, X) - Y) ** 2)
    for _ in range(count):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


OPTIMIZERS = {
    "adam": lambda: optax.adam(1e-2),
    "chained": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2)),
    "momentum": lambda: optax.sgd(1e-2, momentum=0.9),
    "lookahead free": lambda: optax.contrib.schedule_free_adamw(1e-2),
    "labels": lambda: optax.multi_transform(
        {"a": optax.adam(1e-2), "b": optax.sgd(1e-2, momentum=0.5)},
        {"up": {"kernel": "a", "bias": "b"}, "down": "a"},
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_goes_on_as_if_nothing_had_been_removed(name):
    """Masked and compacted networks train alike, from the state in the midst of training."""
    tx = jp.masked_update(OPTIMIZERS[name](), MASKS)
    masked = jp.apply_masks(PARAMS, MASKS)
    params, state = train_steps(network, masked, tx.init(masked), tx, 3)
    graph = jp.trace(network, params, X)
    compact_fn, small = jp.compact(network, params, MASKS, X)
    shrunk = jp.structure.shrink(graph, MASKS, state.inner if hasattr(state, "inner") else state)
    own = OPTIMIZERS[name]()
    assert jax.tree.map(jnp.shape, own.init(small)) == jax.tree.map(jnp.shape, _inner(shrunk))
    expected, _ = train_steps(network, params, state, tx, 3)
    found, _ = train_steps(compact_fn, small, _inner(shrunk), own, 3)
    np.testing.assert_allclose(network(expected, X), compact_fn(found, X), atol=1e-5)


def _inner(state):
    """The inner optimizer's state in that of `masked_update`."""
    return next((getattr(state, n) for n in ("inner", "inner_state") if hasattr(state, n)), state)


def test_trees_like_the_parameters_shrink_alike():
    graph = jp.trace(network, PARAMS, X)
    small = jp.compact(network, PARAMS, MASKS, X)[1]
    state = {
        "step": 3,
        "ema": PARAMS,
        "key": jnp.ones(2),
        "keep": MASKS,
        "part": {"down": PARAMS["down"]},
    }
    found = jp.structure.shrink(graph, MASKS, state)
    for a, b in zip(jax.tree.leaves(found["ema"]), jax.tree.leaves(small), strict=True):
        np.testing.assert_array_equal(a, b)
    assert found["step"] == 3
    assert found["key"].shape == (2,)
    assert jax.tree.map(jnp.shape, found["keep"]) == {
        "up": {"kernel": (1, 4), "bias": (4,)}, "down": (4, 1),
    }  # fmt: skip
    assert found["part"]["down"].shape == (4, 3)


def test_what_cannot_shrink_is_refused():
    graph = jp.trace(network, PARAMS, X)
    with pytest.raises(ValueError, match="'rows/up/kernel' has shape .6,., its parameter"):
        jp.structure.shrink(graph, MASKS, {"rows": {"up": {"kernel": jnp.ones(6)}}, **PARAMS})
    with pytest.raises(ValueError, match="one vector of all parameters"):
        jp.structure.shrink(graph, MASKS, optax.flatten(optax.adam(0.1)).init(PARAMS))
    with pytest.raises(ValueError, match="tree"):
        jp.structure.shrink(graph, MASKS, {"other": jnp.ones(3)})


@pytest.mark.parametrize("other", [features, accumulated])
def test_another_function_that_keeps_what_was_removed_computes_the_same(other):
    compact_fn, small = jp.compact(network, PARAMS, MASKS, X)
    expected = other(jp.apply_masks(PARAMS, MASKS), X)
    with pytest.warns(UserWarning, match=r"cannot do without .*up/kernel\[1\] \("):
        found = compact_fn.of(other)(small, X)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_updates_of_another_function_stay_small():
    def step(p, x):
        moved = jax.tree.map(lambda leaf: 0.5 * leaf, p)
        return network(p, x), moved

    compact_fn, small = jp.compact(network, PARAMS, MASKS, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out, moved = compact_fn.of(step, updates=lambda out: out[1])(small, X)
    assert jax.tree.map(jnp.shape, moved) == jax.tree.map(jnp.shape, small)
    np.testing.assert_allclose(out, compact_fn(small, X), atol=1e-6)


def test_compact_functions_can_be_pickled_or_say_how():
    compact_fn, small = jp.compact(network, PARAMS, MASKS, X)
    again, params = pickle.loads(pickle.dumps((compact_fn, jax.device_get(small))))
    np.testing.assert_allclose(again(params, X), compact_fn(small, X), atol=1e-6)
    closed, _ = jp.compact(lambda p, x: network(p, x), PARAMS, MASKS, X)
    with pytest.raises(TypeError, match="fn: .* top level of a module"):
        pickle.dumps(closed)


def test_masked_units_that_stay_are_told():
    with pytest.warns(UserWarning, match=r"4 slices of up/kernel\[1\]: cumsum"):
        jp.compact(accumulated, PARAMS, MASKS, X)
    rows = jax.tree.map(lambda _: True, PARAMS)
    rows["up"]["kernel"] = (jnp.arange(6) > 1)[:, None]
    with pytest.warns(
        UserWarning, match=r"2 slices of up/kernel\[0\]: tied to axis 1 of input args"
    ):
        jp.compact(network, PARAMS, rows, X)


def test_entries_without_units_are_no_request():
    masks = jp.masks.from_scores(jp.scores.magnitude(PARAMS), 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jp.compact(network, PARAMS, masks, X)
        jp.compact(network, PARAMS, MASKS, X)


@pytest.mark.parametrize(
    ("fn", "how", "match"),
    [
        (accumulated, {}, r"cumsum.*up/kernel\[0\]: tied to axis 1 of input args\[0\]"),
        (network, {"ignore": ["up/.*"]}, "ignore="),
    ],
)
def test_no_units_to_remove_is_an_error(fn, how, match):
    graph, scores = jp.trace(fn, PARAMS, X), jp.scores.magnitude(PARAMS)
    with pytest.raises(ValueError, match=f"sparsity: .*{match}"):
        jp.structure.unit_masks(graph, scores, sparsity=0.5, **how)
    masks = jp.structure.unit_masks(graph, scores, sparsity=0.0, **how)
    assert all(np.all(m) for m in jax.tree.leaves(masks))


def test_nothing_removed_is_told():
    graph, scores = jp.trace(network, PARAMS, X), jp.scores.magnitude(PARAMS)
    with pytest.warns(UserWarning, match="nothing goes at 0.5: min_units=8"):
        jp.structure.unit_masks(graph, scores, sparsity=0.5, min_units=8)


def test_inputs_are_named_where_axes_are_tied_to_them():
    fn = lambda p, x, *, bias: x @ p["w"] + bias
    graph = jp.trace(fn, {"w": jnp.ones((6, 8))}, X, bias=jnp.ones(8))
    assert dict(graph.frozen) == {
        ("w", 0): "tied to axis 1 of input args[0]",
        ("w", 1): "tied to axis 0 of input bias",
    }


def test_what_is_not_read_is_frozen_and_weighs_nothing():
    params = {**PARAMS, "mean": jnp.ones(50), "spare": jnp.ones((40, 50))}
    graph = jp.trace(network, params, X)
    reasons = dict(graph.frozen)
    assert reasons["mean", 0] == reasons["spare", 1] == "not read"
    assert [group.size for group in graph.groups] == [8]
    masks = jp.structure.unit_masks(graph, jp.scores.magnitude(params), params=0.5)
    assert np.sum(masks["up"]["bias"]) == 4, "half of what is read"
