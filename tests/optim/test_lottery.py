"""Lottery tickets: what is pruned, where weights go back to, and going on after a break."""

from itertools import pairwise

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp

X = jax.random.normal(jax.random.key(0), (64, 6))
PARAMS = {
    "a": 0.5 * jax.random.normal(jax.random.key(1), (6, 8)),
    "b": jnp.zeros(8),
    "c": 0.5 * jax.random.normal(jax.random.key(2), (8, 2)),
}
CALLS = []


def network(params, x):
    return jnp.tanh(x @ params["a"] + params["b"]) @ params["c"]


def copied(params):
    return jax.tree.map(jnp.copy, params)


def loss(params):
    return jnp.mean(jnp.square(network(params, X) - jnp.sin(X[:, :2])))


def train(params, masks, start, stop):
    CALLS.append((start, stop))
    tx = jp.masked_update(optax.adam(3e-2), masks)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    steps = (30 if stop is None else stop) - start
    run = jax.jit(lambda c: jax.lax.scan(step, c, None, length=steps)[0], donate_argnums=0)
    return run((params, tx.init(params)))[0]


def test_rounds_prune_what_was_trained_and_go_back():
    CALLS.clear()
    tickets = list(jp.optim.lottery(train, PARAMS, 0.875, rounds=3, rewind=5))
    assert CALLS == [(0, 5), (5, None), (5, None), (5, None), (5, None)]
    chex.assert_trees_all_equal(tickets[0].rewound, train(copied(PARAMS), tickets[0].masks, 0, 5))
    for before, ticket in pairwise(tickets):
        size = np.concatenate([np.abs(before.params[k]).ravel() for k in "ac"])
        was = np.concatenate([np.asarray(before.masks[k]).ravel() for k in "ac"])
        now = np.concatenate([np.asarray(ticket.masks[k]).ravel() for k in "ac"])
        assert now.sum() == was.sum() // 2
        assert not (now & ~was).any()
        assert size[now].min() >= size[was & ~now].max()
        chex.assert_trees_all_equal(ticket.rewound, tickets[0].rewound)
        start = copied(jp.apply_masks(ticket.rewound, ticket.masks))
        again = train(start, ticket.masks, 5, None)
        chex.assert_trees_all_equal(ticket.params, again)
    assert [int(t.round) for t in tickets] == [0, 1, 2, 3]


def test_goes_on_from_a_saved_ticket(tmp_path):
    arguments = {"sparsity": 0.75, "rounds": 2, "rewind": 2, "scope": "leaf"}
    whole = list(jp.optim.lottery(train, PARAMS, **arguments))
    first = next(jp.optim.lottery(train, PARAMS, **arguments))
    jp.export.save(tmp_path / "ticket", first)
    for back in (
        jp.export.load(tmp_path / "ticket", like=first),
        flax.serialization.from_bytes(whole[1], flax.serialization.to_bytes(first)),
    ):
        rest = list(jp.optim.lottery(train, PARAMS, **arguments, resume=back))
        chex.assert_trees_all_equal(rest, whole[1:])
    assert list(jp.optim.lottery(train, PARAMS, **arguments, resume=whole[-1])) == []


def test_tickets_of_units_compact():
    units = jp.structure.Units(jp.trace(network, PARAMS, X))
    *_, last = jp.optim.lottery(train, PARAMS, 0.5, rounds=2, pattern=units)
    fn, small = jp.compact(network, last.params, last.masks, X)
    assert small["a"].shape == (6, 4)
    np.testing.assert_allclose(fn(small, X), network(last.params, X), rtol=1e-4, atol=1e-5)


def test_bad_input():
    find = lambda **k: jp.optim.lottery(train, PARAMS, **{"sparsity": 0.5, "rounds": 2, **k})
    for name, value in (("sparsity", 1.0), ("rounds", 0), ("rewind", -1)):
        with pytest.raises(ValueError, match=name):
            find(**{name: value})
    with pytest.raises(ValueError, match="before there are gradients"):
        find(scores=jp.scores.taylor)
    with pytest.raises(ValueError, match="matches no path"):
        find(where="z")
    ticket = next(find())
    with pytest.raises(ValueError, match="at most rounds"):
        find(resume=ticket._replace(round=jnp.int32(7)))
    other = {**PARAMS, "a": jnp.ones((6, 9))}
    with pytest.raises(ValueError, match="other parameters"):
        jp.optim.lottery(train, other, 0.5, rounds=2, resume=ticket)
    careless = lambda params, masks, start, stop: jax.tree.map(lambda p: p + 1, params)
    with pytest.raises(ValueError, match="pruned weights of leaf 'a' back"):
        list(jp.optim.lottery(careless, PARAMS, 0.5, rounds=1))
    odd = lambda params, masks, start, stop: {"a": params["a"]}
    with pytest.raises(ValueError, match="what train returns"):
        next(jp.optim.lottery(odd, PARAMS, 0.5, rounds=1))
