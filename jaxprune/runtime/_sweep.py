"""A product block by block over the leading axis of a compressed array.

Codes become numbers one block at a time, in a loop, so that the numbers stay in a processor's cache and
the dense array never exists. Codes that lie several in a byte along the last axis are read place by
place: what they multiply is put in that order, or the results of each place are joined.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxprune.graph import Layout
from jaxprune.quantize import (
    Levels,
    QuantizedArray,
    by_place,
    joined_levels,
    leading_block,
    levels_by_place,
    strided,
)

BLOCK = 2**21  # entries that become numbers at a time

Multiply = Callable[[list[Array], Levels, Any], list[Array]]
"""`(xs, codes of a block, extra) -> results`, each x and result as in `_layout`."""


def sweep(
    xs: list[Array],
    w: QuantizedArray,
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
    if bits and w.spec.format == "float8_e4m3fn":  # loops over bits are faster than over float8
        w = replace(w, values=jax.lax.bitcast_convert_type(w.values, jnp.uint8))
    last, per = len(layout.shape) - 1, 8 // w.spec.width
    # reordering rows costs about four times as much per entry as unpacking codes in order
    in_order = per > 1 and 4 * sum(x.size for x in xs) > w.size
    if last in layout.contract and not in_order:
        xs = [by_place(x, per, layout.x_axis(last)) for x in xs]
    step = n // _groups(w, n)
    size = _block_size(w, n, step, block)

    def one(start: Any, length: int) -> list[Array]:
        piece = w.leading(start, length) if w.ndim > 1 else w
        rows = xs
        if 0 not in layout.free and w.ndim > 1:
            axis = layout.x_axis(0)
            rows = [jax.lax.dynamic_slice_in_dim(x, start, length, axis) for x in xs]
        cut = jax.tree.map(lambda y: leading_block(y, n, start, length), extra)
        if last not in layout.free and in_order:
            return multiply(
                rows, Levels(piece.levels(), piece.scale, piece.zero_point, w.spec), cut
            )
        if last not in layout.free:
            return multiply(rows, joined_levels(piece), cut)
        own = lambda i: jax.tree.map(lambda y: strided(y, i, per, w.length), cut)
        found = [multiply(rows, p, own(i)) for i, p in enumerate(levels_by_place(piece))]
        if per == 1:
            return found[0]
        return [_interleaved(ys, w.length) for ys in zip(*found, strict=True)]

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


def _interleaved(ys: tuple[Array, ...], length: int) -> Array:
    """Results of each place in the bytes, in order."""
    joined = jnp.stack(ys, -1)  # (…, bytes, places)
    return joined.reshape(*joined.shape[:-2], -1)[..., :length]


def _groups(w: QuantizedArray, n: int) -> int:
    count = w.scale.shape[0] if w.ndim else 1
    return count if count not in (0, 1) and n % count == 0 else 1


def _block_size(w: QuantizedArray, n: int, step: int, block: int | None) -> int:
    """Entries of the leading axis per block: whole groups, and blocks as equal as can be."""
    if block is None or w.ndim < 2 or w.size <= block or n == 0:
        return max(n, 1)
    step = 1 if step == n else step
    count = -(-w.size // block)
    return min(-(-n // count // step) * step if n // count >= step else step, n)
