"""A search for thresholds that only asks how many keys lie above them.

`f(t) = #{key > t}` falls in `t`; wanted is a `t` with `f(t) <= keep < f(t - 1)`. Each pass over the
data counts at `PROBES` thresholds at once. They are placed by interpolation: in a bracket of `n` keys
the wanted rank is found up to about `sqrt(n)`, so `n` falls to its root with every pass. Where that
fails (heavy ties, gaps) the next pass cuts the bracket into equal parts, which bounds the number of
passes by twice `log_5` of the key range. Several searches ("segments") run side by side, and only
counts leave the data: under a sharding nothing else is communicated.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

PROBES = 4
_MARGINS = np.array([1.5, 0.3, -0.3, -1.5], np.float32)  # in units of sqrt(keys in the bracket)
_PARTS = np.arange(1, PROBES + 1, dtype=np.float32) / (PROBES + 1)
_PROGRESS = 8  # a pass that does not shrink the bracket this many times counts as stalled

CountFn = Callable[[Int[Array, "leaf probe"]], Int[Array, "leaf probe"]]


class Bracket(NamedTuple):
    """Two thresholds per segment, and the number of keys above each, leaf by leaf.

    Summed over a segment, `above_low > keep >= above_high`, or `above_high == keep` where the search
    is over.
    """

    low: Int[Array, " segment"]
    high: Int[Array, " segment"]
    above_low: Int[Array, " leaf"]
    above_high: Int[Array, " leaf"]


class _State(NamedTuple):
    bracket: Bracket
    probes: Int[Array, "segment probe"]
    stalled: Bool[Array, " segment"]


def threshold(
    count: CountFn,
    segment: np.ndarray,
    keep: Int[Array, " segment"],
    start: Bracket,
    probes: Int[Array, "segment probe"] | None = None,
) -> Bracket:
    """The least threshold above which at most `keep` keys lie, or any that leaves exactly `keep`.

    Args:
      count: number of keys of each leaf strictly above each of its probes.
      segment: the segment of each leaf, in ascending order.
      keep: wanted number of keys, between 0 and the segment's size.
      start: a bracket; `above_low` counts all keys above `low`.
      probes: thresholds to count first, where the caller has a guess.

    Returns:
      The final bracket; `high` is the threshold. Where fewer than `keep` keys lie above it, `low` is
      one less, and `above_low - above_high` keys are equal to it.
    """
    everything = keep >= _total(start.above_low, segment)
    bracket = start._replace(
        high=jnp.where(everything, start.low, start.high),
        above_high=jnp.where(everything[segment], start.above_low, start.above_high),
    )
    stalled = jnp.ones(keep.shape, bool)
    if probes is None:
        probes = _place(bracket, segment, keep, stalled)
    state = jax.lax.while_loop(
        lambda state: ~jnp.all(_done(state.bracket, segment, keep)),
        lambda state: _pass(count, segment, keep, state),
        _State(bracket, probes, stalled),
    )
    return state.bracket


def _total(counts: Int[Array, "leaf *probe"], segment: np.ndarray) -> Int[Array, "segment *probe"]:
    """Sums over the leaves of each segment."""
    if segment[-1] + 1 == len(segment):
        return counts
    return jax.ops.segment_sum(counts, segment, int(segment[-1]) + 1)


def _width(bracket: Bracket) -> Array:
    unsigned = jnp.uint64 if bracket.low.dtype == jnp.int64 else jnp.uint32
    return bracket.high.astype(unsigned) - bracket.low.astype(unsigned)  # wraps rightly


def _done(
    bracket: Bracket, segment: np.ndarray, keep: Int[Array, " segment"]
) -> Bool[Array, " segment"]:
    return (_total(bracket.above_high, segment) == keep) | (_width(bracket) <= 1)


def _pass(
    count: CountFn, segment: np.ndarray, keep: Int[Array, " segment"], state: _State
) -> _State:
    old, probes = state.bracket, state.probes
    above = count(probes[segment])
    finished = _done(old, segment, keep)[:, None]
    over = (_total(above, segment) > keep[:, None]) & ~finished
    under = ~over & ~finished
    new = Bracket(
        low=jnp.max(jnp.where(over, probes, old.low[:, None]), axis=1),
        high=jnp.min(jnp.where(under, probes, old.high[:, None]), axis=1),
        above_low=jnp.min(jnp.where(over[segment], above, old.above_low[:, None]), axis=1),
        above_high=jnp.max(jnp.where(under[segment], above, old.above_high[:, None]), axis=1),
    )
    slow = _inside(new, segment) * _PROGRESS > _inside(old, segment)
    stalled = slow & ~state.stalled
    return _State(new, _place(new, segment, keep, stalled), stalled)


def _inside(bracket: Bracket, segment: np.ndarray) -> Float[Array, " segment"]:
    return _total(bracket.above_low - bracket.above_high, segment).astype(jnp.float32)


def _place(
    bracket: Bracket,
    segment: np.ndarray,
    keep: Int[Array, " segment"],
    stalled: Bool[Array, " segment"],
) -> Int[Array, "segment probe"]:
    """Probes strictly inside the bracket: by interpolation, or evenly where that stalled."""
    width = _width(bracket)
    inside = jnp.maximum(_inside(bracket, segment), 1.0)
    rank = (_total(bracket.above_low, segment) - keep).astype(jnp.float32)
    by_rank = (rank[:, None] - jnp.sqrt(inside)[:, None] * _MARGINS) / inside[:, None]
    share = jnp.clip(jnp.where(stalled[:, None], _PARTS, by_rank), 0.0, 1.0)
    floating = jnp.float64 if width.dtype == jnp.uint64 else jnp.float32
    largest = float(np.nextafter(np.asarray(2.0 ** (8 * width.dtype.itemsize), floating), 0))
    offset = jnp.minimum(share * width.astype(floating)[:, None], largest).astype(width.dtype)
    offset = jnp.clip(offset, 1, jnp.maximum(width[:, None], 2) - 1)
    return bracket.low[:, None] + offset.astype(bracket.low.dtype)
