"""Gated modules of linen and nnx."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

import jaxprune as jp
from tests.structure._zoo import normal

METHODS = ["top_k", "straight_through", "gumbel", "semantic_hashing", "hard_concrete"]


@pytest.mark.parametrize("method", METHODS)
def test_linen_gates_draw_only_in_training(method):
    conv = jp.linen.GatedConv(features=8, kernel_size=(3, 3), method=method, k=3)
    x = normal(4, 6, 6, 5)
    variables = {"params": conv.init(jax.random.key(0), x)["params"]}
    apply = lambda key, **kw: conv.apply(variables, x, rngs={"gates": key}, mutable=["gates"], **kw)
    one, two = apply(jax.random.key(1)), apply(jax.random.key(2))
    draws = method not in ("top_k", "straight_through")
    assert bool(jnp.allclose(one[0], two[0])) != draws
    still = conv.apply(variables, x, deterministic=True)
    np.testing.assert_array_equal(still, conv.apply(variables, x, deterministic=True))
    gates = jax.tree.leaves(one[1]["gates"])
    assert gates[0].shape == (4, 8)
    if draws:
        with pytest.raises(flax.errors.InvalidRngError, match="gates"):
            conv.apply(variables, x)


@pytest.mark.parametrize("shape", [(3, 9, 4), (3, 6, 6, 4), (3, 4, 4, 4, 4), (3, 4)])
def test_any_number_of_spatial_axes(shape):
    x = normal(*shape)
    gate = jp.linen.ChannelGate(features=6, k=2, reduction=64)
    found = gate.apply(gate.init(jax.random.key(0), x), x)
    assert ((found != 0).sum(1) == 2).all()
    rank = len(shape) - 2
    if rank:
        conv = jp.linen.GatedConv(features=6, kernel_size=(3,) * rank, strides=(1,) * rank, k=2)
        y = conv.apply(conv.init(jax.random.key(0), x), x)
        assert ((np.abs(np.asarray(y)).reshape(3, -1, 6).sum(1) != 0).sum(1) <= 2).all()


def test_linen_layers_skip_in_a_row():
    first = jp.linen.GatedConv(features=12, kernel_size=(3, 3), k=5)
    second = jp.linen.GatedConv(features=10, kernel_size=(3, 3), strides=(2, 2), k=0.3)
    x = normal(1, 8, 8, 4)
    one = first.init(jax.random.key(0), x)
    y = jax.nn.relu(first.apply(one, x, deterministic=True))
    two = second.init(jax.random.key(1), y)
    whole = second.apply(two, y, deterministic=True)

    @jax.jit
    def skip(x):
        few, index = first.apply(one, x, method="skip")
        return second.apply(two, jax.nn.relu(few), index, method="skip")

    few, index = skip(x)
    assert few.shape == (1, 4, 4, 3)
    np.testing.assert_allclose(jp.gates.scattered(few, index, 10), whole, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="batch of 2"):
        first.apply(one, normal(2, 8, 8, 4), method="skip")


def test_nnx_layers_skip_and_train():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = jp.nnx.GatedConv(4, 12, (3, 3), k=5, rngs=rngs)
            self.head = jp.nnx.GatedDense(12, 6, k=3, rngs=rngs)

        def __call__(self, x):
            return self.head(jax.nn.relu(self.first(x)).mean((1, 2)))

        def skip(self, x):
            few, index = self.first.skip(x)
            return self.head.skip(jax.nn.relu(few).mean((1, 2)), index)

    net, x = Net(nnx.Rngs(0)), normal(1, 8, 8, 4)
    few, index = net.skip(x)
    np.testing.assert_allclose(jp.gates.scattered(few, index, 6), net(x), rtol=1e-4, atol=1e-5)
    grads = nnx.grad(lambda net: jnp.sum(net(normal(3, 8, 8, 4)) ** 2))(net)
    assert float(jnp.abs(grads["first"]["gate"]["expand"]["kernel"][...]).max()) > 0
    _, seen = nnx.capture(lambda net, x: net(x), nnx.Intermediate)(net, normal(3, 8, 8, 4))
    assert seen["first"]["gate"]["gate"][0].shape == (3, 12)
    with pytest.raises(ValueError, match="batch of 3"):
        net.skip(normal(3, 8, 8, 4))


def test_nnx_gates_draw_only_in_training():
    gate = jp.nnx.ChannelGate(4, 16, method="gumbel", rngs=nnx.Rngs(0, gates=1))
    x = normal(5, 4)
    assert not bool(jnp.array_equal(gate(x), gate(x)))
    np.testing.assert_array_equal(gate(x, deterministic=True), gate(x, deterministic=True))


def test_block_token_and_head_gates():
    x = normal(1, 6, 8)
    block = lambda y: jnp.tanh(y) * 2
    for gate, variables in (
        (jp.linen.BlockGate(), None),
        (jp.nnx.BlockGate(8, rngs=nnx.Rngs(0)), "nnx"),
    ):
        if variables is None:
            variables = gate.init(jax.random.key(0), x, block)
            run = lambda m, gate=gate, v=variables: gate.apply(v, x, block, method=m)
        else:
            run = lambda m, gate=gate: getattr(gate, m)(x, block)
        np.testing.assert_allclose(run("__call__"), run("skip"), rtol=1e-5, atol=1e-6)
    token = jp.nnx.TokenGate(8, capacity=2, rngs=nnx.Rngs(0))
    assert int((token(x, block) != x).any(-1).sum()) == 2
    heads = normal(2, 5, 4, 8)
    gated = jp.nnx.HeadGate(4, 8, k=2, rngs=nnx.Rngs(0))(heads)
    assert ((np.abs(np.asarray(gated)).sum((1, 3)) != 0).sum(1) == 2).all()
    with pytest.raises(ValueError, match="always open"):
        jp.nnx.BlockGate(8, method="top_k", rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="more than the 6"):
        jp.nnx.ChannelGate(4, 6, k=7, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="expected one of"):
        jp.nnx.ChannelGate(4, 6, method="soft", rngs=nnx.Rngs(0))


def _two_stages(stage):
    return [stage(), stage()]


TWINS = {
    "ChannelGate": (
        lambda: jp.linen.ChannelGate(6, k=2),
        lambda r: jp.nnx.ChannelGate(4, 6, k=2, rngs=r), (3, 5, 4), (),
    ),
    "GatedConv": (
        lambda: jp.linen.GatedConv(8, (3, 3), k=4),
        lambda r: jp.nnx.GatedConv(4, 8, (3, 3), k=4, rngs=r), (2, 6, 6, 4), (),
    ),
    "GatedDense": (
        lambda: jp.linen.GatedDense(8, k=4), lambda r: jp.nnx.GatedDense(4, 8, k=4, rngs=r), (2, 4), (),
    ),
    "HeadGate": (
        lambda: jp.linen.HeadGate(k=1), lambda r: jp.nnx.HeadGate(2, 4, k=1, rngs=r), (2, 3, 2, 4), (),
    ),
    "TokenGate": (
        lambda: jp.linen.TokenGate(), lambda r: jp.nnx.TokenGate(4, rngs=r), (2, 6, 4), (jnp.tanh,),
    ),
    "BlockGate": (
        lambda: jp.linen.BlockGate(), lambda r: jp.nnx.BlockGate(4, rngs=r), (2, 4), (jnp.tanh,),
    ),
    "EarlyExit": (
        lambda: jp.linen.EarlyExit(_two_stages(lambda: nn.Dense(4)), classes=3),
        lambda r: jp.nnx.EarlyExit(
            _two_stages(lambda: nnx.Linear(4, 4, rngs=r)), [4, 4], classes=3, rngs=r
        ),
        (2, 4), (),
    ),
}  # fmt: skip


def test_every_module_has_a_twin():
    gates = lambda names: {name for name in names if name[0].isupper() and "Sparse" not in name}
    assert set(TWINS) == gates(jp.linen.__all__)
    assert set(TWINS) == gates(jp.nnx.__all__) - {"ConnectivityIndex"}


@pytest.mark.parametrize("name", TWINS)
def test_weights_carry_over_between_linen_and_nnx(name):
    """The same names and shapes of parameters, and with the same weights the same results."""
    linen, make, shape, block = TWINS[name]
    x = normal(*shape)
    module = linen()
    weights = module.init(jax.random.key(1), x, *block)["params"]
    graph, state = nnx.split(make(nnx.Rngs(0)))
    theirs = nnx.to_pure_dict(state)
    assert jax.tree.map(jnp.shape, weights) == jax.tree.map(jnp.shape, theirs)
    nnx.replace_by_pure_dict(state, weights)
    found = nnx.merge(graph, state)(x, *block, **DETERMINISTIC.get(name, {}))
    wanted = module.apply({"params": weights}, x, *block, **DETERMINISTIC.get(name, {}))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), found, wanted)


DETERMINISTIC = {name: {"deterministic": True} for name in ("BlockGate",)}
