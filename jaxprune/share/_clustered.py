"""The clustered leaf: a codebook, and an index per weight."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from jaxprune import _bits, _leaves, _trees
from jaxprune._types import CompressedLeaf

SELECTED = 16  # codewords that are told apart by comparisons; more are gathered
SELECTED_BYTES = 32  # the same of codewords of one byte


@_leaves.register(
    data=("codebook", "indices"),
    meta=("bits", "length", "dtype", "dim", "zero", "copies", "axis"),
)
@dataclass(frozen=True)
class ClusteredArray(CompressedLeaf):
    """An array whose entries share the values of a codebook: `codebook[index]`.

    A pytree node that jits, checkpoints and shards like any array. Gradients with respect to the codebook
    are sums over the entries of each cluster. Its static fields count axes from the end.

    Attributes:
      codebook: codewords, (axes…, K), or (axes…, stages, K, dim) where entries are the sum of
        codewords of several stages or where codewords are vectors. `axes` are those of the dense
        array, of size 1 where they share a codebook, groups counted. An array, or a compressed leaf
        itself.
      indices: planes of uint8 that hold an index for each entry, packed along one axis (see `_bits`).
      bits: bits of an index, 1 to 8.
      length: size of the dense array along the packed axis.
      dtype: dtype of the dense array.
      dim: entries along the last axis that one codeword holds.
      zero: the first codeword is 0 and stays 0: pruned weights have it.
      copies: the leading axis whose entries hold copies of one codebook, counted from the end, so that
        loops over it find one each; their gradients are summed. Or `None`.
      axis: the packed axis, counted from the end: -2 where the last is too short to fill bytes.

    Example:
      >>> leaf = jp.cluster_tree({"w": jnp.array([[1.0, 1.1], [3.0, 2.9]])}, bits=1)["w"]
      >>> leaf.codebook.ravel().tolist(), leaf.index().tolist()
      ([1.0499999523162842, 2.950000047683716], [[0, 0], [1, 1]])
    """

    codebook: Any
    indices: _bits.Planes
    bits: int
    length: int
    dtype: Any
    dim: int = 1
    zero: bool = False
    copies: int | None = None
    axis: int = -1

    @classmethod
    def of(
        cls,
        codebook: Array,
        index: UInt8[Array, "..."],
        *,
        bits: int,
        dtype: Any,
        dim: int = 1,
        zero: bool = False,
        copies: int | None = None,
    ) -> "ClusteredArray":
        """From indices one by one: (…, n), or (…, stages, n / dim)."""
        plain = dim == 1 and len(codebook.shape) == index.ndim + 1
        axis = _bits.packing_axis(index.shape, bits) if plain else -1
        length, planes = index.shape[axis] * dim, _bits.pack_planes(index, bits, axis)
        return cls(codebook, planes, bits, length, np.dtype(dtype), dim, zero, copies, axis)

    @property
    def is_plain(self) -> bool:
        """One number per codeword and one index per entry."""
        return self.dim == 1 and len(self.codebook.shape) == len(self.indices[0].shape) + 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        shape = list(self.indices[0].shape)
        shape[self.axis] = self.length
        return tuple(shape if self.is_plain else (*shape[:-2], shape[-1]))

    @property
    def clusters(self) -> int:
        """Codewords in a codebook (of one stage)."""
        return self.codebook.shape[-1 if self.is_plain else -2]

    def index(self) -> UInt8[Array, "..."]:
        """The index of each entry, (…, n), or (…, stages, n / dim)."""
        return _bits.unpack_planes(self.indices, self.bits, self.length // self.dim, self.axis)

    def codewords(self) -> Float[Array, "..."]:
        """The codebook, dense, its zero in place, with gradients of copies summed."""
        book = jnp.asarray(_trees.dense(self.codebook))
        if self.copies is not None and self.ndim == -self.copies and book.shape[0] > 1:
            mean, count = jnp.mean(book, 0, keepdims=True), book.shape[0]
            summed = mean + (count - 1) * (mean - jax.lax.stop_gradient(mean))
            book = jnp.broadcast_to(summed, book.shape)
        if self.zero:
            axis = book.ndim - (1 if self.is_plain else 2)
            first = jax.lax.broadcasted_iota(jnp.int32, book.shape, axis) == 0
            book = jnp.where(first, 0, book)
        return book

    def materialize(self) -> Float[Array, "..."]:
        """The dense array, of `shape` and `dtype`."""
        if self.ndim == 0 or 0 in self.shape:
            return jnp.zeros(self.shape, self.dtype)
        book, index = self.codewords(), self.index()
        if self.is_plain:
            return codewords_at(book, index).astype(self.dtype)
        *axes, stages, count, dim = book.shape
        first = count * jnp.arange(int(np.prod(axes)) * stages).reshape(*axes[:-1], stages, 1)
        place = index.astype(jnp.int32) + _spread(first, index.shape)
        found = book.reshape(-1, dim)[place].sum(-3)  # (…, stages, n / dim, dim), stages are summed
        return found.reshape(self.shape).astype(self.dtype)

    def __getitem__(self, index: int | slice) -> "ClusteredArray":
        """Entries along the leading axis, still clustered; a packed axis cannot be indexed so."""
        if self.ndim + self.axis < 1 or not isinstance(index, (int, slice, np.integer)):
            raise TypeError(
                f"index: expected an int or a slice along the first of at least two axes, got "
                f"{index!r} for shape {self.shape}; use materialize()[...] for anything else"
            )
        n, book = self.shape[0], jnp.asarray(_trees.dense(self.codebook))
        if book.shape[0] not in (1, n):
            raise TypeError("index: groups lie along the first axis; use materialize()[...]")
        whole = isinstance(index, slice)
        book = book[index] if book.shape[0] == n else (book if whole else book[0])
        return replace(self, codebook=book, indices=tuple(x[index] for x in self.indices))

    def reshape(self, *shape: Any) -> "ClusteredArray":
        """Another shape with the same last axis, still clustered, if one codebook serves all.

        Raises:
          TypeError: the last axis changes, or there are several codebooks.
        """
        wanted = tuple(shape[0]) if len(shape) == 1 and np.ndim(shape[0]) else shape
        wanted = tuple(int(n) for n in wanted)
        book = jnp.asarray(_trees.dense(self.codebook))
        if self.copies is not None and book.shape[0] > 1:
            book = self.codewords()[:1]
        single = int(np.prod(book.shape[: self.ndim])) == 1
        same = wanted[self.axis :] == self.shape[self.axis :]
        if not single or not same or np.prod(wanted) != self.size:
            raise TypeError(
                f"reshape: {self.shape} to {wanted} would part indices of one byte or codebook; "
                "use materialize().reshape(...)"
            )
        rest = book.shape[self.ndim :]
        kept = -self.axis + (0 if self.is_plain else 1)
        lead = wanted[: self.axis]
        planes = [x.reshape(*lead, *x.shape[x.ndim - kept :]) for x in self.indices]
        book = book.reshape(*(1 for _ in wanted), *rest)
        return replace(self, codebook=book, indices=tuple(planes), copies=None)

    def block(self, start: Any, size: int) -> "ClusteredArray":
        """`size` entries of the leading axis from `start` (may be traced), still clustered.

        Raises:
          TypeError: the leading axis is packed, or has groups.
        """
        book = jnp.asarray(_trees.dense(self.codebook))
        if self.ndim + self.axis < 1 or book.shape[0] not in (1, self.shape[0]):
            raise TypeError(f"block: cuts through groups or bytes of shape {self.shape}")
        cut = lambda x: jax.lax.dynamic_slice_in_dim(x, start, size)
        book = book if book.shape[0] == 1 else cut(book)
        return replace(self, codebook=book, indices=tuple(cut(x) for x in self.indices))

    def check(self) -> None:
        """See `CompressedLeaf`; the bytes of all planes are there."""
        widths, count = _bits.widths_of(self.bits), self.length // self.dim
        found = [x.shape[self.axis] for x in self.indices]
        if found != [_bits.packed_length(count, self.bits, i) for i in range(len(widths))]:
            raise ValueError(f"{count} indices of {self.bits} bits in {found} bytes")
        super().check()

    def stacked(self) -> "ClusteredArray":
        """With a codebook for each entry of the leading axis, as loops over it need; groups stay."""
        book = self.codewords()
        if book.shape[0] == 1:
            book = jnp.broadcast_to(book, (self.shape[0], *book.shape[1:]))
        return replace(self, codebook=book, copies=None)

    def quantized(self, quantize: Any, spec: Any) -> "ClusteredArray":
        """With a codebook quantized by `quantize(array, spec)`, one scale for all of it."""
        whole = replace(
            spec,
            granularity="tensor",
            group_size=None,
            group_axis=None,
            otherwise="auto",
            channel_axis=-1,
        )
        return replace(self, codebook=quantize(_trees.dense(self.codebook), whole))


def index_places(x: ClusteredArray) -> list[Array]:
    """The indices of each place in the bytes: side by side they are all, in order, and padding."""
    return _bits.plane_fields(x.indices, x.bits, x.axis)


def codewords_at(book: Float[Array, "..."], index: UInt8[Array, "..."]) -> Float[Array, "..."]:
    """Codewords of indices; the codebook has the axes of `index`, of size 1 or groups, and one more."""
    count = book.shape[-1]
    if count <= (SELECTED_BYTES if book.dtype.itemsize == 1 else SELECTED):
        return _selected(_spread(book, (*index.shape, count)), index)
    first = count * jnp.arange(book.size // count).reshape(book.shape[:-1])
    place = index.astype(jnp.int32) + _spread(first, index.shape)
    return book.reshape(-1)[place]


def _spread(x: Array, shape: tuple[int, ...]) -> Array:
    """What belongs to groups along some axes, repeated to one for each entry; or shared, of size 1."""
    for axis, n in enumerate(shape):
        if x.shape[axis] not in (1, n):
            x = jnp.repeat(x, n // x.shape[axis], axis=axis)
    return x


def _selected(book: Array, index: Array) -> Array:
    """A tree of selections, bit by bit: vector instructions have no fast look-up."""
    words = [book[..., i] for i in range(book.shape[-1])]
    bit = 0
    while len(words) > 1:
        odd = (index >> bit) & 1 == 1
        pairs = [
            jnp.where(odd, words[i + 1], words[i]) if i + 1 < len(words) else words[i]
            for i in range(0, len(words), 2)
        ]
        words, bit = pairs, bit + 1
    return jnp.broadcast_to(words[0], index.shape)
