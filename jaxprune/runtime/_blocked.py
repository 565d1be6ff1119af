"""A product block by block over the leading axis of a compressed array.

Codes become numbers one block at a time, in a loop, so that the numbers stay in a processor's cache and
the dense array never exists. Codes that lie several in a byte along the last axis are read place by
place: what they multiply is split in the same way, or the results of each place are joined.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxprune.program import Layout
from jaxprune.quantize import leading_block
from jaxprune.runtime._decoders import Block, BlockDecoder
from jaxprune.runtime._rules import rule_of

BLOCK = 2**21  # entries that become numbers at a time
FEW_ROWS, FEW_ROWS_BLOCK = (
    4,
    2**18,
)  # products of few rows wait for memory: theirs stay in the L2 cache
PADS_ROWS = jax.__version_info__ < (0, 11)  # XLA decoded anew for each result of a single row

Multiply = Callable[[list[Array], Block, Any], list[Array]]
"""`(xs, codes of a block, extra) -> results`, each x and result as in `_layout`."""


def blocked_product(
    xs: list[Array],
    w: Any,
    extra: Any,
    layout: Layout,
    multiply: Multiply,
    *,
    block: int | None = BLOCK,
) -> list[Array]:
    """Adds or joins products with blocks of `w`.

    Args:
      xs: arrays (parts, batch…, rows, contracted…).
      w: the array; a packed last axis is no batch axis.
      extra: arrays cut like its scales, of size 1, or as many, or one per group along each axis.
      layout: how they multiply.
      multiply: the product of one block.
      block: entries that become numbers at a time; `None` for all.
    """
    n, last = layout.shape[0], len(layout.shape) - 1
    decoder = _decoder(w)
    packing = decoder.packing
    in_free = last in layout.free

    def one(start: Any, length: int) -> list[Array]:
        piece = decoder.leading(decoder.array, start, length) if last else decoder.array
        rows = xs
        if 0 not in layout.free and last:
            axis = layout.x_axis(0)
            rows = [jax.lax.dynamic_slice_in_dim(x, start, length, axis) for x in xs]
        cut = jax.tree.map(lambda y: leading_block(y, n, start, length), extra)
        if packing.per == 1 or not in_free:
            return multiply(rows, decoder.in_order(piece), cut)
        own = lambda i: jax.tree.map(lambda y: packing.own(y, i), cut)
        found = [multiply(rows, part, own(i)) for i, part in enumerate(decoder.places(piece))]
        return [packing.together(list(ys)) for ys in zip(*found, strict=True)]

    size = _block_size(decoder, n, block)
    count, rest = divmod(n, size)
    if count <= 1 and not rest:
        return one(0, n)
    if 0 in layout.contract:
        return _summed(one, count, size, rest)
    return _joined(one, count, size, rest, layout.out_axis(0))


def _decoder(w: Any) -> BlockDecoder:
    make = rule_of(w).decoder
    assert make is not None, type(w)
    return make(w)


def _summed(one: Callable[..., list[Array]], count: int, size: int, rest: int) -> list[Array]:
    add = lambda ys, more: [a + b for a, b in zip(ys, more, strict=True)]
    zeros = [jnp.zeros(y.shape, y.dtype) for y in jax.eval_shape(lambda: one(0, size))]
    total = jax.lax.fori_loop(0, count, lambda i, ys: add(ys, one(i * size, size)), zeros)
    return add(total, one(count * size, rest)) if rest else total


def _joined(
    one: Callable[..., list[Array]], count: int, size: int, rest: int, axis: int
) -> list[Array]:
    _, found = jax.lax.scan(lambda _, i: (None, one(i * size, size)), None, jnp.arange(count))
    joined = []
    for y in found:  # (blocks, …, block, …)
        y = jnp.moveaxis(y, 0, axis)
        joined.append(y.reshape(*y.shape[:axis], count * size, *y.shape[axis + 2 :]))
    if not rest:
        return joined
    tail = one(count * size, rest)
    return [jnp.concatenate([a, b], axis) for a, b in zip(joined, tail, strict=True)]


def _block_size(decoder: BlockDecoder, n: int, block: int | None) -> int:
    """Entries of the leading axis per block: whole groups, and blocks as equal as can be."""
    w, groups = decoder.array, decoder.groups
    if block is None or not decoder.is_cut or w.ndim < 2 or w.size <= block or n == 0:
        return max(n, 1)
    step = decoder.group_length or (n // groups if groups > 1 and n % groups == 0 else 1)
    count = -(-w.size // block)
    return min(-(-n // count // step) * step if n // count >= step else step, n)
