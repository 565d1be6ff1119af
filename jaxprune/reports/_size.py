"""Bytes and bits."""

from typing import Any

import jax
import numpy as np

from jaxprune._types import PyTree, is_compressed


def nbytes(tree: PyTree) -> int:
    """Bytes of all leaves of a tree, compressed leaves at their compressed size.

    Args:
      tree: any tree of arrays, compressed leaves or `jax.ShapeDtypeStruct`.

    Returns:
      Bytes; leaves without a size (None, strings) count 0, Python numbers as a NumPy scalar would.

    Example:
      >>> params = {"w": jnp.ones((64, 64))}
      >>> jp.nbytes(params), jp.nbytes(jp.quantize_tree(params, bits=4))
      (16384, 2304)
    """
    return sum(leaf_nbytes(leaf) for leaf in jax.tree.leaves(tree, is_leaf=is_compressed))


def leaf_nbytes(leaf: Any) -> int:
    """Bytes of one leaf."""
    if is_compressed(leaf):
        return leaf.nbytes
    if isinstance(leaf, (bool, int, float, complex)):
        return np.asarray(leaf).nbytes
    dtype, shape = getattr(leaf, "dtype", None), getattr(leaf, "shape", None)
    return 0 if dtype is None or shape is None else int(np.prod(shape)) * dtype.itemsize
