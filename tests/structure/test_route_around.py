"""Removing an expert is a logit of minus infinity, however tokens are dispatched."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxprune as jp
from tests.structure._zoo import normal

EXPERTS, GONE, TOKENS = 5, (1, 3), 12
LEFT = np.array([e for e in range(EXPERTS) if e not in GONE])


def hidden(x):
    return jax.nn.silu(x)


def dense(p, x):
    """All experts, weighted by a softmax."""
    share = jax.nn.softmax(x @ p["router"] / 2.0 + p["bias"], -1)
    h = hidden(jnp.einsum("ti,eih->teh", x, p["up"]))
    return jnp.einsum("te,teh,eho->to", share, h, p["down"]), jnp.sum(share**2)


def chosen(p, x, k):
    logits = x @ p["router"] + p["bias"]
    best, index = jax.lax.top_k(logits, k)
    return logits, jax.nn.softmax(best, -1), index


def masked_dense(p, x):
    """All experts; those that are not among the largest have no share."""
    _, share, index = chosen(p, x, 2)
    slots = jax.nn.one_hot(index, p["up"].shape[0])
    h = hidden(jnp.einsum("ti,eih->teh", x, p["up"]))
    return jnp.einsum("tk,tke,teh,eho->to", share, slots, h, p["down"]), index


def capacity(p, x):
    """Slots of each expert, filled in order (Switch); with the load-balancing loss."""
    probabilities = jax.nn.softmax(x @ p["router"] + p["bias"], -1)
    best = jnp.argmax(probabilities, -1)
    taken = jax.nn.one_hot(best, p["up"].shape[0], dtype=jnp.int32)
    place = jnp.cumsum(taken, 0) * taken - 1
    dispatch = jax.nn.one_hot(place, 4) * taken[..., None]
    inside = hidden(jnp.einsum("tec,ti,eih->ech", dispatch, x, p["up"]))
    gate = jnp.sum(probabilities * taken, -1)
    y = jnp.einsum("tec,ech,eho,t->to", dispatch, inside, p["down"], gate)
    balance = jnp.sum(taken.mean(0) * probabilities.mean(0))
    return y, balance


def gathered(p, x):
    """The weights of the chosen experts, looked up for each token."""
    _, share, index = chosen(p, x, 2)
    h = hidden(jnp.einsum("ti,tkih->tkh", x, p["up"][index]))
    return jnp.einsum("tk,tkh,tkho->to", share, h, p["down"][index]), share


def ragged(p, x):
    """Tokens sorted by expert, and products of groups of rows."""
    logits, share, index = chosen(p, x, 2)
    owner = index.reshape(-1)
    order = jnp.argsort(owner)
    sizes = jnp.bincount(owner, length=p["up"].shape[0])
    rows = jnp.repeat(x, 2, 0)[order]
    h = hidden(jax.lax.ragged_dot(rows, p["up"], sizes))
    y = jax.lax.ragged_dot(h, p["down"], sizes)[jnp.argsort(order)]
    balance = jax.nn.softmax(logits, -1).mean(0) @ (sizes / sizes.sum())
    return jnp.einsum("tk,tko->to", share, y.reshape(len(x), 2, -1)), balance


def scanned(p, x):
    """Layers of experts in a scan."""

    def layer(x, p):
        return x + jnp.tanh(masked_dense(p, x)[0]), None

    return jax.lax.scan(layer, x, p)[0]


def softmax_first(p, x):
    """The largest two shares (Mixtral, before they add up to 1)."""
    share, index = jax.lax.top_k(jax.nn.softmax(x @ p["router"] + p["bias"]), 2)
    share = share / share.sum(-1, keepdims=True)
    h = hidden(jnp.einsum("ti,tkih->tkh", x, p["up"][index]))
    return jnp.einsum("tk,tkh,tkho->to", share, h, p["down"][index])


def noisy(p, x):
    """Noisy top-k gating; the noise of one key."""
    noise = jax.random.normal(jax.random.key(0), (len(x), p["up"].shape[0]))
    # a smaller mixture draws other noise: the tests compare it with none
    best, index = jax.lax.top_k(x @ p["router"] + 0.0 * noise, 2)
    weights = jnp.take_along_axis(jax.nn.sigmoid(x @ p["router"]), index, -1)
    h = hidden(jnp.einsum("ti,tkih->tkh", x, jnp.take(p["up"], index, axis=0)))
    return jnp.einsum("tk,tkh,tkho->to", weights + best, h, jnp.take(p["down"], index, axis=0))


DISPATCHES = [dense, masked_dense, capacity, gathered, ragged, scanned, softmax_first, noisy]


def parameters():
    return {
        "router": normal(6, EXPERTS, seed=1),
        "bias": normal(EXPERTS, seed=2),
        "up": normal(EXPERTS, 6, 8, seed=3),
        "down": normal(EXPERTS, 8, 6, seed=4),
    }


AXES = {"router": -1, "bias": -1, "up": -3, "down": -3}


def problem(fn):
    """Parameters, and inputs."""
    params = parameters()
    if fn is noisy:
        del params["bias"]
    if fn is scanned:
        params = {k: jnp.stack([v, 0.5 * v[::-1]]) for k, v in params.items()}
    return params, normal(TOKENS, 6)


def smaller(params):
    """The same with fewer experts, written by hand."""
    return {k: jnp.take(v, LEFT, AXES[k]) for k, v in params.items()}


def masks_of(params, keep=None):
    keep = jnp.asarray(np.isin(np.arange(EXPERTS), LEFT)) if keep is None else keep
    return {k: keep.reshape(keep.shape + (1,) * (-AXES[k] - 1)) for k in params}


@pytest.mark.parametrize("fn", DISPATCHES, ids=lambda fn: fn.__name__)
def test_removed_experts_are_those_of_a_smaller_mixture(fn):
    params, x = problem(fn)
    masks = masks_of(params)
    routed = jp.structure.route_around(fn, "router")
    expected = jax.jit(fn)(smaller(params), x)
    masked = jax.jit(routed)(jp.apply_masks(params, masks), x)
    compact_fn, small = jp.compact(routed, params, masks, x, verify=True)
    assert {k: v.shape for k, v in small.items()} == {
        k: v.shape for k, v in smaller(params).items()
    }
    found = jax.jit(compact_fn)(small, x)
    for a, b, c in zip(*map(jax.tree.leaves, (found, masked, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_allclose(a, c, atol=1e-5)
        else:  # experts keep their numbers
            np.testing.assert_array_equal(a, LEFT[np.asarray(c)])
    whole = jax.jit(routed)(params, x)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(fn(params, x)), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_other_batches_gradients_and_units():
    params, x = parameters(), normal(TOKENS, 6)
    routed = jp.structure.route_around(ragged, "router")
    graph = jp.trace(routed, params, x)
    (group,) = [g for g in graph.groups if ("router", 1) in g.members]
    assert {*group.members} == {("router", 1), ("bias", 0), ("up", 0), ("down", 0)}
    assert group.size == EXPERTS
    masks = jp.structure.unit_masks(
        graph, jp.scores.magnitude(params), sparsity=0.4, ignore=[
            g.name for g in graph.groups if g.name != group.name
        ]
    )  # fmt: skip
    compact_fn, small = jp.compact(routed, params, masks, x)
    other = normal(5, 6, seed=9)
    masked = jp.apply_masks(params, masks)
    np.testing.assert_allclose(compact_fn(small, other)[0], routed(masked, other)[0], atol=1e-5)
    loss = lambda f: lambda p: jnp.sum(f(p, x)[0] ** 2)
    big, little = jax.grad(loss(routed))(masked), jax.grad(loss(compact_fn))(small)
    keep = np.asarray(masks["bias"])
    np.testing.assert_allclose(little["up"], big["up"][keep], atol=1e-4)
    np.testing.assert_allclose(little["router"], big["router"][:, keep], rtol=1e-4)
    batch = jnp.stack([x, x[::-1]])
    mapped = jax.lax.map(lambda x: compact_fn(small, x)[0], batch)
    np.testing.assert_allclose(mapped[0], compact_fn(small, x)[0], atol=1e-5)


def test_without_routing_experts_stay_and_say_why():
    params, x = parameters(), normal(TOKENS, 6)
    for fn in (dense, capacity, gathered, ragged):
        graph = jp.trace(fn, params, x)
        why = dict(graph.frozen)[("router", 1)]
        assert "differ when masked" in why or "ranked" in why, (fn, why)
        with pytest.warns(UserWarning, match="masked, but kept"):
            _, small = jp.compact(fn, params, masks_of(params), x)
        assert small["up"].shape == params["up"].shape


def test_what_is_no_removal_stays():
    params, x = parameters(), normal(TOKENS, 6)
    cases = {
        "soft-capped": lambda p, x: jax.nn.softmax(jnp.tanh(x @ p["router"])) @ p["bias"],
        "zero for some": lambda p, x: jax.nn.softmax(jax.nn.relu(x @ p["router"])) @ p["bias"],
        "unknown temperature": lambda p, x: jax.nn.softmax(x @ p["router"] * p["bias"][:1]),
    }
    for name, fn in cases.items():
        routed = jp.structure.route_around(fn, "router")
        graph = jp.trace(routed, params, x)
        assert ("router", 1) in dict(graph.frozen), name


def test_bad_routers():
    params, x = parameters(), normal(TOKENS, 6)
    with pytest.raises(ValueError, match="matches no path"):
        jp.structure.route_around(dense, "gate")(params, x)
    with pytest.raises(ValueError, match="no matrix product.*'bias'"):
        jp.structure.route_around(dense, "bias")(params, x)
    with pytest.raises(ValueError, match="expected one axis"):
        jp.structure.route_around(dense, "up")(params, x)
    one = masks_of(params, jnp.arange(EXPERTS) == 2)
    routed = jp.structure.route_around(gathered, "router")
    compact_fn, small = jp.compact(routed, params, one, x)
    with pytest.raises(ValueError, match="2 largest of 1"):
        compact_fn(small, x)
    zero = {**params, "router": jnp.zeros_like(params["router"])}
    routed = jp.structure.route_around(dense, "router")
    np.testing.assert_allclose(routed(zero, x)[0], dense(zero, x)[0], atol=1e-6)
