"""Block decoders: compressed arrays as a blocked product reads them, place by place in the bytes."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxprune.runtime._activations import TOP, hi_lo


class Block(Protocol):
    """Some entries of a compressed array."""

    @property
    def codes(self) -> Any:
        """The codes one by one, numbers where scales factor out; at least their shape."""
        ...

    def values(self) -> Array:
        """What they stand for, in float32."""
        ...

    def unscaled(self) -> Array:
        """The same without scales that factor out."""
        ...

    def split(self, bound: Array | None) -> tuple[Array, Array]:
        """Values in units of `bound / 127`, in a high and a low int8 part."""
        ...


class DenseBlock(NamedTuple):
    """A block of any leaf, which is made dense."""

    array: Any

    @property
    def codes(self) -> jax.ShapeDtypeStruct:
        """The shape that they stand for."""
        return jax.ShapeDtypeStruct(self.array.shape, jnp.float32)

    def values(self) -> Array:
        """What they stand for, in float32."""
        return self.array.materialize().astype(jnp.float32)

    def unscaled(self) -> Array:
        """The same."""
        return self.values()

    def split(self, bound: Array | None) -> tuple[Array, Array]:
        """Values in units of `bound / 127`, in a high and a low int8 part."""
        assert bound is not None
        return hi_lo(self.values() * (TOP / bound))


class Packing(NamedTuple):
    """Codes that lie several in a byte along the last axis (see `_bits`).

    Attributes:
      per: places in a byte.
      length: codes along the axis.
      width: the same with padding, a multiple of `per`.
    """

    per: int = 1
    length: int = 0
    width: int = 0

    def padded(self, x: Array, axis: int) -> Array:
        """Other data along the axis, with padding."""
        axis %= x.ndim
        pads = [(0, self.width - self.length if i == axis else 0) for i in range(x.ndim)]
        return x if self.per == 1 else jnp.pad(x, pads)

    def own(self, x: Array, place: int) -> Array:
        """What belongs to one place along a last axis, which may be shared."""
        if self.per == 1 or x.shape[-1] == 1 != self.length:
            return x
        each = self.width // self.per
        return self.padded(x, -1)[..., place * each : (place + 1) * each]

    def together(self, ys: list[Array]) -> Array:
        """Results of each place, in order."""
        return ys[0] if self.per == 1 else jnp.concatenate(ys, -1)[..., : self.length]


class BlockDecoder(NamedTuple):
    """How a compressed array is read.

    Attributes:
      array: the array.
      groups: groups along the leading axis, which blocks hold whole.
      packing: how codes share bytes along the last axis.
      leading: `(array, start, size)`: entries of the leading axis.
      places: the codes of each place in the bytes, and padding.
      in_order: all codes of a block, in order.
      is_cut: whether it is read in blocks; else whole.
      group_length: entries of a group along the leading axis; `None`: all groups are alike.
    """

    array: Any
    groups: int
    packing: Packing
    leading: Callable[[Any, Any, int], Any]
    places: Callable[[Any], list[Any]]
    in_order: Callable[[Any], Any]
    is_cut: bool = True
    group_length: int | None = None


def dense_decoder(array: Any, groups: int = 1, block: Any = DenseBlock) -> BlockDecoder:
    """Of any leaf with `block(start, size)`: blocks of it are made dense.

    Example: the rule of a leaf that runs compressed, `register_leaf(Mine, LeafRule(dense_decoder))`.
    """
    leading = lambda q, start, size: q.block(start, size)
    return BlockDecoder(array, groups, Packing(), leading, lambda q: [block(q)], block)
