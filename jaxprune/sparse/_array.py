"""The N:M leaf: n values of every m neighbours, and a bit for each neighbour."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxprune import _bits, _leaves, _trees
from jaxprune._types import CompressedLeaf

LARGEST = 32  # neighbours in a group


@_leaves.register(data=("values", "flags"), meta=("n", "m", "axis", "length", "per", "dtype"))
@dataclass(frozen=True)
class SparseArray(CompressedLeaf):
    """An array of which at most `n` of every `m` neighbours along an axis are not zero.

    A pytree node that jits, checkpoints and shards like any array; gradients go to the values that are
    stored. Its static fields count axes from the end, so `scan`, `vmap` and slices over leading axes keep
    it valid.

    Attributes:
      values: what is left of each group, in order, and zeros where that is less than `n`: the dense shape
        with `n * ceil(length / m)` entries along the axis. An array, or a compressed leaf itself.
      flags: unsigned integers with a bit for each neighbour of a group, the first in the lowest bit;
        groups of 2 or 4 share bytes (see `_bits`).
      n, m: the pattern.
      axis: along which groups lie, counted from the end.
      length: of the dense axis.
      per: groups in an integer.
      dtype: dtype of the dense array.

    Example:
      >>> leaf = jp.sparsify_tree({"w": jnp.array([[0.0], [2.0], [0.0], [1.0]])})["w"]
      >>> leaf.values.ravel().tolist(), leaf.flags.ravel().tolist(), leaf.materialize().ravel().tolist()
      ([2.0, 1.0], [10], [0.0, 2.0, 0.0, 1.0])

    Reference: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021,
    https://arxiv.org/abs/2104.08378
    """

    values: Any
    flags: Array
    n: int
    m: int
    axis: int
    length: int
    per: int
    dtype: Any

    @classmethod
    def of(cls, x: Array, kept: Bool[Array, "..."], n: int, m: int, axis: int) -> "SparseArray":
        """From a dense array, and which of its entries are kept, at most `n` of each group."""
        length, at = x.shape[axis], x.ndim + axis
        grouped = lambda y: _grouped(_padded(y, axis, -length % m), at, m)
        kept = grouped(kept)
        order = jnp.argsort(~kept, axis=at + 1, stable=True)
        order = jax.lax.slice_in_dim(order, 0, n, axis=at + 1)
        take = lambda y: jnp.take_along_axis(y, order, axis=at + 1)
        values = jnp.where(take(kept), take(grouped(x)), jnp.zeros((), x.dtype))
        size = max(width_of(m), 8)
        place = jnp.arange(m, dtype=f"uint{size}").reshape(-1, *(1 for _ in x.shape[at + 1 :]))
        flags = jnp.sum(kept.astype(place.dtype) << place, at + 1, dtype=place.dtype)
        merged = (*values.shape[:at], -1, *values.shape[at + 2 :])
        per = max(8 // width_of(m), 1)
        flags = flags if per == 1 else _bits.pack(flags, 8 // per, axis)
        return cls(values.reshape(merged), flags, n, m, axis, length, per, np.dtype(x.dtype))

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        shape = list(self.values.shape)
        shape[self.axis] = self.length
        return tuple(shape)

    @property
    def groups(self) -> int:
        """Groups along the axis."""
        return -(-self.length // self.m)

    def opened(self) -> "SparseArray":
        """The same with the flags of each group in an integer of its own."""
        if self.per == 1:
            return self
        unpacked = _bits.unpack(
            self.flags, 8 // self.per, self.groups, signed=False, axis=self.axis
        )
        return replace(self, flags=unpacked, per=1)

    def spread(self, values: Array) -> Array:
        """Values in their places, in the dense shape; zeros between. Any dtype."""
        at = values.ndim + self.axis
        flags = self.opened().flags
        bits = flags.dtype
        beside = jnp.expand_dims(flags, at + 1)
        place = jnp.arange(self.m, dtype=bits).reshape(-1, *(1 for _ in values.shape[at + 1 :]))
        here = (beside >> place) & jnp.ones((), bits)
        before = beside & ((jnp.ones((), bits) << place) - jnp.ones((), bits))
        groups = _grouped(values, at, self.n)
        each = [jax.lax.slice_in_dim(groups, j, j + 1, axis=at + 1) for j in range(self.n)]
        found = each[-1]
        if self.n == 2:
            found = jnp.where(before == 0, each[0], each[1])
        elif self.n > 2:
            rank = jax.lax.population_count(before)
            for j in range(self.n - 2, -1, -1):
                found = jnp.where(rank <= j, each[j], found)
        found = jnp.where(here != 0, found, jnp.zeros((), values.dtype))
        merged = (*values.shape[:at], self.groups * self.m, *values.shape[at + 1 :])
        return jax.lax.slice_in_dim(found.reshape(merged), 0, self.length, axis=at)

    def materialize(self) -> Float[Array, "..."]:
        """The dense array, of `shape` and `dtype`."""
        return self.spread(jnp.asarray(_trees.dense(self.values))).astype(self.dtype)

    def leading(self, start: Any, size: int) -> "SparseArray":
        """`size` entries of the leading axis from `start`, whole groups of flags that are opened."""
        assert self.per == 1
        cut = lambda x, a, n: jax.lax.dynamic_slice_in_dim(x, a, n)
        if self.axis != -self.ndim:
            values, flags = cut(self.values, start, size), cut(self.flags, start, size)
            return replace(self, values=values, flags=flags)
        first, count = start // self.m, -(-size // self.m)
        return replace(
            self,
            values=cut(self.values, first * self.n, count * self.n),
            flags=cut(self.flags, first, count),
            length=size,
        )

    def check(self) -> None:
        """See `CompressedLeaf`; the flags of all groups are there."""
        super().check()
        if self.flags.shape[self.axis] != -(-self.groups // self.per):
            raise ValueError(f"flags of {self.flags.shape} for {self.groups} groups")

    def quantized(self, one: Callable[[Any, Any], Any], spec: Any) -> "SparseArray":
        """The same with quantized values: what `quantize_tree` makes of it.

        A scale belongs to a channel of the dense array, so never to a place along the groups.
        """
        if spec.group_size is None and self.axis in (-1, -2) and self.ndim > 1:
            spec = replace(spec, channel_axis=-3 - self.axis)
        return replace(self, values=one(_trees.dense(self.values), spec))


def width_of(m: int) -> int:
    """Bits of a group's flags: a power of two, so that groups share bytes evenly."""
    return next(w for w in (2, 4, 8, 16, 32) if w >= m)


def _padded(x: Array, axis: int, count: int) -> Array:
    return jnp.pad(x, [(0, count if i == x.ndim + axis else 0) for i in range(x.ndim)])


def _grouped(x: Array, at: int, size: int) -> Array:
    """An axis as groups and their entries."""
    return x.reshape(*x.shape[:at], x.shape[at] // size, size, *x.shape[at + 1 :])
