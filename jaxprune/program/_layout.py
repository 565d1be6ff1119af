"""Which axes of a compressed array a product sums over, and the other operand in a standard order.

A product is computed as `dot_general(x, w)` with `w` as it is stored and `x` of shape
(planes, batch…, rows, contracted…): rows are all free axes of `x` in one. Its result is
(batch…, planes, rows, free…), free axes of `w` as they are stored.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxprune._trees import is_few
from jaxprune.program._program import Operation
from jaxprune.program._track import Tracked

_TINY = 1 << 14
"""Multiply-adds up to which int8 operands are widened: XLA for CPU (JAX 0.10) makes invalid code of
smaller int8 products within loops."""


class Layout(NamedTuple):
    """A product with a compressed array.

    Attributes:
      shape: the array's, as it is stored.
      batch, contract, free: its axes, as they are stored; `free` ascends.
      sizes: of the free axes of the other operand.
    """

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    contract: tuple[int, ...]
    free: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def rows(self) -> int:
        """Rows of the other operand, for each entry of the batch axes; symbolic where a size is."""
        return math.prod(self.sizes)

    @property
    def depth(self) -> int:
        """Products in each sum."""
        return math.prod(self.shape[i] for i in self.contract)

    @property
    def columns(self) -> tuple[int, ...]:
        """Shape of the free axes."""
        return tuple(self.shape[i] for i in self.free)

    def of(self, codes: Any) -> "Layout":
        """The same product with an array of another size."""
        return self._replace(shape=tuple(codes.shape))

    def x_axis(self, axis: int) -> int:
        """Where a contracted or batch axis of the array lies in `x`, its planes counted."""
        if axis in self.batch:
            return 1 + self.batch.index(axis)
        return 2 + len(self.batch) + self.contract.index(axis)

    def out_axis(self, axis: int) -> int:
        """Where a free or batch axis lies in the result."""
        if axis in self.batch:
            return self.batch.index(axis)
        return len(self.batch) + 2 + self.free.index(axis)

    def dot(self, x: jax.Array, w: jax.Array, dtype: Any) -> jax.Array:
        """The product of standard `x` with `w` as it is stored, accumulated in `dtype`."""
        if dtype == jnp.int32 and is_few(x.size * int(np.prod(self.columns)), _TINY):
            x, w = x.astype(jnp.int32), w.astype(jnp.int32)
        batch, contract = range(1, 1 + len(self.batch)), range(2 + len(self.batch), x.ndim)
        if not self.batch:  # two plain matrices suit compilers best
            flat = x.reshape(-1, *x.shape[2:])
            dims = ((tuple(range(1, flat.ndim)), self.contract), ((), ()))
            y = jax.lax.dot_general(flat, w, dims, preferred_element_type=dtype)
            return y.reshape(*x.shape[:2], *y.shape[1:])
        dims = ((tuple(contract), self.contract), (tuple(batch), self.batch))
        return jax.lax.dot_general(x, w, dims, preferred_element_type=dtype)


def layout_of(operation: Operation, tracked: Tracked, x: Any, side: int) -> Layout:
    """How a `dot_general` with `tracked` on `side` (0 or 1) reads it."""
    contract, batch = operation.params["dimension_numbers"]
    rank = len(tracked.order)
    stored = lambda axes: tuple(tracked.order[i] + rank for i in axes)
    used = (*contract[side], *batch[side])
    free = sorted(stored(i for i in range(rank) if i not in used))
    other = (*contract[1 - side], *batch[1 - side])
    sizes = tuple(n for i, n in enumerate(np.shape(x)) if i not in other)
    return Layout(
        tuple(tracked.array.shape), stored(batch[side]), stored(contract[side]), tuple(free), sizes
    )


def standard(operation: Operation, x: jax.Array, side: int, layout: Layout) -> jax.Array:
    """`x` as (batch…, rows, contracted…)."""
    contract, batch = (axes[1 - side] for axes in operation.params["dimension_numbers"])
    free = [i for i in range(x.ndim) if i not in (*contract, *batch)]
    x = jnp.transpose(x, (*batch, *free, *contract))
    lead, tail = x.shape[: len(batch)], x.shape[x.ndim - len(contract) :]
    return x.reshape(*lead, layout.rows, *tail)


def restored(y: jax.Array, tracked: Tracked, side: int, layout: Layout) -> jax.Array:
    """A result (batch…, rows, free…) with its axes as the program expects them."""
    n_batch, rank = len(layout.batch), len(tracked.order)
    lead = y.shape[:n_batch]
    y = y.reshape(*lead, *layout.sizes, *layout.columns)
    n_x = len(layout.sizes)
    # free axes in the order in which the program reads them
    read = [axis + rank for axis in tracked.order if axis + rank in layout.free]
    mine = [n_batch + n_x + layout.free.index(axis) for axis in read]
    theirs = list(range(n_batch, n_batch + n_x))
    after = [*mine, *theirs] if side == 0 else [*theirs, *mine]
    return jnp.transpose(y, (*range(n_batch), *after))
