"""Modules in, smaller modules out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxprune as jp


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.dense = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        h = self.drop(nnx.relu(self.norm(self.conv(x)))).mean(1)
        return self.dense(h + self.attention(h))


@pytest.fixture
def x():
    return jnp.asarray(np.random.default_rng(0).standard_normal((4, 8, 8, 3)), jnp.float32)


@pytest.fixture
def model():
    model = Net(nnx.Rngs(0))
    model.eval()
    return model


def masks_of(model, x, where=()):
    graphdef, state = nnx.split(model)
    graph = jp.trace(lambda s, x: nnx.merge(graphdef, s)(x), state, x)
    scores = jp.scores.magnitude(state)
    return jp.structure.unit_masks(graph, scores, sparsity=0.5, scope="leaf")


def test_smaller_module(model, x):
    masks = masks_of(model, x)
    small = jp.nnx.compact(model, masks, x, verify=True)
    assert isinstance(small, Net)
    assert small.conv.kernel.shape == (3, 3, 3, 4)
    assert small.attention.query.kernel.shape == (4, 1, 2)
    assert model.conv.kernel.shape == (3, 3, 3, 8)
    graphdef, state = nnx.split(model)
    masked = nnx.merge(graphdef, jp.apply_masks(state, masks))
    for batch in (x, x[:3]):
        np.testing.assert_allclose(masked(batch), small(batch), atol=1e-5)
        np.testing.assert_allclose(
            nnx.jit(lambda m, v: m(v))(small, batch), small(batch), atol=1e-5
        )
    again = nnx.clone(small)
    np.testing.assert_allclose(again(x), small(x), atol=1e-6)


def test_train_mode_statistics_and_keys(model, x):
    masks = masks_of(model, x)
    small = jp.nnx.compact(model, masks, x)
    graphdef, state = nnx.split(model)
    masked = nnx.merge(graphdef, jp.apply_masks(state, masks))
    for module in (small, masked):
        module.train()
    np.testing.assert_allclose(masked(x), small(x), atol=1e-5)
    (scale,) = jax.tree.leaves(masks["norm"]["scale"])
    kept = np.flatnonzero(np.asarray(scale))
    np.testing.assert_allclose(masked.norm.mean[...][kept], small.norm.mean[...], atol=1e-6)
    assert int(small.drop.rngs.count[...]) == int(masked.drop.rngs.count[...]) == 1


def test_fine_tuning(model, x):
    small = jp.nnx.compact(model, masks_of(model, x), x)
    small.train()
    optimizer = nnx.Optimizer(small, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean(jnp.square(m(x) - 1)))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(small, optimizer, x)) for _ in range(20)]
    assert losses[-1] < 0.6 * losses[0]
    assert float(jnp.abs(small.norm.mean[...]).max()) > 0


def test_masks_of_parameters_only(model, x):
    masks = jax.tree.map(lambda v: jnp.array(True), nnx.state(model, nnx.Param))
    masks["conv"]["kernel"] = jnp.ones((3, 3, 3, 8), bool).at[0, 0].set(False)
    small = jp.nnx.compact(model, masks, x)
    assert small.conv.kernel.shape == (3, 3, 3, 8)
    assert float(jnp.abs(small.conv.kernel[...][0, 0]).max()) == 0


def test_masks_of_another_module(model, x):
    with pytest.raises(ValueError, match="masks"):
        jp.nnx.compact(model, {"other": {"kernel": jnp.array(True)}}, x)


class Cache(nnx.Module):
    def __init__(self, batch, width):
        self.values = nnx.Variable(jnp.zeros((batch, 6, width)))
        self.place = nnx.Variable(jnp.array(0))


@dataclasses.dataclass
class Settings:  # compared by value and not hashable, as many write theirs
    widths: list


class Cached(nnx.Module):
    """Averages what it has seen, in a module of the caller."""

    def __init__(self, settings, rngs):
        self.settings = nnx.static(settings) if hasattr(nnx, "static") else settings
        self.up = nnx.Linear(4, settings.widths[0], rngs=rngs)
        self.down = nnx.Linear(settings.widths[0], 3, rngs=rngs)
        self.calls = nnx.Variable(jnp.array(0))

    def __call__(self, x, cache, other=None, rngs=None):
        self.calls[...] += 1
        h = nnx.relu(self.up(x))
        start = (0, cache.place[...], 0)
        cache.values[...] = jax.lax.dynamic_update_slice(cache.values[...], h[:, None], start)
        cache.place[...] += 1
        y = self.down(cache.values[...].sum(1))
        return y if rngs is None else y + 0 * jax.random.normal(rngs.noise(), y.shape)


def test_modules_among_the_arguments_are_written_back():
    model, x = Cached(Settings([8]), nnx.Rngs(0)), jax.random.normal(jax.random.key(1), (2, 4))
    keep = jnp.arange(8) % 4 > 0
    masks = {"up": {"kernel": keep[None], "bias": keep}, "down": {"kernel": keep[:, None]}}
    masked = nnx.clone(model)
    nnx.update(
        masked,
        jp.apply_masks(nnx.state(model), jp.nnx._compact._for_state(masks, nnx.state(model))),
    )
    cache, rngs = Cache(2, 8), nnx.Rngs(noise=3)
    small = jp.nnx.compact(model, masks, x, cache, None, rngs=rngs, verify=True)
    with pytest.raises(ValueError, match="6 of 8 entries of axis 2 are left: cut it with"):
        small(x, cache, None, rngs=rngs)
    (_, own, _), given = jp.nnx.small_arguments(small, x, Cache(2, 8), None, rngs=nnx.Rngs(noise=3))
    assert own.values.shape == (2, 6, 6)
    for i in range(3):
        found = small(x * i, own, None, **given)
        expected = masked(x * i, cache, None, rngs=rngs)
        np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(own.values[...], cache.values[...][..., np.asarray(keep)], atol=1e-6)
    assert int(own.place[...]) == int(cache.place[...]) == 3
    assert int(small.calls[...]) == 3
    assert int(given["rngs"].noise.count[...]) == int(rngs.noise.count[...])
    assert own.values.shape == (2, 6, 6)


def test_states_that_are_no_modules():
    class Net(Cached):
        def __call__(self, x, total):
            total = {"h": total["h"] + self.up(x)}
            return self.down(total["h"]), total

    model, x = Net(Settings([8]), nnx.Rngs(0)), jnp.ones((2, 4))
    keep = jnp.arange(8) > 2
    masks = {"up": {"kernel": keep[None], "bias": keep}, "down": {"kernel": keep[:, None]}}
    total = {"h": jnp.zeros((2, 8))}
    how = {"states": {"total": lambda out: out[1]}, "verify": True}
    small = jp.nnx.compact(model, masks, x, total, **how)
    (x, total), _ = jp.nnx.small_arguments(small, x, total)
    _, total = small(x, total)
    y, total = small(x, total)
    assert total["h"].shape == (2, 5)
    assert y.shape == (2, 3)
    with pytest.raises(TypeError, match="Net does not come from jp.nnx.compact"):
        jp.nnx.small_arguments(model, x, total)


class Twice(Cached):
    def __call__(self, x, first, second):
        first.values[...] += nnx.relu(self.up(x))[:, None]
        return self.down(second.values[...].sum(1))


def test_a_module_given_twice_is_one():
    model, x = Twice(Settings([8]), nnx.Rngs(0)), jnp.ones((2, 4))
    keep = jnp.arange(8) % 2 == 0
    masks = {"up": {"kernel": keep[None], "bias": keep}, "down": {"kernel": keep[:, None]}}
    masked, cache = nnx.clone(model), Cache(2, 8)
    masked.up.kernel[...] *= keep
    masked.up.bias[...] *= keep
    small = jp.nnx.compact(model, masks, x, cache, cache)
    (_, own, again), _ = jp.nnx.small_arguments(small, x, cache, cache)
    assert own is again
    np.testing.assert_allclose(small(x, own, again), masked(x, cache, cache), atol=1e-5)
    model.cache = cache
    with pytest.raises(ValueError, match="of argument 0 .* is one of the module itself too"):
        jp.nnx.compact(model, masks, x, cache, Cache(2, 8))
