"""A product block by block over the leading axis of a compressed array.

Codes become numbers one block at a time, in a loop, so that the numbers stay in a processor's cache and
the dense array never exists. Codes that lie several in a byte along the last axis are read place by
place: what they multiply is put in that order, or the results of each place are joined.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxprune.program import Layout
from jaxprune.quantize import leading_block
from jaxprune.runtime._readers import Part, Reader, leading, reader_of
from jaxprune.sparse import SparseArray

BLOCK = 2**21  # entries that become numbers at a time

Multiply = Callable[[list[Array], Part, Any], list[Array]]
"""`(xs, codes of a block, extra) -> results`, each x and result as in `_layout`."""


def sweep(
    xs: list[Array],
    w: Any,
    extra: Any,
    layout: Layout,
    multiply: Multiply,
    *,
    block: int | None = BLOCK,
    bits: bool = True,
) -> list[Array]:
    """Adds or joins products with blocks of `w`.

    Args:
      xs: arrays (planes, batch…, rows, contracted…).
      w: the array; a packed last axis is no batch axis.
      extra: arrays cut like its scales, of size 1, or as many, or one per group along each axis.
      layout: how they multiply.
      multiply: the product of one block.
      block: entries that become numbers at a time; `None` for all.
      bits: give float8 codes as their bits.
    """
    n = layout.shape[0]
    reader = reader_of(w, bits=bits)
    w, per, last = reader.array, reader.per, len(layout.shape) - 1
    # reordering rows costs about four times as much per entry as unpacking codes in order
    in_order = per > 1 and 4 * sum(x.size for x in xs) > w.size
    if last in layout.contract and not in_order:
        xs = [reader.ordered(x, layout.x_axis(last)) for x in xs]
    size = _block_size(reader, n, block)

    def one(start: Any, length: int) -> list[Array]:
        piece = leading(w, start, length) if w.ndim > 1 else w
        rows = xs
        if 0 not in layout.free and w.ndim > 1:
            axis = layout.x_axis(0)
            rows = [jax.lax.dynamic_slice_in_dim(x, start, length, axis) for x in xs]
        cut = jax.tree.map(lambda y: leading_block(y, n, start, length), extra)
        if last not in layout.free and in_order:
            return multiply(rows, reader.in_order(piece), cut)
        if last not in layout.free:
            return multiply(rows, reader.joined(piece), cut)
        own = lambda i: jax.tree.map(lambda y: reader.own(y, i), cut)
        found = [multiply(rows, p, own(i)) for i, p in enumerate(reader.by_place(piece))]
        if per == 1:
            return found[0]
        return [reader.together(ys) for ys in zip(*found, strict=True)]

    count, rest = divmod(n, size)
    if count <= 1 and not rest:
        return one(0, n)
    if 0 in layout.contract:
        add = lambda ys, more: [a + b for a, b in zip(ys, more, strict=True)]
        zeros = [jnp.zeros(y.shape, y.dtype) for y in jax.eval_shape(lambda: one(0, size))]
        total = jax.lax.fori_loop(0, count, lambda i, ys: add(ys, one(i * size, size)), zeros)
        return add(total, one(count * size, rest)) if rest else total
    axis = layout.out_axis(0)
    _, found = jax.lax.scan(lambda _, i: (None, one(i * size, size)), None, jnp.arange(count))
    joined = []
    for y in found:  # (blocks, …, block, …)
        y = jnp.moveaxis(y, 0, axis)
        joined.append(y.reshape(*y.shape[:axis], count * size, *y.shape[axis + 2 :]))
    if not rest:
        return joined
    tail = one(count * size, rest)
    return [jnp.concatenate([a, b], axis) for a, b in zip(joined, tail, strict=True)]


def _block_size(reader: Reader, n: int, block: int | None) -> int:
    """Entries of the leading axis per block: whole groups, and blocks as equal as can be."""
    w, groups = reader.array, reader.groups
    if block is None or isinstance(w, SparseArray) or w.ndim < 2 or w.size <= block or n == 0:
        return max(n, 1)
    step = n // groups if groups > 1 and n % groups == 0 else 1
    count = -(-w.size // block)
    return min(-(-n // count // step) * step if n // count >= step else step, n)
