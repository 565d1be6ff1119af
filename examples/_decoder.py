"""A decoder as today's language models have it: RMSNorm, grouped queries, RoPE, SwiGLU, tied embedding.

Written twice: as an nnx module of a list of blocks, and as a scan over stacked blocks. Both are called as
`fn(params, tokens, cache, position) -> (logits, cache)`; without a cache they see the tokens alone.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx


@dataclass(frozen=True)
class Config:
    """Sizes of a decoder. `heads` is a multiple of `kv_heads`, which share keys and values."""

    vocabulary: int = 96
    layers: int = 6
    width: int = 96
    heads: int = 6
    kv_heads: int = 3
    head_dim: int = 16
    neurons: int = 256


def rotated(x, position):
    """RoPE: pairs of features of (batch, time, ..., features) turned by their position."""
    half = x.shape[-1] // 2
    rate = 10_000.0 ** (-jnp.arange(half) / half)
    angle = (position + jnp.arange(x.shape[1]))[:, None] * rate
    angle = angle.reshape(x.shape[1], *[1] * (x.ndim - 3), half)
    a, b = x[..., :half], x[..., half:]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


class Attention(nnx.Module):
    """Causal attention with grouped queries, over a cache where there is one."""

    def __init__(self, c, rngs):
        linear = lambda a, b: nnx.Linear(a, b, use_bias=False, rngs=rngs)
        self.query = linear(c.width, c.heads * c.head_dim)
        self.key = linear(c.width, c.kv_heads * c.head_dim)
        self.value = linear(c.width, c.kv_heads * c.head_dim)
        self.out = linear(c.heads * c.head_dim, c.width)
        self.config = c

    def __call__(self, x, cache, position):
        c, (batch, time, _) = self.config, x.shape
        split = lambda y, *heads: y.reshape(batch, time, *heads, c.head_dim)
        q = rotated(split(self.query(x), c.kv_heads, c.heads // c.kv_heads), position)
        k = rotated(split(self.key(x), c.kv_heads), position)
        v = split(self.value(x), c.kv_heads)
        if cache is not None:
            place = (0, position, 0, 0)
            k = jax.lax.dynamic_update_slice(cache["key"], k, place)
            v = jax.lax.dynamic_update_slice(cache["value"], v, place)
            cache = {"key": k, "value": v}
        logits = jnp.einsum("btkgd,bskd->bkgts", q, k) * c.head_dim**-0.5
        past = jnp.arange(k.shape[1]) <= position + jnp.arange(time)[:, None]
        weights = jax.nn.softmax(jnp.where(past, logits, -1e9))
        y = jnp.einsum("bkgts,bskd->btkgd", weights, v)
        return self.out(y.reshape(batch, time, c.heads * c.head_dim)), cache


class Block(nnx.Module):
    """Attention and a gated MLP, each beside the residual stream."""

    def __init__(self, c, rngs):
        linear = lambda a, b: nnx.Linear(a, b, use_bias=False, rngs=rngs)
        self.norm1, self.norm2 = (nnx.RMSNorm(c.width, rngs=rngs) for _ in range(2))
        self.attention = Attention(c, rngs)
        self.gate, self.up = linear(c.width, c.neurons), linear(c.width, c.neurons)
        self.down = linear(c.neurons, c.width)

    def __call__(self, x, cache, position):
        y, cache = self.attention(self.norm1(x), cache, position)
        x = x + y
        h = self.norm2(x)
        return x + self.down(jax.nn.silu(self.gate(h)) * self.up(h)), cache


class Decoder(nnx.Module):
    """Logits of the next character, and the cache."""

    def __init__(self, c, rngs):
        self.embed = nnx.Embed(c.vocabulary, c.width, rngs=rngs)
        self.blocks = nnx.List([Block(c, rngs) for _ in range(c.layers)])
        self.norm = nnx.RMSNorm(c.width, rngs=rngs)

    def __call__(self, tokens, cache=None, position=0):
        x, new = self.embed(tokens), []
        for i, block in enumerate(self.blocks):
            x, found = block(x, None if cache is None else cache[i], position)
            new.append(found)
        return self.embed.attend(self.norm(x)), None if cache is None else new


def unscanned(c, seed=0):
    """`(fn, params)` of the module; params are plain dicts."""
    graphdef, state = nnx.split(Decoder(c, nnx.Rngs(seed)))

    def fn(params, tokens, cache=None, position=0):
        return nnx.merge(graphdef, params)(tokens, cache, position)

    return fn, nnx.to_pure_dict(state)


def scanned(c, seed=0):
    """`(fn, params)` of the same network as a scan over blocks, whose parameters are stacked."""
    _, params = unscanned(c, seed)
    block, _ = nnx.split(Block(c, nnx.Rngs(0)))
    head, _ = nnx.split(
        nnx.Dict(
            embed=nnx.Embed(c.vocabulary, c.width, rngs=nnx.Rngs(0)),
            norm=nnx.RMSNorm(c.width, rngs=nnx.Rngs(0)),
        )
    )

    def fn(params, tokens, cache=None, position=0):
        ends = nnx.merge(head, {"embed": params["embed"], "norm": params["norm"]})

        def step(x, layer):
            weights, own = layer
            return nnx.merge(block, weights)(x, own, position)

        x, cache = jax.lax.scan(step, ends.embed(tokens), (params["blocks"], cache))
        return ends.embed.attend(ends.norm(x)), cache

    return fn, {**params, "blocks": stacked([*params["blocks"].values()])}


def stacked(trees):
    """Trees of the same shapes as one with a leading axis."""
    return jax.tree.map(lambda *x: jnp.stack(x), *trees)


def empty_cache(c, batch, length, *, scan=False):
    """Keys and values of no token yet, for `length` of them: a list by block, or stacked."""
    zeros = lambda: jnp.zeros((batch, length, c.kv_heads, c.head_dim))
    layers = [{"key": zeros(), "value": zeros()} for _ in range(c.layers)]
    return stacked(layers) if scan else layers
