"""Clustered arrays at work."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxprune.program import Layout
from jaxprune.quantize import QuantizedArray, leading_block
from jaxprune.runtime._activations import TOP, hi_lo
from jaxprune.runtime._decoders import BlockDecoder, Packing
from jaxprune.runtime._rules import Factors, Kind, LeafRule, register_leaf
from jaxprune.share import (
    SELECTED,
    SELECTED_BYTES,
    ClusteredArray,
    codewords_at,
    index_places,
)

_LONGEST = (2**31 - 1) // (127 * 128)


class CodebookBlock(NamedTuple):
    """Indices one by one, with their codebook.

    Attributes:
      codes: uint8.
      book: (K, axes…), axes like those of `codes`, of size 1 where they share codewords.
    """

    codes: Array
    book: Array

    def values(self) -> Array:
        """What they stand for, in float32."""
        return _at(self.book.astype(jnp.float32), self.codes)

    def unscaled(self) -> Array:
        """The same."""
        return self.values()

    def split(self, bound: Array | None) -> tuple[Array, Array]:
        """Values in units of `bound / 127` (of 1 / 127 without), in a high and a low int8 part.

        Codewords are rounded before they are looked up: bytes are looked up faster than floats.
        """
        high, low = hi_lo(self.book * (TOP if bound is None else TOP / bound))
        return _at(high, self.codes), _at(low, self.codes)


class IntegerCodebookBlock(NamedTuple):
    """Indices of integers with one scale.

    Attributes:
      codes: int8, looked up.
      scale: of all.
    """

    codes: Array
    scale: Array

    def values(self) -> Array:
        """What they stand for, in float32."""
        return self.codes.astype(jnp.float32) * self.scale.astype(jnp.float32)

    def unscaled(self) -> Array:
        """The integers, in float32."""
        return self.codes.astype(jnp.float32)

    def split(self, bound: Array | None) -> tuple[Array, Array]:
        """Values in units of `bound / 127`, in a high and a low int8 part."""
        assert bound is not None
        return hi_lo(self.values() * (TOP / bound))


def _at(book: Array, index: Array) -> Array:
    """Codewords of indices; the codebook has codewords first."""
    return codewords_at(jnp.moveaxis(book, 0, -1), index)


def integer_codebook(w: ClusteredArray) -> QuantizedArray | None:
    """A codebook of integers with one scale, which make the array one of integers."""
    book = w.codebook
    if not isinstance(book, QuantizedArray) or not book.spec.format.startswith("int"):
        return None
    return book if book.zero_point is None and book.scale.size == 1 else None


def _decoder(w: ClusteredArray) -> BlockDecoder:
    integers = integer_codebook(w)
    scale = None if integers is None else integers.scale.reshape((1,) * w.ndim)
    book = w.codewords() if integers is None else integers.levels()
    w = replace(w, codebook=book, copies=None)
    places = index_places(w)
    width = len(places) * places[0].shape[-1]
    packing = Packing(len(places), w.length, width)

    def block(q: ClusteredArray, codes: Array, place: int | None) -> Any:
        book = _spread_book(q)
        book = book if place is None else packing.own(book, place)
        if scale is None:
            return CodebookBlock(codes, book)
        return IntegerCodebookBlock(_at(book, codes), scale)

    return BlockDecoder(
        w,
        book.shape[0],
        packing,
        _leading,
        lambda q: [block(q, codes, i) for i, codes in enumerate(index_places(q))],
        lambda q: block(q, q.index(), None),
    )


def _leading(w: ClusteredArray, start: Any, size: int) -> ClusteredArray:
    book, n = w.codewords(), w.shape[0]
    planes = tuple(jax.lax.dynamic_slice_in_dim(x, start, size) for x in w.indices)
    return replace(w, codebook=leading_block(book, n, start, size), indices=planes, copies=None)


def _spread_book(w: ClusteredArray) -> Array:
    """The codebook, codewords first, groups spread to their entries."""
    book = jnp.moveaxis(jnp.asarray(w.codebook), -1, 0)
    for axis, n in enumerate(w.shape, 1):
        if book.shape[axis] not in (1, n):
            book = jnp.repeat(book, n // book.shape[axis], axis=axis)
    return book


def _factored_scales(w: ClusteredArray, layout: Layout) -> Factors:
    book = integer_codebook(w)
    if book is None:
        return "codewords are any numbers"
    return None, book.scale.reshape((1,) * w.ndim).astype(jnp.float32)


def _kind(w: ClusteredArray, layout: Layout) -> tuple[Kind, str]:
    factors = _factored_scales(w, layout)
    few = w.clusters <= SELECTED_BYTES and layout.depth <= _LONGEST
    if few and not isinstance(factors, str):
        return Kind.INTEGER_CODEWORD, ""
    reason = factors if isinstance(factors, str) else "many codewords"
    return (Kind.FEW_CODEWORDS if w.clusters <= SELECTED else Kind.MANY_CODEWORDS), reason


def _bound(w: ClusteredArray, axes: tuple[int, ...]) -> Array:
    bound = jnp.max(jnp.abs(w.codewords().astype(jnp.float32)).max(-1), axes, keepdims=True)
    for axis, n in enumerate(w.shape):
        if bound.shape[axis] not in (1, n):
            bound = jnp.repeat(bound, n // bound.shape[axis], axis=axis)
    return bound


def _take_rows(w: ClusteredArray, index: Array) -> Array:
    """Groups along the leading axis have codebooks of their own."""
    book = w.codewords()
    planes = tuple(jnp.take(x, index, axis=0) for x in w.indices)
    if book.shape[0] > 1:
        book = jnp.take(book, index // (w.shape[0] // book.shape[0]), axis=0)
    return replace(w, codebook=book, indices=planes, copies=None).materialize()


RULE = LeafRule(
    decoder=_decoder,
    factored_scales=_factored_scales,
    kind=_kind,
    bound=_bound,
    take_rows=_take_rows,
    is_packed=lambda w: w.bits < 8,
)
register_leaf(ClusteredArray, lambda w: RULE if w.is_plain and w.axis == -1 else LeafRule())
