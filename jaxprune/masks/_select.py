"""Exact selection of the largest scores of a tree: so many entries, ties to the earliest position.

Two ways to count the keys above a threshold, for the same search (`_search`):

* `_block_counter`, for arrays on one device: the data is read as blocks of 16 x 256; the comparisons
  with four thresholds are packed into the four bytes of an int32, and the sum over the 16 rows is a
  plain vectorised integer reduction. (XLA's CPU backend does not vectorise a fused
  compare-and-count: that costs 26 ms on 25 M weights, where this pass costs 7 ms for four
  thresholds.) Small leaves and tails share one padded buffer, so that a tree of hundreds of leaves
  compiles few kernels.
* `_leaf_counter`, for arrays that are (or, being traced, may be) spread over devices: leaf by leaf
  and without reshapes, so that a sharded leaf is never gathered.

Ties at the threshold go to the earliest positions: a second search of the same kind, over positions,
which runs only where some but not all of the ties are kept.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxprune.masks._keys import floating_dtype, from_key, key_range
from jaxprune.masks._search import PROBES, Bracket, CountFn, threshold

_ROWS, _LANES = 16, 256
_BLOCK = _ROWS * _LANES
_BIG = 1 << 18  # leaves of this size are read in place, smaller ones from a shared buffer
_DRAWN = (slice(None, None, 4), slice(None, None, 16))  # the rows and lanes of a sample
_SAMPLED = 1 << 20  # from this size on, a sample guesses the threshold first

# (scores, positions in the leaf, probe, context of the leaf) -> which entries lie above the probe
AboveFn = Callable[[Array, Array, Array, tuple[Array, ...]], Bool[Array, "..."]]


@partial(jax.jit, static_argnames=("by_leaf", "spread"))
def largest(
    scores: Sequence[Float[Array, "..."]],
    keep: Int[Array, " segment"],
    *,
    by_leaf: bool,
    spread: bool,
) -> list[Bool[Array, "..."]]:
    """Masks of the `keep` largest scores, over all leaves together or in each leaf.

    Args:
      scores: arrays of any float dtype and shape, fewer than 2^31 entries per count. A NaN counts
        as `-inf`.
      keep: entries to keep: shape (1,), or (number of leaves,) with `by_leaf`.
      by_leaf: whether each leaf has its own count.
      spread: whether leaves may be sharded over devices.

    Returns:
      One bool array per leaf, of the leaf's shape; exactly `keep` entries are True, ties broken in
      favour of earlier leaves, and of earlier positions (row-major) in a leaf.
    """
    filled = [i for i, leaf in enumerate(scores) if leaf.size]
    masks = [jnp.zeros(leaf.shape, bool) for leaf in scores]
    if filled:
        wanted = keep[np.array(filled)] if by_leaf else keep
        found = _largest([scores[i] for i in filled], wanted.astype(jnp.int32), by_leaf, spread)
        for i, mask in zip(filled, found, strict=True):
            masks[i] = mask
    return masks


def _largest(
    leaves: list[Array], keep: Int[Array, " segment"], by_leaf: bool, spread: bool
) -> list[Array]:
    sizes = np.array([leaf.size for leaf in leaves])
    segment = np.arange(len(leaves)) if by_leaf else np.zeros(len(leaves), int)
    counter = _leaf_counter if spread else _block_counter
    dtype = floating_dtype(leaves)
    probes = None
    if not spread and sizes.sum() >= _SAMPLED:
        probes = _guess(leaves, sizes, keep, segment, dtype)
    start = _everything(sizes, segment, dtype)
    found = threshold(counter(leaves, _above_score), segment, keep, start, probes)
    level = found.high[segment]
    stops = _tie_stops(leaves, sizes, found, segment, keep, counter)
    value, everything = from_key(level), level <= key_range(dtype)[0]
    return [
        everything[i]
        | (leaf.astype(dtype) > value[i])
        | (_ties(leaf, value[i]) & (_positions(leaf.shape) < stops[i]))
        for i, leaf in enumerate(leaves)
    ]


def _above_score(x: Array, _: Array, probe: Array, __: tuple[Array, ...]) -> Bool[Array, "..."]:
    value = from_key(probe)
    return x.astype(value.dtype) > value


def _ties(x: Array, value: Array) -> Bool[Array, "..."]:
    x = x.astype(value.dtype)
    return ~(x > value) & ((x >= value) | (value == -jnp.inf))  # NaN ties with -inf


def _everything(sizes: np.ndarray, segment: np.ndarray, dtype: jnp.dtype) -> Bracket:
    low, high = (jnp.full(segment[-1] + 1, key, key.dtype) for key in key_range(dtype))
    return Bracket(low, high, jnp.asarray(sizes, jnp.int32), jnp.zeros(len(sizes), jnp.int32))


def _guess(
    leaves: list[Array],
    sizes: np.ndarray,
    keep: Int[Array, " segment"],
    segment: np.ndarray,
    dtype: jnp.dtype,
) -> Int[Array, "segment probe"]:
    """First probes: quantiles of a strided sample, five standard deviations about `keep`."""
    sample, owner = _sample(leaves)
    sampled = np.array([_sampled(leaf.size) for leaf in leaves])
    drawn = np.bincount(segment, sampled).astype(np.float32)
    share = keep.astype(jnp.float32) / np.bincount(segment, sizes).astype(np.float32)
    margin = 5.0 * jnp.sqrt(drawn * share * (1.0 - share)) + 2.0
    start = _everything(sampled, segment, dtype)

    def count(probes: Int[Array, "leaf probe"]) -> Int[Array, "leaf probe"]:
        blocks = _count_blocks(
            sample, jnp.zeros(sample.shape, jnp.int32), probes[owner], _above_score, ()
        )
        return jax.ops.segment_sum(blocks, owner, len(leaves))

    def quantile(rank: Array) -> Array:
        wanted = jnp.clip(rank, 0, drawn).astype(jnp.int32)
        return threshold(count, segment, wanted, start).high

    # one below, so that a value that many entries share is caught between two probes
    low = jnp.clip(quantile(share * drawn + margin) - 1, start.low + 1, start.high - 1)
    high = jnp.clip(quantile(share * drawn - margin), low, start.high - 1)
    width = (high - low).astype(jnp.float32)
    inner = [low + (width * part).astype(low.dtype) for part in (0.4, 0.6)]
    return jnp.stack([low, *(jnp.clip(x, low, high) for x in inner), high], axis=1)


def _tie_stops(
    leaves: list[Array],
    sizes: np.ndarray,
    found: Bracket,
    segment: np.ndarray,
    keep: Int[Array, " segment"],
    counter: Callable[..., CountFn],
) -> Int[Array, " leaf"]:
    """Per leaf the position before which entries equal to the threshold are kept.

    The search makes no pass over the data where all or none of a leaf's ties are kept.
    """
    leaf = np.arange(len(leaves))
    above = jax.ops.segment_sum(found.above_high, segment, int(segment[-1]) + 1)
    missing = (keep - above)[segment]
    ties = jnp.where(missing > 0, found.above_low - found.above_high, 0)
    before = jnp.cumsum(ties, dtype=jnp.int32) - ties
    before = before - before[np.searchsorted(segment, segment)]
    wanted = jnp.clip(missing - before, 0, ties)
    last = jnp.asarray(sizes - 1, jnp.int32)
    start = Bracket(jnp.full_like(last, -1), last + 1, ties, jnp.zeros_like(ties))
    value = from_key(found.high[segment])
    early = threshold(counter(leaves, _above_position, value, last), leaf, wanted, start)
    return jnp.where(wanted > 0, last - early.high, 0)


def _above_position(
    x: Array, position: Array, probe: Array, context: tuple[Array, ...]
) -> Bool[Array, "..."]:
    """Entries equal to the leaf's level, counted from the leaf's end."""
    value, last = context
    return _ties(x, value) & (last - position > probe)


def _positions(shape: tuple[int, ...]) -> Int[Array, "..."]:
    """Row-major positions, built axis by axis so that they shard like the leaf."""
    total = jnp.zeros(shape, jnp.int32)
    stride = 1
    for axis in reversed(range(len(shape))):
        total = total + jax.lax.broadcasted_iota(jnp.int32, shape, axis) * stride
        stride *= shape[axis]
    return total


def _leaf_counter(leaves: list[Array], above: AboveFn, *context: Array) -> CountFn:
    """Counts leaf by leaf, in the leaf's own shape."""

    def count(probes: Int[Array, "leaf probe"]) -> Int[Array, "leaf probe"]:
        counts = []
        for i, leaf in enumerate(leaves):
            probe = probes[i].reshape(-1, *[1] * leaf.ndim)
            hits = above(leaf, _positions(leaf.shape), probe, tuple(c[i] for c in context))
            counts.append(jnp.sum(hits, axis=range(1, leaf.ndim + 1), dtype=jnp.int32))
        return jnp.stack(counts)

    return count


def _block_counter(leaves: list[Array], above: AboveFn, *context: Array) -> CountFn:
    """Counts block by block: big leaves in place, the rest from one padded buffer."""
    buffer, base, owner = _buffer(leaves)
    inside = jax.lax.iota(jnp.int32, _BLOCK).reshape(1, _ROWS, _LANES)

    def count(probes: Int[Array, "leaf probe"]) -> Int[Array, "leaf probe"]:
        # tied to the probes, context and positions are no loop invariants: what is computed from
        # them over all the data would otherwise be hoisted out of the search, and stored
        origin = jnp.zeros((), jnp.int32)
        probes, known, origin = jax.lax.optimization_barrier((probes, context, origin))
        own = tuple(c[owner][:, None, None] for c in known)
        at = inside + (base + origin)[:, None, None]
        blocks = _count_blocks(buffer, at, probes[owner], above, own)
        totals = jax.ops.segment_sum(blocks, owner, len(leaves))
        for i, leaf in enumerate(leaves):
            if _whole(leaf.size):
                x = _in_place(leaf)
                at = (jax.lax.iota(jnp.int32, x.size) + origin).reshape(x.shape)
                blocks = _count_blocks(x, at, probes[i], above, tuple(c[i] for c in known))
                totals = totals.at[i].add(jnp.sum(blocks, 0, dtype=jnp.int32))
        return totals

    return count


def _whole(size: int) -> int:
    """How many entries of a leaf are read in place, in whole blocks."""
    return size - size % _BLOCK if size >= _BIG else 0


def _in_place(leaf: Array) -> Float[Array, "block row lane"]:
    return leaf.reshape(-1)[: _whole(leaf.size)].reshape(-1, _ROWS, _LANES)


def _buffer(leaves: list[Array]) -> tuple[Float[Array, "block row lane"], np.ndarray, np.ndarray]:
    """What is not read in place; the position in its leaf where each block begins, and its leaf.

    Each leaf's part is padded to whole blocks, at positions beyond the leaf, with `-inf`: no probe
    counts it.
    """
    dtype = floating_dtype(leaves)
    values, bases, owners = [jnp.zeros(0, dtype)], [np.zeros(0, int)], [np.zeros(0, int)]
    for i, leaf in enumerate(leaves):
        begin = _whole(leaf.size)
        blocks = -(-(leaf.size - begin) // _BLOCK)
        padding = blocks * _BLOCK - (leaf.size - begin)
        values += [leaf.reshape(-1)[begin:].astype(dtype), jnp.full(padding, -jnp.inf, dtype)]
        bases.append(begin + _BLOCK * np.arange(blocks))
        owners.append(np.full(blocks, i))
    return (
        jnp.concatenate(values).reshape(-1, _ROWS, _LANES),
        np.concatenate(bases).astype(np.int32),
        np.concatenate(owners),
    )


def _sample(leaves: list[Array]) -> tuple[Float[Array, "block row lane"], np.ndarray]:
    """Every fourth row and sixteenth lane of all blocks, and the leaf of each block."""
    buffer, _, owner = _buffer(leaves)
    big = [i for i, leaf in enumerate(leaves) if _whole(leaf.size)]
    blocks = [_in_place(leaves[i]).astype(buffer.dtype) for i in big] + [buffer]
    owners = [np.full(_whole(leaves[i].size) // _BLOCK, i) for i in big] + [owner]
    return jnp.concatenate([x[:, _DRAWN[0], _DRAWN[1]] for x in blocks]), np.concatenate(owners)


def _sampled(size: int) -> int:
    """How many of a leaf's entries `_sample` holds, padding left out."""
    inside = np.arange(_BLOCK).reshape(_ROWS, _LANES)[_DRAWN]
    return size // _BLOCK * inside.size + int(np.sum(inside < size % _BLOCK))


def _count_blocks(
    x: Float[Array, "block row lane"],
    position: Int[Array, "block row lane"],
    probes: Int[Array, "*block probe"],
    above: AboveFn,
    context: tuple[Array, ...],
) -> Int[Array, "block probe"]:
    """Entries above each probe, block by block; four counts share an int32, a byte each.

    Over the 16 rows a count stays below 2^8, over the 256 lanes below 2^16, for which the bytes are
    first spread over two integers.
    """
    packed = jnp.zeros(x.shape, jnp.int32)
    for j in range(PROBES):
        hits = above(x, position, probes[..., j].reshape(-1, 1, 1), context)
        packed = packed + (hits.astype(jnp.int32) << (8 * j))
    lanes = jnp.sum(packed, axis=1, dtype=jnp.int32)
    halves = jnp.stack([lanes & 0x00FF00FF, (lanes >> 8) & 0x00FF00FF])
    even, odd = jnp.sum(halves, axis=2, dtype=jnp.int32)
    return jnp.stack([even & 0xFFFF, odd & 0xFFFF, even >> 16, odd >> 16], axis=1)
