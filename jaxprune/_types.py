"""The types that travel between the stages.

Three kinds of tree share the treedef of the parameters that they speak of:

* `Params`: the model's parameters, any pytree of arrays;
* `Scores`: one float per weight, larger = more worth keeping; a leaf that nobody prunes scores the
  scalar `+inf`;
* `Masks`: one bool per weight, True = keep; a leaf that nobody prunes is the scalar `True`, and a
  whole-channel mask may keep size-1 axes, so that every mask *broadcasts* against its parameter.
"""

from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import jax

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

    Implementations are registered dataclasses whose children are arrays. Their static metadata
    counts axes from the end, so that mapping over leading axes (`scan`, `vmap`, `x[i]`) keeps it
    valid.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense array."""
        ...

    @property
    def dtype(self) -> Any:
        """Dtype of the dense array."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held now, metadata arrays (scales, codebooks) included."""
        ...

    def materialize(self) -> jax.Array:
        """The dense array, of `shape` and `dtype`."""
        ...


def is_compressed(x: Any) -> bool:
    """Whether `x` is a compressed leaf; the `is_leaf` predicate of this library's tree maps."""
    # asked of the type: an nnx.Variable hands every attribute of its value on
    return callable(getattr(type(x), "materialize", None))
