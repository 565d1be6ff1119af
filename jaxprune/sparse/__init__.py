"""Pruned weights without their zeros: compact leaves, and kernels of fixed connectivity.

`SparseArray` holds what is left of every few neighbours of a dense array, and where it was. A
`Connectivity` says which weights of a layer exist at all: `jp.linen.SparseDense` and its like train their
values alone, and have no others.
"""

from jaxprune.sparse._array import SparseArray
from jaxprune.sparse._block_sparse import Tiles, block_diagonal, butterfly
from jaxprune.sparse._connectivity import (
    Connectivity,
    FixedEntries,
    RandomEntries,
    RandomNM,
    values_of,
)
from jaxprune.sparse._products import (
    Initializer,
    initial_values,
    sparse_conv,
    sparse_dot,
    sparse_take,
)
from jaxprune.sparse._tree import sparsify_tree

__all__ = [
    "Connectivity",
    "FixedEntries",
    "RandomEntries",
    "RandomNM",
    "SparseArray",
    "Tiles",
    "block_diagonal",
    "butterfly",
    "initial_values",
    "sparse_conv",
    "sparse_dot",
    "sparse_take",
    "values_of",
]
