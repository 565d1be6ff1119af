"""Joint training, phases, early exit, export."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import jaxprune as jp
from jaxprune import gates as g
from tests.structure._zoo import normal

X = normal(64, 6)
Y = (X[:, 0] + X[:, 1] ** 2 > 0.5).astype(jnp.int32)
PARAMS = {"w1": normal(6, 24), "b1": jnp.zeros(24), "w2": normal(24, 2, seed=1)}


def network(p, x):
    return jax.nn.relu(x @ p["w1"] + p["b1"]) @ p["w2"]


def task(out, batch):
    return optax.softmax_cross_entropy_with_integer_labels(out, batch[1]).mean()


def test_joint_loss_warms_up_anneals_and_reaches_a_budget():
    gated = g.attach(network, PARAMS, X, method="gumbel")
    seen = []

    def fn(both, x, key=None, temperature=None):
        seen.append(temperature)
        return gated(both["net"], both["gates"], x, key=key, temperature=temperature)

    loss_fn = g.joint_loss(
        fn,
        task,
        lambda gates: jnp.maximum(g.weighted_cost(gates, gated.costs) - 0.4, 0),
        weight=jp.schedules.linear(1.0, end=60),
        temperature=jp.schedules.annealed(0.3, end=120),
    )
    both = {"net": PARAMS, "gates": gated.init(jax.random.key(0))}
    first, aux = loss_fn(both, (X, Y), 0, jax.random.key(0))
    assert float(aux["weight"]) == 0
    assert float(first) == pytest.approx(float(aux["task"]))
    assert float(seen[0]) == 1.0
    tx = optax.adam(2e-2)
    state = tx.init(both)

    @jax.jit
    def step(both, state, number):
        key = jax.random.fold_in(jax.random.key(1), number)
        grads, aux = jax.grad(loss_fn, has_aux=True)(both, (X, Y), number, key)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(both, updates), state, aux

    for number in range(160):
        both, state, aux = step(both, state, number)
    out, gates = gated(both["net"], both["gates"], X)
    assert float(g.weighted_cost(gates, gated.costs)) < 0.55
    assert float(task(out, (X, Y))) < 0.9 * float(first)


def test_phases_hold_updates_and_state():
    params = {"net": jnp.ones(3), "gates": jnp.ones(3)}
    tx = optax.multi_transform(
        {
            "net": jp.optim.phased(optax.adam(0.1), jp.schedules.alternating(1, 2)),
            "gates": jp.optim.phased(optax.adam(0.1), jp.schedules.between(2, end=4)),
        },
        {"net": "net", "gates": "gates"},
    )
    state = tx.init(params)
    grads = jax.tree.map(jnp.ones_like, params)
    update = jax.jit(tx.update)
    moved, counts = [], []
    for _ in range(6):
        updates, state = update(grads, state, params)
        moved.append([bool(jnp.any(updates[k] != 0)) for k in ("net", "gates")])
        counts.append(int(state.inner_states["net"].inner_state.inner_state[0].count))
    assert [n for n, _ in moved] == [True, False, False, True, False, False]
    assert [n for _, n in moved] == [False, False, True, True, False, False]
    assert counts == [1, 1, 1, 2, 2, 2]  # Adam's moments rest with it
    with pytest.raises(TypeError, match="function of the step"):
        jp.optim.phased(optax.sgd(0.1), True)


class Exits(nn.Module):
    """Three dense stages."""

    def setup(self):
        self.net = jp.linen.EarlyExit([nn.Dense(8), nn.Dense(8), nn.Dense(8)], classes=3)

    def __call__(self, x):
        return self.net(x)

    def skip(self, x, **how):
        return self.net.skip(x, **how)


def test_linen_early_exit_trains_and_leaves():
    net, x = Exits(), 3 * normal(7, 5)
    params = net.init(jax.random.key(0), x)
    heads = net.apply(params, x)
    assert [y.shape for y in heads] == [(7, 3)] * 3
    hard = lambda y: optax.softmax_cross_entropy_with_integer_labels(y, jnp.zeros(7, int)).mean()
    loss = lambda p: g.exit_loss(net.apply(p, x), hard)
    grads = jax.grad(loss)(params)
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in jax.tree.leaves(grads))
    skip = jax.jit(lambda p, x: net.apply(p, x, capacities=[4, 2], method="skip"))
    logits, left = skip(params, x)
    assert sorted(np.bincount(left, minlength=3).tolist()) == [2, 2, 3]
    for row, stage in enumerate(left.tolist()):
        np.testing.assert_allclose(logits[row], heads[stage][row], rtol=1e-4, atol=1e-5)
    for threshold, stage in ((0.0, 0), (1.1, 2)):
        out, left = net.apply(params, x[:1], threshold=threshold, method="skip")
        assert int(left) == stage
        np.testing.assert_allclose(out, heads[stage][:1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="batch of 1"):
        net.apply(params, x, threshold=0.5, method="skip")
    with pytest.raises(ValueError, match="one of them"):
        net.apply(params, x, method="skip")


def test_stages_after_the_exit_do_not_run():
    ran = []
    stage = lambda n: lambda x: (jax.debug.callback(lambda: ran.append(n)), x)[1]
    head = lambda x: jnp.stack([x[:, 0], -x[:, 0]], -1)
    run = jax.jit(
        lambda x: g.exit_when_confident([stage(i) for i in range(3)], [head] * 3, x, threshold=0.9)
    )
    jax.block_until_ready(run(jnp.full((1, 2), 5.0)))
    jax.effects_barrier()
    assert ran == [0]


def test_nnx_early_exit():
    rngs = nnx.Rngs(0)
    stages = [nnx.Linear(5, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)]
    net = jp.nnx.EarlyExit(stages, [8, 8], classes=3, rngs=rngs)
    x = normal(4, 5)
    logits, left = net.skip(x, capacities=[1])
    heads = net(x)
    for row, stage in enumerate(left.tolist()):
        np.testing.assert_allclose(logits[row], heads[stage][row], rtol=1e-5)
    grads = nnx.grad(lambda net: g.exit_loss(net(x), jnp.mean))(net)
    assert len(jax.tree.leaves(grads)) == 8
    with pytest.raises(ValueError, match="channels, rngs"):
        jp.nnx.EarlyExit(stages, classes=3)
    with pytest.raises(ValueError, match="one of them"):
        jp.nnx.EarlyExit(stages, [8, 8], rngs=rngs)


@pytest.mark.parametrize(
    "method",
    [
        "straight_through",
        *(pytest.param(m, marks=pytest.mark.slow) for m in ("top_k", "hard_concrete", "bernoulli")),
    ],
)
def test_linen_and_nnx_layers_in_buckets(method):
    x = normal(1, 6, 6, 4)
    conv = jp.linen.GatedConv(10, (3, 3), method=method, k=3)
    params = {"params": conv.init(jax.random.key(0), x)["params"]}
    bias = params["params"]["gate"]["expand"]["bias"]
    params["params"]["gate"]["expand"]["bias"] = bias - 1.5 * (jnp.arange(10) % 2)
    y, gates = jax.jit(lambda p, x: conv.apply(p, x, method="bucketed"))(params, x)
    whole = conv.apply(params, x, deterministic=True)
    np.testing.assert_allclose(y, whole, rtol=1e-4, atol=1e-5)
    own = jp.nnx.GatedDense(10, 6, method=method, k=3, rngs=nnx.Rngs(1, gates=2))
    flat = y.mean((1, 2))
    few, _ = own.bucketed(flat, gates)
    np.testing.assert_allclose(few, own(flat, deterministic=True), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_policies_get_actions_and_logits_from_the_modules():
    conv = jp.linen.GatedConv(8, (3, 3), method="bernoulli")
    x = normal(5, 6, 6, 3)
    params = {"params": conv.init(jax.random.key(0), x)["params"]}

    def loss(params):
        y, seen = conv.apply(
            params, x, rngs={"gates": jax.random.key(1)}, mutable=["gates", "gate_logits"]
        )
        actions, logits = seen["gates"]["gate"]["gate"][0], seen["gate_logits"]["gate"]["gate"][0]
        return g.reinforce(logits, actions, -jnp.mean(y**2, (1, 2, 3))), actions

    grads, actions = jax.grad(loss, has_aux=True)(params)
    assert set(np.unique(actions)) == {0.0, 1.0}
    assert float(jnp.abs(grads["params"]["gate"]["expand"]["bias"]).max()) > 0
    assert float(jnp.abs(grads["params"]["conv"]["kernel"]).max()) == 0  # rewards have no gradient


def test_skipping_can_be_exported():
    conv = jp.linen.GatedConv(8, (3, 3), k=3)
    x = normal(1, 6, 6, 4)
    params = conv.init(jax.random.key(0), x)
    run = jax.jit(lambda p, x: conv.apply(p, x, method="skip"))
    shipped = jax.export.export(run)(params, x)
    few, index = shipped.call(params, x)
    np.testing.assert_allclose(few, run(params, x)[0], rtol=1e-6)
    np.testing.assert_array_equal(index, run(params, x)[1])


def test_annealed_temperatures():
    for kind in ("exponential", "linear", "cosine"):
        schedule = jp.schedules.annealed(0.1, initial=2.0, begin=10, end=20, method=kind)
        values = [float(jax.jit(schedule)(step)) for step in (0, 10, 15, 20, 99)]
        assert values[:2] == pytest.approx([2.0, 2.0])
        assert values[3:] == pytest.approx([0.1, 0.1])
        middle = {"exponential": (2.0 * 0.1) ** 0.5, "linear": 1.05, "cosine": 1.05}[kind]
        assert values[2] == pytest.approx(middle, rel=1e-5)


@pytest.mark.parametrize(
    "call",
    [
        lambda: jp.schedules.annealed(0.0, end=5),
        lambda: jp.schedules.annealed(0.1, end=5, method="steps"),
        lambda: jp.schedules.between(5, end=5),
        lambda: jp.schedules.alternating(0, 1),
        lambda: g.exit_loss([X], jnp.mean, weights=[1.0, 2.0]),
        lambda: g.exit_when_confident([jnp.tanh], [], X, threshold=0.5),
        lambda: g.early_exit([jnp.tanh], [jnp.tanh], X, capacities=[1]),
    ],
)
def test_bad_input(call):
    with pytest.raises(ValueError, match="expected"):
        call()
