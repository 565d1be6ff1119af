"""Compressed arrays as a sweep reads them: block by block, and each place in the bytes by itself."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxprune._trees import dense
from jaxprune.quantize import (
    NF4_LEVELS,
    Levels,
    QuantizedArray,
    Spec,
    by_place,
    joined_levels,
    largest_values,
    leading_block,
    levels_by_place,
    strided,
)
from jaxprune.runtime._activations import STEPS
from jaxprune.runtime._settle import all_settled
from jaxprune.share import ClusteredArray, codewords_at, index_places, widths_of
from jaxprune.sparse import SparseArray

_INT8 = Spec(bits=8)


class Words(NamedTuple):
    """Indices one by one, with their codebook.

    Attributes:
      codes: uint8.
      book: (K, axes…), axes like those of `codes`, of size 1 where they share codewords.
    """

    codes: Array
    book: Array

    def values(self) -> Array:
        """What they stand for, in float32."""
        return codewords_at(jnp.moveaxis(self.book.astype(jnp.float32), 0, -1), self.codes)

    def planes(self, bound: Array | None) -> tuple[Array, Array]:
        """Values in units of `bound / 127` (of 1 / 127 without): whole numbers, and what is left in units
        of 1 / STEPS.

        Codewords are rounded before they are looked up: bytes are looked up faster than floats.
        """
        book = self.book * (127.0 if bound is None else 127.0 / bound)
        first = jnp.round(book)
        second = jnp.round((book - first) * STEPS)
        of = lambda table: codewords_at(jnp.moveaxis(table.astype(jnp.int8), 0, -1), self.codes)
        return of(first), of(second)


class Codes(NamedTuple):
    """Levels of a quantized array."""

    levels: Levels

    @property
    def codes(self) -> Array:
        """int8, or the bits of float8 as uint8."""
        return self.levels.codes

    def values(self) -> Array:
        """What they stand for, in float32."""
        return self.levels.values()

    def planes(self, bound: Array | None) -> tuple[Array, Array]:
        """Values in units of `bound / 127`: whole numbers, and what is left in units of 1 / STEPS.

        No bound: of nf4 codes in units of their scale / 127, looked up rounded.
        """
        if bound is None:
            levels = jnp.array(NF4_LEVELS).reshape(-1, *(1 for _ in self.codes.shape))
            return Words(self.codes.astype(jnp.uint8), levels).planes(None)
        return _in_two(self.values(), bound)


def _in_two(values: Array, bound: Array) -> tuple[Array, Array]:
    """Values in units of `bound / 127`: whole numbers, and what is left in units of 1 / STEPS."""
    values = values * (127.0 / bound)
    first = jnp.round(values)
    second = jnp.round((values - first) * STEPS)
    return first.astype(jnp.int8), second.astype(jnp.int8)


class Kept(NamedTuple):
    """What is left of pruned neighbours, in its places."""

    array: SparseArray

    @property
    def codes(self) -> jax.ShapeDtypeStruct:
        """The shape that they stand for."""
        return jax.ShapeDtypeStruct(self.array.shape, jnp.float32)

    def values(self) -> Array:
        """What they stand for, in float32."""
        return self.array.materialize().astype(jnp.float32)

    def planes(self, bound: Array | None) -> tuple[Array, Array]:
        """Values in units of `bound / 127`: whole numbers, and what is left in units of 1 / STEPS.

        What is stored is rounded before it is spread: there is less of it, and bytes move faster.
        """
        assert bound is not None
        values = dense(self.array.values).astype(jnp.float32)
        first, second = all_settled(_in_two(values, bound), bound)
        return self.array.spread(first), self.array.spread(second)


Part = Words | Codes | Kept


class Reader(NamedTuple):
    """How a compressed array is read.

    Attributes:
      array: the array.
      per: places in a byte along the last axis.
      groups: groups along the leading axis.
      in_order: all codes of a block, in order.
      joined: all codes of a block, in the order of their places in the bytes, and padding.
      by_place: the codes of each place, and padding.
      ordered: `(x, axis)`: an axis of other data in the order of `joined`, and padding.
      own: `(x, i)`: what belongs to the place `i` along a last axis, which may be shared.
      together: results of each place, in order.
    """

    array: Any
    per: int
    groups: int
    in_order: Callable[[Any], Part]
    joined: Callable[[Any], Part]
    by_place: Callable[[Any], list[Part]]
    ordered: Callable[[Array, int], Array]
    own: Callable[[Array, int], Array]
    together: Callable[[tuple[Array, ...]], Array]


def reader_of(w: Any, *, bits: bool = True) -> Reader:
    """The reader of a quantized or clustered array; `bits`: float8 codes as their bits."""
    if isinstance(w, ClusteredArray):
        return _clusters(w)
    if isinstance(w, SparseArray):
        return _kept(w)
    if bits and w.spec.format == "float8_e4m3fn":  # loops over bits are faster than over float8
        w = replace(w, values=jax.lax.bitcast_convert_type(w.values, jnp.uint8))
    per, length = 8 // w.spec.width, w.length
    return Reader(
        w,
        per,
        w.scale.shape[0] if w.ndim else 1,
        lambda q: Codes(Levels(q.levels(), q.scale, q.zero_point, q.spec)),
        lambda q: Codes(joined_levels(q)),
        lambda q: [Codes(levels) for levels in levels_by_place(q)],
        lambda x, axis: by_place(x, per, axis),
        lambda x, i: strided(x, i, per, length),
        lambda ys: _interleaved(ys, length),
    )


def _interleaved(ys: tuple[Array, ...], length: int) -> Array:
    """Results of neighbours in a byte, in order."""
    joined = jnp.stack(ys, -1)  # (…, bytes, places)
    return joined.reshape(*joined.shape[:-2], -1)[..., :length]


def _kept(w: SparseArray) -> Reader:
    w = replace(w.opened(), values=jnp.asarray(dense(w.values)))
    return Reader(
        w,
        1,
        w.groups if w.axis == -w.ndim and w.length % w.m == 0 else 1,
        Kept,
        Kept,
        lambda q: [Kept(q)],
        lambda x, axis: x,
        lambda x, i: x,
        lambda ys: ys[0],
    )


def _clusters(w: ClusteredArray) -> Reader:
    integers = integer_book(w)
    scale = None if integers is None else scale_of_integers(w)
    book = w.codewords() if integers is None else integers.levels()
    w = replace(w, codebook=book, copies=None)
    per, length = 8 // widths_of(w.bits)[0], w.length
    width = per * w.indices[0].shape[-1]  # padded

    def padded(x: Array, axis: int) -> Array:
        return jnp.pad(x, [(0, width - length if i == axis else 0) for i in range(x.ndim)])

    def own(x: Array, i: int) -> Array:
        if x.shape[-1] == 1 != length:
            return x
        return padded(x, x.ndim - 1)[..., i * (width // per) : (i + 1) * (width // per)]

    def made(codes: Array, book: Array) -> Part:
        if scale is None:
            return Words(codes, book)
        found = codewords_at(jnp.moveaxis(book, 0, -1), codes)
        return Codes(Levels(found, scale, None, _INT8))

    def whole(q: ClusteredArray) -> Array:
        book = _book(q)
        return book if book.shape[-1] == 1 != length else padded(book, book.ndim - 1)

    return Reader(
        w,
        per,
        book.shape[0],
        lambda q: made(q.index(), _book(q)),
        lambda q: made(jnp.concatenate(index_places(q), -1), whole(q)),
        lambda q: [made(codes, own(_book(q), i)) for i, codes in enumerate(index_places(q))],
        padded,
        own,
        lambda ys: jnp.concatenate(ys, -1)[..., :length],
    )


def integer_book(w: ClusteredArray) -> QuantizedArray | None:
    """A codebook of integers with one scale, which make the array one of integers."""
    book = w.codebook
    if not isinstance(book, QuantizedArray) or not book.spec.format.startswith("int"):
        return None
    return book if book.zero_point is None and book.scale.size == 1 else None


def scale_of_integers(w: ClusteredArray) -> Array:
    """The scale of a codebook of integers, with the axes of the array."""
    assert isinstance(w.codebook, QuantizedArray)
    return w.codebook.scale.reshape((1,) * w.ndim)


def largest(w: QuantizedArray | ClusteredArray | SparseArray, axes: tuple[int, ...]) -> Array:
    """A bound of the absolute values along some axes, which stay with size 1; others may have it too."""
    if isinstance(w, SparseArray):
        values = jnp.abs(dense(w.values).astype(jnp.float32))
        along = {*axes, w.ndim + w.axis}  # one bound for all that is left along the groups
        return jnp.max(values, tuple(along), keepdims=True, initial=0.0)
    if isinstance(w, QuantizedArray):
        return largest_values(w, axes)
    bound = jnp.max(jnp.abs(w.codewords().astype(jnp.float32)).max(-1), axes, keepdims=True)
    for axis, n in enumerate(w.shape):
        if bound.shape[axis] not in (1, n):
            bound = jnp.repeat(bound, n // bound.shape[axis], axis=axis)
    return bound


def leading(w: Any, start: Any, size: int) -> Any:
    """`size` entries of the leading axis from `start`, which hold whole groups."""
    if isinstance(w, QuantizedArray | SparseArray):
        return w.leading(start, size)
    book, n = w.codewords(), w.shape[0]
    planes = tuple(jax.lax.dynamic_slice_in_dim(x, start, size) for x in w.indices)
    return replace(w, codebook=leading_block(book, n, start, size), indices=planes, copies=None)


def _book(w: ClusteredArray) -> Array:
    """The codebook, codewords first, groups spread to their entries."""
    book = jnp.moveaxis(jnp.asarray(w.codebook), -1, 0)
    for axis, n in enumerate(w.shape, 1):
        if book.shape[axis] not in (1, n):
            book = jnp.repeat(book, n // book.shape[axis], axis=axis)
    return book
