"""Fixed connectivity: which weights of a kernel exist, and how those that do are held.

A kernel has the shape (window…, inputs, outputs), as Flax lays it out. Its values, all that is trained,
are an array of a shape of its own; a second array, the *index*, says where they are if that is not known
from the shape alone.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jaxprune import _checks
from jaxprune.sparse._array import LARGEST, SparseArray, width_of

Shape = tuple[int, ...]
_MOST = 2**31 - 1


@runtime_checkable
class Connectivity(Protocol):
    """Which weights exist: frozen and hashable, without arrays.

    Example:
      >>> isinstance(jp.sparse.block_diagonal(2), jp.sparse.Connectivity)
      True
    """

    def values_shape(self, shape: Shape) -> Shape:
        """Shape of the values of a kernel of `shape`; raises `ValueError` where it does not fit."""
        ...

    def draw(self, key: jax.Array, shape: Shape) -> Array | None:
        """An index for a kernel of `shape`; `None` where none is needed."""
        ...

    def index_of(self, mask: Bool[Array, "..."]) -> Array | None:
        """The index of a mask of kept weights; raises `ValueError` where it is not of this kind."""
        ...

    def dense(self, values: Array, index: Array | None, shape: Shape) -> Array:
        """The kernel, zeros where no weight exists. Inverse: `take`."""
        ...

    def take(self, kernel: Array, index: Array | None) -> Array:
        """The values of a kernel, whatever it holds elsewhere. Inverse: `dense`."""
        ...

    def table(self, shape: Shape) -> tuple[int, np.ndarray] | None:
        """Blocks of inputs, and which of them each tile of outputs reads; `None` of other kinds."""
        ...


@dataclass(frozen=True)
class FixedEntries:
    """Any `count` weights of one shape: of a mask, or drawn at random. An int32 place for each value.

    Products scatter the values into a dense kernel first: memory of parameters, gradients and optimizer
    is saved, time is not.

    Attributes:
      count: weights that exist.
      shape: of the kernel; places mean nothing in any other.

    Example:
      >>> mask = jnp.array([[True, False], [False, True]])
      >>> connectivity = jp.sparse.FixedEntries(2, (2, 2))
      >>> index = connectivity.index_of(mask)
      >>> connectivity.dense(jnp.array([5.0, 7.0]), index, (2, 2)).tolist()
      [[5.0, 0.0], [0.0, 7.0]]
    """

    count: int
    shape: Shape

    def values_shape(self, shape: Shape) -> Shape:
        """See `Connectivity`."""
        _checks.positive_int("count", self.count, least=0)
        if tuple(shape) != tuple(self.shape):
            raise ValueError(
                f"shape: these weights are of a kernel of {tuple(self.shape)}, got one of "
                f"{tuple(shape)}; use RandomEntries for weights of any shape"
            )
        size = int(np.prod(shape))
        if self.count > size or size > _MOST:
            raise ValueError(
                f"count: expected at most {min(size, _MOST)} of {shape}, got {self.count}"
            )
        return (self.count,)

    def draw(self, key: jax.Array, shape: Shape) -> Array:
        """See `Connectivity`."""
        self.values_shape(shape)
        return jnp.sort(jax.random.permutation(key, int(np.prod(shape)))[: self.count])

    def index_of(self, mask: Bool[Array, "..."]) -> Array:
        """See `Connectivity`."""
        kept = int(jnp.sum(mask))
        if kept != self.count:
            raise ValueError(f"mask: expected {self.count} kept weights, got {kept}")
        return jnp.asarray(np.flatnonzero(np.asarray(mask)), jnp.int32)

    def dense(self, values: Array, index: Array | None, shape: Shape) -> Array:
        """See `Connectivity`."""
        assert index is not None
        flat = jnp.zeros(int(np.prod(shape)), values.dtype)
        flat = flat.at[index].set(values, unique_indices=True, indices_are_sorted=True)
        return flat.reshape(shape)

    def take(self, kernel: Array, index: Array | None) -> Array:
        """See `Connectivity`."""
        assert index is not None
        return kernel.reshape(-1)[index]

    def table(self, shape: Shape) -> None:
        """None."""
        return


@dataclass(frozen=True)
class RandomEntries:
    """Weights drawn uniformly: exactly `round((1 - sparsity) * size)` of them; see `FixedEntries`.

    Attributes:
      sparsity: fraction that does not exist, in [0, 1]: of one layer, such as its entry of
        `jp.budgets.erk` on the shapes of dense kernels.

    Example:
      >>> budget = jp.budgets.erk({"a": jnp.zeros((64, 64)), "b": jnp.zeros((64, 4))}, 0.8)
      >>> jp.sparse.RandomEntries(budget["a"]).values_shape((64, 64))
      (614,)
    """

    sparsity: float

    def fixed(self, shape: Shape) -> FixedEntries:
        """As many entries of a kernel of `shape`."""
        _checks.fraction("sparsity", self.sparsity)
        count = round((1.0 - float(self.sparsity)) * int(np.prod(shape)))
        return FixedEntries(count, tuple(shape))

    def values_shape(self, shape: Shape) -> Shape:
        """See `Connectivity`."""
        return self.fixed(shape).values_shape(shape)

    def draw(self, key: jax.Array, shape: Shape) -> Array:
        """See `Connectivity`."""
        return self.fixed(shape).draw(key, shape)

    def index_of(self, mask: Bool[Array, "..."]) -> Array:
        """See `Connectivity`."""
        return self.fixed(mask.shape).index_of(mask)

    def dense(self, values: Array, index: Array | None, shape: Shape) -> Array:
        """See `Connectivity`."""
        return self.fixed(shape).dense(values, index, shape)

    def take(self, kernel: Array, index: Array | None) -> Array:
        """See `Connectivity`."""
        return self.fixed(kernel.shape).take(kernel, index)

    def table(self, shape: Shape) -> None:
        """None."""
        return


@dataclass(frozen=True)
class RandomNM:
    """`n` weights of every `m` neighbours along the inputs: a bit for each of the `m`, as `SparseArray`.

    Products make the kernel dense first: memory is saved, time is not.

    Attributes:
      n: weights that exist in each group.
      m: neighbours, at most 32; divides the inputs.

    Example:
      >>> connectivity = jp.sparse.RandomNM(2, 4)
      >>> index = connectivity.draw(jax.random.key(0), (8, 3))
      >>> kernel = connectivity.dense(jnp.ones((4, 3)), index, (8, 3))
      >>> kernel.reshape(2, 4, 3).sum(1).tolist()
      [[2.0, 2.0, 2.0], [2.0, 2.0, 2.0]]
    """

    n: int = 2
    m: int = 4

    def values_shape(self, shape: Shape) -> Shape:
        """See `Connectivity`."""
        _checks.positive_int("n", self.n)
        _checks.positive_int("m", self.m, least=2)
        if self.n > self.m or self.m > LARGEST:
            raise ValueError(f"n, m: expected n <= m <= {LARGEST}, got {self.n} and {self.m}")
        if shape[-2] % self.m:
            raise ValueError(
                f"m: groups of {self.m} do not divide {shape[-2]} inputs of {shape}; choose another m"
            )
        return (*shape[:-2], shape[-2] // self.m * self.n, shape[-1])

    def draw(self, key: jax.Array, shape: Shape) -> Array:
        """See `Connectivity`."""
        self.values_shape(shape)
        groups = (*shape[:-2], shape[-2] // self.m, self.m, shape[-1])
        order = jnp.argsort(jax.random.uniform(key, groups), axis=-2)
        mask = (jnp.argsort(order, axis=-2) < self.n).reshape(shape)
        return self._array(jnp.zeros(shape, jnp.bfloat16), mask).flags

    def index_of(self, mask: Bool[Array, "..."]) -> Array:
        """See `Connectivity`."""
        self.values_shape(mask.shape)
        groups = mask.reshape(*mask.shape[:-2], -1, self.m, mask.shape[-1])
        counts = np.asarray(groups.sum(-2))
        if (counts != self.n).any():
            raise ValueError(
                f"mask: expected {self.n} of every {self.m} along the inputs, got groups of "
                f"{counts.min()} to {counts.max()}; use pattern=jp.masks.NM({self.n}, {self.m})"
            )
        return self._array(jnp.zeros(mask.shape, jnp.bfloat16), mask).flags

    def dense(self, values: Array, index: Array | None, shape: Shape) -> Array:
        """See `Connectivity`."""
        return self.compact(values, index).materialize()

    def take(self, kernel: Array, index: Array | None) -> Array:
        """See `Connectivity`."""
        empty = jnp.zeros(self.values_shape(kernel.shape), jnp.bool_)
        mask = self.compact(~empty, index).spread(~empty)
        return self._array(kernel, mask).values

    def table(self, shape: Shape) -> None:
        """None."""
        return

    def compact(self, values: Array, index: Array | None) -> SparseArray:
        """The kernel as a leaf; of some of the outputs as well."""
        assert index is not None
        length = values.shape[-2] // self.n * self.m
        per = max(8 // width_of(self.m), 1)
        return SparseArray(values, index, self.n, self.m, -2, length, per, values.dtype)

    def _array(self, kernel: Array, mask: Array) -> SparseArray:
        return SparseArray.of(kernel, mask, self.n, self.m, -2)


def values_of(
    kernel: Float[Array, "..."],
    mask: Bool[Array, "..."],
    *,
    connectivity: Connectivity | None = None,
) -> tuple[Connectivity, Array, Array | None]:
    """The weights of a dense kernel that a mask keeps, held compactly.

    Args:
      kernel: (window…, inputs, outputs).
      mask: bools that broadcast against it, True = exists.
      connectivity: how they are held; by default `FixedEntries`, for any mask.

    Returns:
      The connectivity, its values and its index (`None` where none is needed).

    Raises:
      ValueError: a mask that is not of that kind, or does not broadcast.

    Example:
      >>> kernel = jnp.arange(1.0, 5.0).reshape(2, 2)
      >>> connectivity, values, index = jp.sparse.values_of(kernel, kernel > 2)
      >>> connectivity, values.tolist(), index.tolist()
      (FixedEntries(count=2, shape=(2, 2)), [3.0, 4.0], [2, 3])
    """
    _checks.broadcasts("mask", "kernel", jnp.shape(mask), kernel.shape)
    mask = jnp.broadcast_to(jnp.asarray(mask, bool), kernel.shape)
    connectivity = (
        FixedEntries(int(mask.sum()), mask.shape) if connectivity is None else connectivity
    )
    index = connectivity.index_of(mask)
    return connectivity, connectivity.take(kernel, index), index
