"""Compact leaves of pruned weights: what is left of every few neighbours, and where it was."""

from jaxprune.sparse._array import SparseArray
from jaxprune.sparse._tree import sparsify_tree

__all__ = ["SparseArray"]
