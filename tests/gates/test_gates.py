"""Gate functions against closed forms, policies against exact gradients, and skipping against masks."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxprune as jp
import tests.structure._more_networks  # noqa: F401
from jaxprune import gates as g
from tests.structure._zoo import build, normal

X = jnp.linspace(-3, 3, 13)


def test_straight_through_has_the_gradient_of_its_surrogate():
    np.testing.assert_array_equal(g.straight_through(X), (X > 0).astype(jnp.float32))
    slope = lambda f: jax.vmap(jax.grad(f))(X)
    soft = jax.nn.sigmoid(X)
    np.testing.assert_allclose(slope(g.straight_through), soft * (1 - soft), rtol=1e-5)
    identity = slope(lambda x: g.straight_through(x, surrogate="identity"))
    np.testing.assert_allclose(identity, 1.0)
    clipped = slope(lambda x: g.straight_through(x, surrogate="clipped"))
    inside = np.abs(np.asarray(X)) < 0.99
    np.testing.assert_allclose(clipped[inside], 1.0)
    assert float(jnp.abs(slope(lambda x: (x > 0) * 1.0)).max()) == 0  # the naive gate


def test_gumbel_opens_with_the_chance_of_its_logit():
    keys = jax.random.split(jax.random.key(0), 20_000)
    draws = jax.vmap(lambda k: g.gumbel_sigmoid(X, k))(keys)
    assert set(np.unique(draws)) == {0.0, 1.0}
    error = np.sqrt(np.asarray(jax.nn.sigmoid(X) * jax.nn.sigmoid(-X)) / 20_000)
    assert (np.abs(draws.mean(0) - jax.nn.sigmoid(X)) < 4 * error + 1e-4).all()
    soft = g.gumbel_sigmoid(X, keys[0], hard=False, temperature=0.1)
    assert bool(((soft > 0) & (soft < 1)).any())
    slopes = jax.grad(lambda x: jnp.sum(g.gumbel_sigmoid(x, keys[0])))(X)
    assert bool((slopes > 0).all())


def test_hard_concrete_statistics_match_the_closed_form():
    keys = jax.random.split(jax.random.key(1), 20_000)
    for beta in (2 / 3, 0.3):
        draws = np.asarray(jax.vmap(lambda k, beta=beta: g.hard_concrete(X, k, beta=beta))(keys))
        chance = np.asarray(g.expected_l0(X, beta=beta))
        error = np.sqrt(chance * (1 - chance) / 20_000)
        assert (np.abs((draws > 0).mean(0) - chance) < 4 * error + 1e-4).all()
        # the chance of exactly 1: sigmoid((log_alpha - beta log((1 - gamma) / (zeta - 1))))
        ones = np.asarray(jax.nn.sigmoid(X - beta * np.log(1.1 / 0.1)))
        assert (
            np.abs((draws == 1).mean(0) - ones) < 4 * np.sqrt(ones * (1 - ones) / 20_000) + 1e-4
        ).all()
    slopes = jax.grad(lambda x: jnp.sum(g.hard_concrete(x, keys[0])))(X)
    assert bool(jnp.isfinite(slopes).all())
    assert float(slopes.sum()) > 0
    np.testing.assert_array_equal(g.hard_concrete_mean(jnp.array([-9.0, 9.0])), [0.0, 1.0])


def test_semantic_hashing_mixes_soft_and_hard_halves():
    x = jnp.tile(X, (2000, 1))
    draws = np.asarray(g.semantic_hashing(x, jax.random.key(0)))
    binary = ((draws == 0) | (draws == 1)).all(1)
    assert 0.4 < binary.mean() < 0.6
    assert draws.min() >= 0
    assert draws.max() <= 1
    slopes = jax.grad(lambda x: jnp.sum(g.semantic_hashing(x, jax.random.key(0))))(x)
    assert float(slopes.sum()) > 0
    np.testing.assert_array_equal(g.semantic_hashing(X, None), X > 0)


@pytest.mark.parametrize("k", [1, 3, 7])
def test_top_k_keeps_exactly_k_even_of_ties(k):
    x = jnp.array([[1.0, 2.0, 2.0, 2.0, 0.0, -1.0, 5.0], [1.0] * 7])
    found = g.top_k(x + 2, k)
    assert ((found != 0).sum(1) == k).all()
    np.testing.assert_array_equal(found[1] != 0, np.arange(7) < k)
    one = g.top_k(x, k, soft=False)
    assert set(np.unique(one)) <= {0.0, 1.0}
    slopes = jax.grad(lambda x: jnp.sum(g.top_k(x, k, soft=False)))(x)
    np.testing.assert_array_equal(slopes, one)
    np.testing.assert_array_equal(jax.jit(jax.vmap(lambda r: g.top_k(r, k)))(x + 2), found)


def test_costs():
    gates = jnp.array([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    assert float(g.l1_penalty(gates)) == 0.5
    np.testing.assert_allclose(g.target_rate(gates, 0.5, per="gate"), np.mean([0.25, 0.25, 0.0]))
    np.testing.assert_allclose(
        g.target_rate(gates, 0.5, per="example"),
        np.mean([(2 / 3 - 0.5) ** 2, (1 / 3 - 0.5) ** 2]),
        rtol=1e-5,
    )
    lopsided = g.load_balance(jnp.array([[0.9, 0.1], [0.9, 0.1]]), jnp.array([[1.0, 0], [1, 0]]))
    assert float(lopsided) == pytest.approx(1.8)
    assert float(g.weighted_cost({"a": gates}, {"a": 10.0})) == 0.5


# policies


def exact_gradient(logits, reward):
    """Of the expected reward over all actions."""

    def expected(logits):
        total = 0.0
        for action in itertools.product((0.0, 1.0), repeat=len(logits)):
            action = jnp.array(action)
            total += jnp.exp(g.log_prob(logits[None], action[None])[0]) * reward(action)
        return total

    return jax.grad(expected)(logits)


def test_reinforce_is_unbiased_and_a_baseline_calms_it():
    logits = jnp.array([0.3, -0.7, 1.1])
    values = jnp.array([1.0, -2.0, 0.5])
    reward = lambda a: jnp.dot(a, values) - 0.8 * a[0] * a[1] + 3.0
    exact = np.asarray(exact_gradient(logits, reward))
    draws = 20_000
    actions = g.bernoulli(jnp.tile(logits, (draws, 1)), jax.random.key(0))
    rewards = jax.vmap(reward)(actions)

    def each(baseline):
        one = lambda a, r: jax.grad(
            lambda x: -g.reinforce(x[None], a[None], r[None], baseline=baseline)
        )(logits)
        return np.asarray(jax.vmap(one)(actions, rewards))

    plain, calm = each(0.0), each(float(rewards.mean()))
    for found in (plain, calm):
        error = found.std(0) / np.sqrt(draws)
        assert (np.abs(found.mean(0) - exact) < 3 * error).all()
    assert calm.var(0).sum() < 0.5 * plain.var(0).sum()


def test_categorical_policies_and_learning():
    logits, target = jnp.zeros((64, 5)), 3
    key = jax.random.key(0)
    state = None
    for step in range(120):
        actions = jax.random.categorical(jax.random.fold_in(key, step), logits, -1)
        reward = (actions == target).astype(jnp.float32)
        baseline = 0.0 if state is None else state.value
        loss = lambda x, a=actions, r=reward, b=baseline: g.reinforce(
            x, a, r, baseline=b, kind="categorical", entropy_bonus=1e-3
        )
        logits = logits - 64.0 * jax.grad(loss)(logits)
        state = g.moving_baseline(state, reward)
    assert float((logits.argmax(1) == target).mean()) > 0.9
    assert float(state.value) > 0.7


def test_clipped_objective_stops_at_its_bounds():
    logits, actions = jnp.array([[0.0]]), jnp.array([[1.0]])
    old = g.log_prob(logits, actions)
    slope = lambda x, a: jax.grad(lambda x: g.ppo_clip_loss(x, actions, jnp.array([a]), old))(
        jnp.array([[x]])
    )
    assert float(slope(0.0, 1.0)[0, 0]) < 0  # towards the rewarded action
    assert float(slope(3.0, 1.0)[0, 0]) == 0  # but not beyond 1.2 times its old chance
    assert float(slope(3.0, -1.0)[0, 0]) > 0  # back from a punished one, however far
    bounded = g.log_prob(jnp.array([[50.0]]), jnp.array([[0.0]]), alpha=0.8)
    np.testing.assert_allclose(bounded, np.log(0.2), rtol=1e-5)


def test_blockdrop_rewards_and_curriculum():
    actions = jnp.array([[1.0, 1.0, 0.0, 0.0]])
    np.testing.assert_allclose(g.dropped_reward(jnp.ones(1), actions), [0.75])
    stages = [g.curriculum(jnp.zeros((1, 4)), s, every=5)[0].tolist() for s in (0, 5, 10, 99)]
    assert stages == [[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]


# inference that skips


def test_gathered_layers_equal_masked_ones():
    x, kernel, bias = normal(1, 7, 7, 6), normal(3, 3, 6, 10), normal(10)
    inputs, outputs = jnp.array([0, 3, 5]), jnp.array([1, 2, 8, 9])
    few = g.gathered_conv(x, kernel, bias=bias, inputs=inputs, outputs=outputs, strides=(2, 2))
    kept = jnp.zeros(6).at[inputs].set(1)
    full = jax.lax.conv_general_dilated(
        x * kept, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(few, (full + bias)[..., outputs], rtol=1e-4, atol=1e-4)
    again = g.gathered_conv(
        x[..., inputs], kernel, bias=bias, inputs=inputs, outputs=outputs, strides=(2, 2)
    )
    np.testing.assert_allclose(again, few, rtol=1e-5, atol=1e-5)
    spread = g.scattered(few, outputs, 10)
    np.testing.assert_allclose(spread[..., outputs], few)
    assert float(jnp.abs(spread).sum()) == pytest.approx(float(jnp.abs(few).sum()), rel=1e-5)
    y = g.gathered_dense(normal(2, 6), kernel[0, 0], bias=bias, inputs=inputs, outputs=outputs)
    wanted = (normal(2, 6) * kept) @ kernel[0, 0] + bias
    np.testing.assert_allclose(y, wanted[:, outputs], rtol=1e-4, atol=1e-5)


def flops(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def test_less_work_is_compiled():
    x, kernel = normal(1, 16, 16, 32), normal(3, 3, 32, 32)
    index = jnp.arange(8)
    dense = lambda x, k: g.gathered_conv(x, k)
    few = lambda x, k, i: g.gathered_conv(x, k, inputs=i, outputs=i)
    assert flops(few, x, kernel, index) < 0.1 * flops(dense, x, kernel)
    block = lambda x: jnp.tanh(x @ kernel[0, 0]) @ kernel[1, 1]
    tokens, scores = normal(2, 64, 32), normal(2, 64)
    routed = lambda x, s: g.route_top_k(block, x, s, 16)
    assert flops(routed, tokens, scores) < 0.5 * flops(lambda x: x + block(x), tokens)


def test_routing_equals_masking():
    block = lambda x: jnp.sin(3 * x)
    x, scores = normal(2, 6, 4), normal(2, 6, seed=1)
    chosen = g.top_k(scores - scores.min() + 1, 3, soft=False)
    weight = jax.nn.sigmoid(scores) * chosen
    wanted = x + block(x) * weight[..., None]
    found = jax.jit(lambda x, s: g.route_top_k(block, x, s, 3, weight=jax.nn.sigmoid))(x, scores)
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    slopes = jax.grad(lambda s: jnp.sum(g.route_top_k(block, x, s, 3, weight=jax.nn.sigmoid)))(
        scores
    )
    assert ((np.asarray(slopes) != 0) == np.asarray(chosen > 0)).all()
    rows = g.route_top_k(block, x[0], scores[0], 2)
    changed = np.asarray((rows != x[0]).any(1))
    assert set(np.flatnonzero(changed)) == set(np.argsort(-np.asarray(scores[0]))[:2])


def test_blocks_that_are_closed_do_not_run():
    ran = []

    def block(x):
        jax.debug.callback(lambda: ran.append(1))
        return jnp.tanh(x)

    run = jax.jit(lambda gate, x: g.skip_block(gate, block, x))
    x = normal(1, 4)
    np.testing.assert_array_equal(run(jnp.array(0.0), x), x)
    jax.effects_barrier()
    assert ran == []
    np.testing.assert_allclose(run(jnp.array(1.0), x), x + jnp.tanh(x), rtol=1e-6)
    jax.effects_barrier()
    assert ran == [1]


def test_buckets_and_early_exit():
    calls = lambda k: lambda x: jnp.sum(x[:k])
    for count, wanted in ((1, 2.0), (2, 2.0), (5, 8.0), (99, 8.0)):
        assert float(g.in_buckets(calls, jnp.array(count), (2, 4, 8), jnp.ones(8))) == wanted
    stages = [lambda x: x * 2.0] * 3
    heads = [lambda x: jnp.concatenate([x, -x], -1)] * 3
    x = jnp.array([[3.0], [0.1], [0.5], [1.0]])
    logits, left = g.early_exit(stages, heads, x, capacities=[3, 1])
    np.testing.assert_array_equal(left, [0, 2, 1, 1])
    np.testing.assert_allclose(logits[:, 0], x[:, 0] * 2.0 ** (left + 1))


# gates on existing functions


@pytest.mark.parametrize(
    "name",
    [
        "mlp",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in (
                "flatten_cnn",
                "squeeze_excite",
                "grouped_query_attention",
                "glu_and_split",
            )
        ),
    ],
)
def test_attached_gates_equal_masks(name):
    fn, params, x = build(name)
    gated = g.attach(fn, params, x, method="straight_through")
    assert gated.names
    key = jax.random.key(3)
    own = gated.init(key)
    # some gates closed, the same for all examples: what a mask of those units would do
    own = jax.tree.map(lambda p: p, own)
    rng = np.random.default_rng(0)
    shut = {}
    for group, size in zip(gated.names, gated.sizes, strict=True):
        shut[group] = rng.random(size) < 0.4
        shut[group][0] = False
        own[group]["expand"] = {
            "kernel": jnp.zeros_like(own[group]["expand"]["kernel"]),
            "bias": jnp.asarray(np.where(shut[group], -1.0, 1.0), jnp.float32),
        }
    out, gates = jax.jit(lambda p, o, x: gated(p, o, x))(params, own, x)
    for group in gated.names:
        np.testing.assert_array_equal(gates[group][0] == 0, shut[group])
    masks = masks_of(jp.trace(fn, params, x), shut, params)
    wanted = fn(jp.apply_masks(params, masks), x)
    for a, b in zip(jax.tree.leaves(out), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def masks_of(graph, shut, params):
    """Masks of the units that are shut."""
    from jaxprune.graph import places_of

    masks = [np.ones(np.shape(leaf), bool) for leaf in jax.tree.leaves(params)]
    for group in graph.groups:
        for place in places_of(graph, group) if group.name in shut else ():
            gone = place.slices[shut[group.name][place.units]]
            np.moveaxis(masks[place.leaf], place.axis, 0)[gone] = False
    return jax.tree.unflatten(jax.tree.structure(params), [jnp.asarray(m) for m in masks])


def test_attached_gates_train_jointly():
    key = jax.random.key(0)
    x = jax.random.normal(key, (256, 8))
    y = (x[:, 0] * x[:, 1] > 0).astype(jnp.int32)
    params = {"w1": normal(8, 32), "b1": jnp.zeros(32), "w2": normal(32, 2, seed=1)}
    fn = lambda p, x: jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"]
    gated = g.attach(fn, params, x, k=8)
    both = (params, gated.init(key))

    def loss(both):
        logits, gates = gated(*both, x)
        task = optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()
        return task + 1e-3 * sum(g.l1_penalty(v) for v in gates.values())

    tx = optax.adam(1e-2)
    state, first = tx.init(both), loss(both)

    @jax.jit
    def step(both, state):
        updates, state = tx.update(jax.grad(loss)(both), state)
        return optax.apply_updates(both, updates), state

    for _ in range(150):
        both, state = step(both, state)
    _, gates = gated(*both, x)
    assert loss(both) < 0.6 * first
    (found,) = gates.values()
    assert ((found != 0).sum(1) == 8).all()
    assert (
        len(np.unique(np.asarray(found != 0), axis=0)) > 1
    )  # different channels for different inputs


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: g.top_k(X, 14), "more than the 13"),
        (lambda: g.top_k(X, 0), "at least 1"),
        (lambda: g.gumbel_sigmoid(X, jax.random.key(0), temperature=0.0), "above 0"),
        (lambda: g.hard_concrete(X, jax.random.key(0), gamma=0.1), "gamma below 0"),
        (lambda: g.hard_concrete(X, jax.random.key(0), beta=-1.0), "above 0"),
        (lambda: g.target_rate(X, 1.5), r"\[0, 1\]"),
        (lambda: g.weighted_cost({"a": X}, {"b": 1.0}), "'a'"),
        (lambda: g.route_top_k(lambda x: x, normal(2, 4), normal(2), 0), "at least 1"),
        (lambda: g.route_top_k(lambda x: x, normal(2, 4), normal(2), 3), "more than the 2"),
        (lambda: g.route_top_k(lambda x: x, normal(2, 4), normal(3), 1), "first one or two axes"),
        (lambda: g.skip_block(jnp.ones(2), jnp.tanh, normal(2, 3)), "one decision"),
        (lambda: g.opened(X, "topk"), "expected one of"),
        (lambda: g.opened(X, "top_k", k=1.5), "fraction"),
        (lambda: g.reinforce(normal(3, 2), normal(3, 2), normal(2)), "one per example"),
        (lambda: g.in_buckets(lambda k: lambda: k, jnp.array(1), (4, 2)), "ascending"),
        (lambda: g.gathered_dense(normal(2, 5), normal(6, 3)), "the kernel reads 6"),
        (lambda: g.pooled(normal(3)), "channels"),
        (lambda: attached(groups=["w2[1]"]), "cannot be gated.*output"),
        (lambda: attached(groups=["w3[1]"]), "w1"),
        (lambda: attached(k=40), "more than the 16"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def attached(**settings):
    params = {"w1": normal(4, 16), "w2": normal(16, 2)}
    return g.attach(lambda p, x: jnp.tanh(x @ p["w1"]) @ p["w2"], params, normal(3, 4), **settings)


def test_buckets_hold_any_number_of_open_channels():
    rng = np.random.default_rng(0)
    n_in, n_out = 8, 12
    kernel = jnp.asarray(rng.normal(size=(3, 3, n_in, n_out)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=n_out), jnp.float32)
    conv = jax.jit(lambda x, g, i: jp.gates.bucketed_conv(x, kernel, g, bias=bias, inputs=i))
    dense = jax.jit(
        lambda x, g, i: jp.gates.bucketed_dense(x, kernel[0, 0], g, bias=bias, inputs=i)
    )
    for a in range(n_in + 1):
        b = int(rng.integers(0, n_out + 1))
        opened = [np.zeros(n, np.float32) for n in (n_in, n_out)]
        for gates, count in zip(opened, (a, b), strict=True):
            gates[rng.permutation(len(gates))[:count]] = rng.uniform(0.1, 2, count)
        inputs, outputs = (jnp.asarray(gates) for gates in opened)
        x = jnp.asarray(rng.normal(size=(1, 5, 5, n_in)), jnp.float32) * (inputs != 0)
        whole = jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        np.testing.assert_allclose(conv(x, outputs, inputs), (whole + bias) * outputs, atol=1e-4)
        np.testing.assert_allclose(
            dense(x, outputs, inputs), (x @ kernel[0, 0] + bias) * outputs, atol=1e-4
        )
