"""The types that travel between the stages.

Three kinds of tree share the treedef of the parameters that they speak of:

* `Params`: the model's parameters, any pytree of arrays;
* `Scores`: one float per weight, larger = more worth keeping; a leaf that nobody prunes scores the
  scalar `+inf`;
* `Masks`: one bool per weight, True = keep; a leaf that nobody prunes is the scalar `True`, and a
  whole-channel mask may keep size-1 axes, so that every mask *broadcasts* against its parameter.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar, Protocol, Self, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

PyTree: TypeAlias = Any
Params: TypeAlias = PyTree
Scores: TypeAlias = PyTree
Masks: TypeAlias = PyTree
Where: TypeAlias = Any  # None | regex | sequence of those | Callable[[str, Any], bool]

ScoreFn: TypeAlias = Callable[..., Scores]
"""`params -> scores` or `(params, grads) -> scores`."""

MaskFn: TypeAlias = Callable[[Params], Masks]
"""`params -> masks`."""

ScheduleFn: TypeAlias = Callable[[jax.Array], jax.Array]
"""`step -> sparsity`, both scalars; must be traceable."""


class CompressedArray(Protocol):
    """A pytree node that stands for one dense array and stores it in fewer bytes.

    Implementations are frozen dataclasses whose children are arrays (`_leaves.register`). Their
    static fields count axes from the end, so that mapping over leading axes (`scan`, `vmap`, `x[i]`)
    keeps them valid. They state `shape`, `dtype` and `materialize`, and take the rest from
    `CompressedLeaf`.

    Attributes:
      is_trained: held as the arrays that an optimizer moves, as large as the dense one.
      is_tie: stands for another leaf of its tree, and has no numbers of its own.
    """

    is_trained: ClassVar[bool]
    is_tie: ClassVar[bool]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        ...

    @property
    def dtype(self) -> Any:
        """Dtype of the dense array."""
        ...

    @property
    def ndim(self) -> int:
        """Number of axes of the dense array."""
        ...

    @property
    def size(self) -> int:
        """Number of entries of the dense array."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held now, metadata arrays (scales, codebooks) included."""
        ...

    def materialize(self) -> jax.Array:
        """The dense array, of `shape` and `dtype`."""
        ...

    def astype(self, dtype: Any) -> Any:
        """The same codes, standing for an array of another float type; or `TypeError`."""
        ...


class CompressedLeaf:
    """What all leaves share: see `CompressedArray`."""

    is_trained: ClassVar[bool] = False
    is_tie: ClassVar[bool] = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        """Number of axes of the dense array."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of entries of the dense array."""
        return int(np.prod(self.shape))

    @property
    def nbytes(self) -> int:
        """Bytes held now, metadata arrays (scales, codebooks) included."""
        return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(self))

    def astype(self, dtype: Any) -> Self:
        """The same codes, standing for an array of another float type.

        Raises:
          TypeError: not a float type.
        """
        check_float(dtype)
        changed: Any = self
        return replace(changed, dtype=np.dtype(dtype))

    def check(self) -> None:
        """Raises `ValueError` where the children do not fit the static fields, as in damaged files."""
        mine: Any = self
        found = jax.eval_shape(lambda leaf: leaf.materialize(), mine)
        if found.shape != mine.shape or found.dtype != mine.dtype:
            raise ValueError(f"its parts make {found.shape} of {found.dtype}, not {mine.shape}")


def check_float(dtype: Any) -> None:
    """Raises `TypeError` for what is no float type."""
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(f"dtype: expected a float type, got {dtype}; use materialize() first")


def is_compressed(x: Any) -> bool:
    """Whether `x` is a compressed leaf; the `is_leaf` predicate of this library's tree maps."""
    # asked of the type: an nnx.Variable hands every attribute of its value on
    return callable(getattr(type(x), "materialize", None))
