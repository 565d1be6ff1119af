"""A product block by block over the leading axis of a compressed array.

Codes become numbers one block at a time, in a loop, so that the numbers stay in a processor's cache and
the dense array never exists. Codes that lie several in a byte along the last axis become several parts,
each a strided slice of that axis, and are not put in order.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxprune.quantize import Levels, QuantizedArray, leading_block, parts_of, strided
from jaxprune.runtime._layout import Layout

BLOCK = 2**21  # entries that become numbers at a time

Multiply = Callable[[Array, Levels, Any], Array]
"""`(x, part of the array, extra) -> result`, `x` and result as in `_layout`."""


def sweep(
    x: Array,
    w: QuantizedArray,
    extra: Any,
    layout: Layout,
    multiply: Multiply,
    *,
    block: int | None = BLOCK,
    bits: bool = True,
) -> Array:
    """Adds or joins products with blocks of `w`.

    Args:
      x: (planes, batch…, rows, contracted…).
      w: the array; a packed last axis is no batch axis.
      extra: arrays cut like its scales, of size 1, or as many, or one per group along each axis.
      layout: how they multiply.
      multiply: the product of one part.
      block: entries that become numbers at a time; `None` for all.
      bits: give float8 codes as their bits.
    """
    n = layout.shape[0]
    if bits and w.spec.format == "float8_e4m3fn":  # loops over bits are faster than over float8
        w = replace(w, values=jax.lax.bitcast_convert_type(w.values, jnp.uint8))
    xs = _x_parts(x, w, layout)
    step = n // _groups(w, n)
    size = _block_size(w, n, step, block)

    def one(start: Any, length: int) -> Array:
        piece = w.leading(start, length) if w.ndim > 1 else w
        cut = jax.tree.map(lambda y: leading_block(y, n, start, length), extra)
        sliced = xs
        if 0 not in layout.free and w.ndim > 1:
            axis = layout.x_axis(0)
            sliced = [jax.lax.dynamic_slice_in_dim(y, start, length, axis) for y in xs]
        inner = layout._replace(shape=(length, *layout.shape[1:]))
        return _parts_product(sliced, piece, cut, inner, multiply)

    count, rest = divmod(n, size)
    if count <= 1 and not rest:
        return one(0, n)
    if 0 in layout.contract:
        first = jax.eval_shape(lambda: one(0, size))
        zero = jnp.zeros(first.shape, first.dtype)
        total = jax.lax.fori_loop(0, count, lambda i, y: y + one(i * size, size), zero)
        return total + one(count * size, rest) if rest else total
    axis = layout.out_axis(0)
    _, stacked = jax.lax.scan(lambda _, i: (None, one(i * size, size)), None, jnp.arange(count))
    joined = jnp.moveaxis(stacked, 0, axis)
    shape = list(joined.shape)
    shape[axis : axis + 2] = [count * size]
    joined = joined.reshape(shape)
    return jnp.concatenate([joined, one(count * size, rest)], axis) if rest else joined


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


def _x_parts(x: Array, w: QuantizedArray, layout: Layout) -> list[Array]:
    """`x` for each part of the array."""
    last, per = len(layout.shape) - 1, 8 // w.spec.width
    if per == 1 or last not in layout.contract:
        return [x] * per
    axis = layout.x_axis(last)
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, -x.shape[axis] % per)
    x = jnp.pad(x, pads)
    return [jax.lax.slice_in_dim(x, i, x.shape[axis], per, axis) for i in range(per)]


def _parts_product(
    xs: list[Array], piece: QuantizedArray, extra: Any, layout: Layout, multiply: Multiply
) -> Array:
    parts = parts_of(piece)
    if len(parts) == 1:
        return multiply(xs[0], parts[0], extra)
    last, length, per = len(layout.shape) - 1, piece.length, len(parts)
    if last in layout.contract:
        found = [multiply(y, part, extra) for y, part in zip(xs, parts, strict=True)]
        return sum(found[1:], start=found[0])
    own = lambda i: jax.tree.map(lambda y: strided(y, i, per, length), extra)
    found = [multiply(xs[i], part, own(i)) for i, part in enumerate(parts)]
    joined = jnp.stack(found, -1)  # (…, bytes, parts)
    return joined.reshape(*joined.shape[:-2], -1)[..., :length]
