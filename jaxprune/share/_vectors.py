"""k-means of vectors, and of numbers inside a compiled function."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

_SAMPLE = 64  # points per cluster that a start looks at
_ROWS = 2**14  # points compared with all centers at a time
_QUANTILES = 1024


def nearest(
    x: Float[Array, "n d"], centers: Float[Array, "k d"], weight: Float[Array, "n d"] | None
) -> tuple[Array, Array]:
    """The nearest center of each point, int32 (n,), and its squared distance."""
    n, d = x.shape
    rows = min(_ROWS, max(n, 1))
    pad = [(0, -n % rows), (0, 0)]
    blocks = lambda y: jnp.pad(y, pad).reshape(-1, rows, d)

    def one(block: tuple[Array, ...]) -> tuple[Array, Array]:
        x, w = block[0], block[-1] if weight is not None else jnp.ones_like(block[0])
        squares = jnp.square(centers).T
        least = jnp.sum(w * x * x, -1, keepdims=True) - 2 * (w * x) @ centers.T + w @ squares
        return jnp.argmin(least, -1).astype(jnp.int32), jnp.maximum(jnp.min(least, -1), 0)

    parts = (blocks(x),) if weight is None else (blocks(x), blocks(weight))
    index, distance = jax.lax.map(one, parts)
    return index.reshape(-1)[:n], distance.reshape(-1)[:n]


def updated(
    x: Array, index: Array, centers: Array, weight: Array | None, distance: Array | None = None
) -> Array:
    """Weighted means of clusters; empty ones move to the points that lie farthest, or stay."""
    k = centers.shape[0]
    w = jnp.ones_like(x) if weight is None else weight
    total = jax.ops.segment_sum(w, index, k)
    sums = jax.ops.segment_sum(w * x, index, k)
    means = jnp.where(total > 0, sums / jnp.where(total > 0, total, 1), centers)
    if distance is None or x.shape[0] < k:
        return means
    empty = jax.ops.segment_sum(jnp.ones_like(index), index, k) == 0
    far = x[jax.lax.top_k(distance, k)[1]]
    rank = jnp.clip(jnp.cumsum(empty) - 1, 0, k - 1)
    return jnp.where(empty[:, None], far[rank], means)


@partial(jax.jit, static_argnames=("clusters", "turns"))
def kmeans(
    x: Float[Array, "n d"],
    clusters: int,
    key: jax.Array,
    *,
    weight: Float[Array, "n d"] | None = None,
    turns: int = 25,
) -> tuple[Float[Array, "k d"], Array]:
    """Centers by Lloyd's iteration from a kmeans++ start, and the nearest of each point."""
    first, second = jax.random.split(key)
    n = x.shape[0]
    some = x[jax.random.permutation(first, n)[: _SAMPLE * clusters]]
    keys = jax.random.split(second, clusters)

    def add(i: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        centers, distance = state
        chance = jnp.where(jnp.sum(distance) > 0, distance, 1.0)
        chosen = some[jax.random.categorical(keys[i], jnp.log(chance + 1e-30))]
        centers = centers.at[i].set(chosen)
        return centers, jnp.minimum(distance, jnp.sum(jnp.square(some - chosen), -1))

    start = (jnp.zeros((clusters, x.shape[1]), x.dtype), jnp.full(some.shape[0], jnp.inf))
    centers, _ = jax.lax.fori_loop(0, clusters, add, (start[0], jnp.full_like(start[1], 1e30)))

    def turn(_: Array, centers: Array) -> Array:
        index, distance = nearest(x, centers, weight)
        return updated(x, index, centers, weight, distance)

    centers = jax.lax.fori_loop(0, turns, turn, centers)
    return centers, nearest(x, centers, weight)[0]


def additive(
    x: Float[Array, "n d"],
    clusters: int,
    stages: int,
    key: jax.Array,
    *,
    weight: Float[Array, "n d"] | None = None,
    rounds: int = 4,
) -> tuple[Float[Array, "stages k d"], Array]:
    """Codebooks whose codewords add up: each of what the others leave, in rounds.

    Returns the codebooks and int32 indices (stages, n).
    """
    keys = jax.random.split(key, stages)
    books, indices, rest = [], [], x
    for stage in range(stages):
        book, index = kmeans(rest, clusters, keys[stage], weight=weight)
        books.append(book)
        indices.append(index)
        rest = rest - book[index]
    for _ in range(rounds if stages > 1 else 0):
        for stage in range(stages):
            target = rest + books[stage][indices[stage]]
            book = updated(target, indices[stage], books[stage], weight)
            indices[stage] = nearest(target, book, weight)[0]
            books[stage] = updated(target, indices[stage], book, weight)
            rest = target - books[stage][indices[stage]]
    return jnp.stack(books), jnp.stack(indices)


def assigned(x: Float[Array, "..."], centers: Float[Array, "k"]) -> Array:
    """The nearest of ascending centers, uint8, by comparisons with all middles."""
    middles = (centers[1:] + centers[:-1]) / 2
    return jnp.sum(x[..., None] > middles, -1, dtype=jnp.uint8)


def line_start(x: Float[Array, "n"], clusters: int) -> Float[Array, "k"]:
    """Centers, ascending, as dense as points to the power 1/3 (optimal for many)."""
    order = jnp.sort(x)
    at = jnp.linspace(0, x.shape[0] - 1, _QUANTILES)
    quantiles = order[jnp.round(at).astype(jnp.int32)]
    gaps = jnp.maximum(jnp.diff(quantiles), 0.0)
    mass = jnp.cumsum(gaps ** (2 / 3) + 1e-12)
    wanted = mass[-1] * (jnp.arange(clusters) + 0.5) / clusters
    return jnp.interp(wanted, mass, quantiles[1:])


def line_turn(
    x: Float[Array, "n"], centers: Float[Array, "k"], weight: Float[Array, "n"] | None = None
) -> Float[Array, "k"]:
    """One of Lloyd's turns on a line, centers ascending."""
    index = assigned(x, centers).astype(jnp.int32)
    w = None if weight is None else weight[:, None]
    return jnp.sort(updated(x[:, None], index, centers[:, None], w)[:, 0])
