"""Leaves that are products of smaller arrays."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxprune import _leaves, _trees
from jaxprune._types import CompressedLeaf


@_leaves.register(data=("left", "right"), meta=("tail", "dtype"))
@dataclass(frozen=True)
class LowRankArray(CompressedLeaf):
    """An array of low rank: `left @ right`, over one inner axis.

    A pytree node that jits, checkpoints and trains like any array: gradients go to the factors. With
    batch axes (stacked layers, experts), loops and maps over them find one product each.

    Attributes:
      left: (batch…, head…, rank); an array, or a compressed leaf itself.
      right: (batch…, rank, tail…); likewise.
      tail: number of trailing axes of the dense array that `right` holds.
      dtype: dtype of the dense array.

    Example:
      >>> leaf = jp.factorize_tree({"w": jnp.ones((6, 4))}, rank=1)["w"]
      >>> leaf.left.shape, leaf.right.shape, jnp.round(leaf.materialize(), 3).min().item()
      ((6, 1), (1, 4), 1.0)
    """

    left: Any
    right: Any
    tail: int
    dtype: Any

    @property
    def batch(self) -> int:
        """Number of leading axes that both factors have."""
        return len(self.right.shape) - 1 - self.tail

    @property
    def rank(self) -> int:
        """Size of the inner axis."""
        return self.left.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        return (*self.left.shape[:-1], *self.right.shape[self.batch + 1 :])

    def materialize(self) -> Float[Array, "..."]:
        """The dense array, of `shape` and `dtype`."""
        left, right = jnp.asarray(_trees.dense(self.left)), jnp.asarray(_trees.dense(self.right))
        lead = left.shape[: self.batch]
        product = left.reshape(*lead, -1, self.rank) @ right.reshape(*lead, self.rank, -1)
        return product.reshape(self.shape).astype(self.dtype)

    def __getitem__(self, index: int | slice) -> "LowRankArray":
        """Entries along a leading batch axis, still factors."""
        if self.batch < 1 or not isinstance(index, (int, slice, np.integer)):
            raise TypeError(
                f"index: expected an int or a slice along a batch axis, got {index!r} for shape "
                f"{self.shape} with {self.batch} batch axes; use materialize()[...] for anything else"
            )
        return replace(self, left=self.left[index], right=self.right[index])

    def block(self, start: Any, size: int) -> "LowRankArray":
        """`size` entries of the leading axis from `start` (may be traced), still factors."""
        cut = lambda x: (
            x.block(start, size)
            if hasattr(type(x), "block")
            else jax.lax.dynamic_slice_in_dim(x, start, size)
        )
        right = cut(self.right) if self.batch else self.right
        return replace(self, left=cut(self.left), right=right)

    def reshape(self, *shape: Any) -> "LowRankArray":
        """Another shape, still factors, where leading axes of size 1 come or go, or head and tail are
        each reshaped.

        Raises:
          TypeError: entries of head, tail and batch mix.
        """
        wanted = tuple(shape[0]) if len(shape) == 1 and np.ndim(shape[0]) else shape
        wanted = tuple(int(n) for n in wanted)
        head = self.shape[: self.ndim - self.tail]
        for cut in range(1, len(wanted)):
            first, last = wanted[:cut], wanted[cut:]
            same = int(np.prod(first)) == int(np.prod(head))
            if not same or int(np.prod(last)) * int(np.prod(first)) != self.size:
                continue
            if self.batch == 0:
                left = self.left.reshape(*first, self.rank)
                return replace(
                    self, left=left, right=self.right.reshape(self.rank, *last), tail=len(last)
                )
            if int(np.prod(head[: self.batch])) == 1:  # one layer out of a stack
                left = self.left.reshape(*first, self.rank)
                right = self.right.reshape(self.rank, *last)
                return LowRankArray(left, right, len(last), self.dtype)
        raise TypeError(
            f"reshape: {self.shape} to {wanted} would mix the axes of the factors; use "
            "materialize().reshape(...)"
        )

    def stacked(self) -> "LowRankArray | None":
        """Itself, if loops over the leading axis find one product for each entry."""
        return self if self.batch else None

    def quantized(self, quantize: Any, spec: Any) -> "LowRankArray":
        """With both factors quantized by `quantize(array, spec)`."""
        of = lambda x: quantize(_trees.dense(x), spec)
        return replace(self, left=of(self.left), right=of(self.right))


@_leaves.register(data=("left", "core", "right"), meta=("dtype",))
@dataclass(frozen=True)
class TuckerArray(CompressedLeaf):
    """A convolution kernel as three: channels in, space, channels out.

    `kernel[s, i, o] = sum_ab left[i, a] core[s, a, b] right[b, o]` (Tucker), or, with a core of one input
    channel, `sum_a left[i, a] core[s, 0, a] right[a, o]` (CP: a depthwise convolution in the middle).

    Attributes:
      left: (in, a).
      core: (space…, a, b), or (space…, 1, a).
      right: (b, out).
      dtype: dtype of the kernel.

    Example:
      >>> tree = {"k": jax.random.normal(jax.random.key(0), (3, 3, 16, 16))}
      >>> leaf = jp.factorize_tree(tree, rank=8, method="tucker")["k"]
      >>> leaf.left.shape, leaf.core.shape, leaf.right.shape
      ((16, 8), (3, 3, 8, 8), (8, 16))
    """

    left: Any
    core: Any
    right: Any
    dtype: Any

    @property
    def is_depthwise(self) -> bool:
        """Whether the core is a depthwise convolution (CP)."""
        return self.core.shape[-2] == 1 != self.left.shape[-1]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the kernel, (space…, in, out)."""
        return (*self.core.shape[:-2], self.left.shape[0], self.right.shape[-1])

    def materialize(self) -> Float[Array, "..."]:
        """The kernel, of `shape` and `dtype`."""
        left, core, right = (
            jnp.asarray(_trees.dense(x)) for x in (self.left, self.core, self.right)
        )
        if self.is_depthwise:
            kernel = jnp.einsum("ia,...a,ao->...io", left, core[..., 0, :], right)
        else:
            kernel = jnp.einsum("ia,...ab,bo->...io", left, core, right)
        return kernel.astype(self.dtype)

    def stacked(self) -> None:
        """Nothing: it has no axis of layers."""

    def quantized(self, quantize: Any, spec: Any) -> "TuckerArray":
        """With all factors quantized by `quantize(array, spec)`."""
        parts = (quantize(_trees.dense(x), spec) for x in (self.left, self.core, self.right))
        return TuckerArray(*parts, self.dtype)
