"""Networks as others write them: norms in two passes, sums over shares, look-ups and caches by vmap."""

import jax
import jax.numpy as jnp

from tests.structure._more_networks import conv, shapes
from tests.structure._zoo import IMAGE, SEQUENCE, TOKENS, network, normal


def two_pass(x, scale, bias, axis=-1):
    centred = x - x.mean(axis, keepdims=True)
    return centred / jnp.sqrt((centred**2).mean(axis, keepdims=True) + 1e-5) * scale + bias


@network
def norms_in_two_passes_in_a_scan():
    def layer(x, w):
        h = two_pass(x, w["scale"], w["bias"])
        return x + jax.nn.gelu(h @ w["up"]) @ w["down"], jnp.std(x, -1)

    def fn(p, t):
        x, spreads = jax.lax.scan(layer, p["embed"][t], p["layers"])
        return jax.nn.standardize(x) @ p["out"], spreads

    layers = shapes(scale=(3, 12), bias=(3, 12), up=(3, 12, 20), down=(3, 20, 12))
    return fn, shapes(embed=(30, 12), out=(12, 4)) | {"layers": layers}, TOKENS


@network
def shares_and_norms_of_units():
    """Sums over entries that are no zeros when masked, but all alike."""

    def fn(p, x):
        shares = jnp.exp(jnp.tanh(x @ p["gate"] + p["bias"]))
        shares = shares / shares.sum(-1, keepdims=True)
        h = shares * (x @ p["up"])
        scale = 1 + jnp.log(jnp.exp(h).sum(-1, keepdims=True))
        return (h / scale) @ p["down"], jnp.linalg.norm(shares - 0.1, axis=-1)

    return fn, shapes(gate=(10, 12), bias=12, up=(10, 12), down=(12, 3)), SEQUENCE


@network
def group_norm_in_two_passes():
    def fn(p, x):
        for name in ("a", "b"):
            x = conv(x, p[name])
            split = x.reshape(*x.shape[:3], 3, -1)
            centred = split - split.mean((1, 2, 4), keepdims=True)
            split = centred / jnp.sqrt((centred**2).mean((1, 2, 4), keepdims=True) + 1e-5)
            x = jax.nn.relu(split.reshape(x.shape) * p[name + "_scale"])
        return x.mean((1, 2)) @ p["out"]

    return fn, shapes(a=(3, 3, 3, 12), a_scale=12, b=(3, 3, 12, 18), b_scale=18, out=(18, 3)), IMAGE


@network
def standardized_weights():
    """A mean over the inputs of each filter leaves no zeros in the rows of masked inputs."""

    def filters(w):
        centred = w - w.mean((0, 1, 2))
        return centred / jnp.sqrt((centred**2).mean((0, 1, 2)) + 1e-4)

    def fn(p, x):
        x = jax.nn.relu(conv(x, filters(p["a"])) * p["scale"])
        return conv(x, filters(p["b"])).mean((1, 2))

    return fn, shapes(a=(3, 3, 3, 12), scale=12, b=(3, 3, 12, 5)), IMAGE


@network
def looked_up_example_by_example():
    def one(p, tokens):
        def step(cache, item):
            place, token = item
            x = jax.lax.dynamic_index_in_dim(p["embed"], token, keepdims=False)
            cache = jax.lax.dynamic_update_slice(cache, (x @ p["k"])[None], (place, 0))
            scores = jax.nn.softmax(cache @ (x @ p["q"]))
            return cache, (scores @ cache) @ p["out"]

        start = jnp.zeros((len(tokens), p["k"].shape[1]))
        return jax.lax.scan(step, start, (jnp.arange(len(tokens)), tokens))[1]

    fn = lambda p, t: jax.vmap(one, (None, 0))(p, t)
    return fn, shapes(embed=(30, 8), k=(8, 12), q=(8, 12), out=(12, 3)), TOKENS


@network
def rolled_and_flipped_by_length():
    def fn(p, x):
        h = x @ p["a"]
        lengths = jnp.arange(1, len(x) + 1) + 2
        h = jax.vmap(jnp.roll, (0, 0, None))(h, lengths, 0)
        index = (h.shape[1] - 1 - jnp.arange(h.shape[1])[None] + lengths[:, None]) % h.shape[1]
        h = jnp.take_along_axis(h, index[..., None], axis=1)
        h = h + jax.vmap(lambda row, i: row[i])(h, index)
        return jax.nn.relu(h) @ p["b"]

    return fn, shapes(a=(10, 12), b=(12, 3)), SEQUENCE


@network
def kernels_made_for_each_example():
    """Convolutions under vmap, each example with a mixture of kernels of its own."""

    def one(p, x):
        mix = jax.nn.softmax(x.mean((0, 1)) @ p["mix"])
        h = jax.nn.relu(conv(x[None], jnp.einsum("k,k...->...", mix, p["a"])))
        return conv(h, p["b"])[0].mean((0, 1))

    fn = lambda p, x: jax.vmap(one, (None, 0))(p, x)
    return fn, shapes(mix=(3, 2), a=(2, 3, 3, 3, 12), b=(1, 1, 12, 4)), IMAGE


@network
def written_into_whole_rows():
    def fn(p, x):
        h = x @ p["a"]
        table = jnp.zeros((len(x), 9, h.shape[-1])).at[:, jnp.array([1, 4])].add(h[:, :2])
        table = jax.vmap(lambda t, row, i: t.at[i].set(row))(table, h[:, 2], jnp.arange(len(x)))
        return table @ p["b"]

    return fn, shapes(a=(10, 12), b=(12, 3)), normal(3, 6, 10)


@network
def experts_by_ragged_products():
    def fn(p, x):
        x = x.reshape(-1, x.shape[-1]) @ p["in"]
        best = jnp.argmax(x @ p["router"], -1)
        order = jnp.argsort(best)
        sizes = jnp.bincount(best, length=p["router"].shape[-1])
        h = jax.nn.silu(jax.lax.ragged_dot(x[order], p["up"], sizes))
        y = jax.lax.ragged_dot(h, p["down"], sizes)[jnp.argsort(order)]
        return (x + y) @ p["out"]

    return fn, {
        "in": jnp.ones((10, 12)), **shapes(router=(12, 3), up=(3, 12, 20), down=(3, 20, 12), out=(12, 4))
    }, SEQUENCE  # fmt: skip
